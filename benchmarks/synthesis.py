"""Training on what our own engine synthesizes, against training on its teacher's own rows.

The clinic writes rows of each kind. A small model is fine-tuned on them, a teacher for each kind,
and synthesizes 1,000 rows of the kind in this process, without a server. Students from fresh
weights are fine-tuned, some on these rows and as many on 1,000 of the teacher's own, and all are
measured on held-out rows of the teacher's data. In conversations the clinic's doctor asks for
findings until the case is clear, and only then names the disease, as the checks of distilled
conversations want it of every teacher.

Students of other 1,000 own rows differ by up to .07 nats, so one student a side says little of a
distance of .1. The figure is the mean over `NUM_STUDENTS` pairs: the two students of a pair have
the same fresh weights, the pairs have others; each student of own rows has other 1,000 of them,
those of synthesized rows have the same 1,000 in another order. The standard error is that of the
mean of the pairs' differences; another draw of synthesized rows is not in it. `holds` is judged on
the mean. This was written before any figure that is measured so.

    python benchmarks/synthesis.py --workdir=runs/synthesis

About three hours a seed on one core. Stopped, it goes on with the same command; `--kinds` and
`--seeds` do a part of it, and the figures of the parts that are done are kept.
"""

import dataclasses
import itertools
import json
import pathlib
import statistics
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

NUM_STUDENTS = 3
"""Pairs of students."""

OWN_ROWS = 16_000
"""Rows of a teacher. Of 8,000, as at first, a teacher said what the real doctor said at 44 % of
first attempts, where the clinic's own doctor, asked again, does at 64 %; what is never said so is
left out, and its lack is most of that student's distance. And a student of a teacher's
conversations can at best reach the teacher's loss. Both are the teacher's error, which more rows
make smaller: chosen once, before any figure of such a teacher."""

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
    rows = read_rows(own, unfinished="read")
    of_own: list[float] = []
    of_synthesized: list[float] = []
    for number in range(NUM_STUDENTS):
        part = folder / f"own_{number}.jsonl"
        write_rows(part, rows[number * NUM_ROWS : (number + 1) * NUM_ROWS])
        for path, losses in ((part, of_own), (synthesized, of_synthesized)):
            cfg = fine_tuning(kind, path, held_out, NUM_ROWS, seed * NUM_STUDENTS + number)
            student = run_sft(cfg, folder / f"student_{number}_of_{path.stem}")
            losses.append(student["eval/loss"])
    pairs = [theirs - owns for owns, theirs in zip(of_own, of_synthesized, strict=True)]
    behind = statistics.mean(pairs)
    return {
        "rows_of_the_teacher": OWN_ROWS,
        "epochs_of_the_teacher": TEACHER_EPOCHS,
        "teacher": round(teacher["eval/loss"], 4),
        "own": [round(loss, 4) for loss in of_own],
        "synthesized": [round(loss, 4) for loss in of_synthesized],
        "behind": round(behind, 4),
        "standard_error": round(statistics.stdev(pairs) / len(pairs) ** 0.5, 4),
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
