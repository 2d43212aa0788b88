"""Reads the medical exams CMB, CMExam, MedQA, MedMCQA, PubMedQA, CMMLU, C-Eval and MMLU.

Each reader takes a set in the files that its authors publish and gives its questions together with
every row that is not one, by file, row and reason. A file in another layout is refused.
"""

import collections
import csv
import io
import json
import os
import pathlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from huatuo_jax.core.files import as_path
from huatuo_jax.data.formats.dialogues import options_from_text
from huatuo_jax.data.formats.turns import RowProblem
from huatuo_jax.evaluation.exam_questions import ExamSet, Kind, Path, SetBuilder, Unusable

Row = Mapping[Any, Any]

CMMLU_SUBJECTS: Mapping[str, str] = {
    "anatomy": "解剖学",
    "clinical_knowledge": "临床知识",
    "college_medicine": "大学医学",
    "genetics": "遗传学",
    "nutrition": "营养学",
    "professional_medicine": "专业医学",
    "traditional_chinese_medicine": "中医中药",
    "virology": "病毒学",
}
CEVAL_SUBJECTS: Mapping[str, str] = {
    "basic_medicine": "基础医学",
    "clinical_medicine": "临床医学",
    "physician": "医师资格",
}
MMLU_SUBJECTS: Mapping[str, str] = {
    name: name.replace("_", " ")
    for name in (
        *("anatomy", "clinical_knowledge", "college_biology", "college_medicine"),
        *("medical_genetics", "professional_medicine"),
    )
}
"""The medical subjects by file name, with the names that prompts have."""

YES_NO_MAYBE: Mapping[str, str] = {"yes": "yes", "no": "no", "maybe": "maybe"}


def read_cmb(questions: Path, *, answers: Path | None = None) -> ExamSet:
    """CMB-Exam (arXiv 2308.08833): a JSON list (or lines) of questions with options by letter.

    Args:
        questions: such as `CMB-val-merge.json`, or `CMB-test-choice-question-merge.json`.
        answers: `CMB-test-choice-answer.json`, as the test questions come without their answers.

    Raises:
        ValueError: another layout, or no question with an answer.
    """
    needs = ("exam_type", "exam_class", "question", "question_type", "option")
    rows = _json_rows(questions, needs if answers else (*needs, "answer"), "CMB")
    keys = _cmb_answers(answers) if answers else None
    builder = SetBuilder("cmb")
    used = set()
    for number, row in rows:
        name = str(row.get("id", f"{pathlib.Path(questions).stem}:{number}"))
        used.add(name)
        builder.add(questions, number, name, partial(_cmb, row, name, keys))
    for name, (number, _) in (keys or {}).items():
        if name not in used:
            builder.exclude(answers or "", number, name, "answer without a question")
    return builder.close(questions)


def _cmb_answers(path: Path) -> dict[str, tuple[int, Row]]:
    found: dict[str, tuple[int, Row]] = {}
    for number, row in _json_rows(path, ("id", "answer"), "CMB's answers"):
        name = str(row.get("id"))
        if name in found and found[name][1].get("answer") != row.get("answer"):
            raise ValueError(
                f"{os.fspath(path)}: row {number}: id {name} has another answer in row "
                f"{found[name][0]}"
            )
        found.setdefault(name, (number, row))
    return found


def _cmb(row: Row, name: str, keys: Mapping[str, tuple[int, Row]] | None) -> dict[str, Any]:
    kinds: dict[str, Kind] = {"单项选择题": "single", "多项选择题": "multiple"}
    kind = _text(row, "question_type")
    if kind not in kinds:
        raise Unusable("unknown question type", kind)
    answer = row.get("answer")
    if keys is not None:
        if name not in keys:
            raise Unusable("no answer", f"id {name} is not in the file of answers")
        key = keys[name][1]
        answer = key["answer"]
        for field in ("exam_type", "exam_class", "question_type"):
            if key.get(field, row.get(field)) != row.get(field):
                detail = f"{field} {row.get(field)!r}, in the answers {key[field]!r}"
                raise Unusable("question and answer disagree", detail)
    return {
        "category": _text(row, "exam_type"),
        "subject": _text(row, "exam_class"),
        "question": _text(row, "question"),
        "options": _options(row, "option"),
        "answer": _letters(answer),
        "kind": kinds[kind],
        "explanation": _text(row, "explanation", optional=True),
    }


def read_cmexam(path: Path, *, subject: str = "Medical Discipline") -> ExamSet:
    """CMExam (arXiv 2306.03030): CSV with Question, Options (lines `A text`), Answer.

    Args:
        path: such as `test_with_annotations.csv`.
        subject: the column of the class; files without it have one class.

    Raises:
        ValueError: another layout, or no question with an answer.
    """
    builder = SetBuilder("cmexam")
    for number, row in _csv_rows(path, ("Question", "Options", "Answer"), "CMExam"):
        name = f"{pathlib.Path(path).stem}:{number}"
        builder.add(path, number, name, partial(_cmexam, row, subject))
    return builder.close(path)


def _cmexam(row: Row, subject: str) -> dict[str, Any]:
    answer = _letters(row.get("Answer"))
    return {
        "subject": _text(row, subject, optional=True),
        "question": _text(row, "Question"),
        "options": _options(row, "Options"),
        "answer": answer,
        "kind": "multiple" if len(answer) > 1 else "single",
        "explanation": _text(row, "Explanation", optional=True),
    }


def read_medqa(path: Path, *, region: Literal["us", "mainland", "taiwan"]) -> ExamSet:
    """MedQA (arXiv 2009.13081): JSON lines with options by letter, answer and answer_idx.

    Args:
        path: of one split, such as `questions/US/4_options/phrases_no_exclude_test.jsonl`.
        region: which exam it is.

    Raises:
        ValueError: another layout, or no question with an answer.
    """
    builder = SetBuilder(f"medqa_{region}")
    for number, row in _json_rows(path, ("question", "options", "answer_idx"), "MedQA"):
        name = f"{pathlib.Path(path).stem}:{number}"
        builder.add(path, number, name, partial(_medqa, row))
    return builder.close(path)


def _medqa(row: Row) -> dict[str, Any]:
    options, answer = _options(row, "options"), _letters(row.get("answer_idx"))
    spelled = row.get("answer")
    if len(answer) == 1 and spelled is not None and options.get(*answer) not in (None, spelled):
        detail = f"answer_idx {row['answer_idx']!r}, answer {str(spelled)[:60]!r}"
        raise Unusable("answer and answer_idx disagree", detail)
    return {
        "subject": _text(row, "meta_info", optional=True),
        "question": _text(row, "question"),
        "options": options,
        "answer": answer,
        "kind": "single",
        "explanation": _text(row, "rationale", optional=True),
    }


def read_medmcqa(path: Path, *, first_option: Literal[0, 1] | None = None) -> ExamSet:
    """MedMCQA (arXiv 2203.14371): JSON lines with opa to opd and cop, the number of the answer.

    The authors' files count the options from 1, the Hub's from 0 (with -1 in the test split, which
    has no answers). All questions have one right answer, whatever their `choice_type` says.

    Args:
        path: of one split, such as `dev.json`.
        first_option: what cop is for option A; None to tell by the values in the file.

    Raises:
        ValueError: another layout, no answers, or a file that does not tell where cop begins.
    """
    rows = _json_rows(path, ("id", "question", "opa", "opb", "opc", "opd"), "MedMCQA")
    if first_option is None:
        values = {str(row.get("cop")) for _, row in rows} & {"-1", "0", "4"}
        if values in ({"4"}, {"0"}, {"-1"}, {"-1", "0"}):
            first_option = 1 if values == {"4"} else 0
        elif any(row.get("cop") is not None for _, row in rows):
            said = "both 0 and 4" if "4" in values else "neither 0 nor 4"
            raise ValueError(
                f"{os.fspath(path)}: cop has {said}, which does not tell whether it counts the "
                "options from 0 or from 1; set first_option"
            )
    builder = SetBuilder("medmcqa")
    for number, row in rows:
        builder.add(path, number, str(row.get("id")), partial(_medmcqa, row, first_option or 0))
    return builder.close(path)


def _medmcqa(row: Row, first_option: int) -> dict[str, Any]:
    value = row.get("cop")
    if value is None or str(value) == "-1":
        raise Unusable("no answer", f"cop is {value!r}")
    try:
        place = int(value) - first_option
    except (TypeError, ValueError):
        place = -1
    if not 0 <= place < 4:
        raise Unusable("answer key outside the options", f"cop is {value!r}")
    return {
        "subject": _text(row, "subject_name", optional=True),
        "question": _text(row, "question"),
        "options": {letter: _text(row, f"op{letter.lower()}", optional=True) for letter in "ABCD"},
        "answer": frozenset("ABCD"[place]),
        "kind": "single",
        "explanation": _text(row, "exp", optional=True),
    }


def read_pubmedqa(path: Path, *, ground_truth: Path | None = None) -> ExamSet:
    """PubMedQA (arXiv 1909.06146): JSON of abstracts and questions by PMID; yes, no or maybe.

    Args:
        path: `ori_pqal.json`.
        ground_truth: `test_ground_truth.json`, whose questions are then the set; None for all.

    Raises:
        ValueError: another layout, or no question with an answer.
    """
    rows = _json_object(path)
    keys = None if ground_truth is None else _json_object(ground_truth)
    first = next(iter(rows.values()), None)
    if not isinstance(first, dict) or not {"QUESTION", "CONTEXTS"} <= set(first):
        raise _layout(path, "PubMedQA", ("QUESTION", "CONTEXTS"), first)
    builder = SetBuilder("pubmedqa")
    for number, (name, row) in enumerate(rows.items(), start=1):
        if keys is None or name in keys:
            key = keys[name] if keys else None
            builder.add(path, number, name, partial(_pubmedqa, row, key))
    for number, name in enumerate(keys or {}, start=1):
        if name not in rows:
            builder.exclude(ground_truth or "", number, name, "answer without a question")
    return builder.close(path)


def _pubmedqa(row: Any, key: object) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise Unusable("not an object", type(row).__name__)
    said = row.get("final_decision")
    if key is not None and said not in (None, key):
        raise Unusable("answers disagree", f"final_decision {said!r}, ground truth {key!r}")
    answer = said if key is None else key
    if answer is None:
        raise Unusable("no answer", "neither final_decision nor a ground truth")
    contexts = row.get("CONTEXTS")
    if not isinstance(contexts, list) or not all(isinstance(text, str) for text in contexts):
        raise Unusable("field is not text", "CONTEXTS is no list of texts")
    return {
        "question": _text(row, "QUESTION"),
        "context": "\n".join(contexts),
        "options": YES_NO_MAYBE,
        "answer": frozenset({str(answer)}),
        "kind": "single",
        "explanation": _text(row, "LONG_ANSWER", optional=True),
    }


class _Table(NamedTuple):
    """File and column names of a set that has one table for each subject."""

    subjects: Mapping[str, str]
    file: str
    id: str
    question: str
    answer: str
    explanation: str


_TABLES: Mapping[str, _Table] = {
    "cmmlu": _Table(CMMLU_SUBJECTS, "{split}/{subject}.csv", "", "Question", "Answer", ""),
    "ceval": _Table(
        *(CEVAL_SUBJECTS, "{split}/{subject}_{split}.csv", "id", "question", "answer"),
        "explanation",
    ),
    "mmlu": _Table(
        *(MMLU_SUBJECTS, "{split}/{subject}_{split}.csv", "-", "question", "answer", "")
    ),
}
_MMLU_COLUMNS = ("question", "A", "B", "C", "D", "answer")


def read_subject_folder(
    folder: Path,
    *,
    exam: Literal["cmmlu", "ceval", "mmlu"],
    split: str,
    subjects: Sequence[str] | None = None,
) -> ExamSet:
    """CMMLU (arXiv 2306.09212), C-Eval (arXiv 2305.08322) or MMLU (arXiv 2009.03300).

    Args:
        folder: with a folder for each split, as published.
        exam: which set it is.
        split: such as `dev`, `val`, `test`.
        subjects: file names without their ending; None for the medical ones.

    Raises:
        ValueError: a split or subject has no file, or one is in another layout.
    """
    table = _TABLES[exam]
    wanted = list(table.subjects if subjects is None else subjects)
    files = {
        subject: as_path(folder) / table.file.format(split=split, subject=subject)
        for subject in wanted
    }
    missing = [path for path in files.values() if not path.is_file()]
    if missing:
        raise ValueError(
            f"{os.fspath(folder)}: {len(missing)} of {len(files)} files of {exam}'s split "
            f"{split!r} are missing, such as {missing[0]}"
        )
    return read_subject_files({path: subject for subject, path in files.items()}, exam=exam)


def read_subject_files(
    files: Mapping[Path, str], *, exam: Literal["cmmlu", "ceval", "mmlu"]
) -> ExamSet:
    """As `read_subject_folder`, from files anywhere, each with its subject."""
    table = _TABLES[exam]
    header = _MMLU_COLUMNS if exam == "mmlu" else None
    needs = (table.question, *"ABCD", table.answer) if exam != "ceval" else ("question", *"ABCD")
    builder = SetBuilder(exam)
    last: Path = ""
    for last, subject in files.items():
        for number, row in _csv_rows(last, needs, exam.upper(), header=header):
            place = row.get(table.id) or number
            name = f"{subject}:{place}"
            builder.add(last, number, name, partial(_table_row, row, table, subject))
    return builder.close(last)


def _table_row(row: Row, table: _Table, subject: str) -> dict[str, Any]:
    return {
        "subject": subject,
        "question": _text(row, table.question),
        "options": {letter: _text(row, letter, optional=True) for letter in "ABCD"},
        "answer": _letters(row.get(table.answer)),
        "kind": "single",
        "explanation": _text(row, table.explanation, optional=True),
    }


def read_apollo(path: Path) -> ExamSet:
    """The exams as Apollo (arXiv 2403.03640) publishes them: question, option, anwer, source.

    Options are lines `(A) text.`, answers letters in brackets; `anwer` is misspelt in the files.

    Raises:
        ValueError: another layout, or no question with an answer.
    """
    rows = _json_rows(path, ("question", "option", "anwer"), "Apollo")
    builder = SetBuilder(str(rows[0][1].get("source", "apollo")))
    for number, row in rows:
        name = f"{pathlib.Path(path).stem}:{number}"
        builder.add(path, number, name, partial(_apollo, row))
    return builder.close(path)


def _apollo(row: Row) -> dict[str, Any]:
    answer = _letters(row.get("anwer"))
    return {
        "question": _text(row, "question"),
        "options": _options(row, "option"),
        "answer": answer,
        "kind": "multiple" if len(answer) > 1 else "single",
    }


def _text(row: Row, key: str, *, optional: bool = False) -> str:
    if None in row:  # As `csv.DictReader` has it.
        raise Unusable("too many cells", f"the last ones are {str(row[None])[:60]}")
    value = row.get(key)
    if value is None and optional:
        return ""
    if value is None:
        raise Unusable("missing field", key)
    if not isinstance(value, str):
        raise Unusable("field is not text", f"{key} is {type(value).__name__}")
    return value


def _options(row: Row, key: str) -> dict[str, str]:
    """Options by letter, or as lines such as `A text` and `(A) text`."""
    given = row.get(key)
    if isinstance(given, str):
        try:
            return options_from_text(given)
        except RowProblem as problem:
            raise Unusable("options are not readable", str(problem)) from problem
    if not isinstance(given, dict):
        raise Unusable("options are not readable", f"{key} is {type(given).__name__}")
    for label, text in given.items():
        if not re.fullmatch("[A-J]", label) or not isinstance(text, str | None):
            raise Unusable("options are not readable", f"option {label!r} is {str(text)[:40]!r}")
    return {label: text or "" for label, text in sorted(given.items())}


def _letters(value: object) -> frozenset[str]:
    """The labels of an answer such as B, (B), BCD or B, C; whether they are options is not seen."""
    if value is None or value == "" or (isinstance(value, float) and value != value):
        raise Unusable("no answer")
    if not isinstance(value, str):
        raise Unusable("field is not text", f"answer is {type(value).__name__}")
    letters = re.sub(r"[()\s,、;.]", "", unicodedata.normalize("NFKC", value))
    if not letters:
        raise Unusable("no answer", repr(value))
    if len(set(letters)) < len(letters):
        raise Unusable("answer key outside the options", f"answer {value[:40]!r}")
    return frozenset(letters)


def _json_rows(path: Path, needs: Sequence[str], name: str) -> list[tuple[int, Row]]:
    """The objects of a JSON list or of JSON lines, numbered from 1."""
    text = _read(path)
    try:
        if text.lstrip().startswith("["):
            values = list(enumerate(json.loads(text), start=1))
        else:
            lines = enumerate(text.split("\n"), start=1)
            values = [(number, _line(path, number, line)) for number, line in lines if line.strip()]
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: not JSON: {error}") from error
    for _, value in values:
        if not isinstance(value, dict):
            raise _layout(path, name, needs, value)
    if not any(set(needs) <= set(row) for _, row in values):
        raise _layout(path, name, needs, values[0][1] if values else None)
    return values


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}:{number}: not a line of JSON: {error}") from error


def _json_object(path: Path) -> dict[str, Any]:
    pairs: list[tuple[str, Any]] = []

    def unique(found: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs[:] = found  # The outermost object is the last one.
        return dict(found)

    try:
        value = json.loads(_read(path), object_pairs_hook=unique)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: not JSON: {error}") from error
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{os.fspath(path)}: should be an object with a value for each PMID")
    twice = [name for name, count in collections.Counter(k for k, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"{os.fspath(path)}: PMID {twice[0]} stands in it more than once")
    return value


def _csv_rows(
    path: Path, needs: Sequence[str], name: str, *, header: Sequence[str] | None = None
) -> list[tuple[int, Row]]:
    """The rows of a table, numbered from 1 without the header."""
    table = csv.DictReader(io.StringIO(_read(path), newline=""), header, strict=True)
    try:
        rows = list(enumerate(table, start=1))
    except csv.Error as error:
        raise ValueError(f"{os.fspath(path)}:{table.line_num}: not CSV: {error}") from error
    columns = table.fieldnames or ()
    if not set(needs) <= set(columns):
        raise _layout(path, name, needs, dict.fromkeys(columns))
    if not rows:
        raise ValueError(f"{os.fspath(path)}: has no rows")
    return list(rows)


def _read(path: Path) -> str:
    try:
        return as_path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{os.fspath(path)}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{os.fspath(path)}: not UTF-8 at byte {error.start}; save it as UTF-8"
        ) from error


def _layout(path: Path, name: str, needs: Sequence[str], found: object) -> ValueError:
    has = ", ".join(map(repr, found)) if isinstance(found, dict) else repr(found)[:60]
    return ValueError(
        f"{os.fspath(path)}: not the layout of {name}: its first row has {has[:200]}; needed are "
        f"{', '.join(needs)}"
    )
