"""Reads the exam sets that a command line names, and the questions that examples are drawn from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

from huatuo_jax.core.files import as_path
from huatuo_jax.evaluation import exam_sets
from huatuo_jax.evaluation.exam_questions import ExamSet, Question


@dataclass(frozen=True, kw_only=True)
class ExampleFiles:
    """Questions that worked examples are drawn from, of a dev or val split.

    CMMLU, C-Eval and MMLU have them in the folder `dev` of the set.

    Attributes:
        cmb: such as CMB-val-merge.json.
        cmexam: CSV in the columns of the set.
        medqa_us: JSON lines in the form of the set.
        medqa_mainland: likewise.
        medqa_taiwan: likewise.
        medmcqa: likewise.
        pubmedqa: JSON in the form of ori_pqal.json.
        apollo: JSON lines in the form of the sets.
    """

    cmb: str | None = None
    cmexam: str | None = None
    medqa_us: str | None = None
    medqa_mainland: str | None = None
    medqa_taiwan: str | None = None
    medmcqa: str | None = None
    pubmedqa: str | None = None
    apollo: tuple[str, ...] = ()


_Folder = Literal["cmmlu", "ceval", "mmlu"]
_FOLDERS: Mapping[_Folder, str] = {"cmmlu": "test", "ceval": "val", "mmlu": "test"}
"""Sets that are folders, and the split with published answers."""

EXAMS = ("cmb", "cmexam", "medqa_us", "medqa_mainland", "medqa_taiwan", "medmcqa", "pubmedqa")
COMPLETIONS: Mapping[str, str] = {"cmb": "cmb_answers", "pubmedqa": "pubmedqa_test"}
"""Sets that a second file completes, and its field."""


def read_exam_sets(
    files: Mapping[str, str | None], apollo: tuple[str, ...] = ()
) -> dict[str, ExamSet]:
    """The sets that are given, by name.

    Args:
        files: path by field: those of `EXAMS`, `cmb_answers`, `pubmedqa_test`, and the folders
            `cmmlu`, `ceval` and `mmlu`.
        apollo: files of Apollo, each a set of its own.

    Raises:
        ValueError: a file is missing or in another layout, or two files of Apollo are of one set.
    """
    found = {}
    for name in EXAMS:
        path = files.get(name)
        if path is not None:
            extra = COMPLETIONS.get(name)
            found[name] = _read(name, path, files.get(extra) if extra else None)
    for name, split in _FOLDERS.items():
        path = files.get(name)
        if path is not None:
            found[name] = exam_sets.read_subject_folder(_existing(path), exam=name, split=split)
    for path in apollo:
        one = exam_sets.read_apollo(_existing(path))
        name = f"apollo_{one.exam}"
        if name in found:
            raise ValueError(f"{path}: another file of {one.exam} is given; give each set once")
        found[name] = one
    return found


def read_examples(
    sets: Mapping[str, ExamSet], files: Mapping[str, str | None], examples: ExampleFiles
) -> dict[str, list[Question]]:
    """The questions that examples of each set are drawn from, where there are any.

    Raises:
        ValueError: a file is missing or in another layout, or is of a set that is not given.
    """
    found: dict[str, list[Question]] = {}
    for field in fields(ExampleFiles):
        path = getattr(examples, field.name)
        if field.name != "apollo" and path is not None:
            found[field.name] = list(_read(field.name, path, None).questions)
    for name in _FOLDERS:
        folder = files.get(name)
        if folder is not None and (as_path(folder) / "dev").is_dir():
            examples_of = exam_sets.read_subject_folder(folder, exam=name, split="dev")
            found[name] = list(examples_of.questions)
    pool: dict[str, list[Question]] = {}
    for path in examples.apollo:
        one = exam_sets.read_apollo(_existing(path))
        pool.setdefault(f"apollo_{one.exam}", []).extend(one.questions)
    unknown = sorted(set(pool) - set(sets))
    if unknown:
        raise ValueError(
            f"examples.apollo has examples of {unknown[0].removeprefix('apollo_')}, and no file"
            " of files.apollo is of that set"
        )
    return found | pool


def _read(name: str, path: str, extra: str | None) -> ExamSet:
    path = _existing(path)
    extra = None if extra is None else _existing(extra)
    readers: Mapping[str, Callable[[], ExamSet]] = {
        "cmb": lambda: exam_sets.read_cmb(path, answers=extra),
        "cmexam": lambda: exam_sets.read_cmexam(path),
        "medqa_us": lambda: exam_sets.read_medqa(path, region="us"),
        "medqa_mainland": lambda: exam_sets.read_medqa(path, region="mainland"),
        "medqa_taiwan": lambda: exam_sets.read_medqa(path, region="taiwan"),
        "medmcqa": lambda: exam_sets.read_medmcqa(path),
        "pubmedqa": lambda: exam_sets.read_pubmedqa(path, ground_truth=extra),
    }
    return replace(readers[name](), exam=name)


def _existing(path: str) -> str:
    """The path.

    Raises:
        ValueError: nothing is there.
    """
    if not as_path(path).exists():
        raise ValueError(f"{path}: there is no such file or folder")
    return path
