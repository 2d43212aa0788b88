"""Rewards without a reward model, on the clinic: what a verifier, a rubric and length each raise.

Four models answer prompts of the clinic: one that was fine-tuned on distilled dialogues, and those
that `configs/rewards.py` makes of it with each of its rewards. The prompts are of cases and in
sentences that no training text has, and other ones than those by which a run keeps its best policy.
Figures are means over prompts with 95 % intervals (bootstrap over prompts), and differences from
the fine-tuned model over the same prompts.

    python benchmarks/rewards.py --runs=runs/rewards

Fine-tuning and the three runs take about half an hour on two cores. Stopped, it goes on with the
same command.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import app, flags

import huatuo_jax as hj
from huatuo_jax.clinic.dialogues import prompts as clinic_prompts
from huatuo_jax.core.config import load_card
from huatuo_jax.core.statistics import Interval, mean_difference, mean_over_prompts
from huatuo_jax.data.readers import read_prompts
from huatuo_jax.data.records import Prompt, messages_to_json
from huatuo_jax.recipe import recipe
from huatuo_jax.reward_functions.clinic import clinic_rubric, right_diagnosis
from huatuo_jax.training.metrics import read_rows
from huatuo_jax.training.run_directory import FINISHED_FILE

_RUNS = flags.DEFINE_string("runs", "runs/rewards", "Folder of the three runs.")
_PROMPTS = flags.DEFINE_integer("prompts", 400, "To answer.", lower_bound=2)
_SAMPLES = flags.DEFINE_integer("samples", 2, "Answers of each model to a prompt.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/rewards.json", "File for the figures.")

FIRST = "diagnosis"
"""The run whose fine-tuned model and clinic the others share."""
OTHER_SEED = 1
TRAINED = (FIRST, "rubric", "length")
FIGURES = ("right diagnosis", "rubric", "tokens")

Values = dict[str, dict[str, list[float | None]]]


def main(_: list[str]) -> None:
    """Trains what is not there, answers, measures and writes the file."""
    runs = pathlib.Path(_RUNS.value)
    for name in TRAINED:
        card = f"rewards:{name}" if name == FIRST else f"rewards:{name},{runs / FIRST}"
        recipe.main(recipe.Flags(workdir=str(runs / name)), load_card(card))
    prompts = further_prompts(runs / FIRST / "clinic" / "held_out_prompts.jsonl")
    models = {"fine-tuned": runs / FIRST / "sft" / "model"}
    models |= {name: runs / name / "ppo" / "model" for name in TRAINED}
    measured = {name: measure(folder, prompts) for name, folder in models.items()}
    found = {
        "prompts": len(prompts),
        "samples": _SAMPLES.value,
        "models": {
            name: figures(values, measured["fine-tuned"]) for name, values in measured.items()
        },
        "runs": {name: of_run(runs / name) for name in TRAINED},
    }
    path = pathlib.Path(_OUTPUT.value)
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


def further_prompts(known: pathlib.Path) -> list[Prompt]:
    """Held-out prompts of the clinic that are not in its file."""
    seen = {one.messages for one in read_prompts(str(known))}
    drawn = clinic_prompts(_PROMPTS.value, seed=OTHER_SEED, held_out=True)
    return [one for one in drawn if one.messages not in seen]


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


def of_run(run: pathlib.Path) -> dict[str, Any]:
    """Which iteration's policy a run kept, of how many, and the KL of its last one."""
    rows = read_rows(run / "ppo" / "metrics.jsonl")
    result = json.loads((run / "ppo" / FINISHED_FILE).read_text(encoding="utf-8"))
    return {
        "kept_iteration": result["kept_iteration"],
        "iterations": rows[-1]["step"],
        "kl_per_sequence": result["ppo/kl_per_sequence"],
    }


if __name__ == "__main__":
    app.run(main)
