"""Writes all that the recipe needs of this world into a folder: one seed, the same bytes."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

from huatuo_jax.atomic import write_file
from huatuo_jax.clinic.dialogues import counts_of_kinds, dialogues, prompts
from huatuo_jax.clinic.exams import exam_questions, written_cases

HELD_OUT = "held_out_"
PROMPTS, CASES, EXAMS = "prompts.jsonl", "cases.jsonl", "exams.jsonl"


@dataclass(frozen=True, kw_only=True)
class ClinicSizes:
    """How many rows there are of each file.

    Attributes:
        dialogues: to train on, of all four kinds together.
        held_out_dialogues: of all four kinds together.
        prompts: to learn from by reinforcement.
        held_out_prompts: to evaluate on.
        cases: written cases, each of them a simulated patient.
        exams: exam questions.
    """

    dialogues: int = 1_800
    held_out_dialogues: int = 200
    prompts: int = 400
    held_out_prompts: int = 150
    cases: int = 200
    exams: int = 200

    def __post_init__(self) -> None:
        """Refuse less than none."""
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(
                    f"{field.name} is {getattr(self, field.name)}; it should be 0 or more"
                )


class _Record(Protocol):
    def to_json(self) -> dict[str, Any]: ...


def write_clinic(
    folder: str | os.PathLike[str], *, seed: int = 0, sizes: ClinicSizes | None = None
) -> dict[str, pathlib.Path]:
    """Writes the files of a clinic, JSON Lines in UTF-8.

    Args:
        folder: is made where it is not there.
        seed: another clinic for another one; the same bytes for the same one, everywhere.
        sizes: rows of each file.

    Returns:
        Name -> path: `KIND.jsonl` and `held_out_KIND.jsonl` for each of the four kinds,
        `prompts.jsonl`, `held_out_prompts.jsonl`, `cases.jsonl`, `exams.jsonl`.

    Raises:
        ValueError: a clinic has not so many different rows.
        OSError: it cannot be written.
    """
    target = pathlib.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, rows in clinic_records(seed=seed, sizes=sizes or ClinicSizes()).items():
        paths[name] = target / name
        lines = (json.dumps(row.to_json(), ensure_ascii=False) for row in rows)
        write_file(paths[name], "".join(f"{line}\n" for line in lines))
    return paths


def clinic_records(*, seed: int, sizes: ClinicSizes) -> Mapping[str, Iterable[_Record]]:
    """File name -> its records, made as they are read; see `write_clinic`."""
    found: dict[str, Iterable[_Record]] = {}
    for held_out, total in ((False, sizes.dialogues), (True, sizes.held_out_dialogues)):
        prefix = HELD_OUT if held_out else ""
        for kind, count in counts_of_kinds(total).items():
            name = f"{prefix}{kind}.jsonl"
            found[name] = dialogues(kind, count, seed=seed, held_out=held_out)
    found[PROMPTS] = prompts(sizes.prompts, seed=seed)
    found[HELD_OUT + PROMPTS] = prompts(sizes.held_out_prompts, seed=seed, held_out=True)
    found[CASES] = written_cases(sizes.cases, seed=seed)
    found[EXAMS] = exam_questions(sizes.exams, seed=seed)
    return found
