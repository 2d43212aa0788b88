"""Rewards without a reward model, on the clinic: what a verifier, a rubric and length each raise.

Four models answer the clinic's held-out prompts: one that was fine-tuned on distilled dialogues,
and those that `configs/rewards.py` makes of it with each of its rewards. Figures are means over
prompts with 95 % intervals (bootstrap over prompts), and differences from the fine-tuned model over
the same prompts.

    python launch/train.py --config=configs/rewards.py:diagnosis --workdir=runs/rewards/diagnosis
    python launch/train.py --config=configs/rewards.py:rubric,runs/rewards/diagnosis \
        --workdir=runs/rewards/rubric
    python launch/train.py --config=configs/rewards.py:length,runs/rewards/diagnosis \
        --workdir=runs/rewards/length
    python benchmarks/rewards.py --runs=runs/rewards
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

import huatuo_jax as hj
from huatuo_jax.core.statistics import Interval, mean_difference, mean_over_prompts
from huatuo_jax.data.readers import read_prompts
from huatuo_jax.data.records import Prompt, messages_to_json
from huatuo_jax.reward_functions.clinic import clinic_rubric, right_diagnosis
from huatuo_jax.training.metrics import read_rows

_RUNS = flags.DEFINE_string("runs", "runs/rewards", "Folder of the three runs.")
_SAMPLES = flags.DEFINE_integer("samples", 2, "Answers of each model to a prompt.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/rewards.json", "File for the figures.")

FIRST = "diagnosis"
"""The run whose fine-tuned model and clinic the others share."""
TRAINED = (FIRST, "rubric", "length")
FIGURES = ("right diagnosis", "rubric", "tokens")

Values = dict[str, dict[str, list[float | None]]]


def main(_: list[str]) -> None:
    """Answers, measures and writes the file."""
    runs = pathlib.Path(_RUNS.value)
    prompts = list(read_prompts(str(runs / FIRST / "clinic" / "held_out_prompts.jsonl")))
    models = {"fine-tuned": runs / FIRST / "sft" / "model"}
    models |= {name: runs / name / "ppo" / "model" for name in TRAINED}
    measured = {name: measure(folder, prompts) for name, folder in models.items()}
    found = {
        "prompts": len(prompts),
        "samples": _SAMPLES.value,
        "models": {
            name: figures(values, measured["fine-tuned"]) for name, values in measured.items()
        },
        "seconds": {name: seconds_of(runs / name) for name in TRAINED},
    }
    path = pathlib.Path(_OUTPUT.value)
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found))


def measure(folder: pathlib.Path, prompts: Sequence[Prompt]) -> Values:
    """The figures of each answer, by prompt."""
    model = hj.load_model(folder, max_length=356)
    rows = [{"id": one.id, "messages": messages_to_json(one.messages)} for one in prompts]
    groups = model.generate(
        rows, num_samples=_SAMPLES.value, max_new_tokens=100, temperature=0.7, seed=1
    )
    values: Values = {name: {} for name in FIGURES}
    for prompt, row, group in zip(prompts, rows, groups, strict=True):
        texts, dialogues = [one.text for one in group], [row["messages"]] * len(group)
        truth = [prompt.diagnosis] * len(group)
        right = right_diagnosis(dialogues, texts, diagnosis=truth)
        values["right diagnosis"][prompt.id] = right
        values["rubric"][prompt.id] = clinic_rubric(dialogues, texts, diagnosis=truth)
        values["tokens"][prompt.id] = [float(len(one.token_ids)) for one in group]
    return values


def figures(values: Values, others: Values) -> dict[str, Any]:
    """Means with their intervals, and differences from another model's."""
    return {
        name: {
            "mean": as_json(mean_over_prompts(values[name])),
            "difference": as_json(mean_difference(values[name], others[name])),
        }
        for name in FIGURES
    }


def as_json(interval: Interval | None) -> dict[str, Any]:
    """An interval that is there."""
    assert interval is not None
    return interval.to_json()


def seconds_of(run: pathlib.Path) -> float:
    """Of all iterations of a run."""
    rows = read_rows(run / "ppo" / "metrics.jsonl")
    return sum(row.get("throughput/step_s", 0.0) for row in rows)


def table(found: Mapping[str, Any]) -> str:
    """A line for each model, in Markdown."""
    heading = f"| rewarded for | {' | '.join(FIGURES)} |"
    lines = [heading, "|---" * (len(FIGURES) + 1) + "|"]
    for name, of_model in found["models"].items():
        cells = []
        for figure in FIGURES:
            mean, moved = of_model[figure]["mean"], of_model[figure]["difference"]
            digits = ".1f" if figure == "tokens" else ".3f"
            cell = f"{mean['value']:{digits}} ({mean['low']:{digits}} to {mean['high']:{digits}})"
            if name in TRAINED:
                cell += f", {moved['value']:+{digits}}"
                cell += f" ({moved['low']:+{digits}} to {moved['high']:+{digits}})"
            cells.append(cell)
        lines.append(
            f"| {name if name in TRAINED else 'nothing yet: fine-tuned'} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app.run(main)
