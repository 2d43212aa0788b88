"""The table of hardware, from what `launch/compile.py` found for each card.

Compile a card, and write the table into the pages anew:

    python launch/compile.py --config=configs/huatuogpt_7b.py --topology=v5e:8x8 \
        --output=benchmarks/results/compiled/huatuogpt_7b.v5e_8x8.json
    python benchmarks/tables.py

A file's name says its card, the argument that the card was given, if any, and the topology
(`qwen3_0_6b.v5e-8.v5e_2x4.json`). The first column is what `--config=` takes. Times are the sums of
the programs' rooflines: no run can be faster. An iteration of PPO takes its prompts, all tokens of
its answers at full length, scores, passes and steps; a pass without gradients counts as a third of
one with them.
"""

import json
import pathlib
from typing import Any

from absl import app

from huatuo_jax.core.config import load_card

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "compiled"
GIB = 2**30
STAGES = ("sft", "reward", "ppo")
HEADING = (
    "| config | devices | GiB a device: SFT, reward, PPO | of | SFT, tokens/s at most "
    "| SFT, utilisation at most | PPO, s an iteration at least |"
)

Figures = dict[str, Any]


def main(_: list[str]) -> None:
    """Prints the table."""
    print(table())


def table() -> str:
    """A line for each file of results, in Markdown."""
    rows = [row(path) for path in sorted(RESULTS.glob("*.json"))]
    return "\n".join([HEADING, "|---" * HEADING.count(" | ") + "|---|", *rows]) + "\n"


def row(path: pathlib.Path) -> str:
    """What one card needs on its devices."""
    found = json.loads(path.read_text(encoding="utf-8"))
    # CARD.TOPOLOGY.json, or CARD.ARGUMENT.TOPOLOGY.json.
    name, stages = ":".join(path.name.split(".")[:-2]), by_stage(found)
    slice_ = found["slice"]
    sft = stages["sft"]["sft/update"]["roofline"] if "sft" in stages else None
    peaks = ", ".join(
        f"{peak(stages[stage]) / GIB:.1f}" if stage in stages else "none" for stage in STAGES
    )
    seconds = iteration_seconds(name, stages["ppo"]) if "ppo" in stages else None
    return (
        " | ".join(
            [
                f"| `{name}`",
                f"{slice_['topology']} ({slice_['devices']})",
                peaks,
                f"{slice_['usable_memory_bytes_per_device'] / GIB:.1f}",
                "" if sft is None else f"{sft['tokens_per_s']:,.0f}",
                "" if sft is None else f"{sft['utilisation']:.0%}",
                "" if seconds is None else f"{seconds:.1f}",
            ]
        )
        + " |"
    )


def by_stage(found: Figures) -> dict[str, dict[str, Figures]]:
    """The programs by stage and name."""
    stages: dict[str, dict[str, Figures]] = {}
    for program in found["programs"]:
        stages.setdefault(program["program"].split("/")[0], {})[program["program"]] = program
    return stages


def peak(programs: dict[str, Figures]) -> int:
    """The most that a device holds at a time in a stage, in bytes.

    Raises:
        ValueError: a program does not fit: the card has no place in the table.
    """
    if wrong := [name for name, one in programs.items() if not one["fits"]]:
        raise ValueError(f"{', '.join(wrong)} do not fit")
    return max(one["memory_bytes_per_device"]["total"] for one in programs.values())


def iteration_seconds(name: str, programs: dict[str, Figures]) -> float:
    """Of PPO, each program as often as an iteration runs it."""
    ppo = load_config(name).ppo
    answers = ppo.rollout.num_prompts * ppo.rollout.answers_per_prompt
    longest = ppo.data.max_prompt_tokens + ppo.rollout.max_new_tokens
    prefilled = programs["ppo/prefill"]["tokens"] / longest
    runs = {
        "prefill": ppo.rollout.num_prompts / prefilled,
        "decode": answers * ppo.rollout.max_new_tokens / programs["ppo/decode"]["tokens"],
        "policy_pass": ppo.num_epochs * ppo.num_minibatches + 2 / 3,
        "value_pass": ppo.num_epochs * ppo.num_minibatches + 1 / 3,
        "policy_apply": ppo.num_epochs * ppo.num_minibatches,
        "value_apply": ppo.num_epochs * ppo.num_minibatches,
    }
    if "ppo/score" in programs:  # By a reward model.
        runs["score"] = answers * longest / programs["ppo/score"]["tokens"]
    return sum(
        number * programs[f"ppo/{one}"]["roofline"]["step_s"]
        for one, number in runs.items()
        if f"ppo/{one}" in programs  # There may be no critic.
    )


def load_config(name: str) -> Any:
    """The settings of a card, which may have an argument behind a colon."""
    card, colon, argument = name.partition(":")
    return load_card(f"{ROOT / 'configs' / card}.py{colon}{argument}")


if __name__ == "__main__":
    app.run(main)
