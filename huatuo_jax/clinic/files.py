"""Writes all that the recipe needs of this world into a folder: one seed, the same bytes."""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

from huatuo_jax.atomic import write_file
from huatuo_jax.clinic.dialogues import counts_of_kinds, dialogues, prompts
from huatuo_jax.clinic.diseases import DISEASES
from huatuo_jax.clinic.exams import exam_questions, written_cases
from huatuo_jax.clinic.planted import DIFFERENCES, Difference, pairs_that_differ

HELD_OUT = "held_out_"
PROMPTS, CASES, EXAMS = "prompts.jsonl", "cases.jsonl", "exams.jsonl"
TOKENIZER = pathlib.Path(__file__).resolve().parent / "tokenizer"
"""The folder of the tokenizer that ships with the clinic, see `build_tokenizer`."""
SETTINGS_FILE = "clinic.json"
"""Beside the files: seed, sizes, a hash of the code that wrote them, and one of each file."""


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
        diseases: so many different ones the patients have, the most common of the table. Doctors
            consider all of the table, and exams ask about all.
        pairs: held-out pairs of answers that differ in truth alone, as many in manner, and in
            length.
    """

    dialogues: int = 1_800
    held_out_dialogues: int = 200
    prompts: int = 400
    held_out_prompts: int = 150
    cases: int = 200
    exams: int = 200
    diseases: int = len(DISEASES)
    pairs: int = 100

    def __post_init__(self) -> None:
        """Refuse less than none, and diseases that the table does not have."""
        if not 1 <= self.diseases <= len(DISEASES):
            raise ValueError(f"diseases is {self.diseases}; it should be 1 to {len(DISEASES)}")
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(
                    f"{field.name} is {getattr(self, field.name)}; it should be 0 or more"
                )


@dataclass(frozen=True, kw_only=True)
class ClinicConfig:
    """Which clinic.

    Attributes:
        seed: another clinic for another one.
        sizes: rows of each file.
    """

    seed: int = 0
    sizes: ClinicSizes = ClinicSizes()


class _Record(Protocol):
    def to_json(self) -> dict[str, Any]: ...


def write_clinic(
    folder: str | os.PathLike[str], *, seed: int = 0, sizes: ClinicSizes | None = None
) -> dict[str, pathlib.Path]:
    """Writes the files of a clinic, JSON Lines in UTF-8, and last `clinic.json`.

    Args:
        folder: is made where it is not there.
        seed: another clinic for another one; the same bytes for the same one, everywhere.
        sizes: rows of each file.

    Returns:
        Name -> path: `KIND.jsonl` and `held_out_KIND.jsonl` for each of the four kinds,
        `prompts.jsonl`, `held_out_prompts.jsonl`, `cases.jsonl`, `exams.jsonl`, and
        `pairs_DIFFERENCE.jsonl` for each of `planted.DIFFERENCES`.

    Raises:
        ValueError: a clinic has not so many different rows.
        OSError: it cannot be written.
    """
    target, cfg = pathlib.Path(folder), ClinicConfig(seed=seed, sizes=sizes or ClinicSizes())
    contents = _contents(cfg)
    _write(target, cfg, contents)
    return {name: target / name for name in contents}


def prepare_clinic(folder: str | os.PathLike[str], cfg: ClinicConfig, *, in_use: bool) -> None:
    """Writes a clinic, or finds in the folder the very files that would be written.

    Args:
        folder: of the clinic.
        cfg: which one.
        in_use: something was made from the files that stand there: others may not take their place.

    Raises:
        ValueError: other files stand there, and are in use. Or a clinic has not so many rows.
        OSError: it cannot be read or written.
    """
    target = pathlib.Path(folder)
    found = _settings_there(target)
    wanted = _settings(cfg)
    if found is not None and {name: found[name] for name in wanted} == wanted:
        if all(_hash_there(target / name) == digest for name, digest in found["files"].items()):
            return
    contents = _contents(cfg)
    hashes = {name: _hash(content) for name, content in contents.items()}
    if in_use and any(_hash_there(target / name) != hashes[name] for name in contents):
        raise ValueError(
            f"{target}: what was trained here was made from another clinic than seed={cfg.seed} of "
            f"these sizes and this version writes{_differences(found, wanted)}; undo the change, "
            "or choose another workdir"
        )
    _write(target, cfg, contents)


def clinic_records(*, seed: int, sizes: ClinicSizes) -> Mapping[str, Iterable[_Record]]:
    """File name -> its records, made as they are read; see `write_clinic`."""
    found: dict[str, Iterable[_Record]] = {}
    for held_out, total in ((False, sizes.dialogues), (True, sizes.held_out_dialogues)):
        prefix = HELD_OUT if held_out else ""
        for kind, count in counts_of_kinds(total).items():
            name = f"{prefix}{kind}.jsonl"
            found[name] = dialogues(
                kind, count, seed=seed, held_out=held_out, diseases=sizes.diseases
            )
    found[PROMPTS] = prompts(sizes.prompts, seed=seed, diseases=sizes.diseases)
    found[HELD_OUT + PROMPTS] = prompts(
        sizes.held_out_prompts, seed=seed, held_out=True, diseases=sizes.diseases
    )
    found[CASES] = written_cases(sizes.cases, seed=seed, diseases=sizes.diseases)
    found[EXAMS] = exam_questions(sizes.exams, seed=seed)
    for difference in DIFFERENCES:
        found[pairs_file(difference)] = pairs_that_differ(
            difference, sizes.pairs, seed=seed, held_out=True, diseases=sizes.diseases
        )
    return found


def pairs_file(difference: Difference) -> str:
    """The file of pairs that differ in this alone."""
    return f"pairs_{difference}.jsonl"


def _contents(cfg: ClinicConfig) -> dict[str, bytes]:
    return {
        name: "".join(f"{json.dumps(row.to_json(), ensure_ascii=False)}\n" for row in rows).encode()
        for name, rows in clinic_records(seed=cfg.seed, sizes=cfg.sizes).items()
    }


def _write(target: pathlib.Path, cfg: ClinicConfig, contents: Mapping[str, bytes]) -> None:
    settings = {
        **_settings(cfg),
        "files": {name: _hash(content) for name, content in contents.items()},
    }
    target.mkdir(parents=True, exist_ok=True)
    # They say that the files are whole: taken away first, put there last.
    (target / SETTINGS_FILE).unlink(missing_ok=True)
    for name, content in contents.items():
        write_file(target / name, content)
    text = json.dumps(settings, ensure_ascii=False, indent=2)
    write_file(target / SETTINGS_FILE, f"{text}\n")


def _settings(cfg: ClinicConfig) -> dict[str, Any]:
    """What the bytes follow from."""
    code = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        code.update(path.name.encode() + b"\0" + path.read_bytes())
    return {**asdict(cfg), "code": code.hexdigest()}


def _settings_there(folder: pathlib.Path) -> dict[str, Any] | None:
    """The settings of the files that stand in a folder; None where there are none that can be."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    whole = isinstance(found, dict) and {"seed", "sizes", "code", "files"} <= set(found)
    return found if whole and isinstance(found["files"], dict) else None


def _differences(found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> str:
    """The settings that are others now, in words."""
    if found is None:
        return ""
    names = [name for name in ("seed", "sizes") if found[name] != wanted[name]]
    told = [f"{name}: {found[name]} before, {wanted[name]} now" for name in names]
    return f" ({'; '.join(told)})" if told else ""


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _hash_there(path: pathlib.Path) -> str | None:
    return _hash(path.read_bytes()) if path.is_file() else None
