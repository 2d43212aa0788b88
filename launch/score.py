"""Score every answer in a file with a reward model.

python launch/score.py --model=DIR --input=FILE.jsonl --output=FILE.jsonl
"""

from absl import flags

from huatuo_jax import command_line, multi_host
from huatuo_jax.reward.score_file import ScoreConfig, score_file

_FLAGS = (
    flags.DEFINE_string("model", None, "Reward model: a folder of either form, or a hub id."),
    flags.DEFINE_string("input", None, "Dialogues, comparisons, or several answers a prompt."),
    flags.DEFINE_string("encoding", None, "Of the input's text; default: told by evidence."),
    flags.DEFINE_string("output", None, "JSON Lines to write: each record with its scores."),
    flags.DEFINE_string("template", "huatuogpt", "Chat template; `tokenizer` for its own."),
    flags.DEFINE_enum(
        "truncation",
        "drop_oldest_turns",
        ["drop_oldest_turns", "drop_row"],
        "What becomes of a dialogue that is too long; a dropped one has null for its score.",
    ),
    flags.DEFINE_integer("max_length", None, "Tokens of a dialogue; default: as the model has."),
    flags.DEFINE_integer("rows_at_once", 8, "Rows that go through the model together."),
    flags.DEFINE_integer("row_length", None, "Tokens of a row; default: the longest dialogue."),
    flags.DEFINE_enum("compute_dtype", None, ["float32", "bfloat16"], "Default: by platform."),
    flags.DEFINE_integer("data", 1, "Mesh axis."),
    flags.DEFINE_integer("fsdp", -1, "Mesh axis; -1 takes the devices that are left."),
    flags.DEFINE_integer("tensor", 1, "Mesh axis."),
)
flags.mark_flags_as_required(["model", "input", "output"])


@multi_host.joined()
def main() -> None:
    """Score, and say how it went."""
    cfg = ScoreConfig(**{flag.name: flag.value for flag in _FLAGS})
    scored = score_file(cfg)
    if multi_host.is_first():
        print(scored)
        print(f"written: {cfg.output}")


if __name__ == "__main__":
    command_line.run(main)
