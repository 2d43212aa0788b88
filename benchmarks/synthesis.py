"""Training on what our own engine synthesizes, against training on its teacher's own rows.

The clinic writes rows of each kind. A small model is fine-tuned on them, a teacher for each kind,
and synthesizes 1,000 rows of the kind in this process, without a server. Two students from the same
fresh weights are fine-tuned, one on these rows and one on as many of the teacher's own, and both
are measured on held-out rows of the teacher's data. In conversations the clinic's doctor asks for
findings until the case is clear, and only then names the disease, as the checks of distilled
conversations want it of every teacher.

    python benchmarks/synthesis.py --workdir=runs/synthesis

About an hour on two cores. Stopped, it goes on with the same command; `--kinds` and `--seeds` do a
part of it, and the figures of the parts that are done are kept.
"""

import dataclasses
import itertools
import json
import pathlib
from typing import Any

from absl import app, flags

from huatuo_jax.clinic.dialogues import dialogues
from huatuo_jax.core.config import checked, load_card
from huatuo_jax.core.files import make_folder, read_rows, write_file, write_rows
from huatuo_jax.data.mixture import DuplicatesConfig
from huatuo_jax.data.records import KINDS, Kind
from huatuo_jax.generation.samples import SamplesConfig
from huatuo_jax.recipe.config import RlaifConfig
from huatuo_jax.sft import SftConfig, run_sft
from huatuo_jax.synthesis.run import Synthesis, SynthesisSettings
from huatuo_jax.training.dialogue_data import SourceConfig
from huatuo_jax.training.loop import LoopConfig

CARD = pathlib.Path(__file__).resolve().parent.parent / "configs" / "rlaif.py"

DISTANCE = 0.1
"""Nats a token by which the student of synthesized rows may be behind: its perplexity is then at
most 10.5 % above that of the student of the teacher's own rows. Stated before any run."""

NUM_ROWS = 1_000
"""Rows of each student."""

OWN_ROWS = 8_000
"""Rows of a teacher; its student gets the first `NUM_ROWS` of them."""

TEACHER_EPOCHS = 2
"""The card's students go over theirs three times; more rows teach more than a third time."""

HELD_OUT_ROWS = 200

SOURCE_ROWS = 8_000
"""Real dialogues to answer anew, at most: a row is kept only if it says what the doctor said."""

ATTEMPTS = 20
"""Answers to a real dialogue until one says what the doctor said, and conversations until one finds
the disease. Of few attempts what is easily met is kept, such as questions without a drug."""

TEMPERATURE = 1.0
"""The teacher's own distribution: rows that are drawn colder are more alike than its own."""

_OTHER_CASES = 1_000
"""Added to a seed for cases that the teacher has not seen."""

_ANSWER_TOKENS = 200
_SLOTS = 128

_WORKDIR = flags.DEFINE_string("workdir", "runs/synthesis", "The folder of all runs.")
_KINDS = flags.DEFINE_list("kinds", list(KINDS), "Kinds of data.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "Of cases, weights and synthesis.")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/synthesis.json", "File of the figures.")


def main() -> None:
    """Trains, synthesizes and compares, a kind and a seed at a time."""
    output = pathlib.Path(_OUTPUT.value)
    for seed, kind in itertools.product(map(int, _SEEDS.value), _KINDS.value):
        found = compared(kind, seed, pathlib.Path(_WORKDIR.value) / f"seed_{seed}" / kind)
        print(f"{kind}, seed {seed}: {json.dumps(found)}", flush=True)
        kinds = json.loads(output.read_text(encoding="utf-8"))["kinds"] if output.is_file() else {}
        kinds.setdefault(kind, {})[str(seed)] = found
        figures = {
            "distance": DISTANCE,
            "rows": NUM_ROWS,
            "held_out_rows": HELD_OUT_ROWS,
            "temperature": TEMPERATURE,
            "kinds": {name: dict(sorted(kinds[name].items())) for name in KINDS if name in kinds},
        }
        make_folder(output.parent)
        write_file(output, json.dumps(figures, indent=2) + "\n")


def compared(kind: Kind, seed: int, folder: pathlib.Path) -> dict[str, Any]:
    """Returns held-out losses in nats a token of teacher and students, and what was left out."""
    own, held_out = folder / "own.jsonl", folder / "held_out.jsonl"
    if not held_out.is_file():
        rows = own_rows(kind, OWN_ROWS + HELD_OUT_ROWS, seed, folder / "clinic.jsonl")
        write_rows(own, rows[:OWN_ROWS])
        write_rows(held_out, rows[OWN_ROWS:])
    cfg = fine_tuning(kind, own, held_out, OWN_ROWS, seed)
    cfg = dataclasses.replace(cfg, num_epochs=TEACHER_EPOCHS)
    teacher = run_sft(cfg, folder / "teacher")
    synthesized = folder / "synthesized.jsonl"
    report = synthesize(kind, seed, folder / "teacher" / "sft" / "model", synthesized)
    losses = {"teacher": teacher["eval/loss"]}
    for name, path in (("own", own), ("synthesized", synthesized)):
        cfg = fine_tuning(kind, path, held_out, NUM_ROWS, seed)
        losses[name] = run_sft(cfg, folder / f"student_of_{name}")["eval/loss"]
    behind = losses["synthesized"] - losses["own"]
    return {
        "rows_of_the_teacher": OWN_ROWS,
        "epochs_of_the_teacher": TEACHER_EPOCHS,
        **{name: round(loss, 4) for name, loss in losses.items()},
        "behind": round(behind, 4),
        "holds": behind <= DISTANCE,
        "attempts": ATTEMPTS,
        "requests": report["requests"],
        "yield": round(report["yield"], 3),
        "left_out": {reason: one["count"] for reason, one in report["rejections"].items()},
    }


def own_rows(kind: Kind, count: int, seed: int, path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns rows of a kind that the clinic's doctors write, no model among them."""
    if kind.startswith("real"):
        return [one.to_json() for one in dialogues(kind, count, seed=seed)]
    settings = SynthesisSettings(num_rows=count, batch_size=200, seed=seed, near_duplicate=1.0)
    Synthesis(kind, settings, path).run()
    return read_rows(path, unfinished="read")[:count]


def synthesize(kind: Kind, seed: int, teacher: pathlib.Path, path: pathlib.Path) -> dict[str, Any]:
    """Makes rows of a kind by a saved teacher, and returns the figures of the report."""
    cases = seed + _OTHER_CASES
    source = path.with_name("source.jsonl")
    if kind.startswith("real") and not source.is_file():
        write_rows(source, (one.to_json() for one in dialogues(kind, SOURCE_ROWS, seed=cases)))
    settings = SynthesisSettings(
        teacher=str(teacher),
        asks="questions",
        num_rows=NUM_ROWS,
        batch_size=2 * _SLOTS,
        per_request=1,
        attempts=ATTEMPTS,
        seed=cases,
        source=(str(source),) if kind.startswith("real") else (),
        near_duplicate=1.0,  # In so small a world most questions are near one another.
        temperature=TEMPERATURE,
        max_new_tokens=_ANSWER_TOKENS,
        slots=_SLOTS,
    )
    report = Synthesis(kind, settings, path).run()
    if report["rows"] < NUM_ROWS:
        raise ValueError(f"{path}: {report['rows']} rows are fewer than {NUM_ROWS}")
    return report


def fine_tuning(
    kind: Kind, rows: pathlib.Path, held_out: pathlib.Path, count: int, seed: int
) -> SftConfig:
    """Returns the card's fine-tuning, from fresh weights on the first rows of a file."""
    card = checked(load_card(str(CARD)), RlaifConfig, path="config").sft
    taught = SourceConfig(
        name="taught", paths=(str(rows),), kind=kind, limit=count, held_out_by="never"
    )
    measured = SourceConfig(
        name="measured", paths=(str(held_out),), kind=kind, held_out_by="always"
    )
    return dataclasses.replace(
        card,
        clinic=None,
        data=dataclasses.replace(
            card.data,
            sources=(taught, measured),
            duplicates=DuplicatesConfig(remove=False),  # Each student has as many rows.
        ),
        seed=seed,
        samples=SamplesConfig(num_prompts=0),
        loop=LoopConfig(evaluate_every=1_000, checkpoint_every=1_000, log_every=500),
    )


if __name__ == "__main__":
    app.run(lambda _: main())
