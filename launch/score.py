"""Score every answer in a file with a reward model.

python launch/score.py --model=DIR --input=FILE.jsonl --output=FILE.jsonl
"""

from absl import flags

from huatuo_jax import command_line, multi_host
from huatuo_jax.reward.score_file import ScoreConfig, score_file
from huatuo_jax.rl.rewards import AnswerScoreConfig

_CUT = ("drop_oldest_turns", ["drop_oldest_turns", "drop_row"])
_FLAGS = (
    flags.DEFINE_string("model", None, "Reward model: a folder of either form, or a hub id."),
    flags.DEFINE_string("input", None, "Dialogues, comparisons, or several answers a prompt."),
    flags.DEFINE_string("encoding", None, "Of the input's text; default: told by evidence."),
    flags.DEFINE_string("output", None, "JSON Lines to write: each record with its scores."),
    flags.DEFINE_string("template", "huatuogpt", "Chat template; `tokenizer` for its own."),
    flags.DEFINE_string("default_system", None, "System text; default: the template's own."),
    flags.DEFINE_string("template_date", None, "Date that a tokenizer's own template prints."),
    flags.DEFINE_list("ignore_config_fields", [], "Fields of config.json that do not matter."),
    flags.DEFINE_enum("truncation", *_CUT, "Of a long dialogue; a dropped one has null as score."),
    flags.DEFINE_integer("max_length", None, "Tokens of a dialogue; default: as the model has."),
    flags.DEFINE_float("max_left_out_share", 0.1, "Of the answers, those that may not fit."),
    flags.DEFINE_integer("rows_at_once", 8, "Rows that go through the model together."),
    flags.DEFINE_integer("row_length", None, "Tokens of a row; default: the longest dialogue."),
    flags.DEFINE_enum("compute_dtype", None, ["float32", "bfloat16"], "Default: by platform."),
    flags.DEFINE_integer("data", 1, "Mesh axis."),
    flags.DEFINE_integer("fsdp", -1, "Mesh axis; -1 takes the devices that are left."),
    flags.DEFINE_integer("tensor", 1, "Mesh axis."),
)
_RULE = (
    flags.DEFINE_enum(
        "on_truncation",
        "subtract",
        ["subtract", "replace", "keep"],
        "What an answer that was cut off counts in `reward`, as in PPO.",
    ),
    flags.DEFINE_float("penalty", None, "Of such an answer; default: 1, and none with `keep`."),
    flags.DEFINE_float("clip", None, "Bound of scores in `reward`; default: none."),
)
flags.mark_flags_as_required(["model", "input", "output"])


@multi_host.joined()
def main() -> None:
    """Score, and say how it went."""
    rule = {flag.name: flag.value for flag in _RULE}
    if rule["penalty"] is None and rule["on_truncation"] != "keep":
        rule["penalty"] = 1.0
    cfg = ScoreConfig(**{f.name: f.value for f in _FLAGS}, rule=AnswerScoreConfig(**rule))
    scored = score_file(cfg)
    if multi_host.is_first():
        print(scored)
        print(f"written: {cfg.output}")


if __name__ == "__main__":
    command_line.run(main)
