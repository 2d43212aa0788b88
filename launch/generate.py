"""Answer a file of prompts in bulk; run again after a kill, it goes on.

python launch/generate.py --model=DIR --prompts=FILE.jsonl --output=FILE.jsonl --num_samples=4
"""

from absl import flags

from huatuo_jax import command_line, multi_host, sharding
from huatuo_jax.generation.bulk import BulkConfig, run_bulk
from huatuo_jax.generation.requests import SamplingConfig
from huatuo_jax.progress import tell

_TASK = (
    flags.DEFINE_string("model", None, "Model folder of either form, or a hub id."),
    flags.DEFINE_string("prompts", None, "File of prompts."),
    flags.DEFINE_string("encoding", None, "Of the prompts' text; default: told by evidence."),
    flags.DEFINE_string("output", None, "Answers file to make, or to go on with."),
    flags.DEFINE_string("template", "huatuogpt", "Chat template; `tokenizer` for its own."),
    flags.DEFINE_string("default_system", None, "System text; default: the template's own."),
    flags.DEFINE_string("template_date", None, "Date that a tokenizer's own template prints."),
    flags.DEFINE_list("ignore_config_fields", [], "Fields of config.json that do not matter."),
    flags.DEFINE_integer("num_samples", 1, "Answers to each prompt."),
    flags.DEFINE_integer("seed", 0, "With a prompt's id it decides that prompt's answers."),
    flags.DEFINE_integer("chunk_size", 256, "Prompts whose answers are written together."),
    flags.DEFINE_bool("drop_oldest_turns", False, "Shorten dialogues that do not fit."),
    flags.DEFINE_float("max_left_out_share", 0.1, "Of the prompts, those that may not fit."),
    flags.DEFINE_integer("max_length", None, "Tokens of prompt and answer; default: as needed."),
    flags.DEFINE_integer("slots", None, "Answers decoded at once; default: up to 64."),
    flags.DEFINE_enum("compute_dtype", None, ["float32", "bfloat16"], "Default: by platform."),
)
_MESH = [
    flags.DEFINE_integer(axis, size, "Mesh axis; -1 takes the devices that are left.")
    for axis, size in vars(sharding.MeshConfig()).items()
]
_SAMPLING = (
    flags.DEFINE_integer("max_new_tokens", 512, "Tokens of an answer at most."),
    flags.DEFINE_integer("min_new_tokens", 0, "Tokens of an answer at least."),
    flags.DEFINE_float("temperature", 1.0, "0 takes the best token."),
    flags.DEFINE_integer("top_k", 0, "Keep the k best tokens; 0 for all."),
    flags.DEFINE_float("top_p", 1.0, "Keep the best tokens of this probability; 1 for all."),
    flags.DEFINE_float("min_p", 0.0, "Keep tokens of this share of the best; 0 for all."),
    flags.DEFINE_float("repetition_penalty", 1.0, "1 for none."),
)
_STOP = flags.DEFINE_multi_string("stop_strings", [], "Text that ends an answer; repeatable.")
flags.mark_flags_as_required(["model", "prompts", "output"])


@multi_host.joined()
def main() -> None:
    """Generate, and say how it went."""
    task, sampling, mesh = ({f.name: f.value for f in group} for group in (_TASK, _SAMPLING, _MESH))
    how = SamplingConfig(**sampling, stop_strings=tuple(_STOP.value))
    cfg = BulkConfig(**task, sampling=how, mesh=sharding.MeshConfig(**mesh))
    report = run_bulk(cfg, lambda progress: tell(str(progress)))
    if multi_host.is_first():
        print(report or "nothing left to do", f"written: {cfg.output}", sep="\n")


if __name__ == "__main__":
    command_line.run(main)
