"""Reads cMedQA2, webMedQA and Huatuo-26M: patients' questions with doctors' reference answers.

Each set is read in the format that it is published in. A row that does not fit stops the reading
with its file and line, as a question that is dropped or a wrong answer taken for a reference would
change the figures. A blank answer is kept as an empty reference: `lexical` says what becomes of it.
"""

import os
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from huatuo_jax.core.files import as_path
from huatuo_jax.data.files import RowError, read_rows
from huatuo_jax.data.records import shown

Path = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class ReferenceQuestion:
    """A question and its reference answers.

    Attributes:
        id: of the question in its set, or its place in the file where the set has no ids.
        question: the patient's text.
        references: the answers of doctors, in the file's order; some sets have several.
        category: the department, where the set tells it.
    """

    id: str
    question: str
    references: tuple[str, ...]
    category: str | None = None


@dataclass
class _Question:
    """A question whose references are being collected."""

    place: str
    text: str
    category: str | None
    references: list[str]


def read_cmedqa2(folder: Path, *, split: str = "test") -> list[ReferenceQuestion]:
    """The questions of a split of cMedQA2 (Zhang et al. 2018), in the order of its candidates.

    Args:
        folder: holds `question.csv`, `answer.csv` and `{split}_candidates.txt`, unpacked.
        split: test, dev or train. The references are the candidates of label 1 (test, dev) or those
            named `pos_ans_id` (train).

    Raises:
        ValueError: a file is missing, has other columns, or an unreadable row; an id is
            used twice, or one that a candidate names is in no file.
    """
    questions = _by_id(_member(folder, "question.csv"), "question_id", ("content",))
    answers = _by_id(_member(folder, "answer.csv"), "ans_id", ("question_id", "content"))
    found: dict[str, list[str]] = {}
    candidates = _member(folder, f"{split}_candidates.txt")
    for place, question, answer in _right_candidates(candidates):
        for name, key, known in (("question", question, questions), ("answer", answer, answers)):
            if key not in known:
                raise ValueError(f"{place}: there is no {name} {shown(key)!r} in {name}.csv")
        owner = answers[answer][1]["question_id"]
        if owner != question:
            raise ValueError(
                f"{place}: answer {shown(answer)!r} is marked right for question"
                f" {shown(question)!r}, but answer.csv has it under {shown(owner)!r}"
            )
        listed = found.setdefault(question, [])
        if answer not in listed:  # The train split repeats an answer with each wrong one.
            listed.append(answer)
    if not found:
        raise ValueError(f"{candidates}: no candidate is marked as a right answer")
    return [
        ReferenceQuestion(
            id=key,
            question=_needed(questions[key][1]["content"], "content", questions[key][0]),
            references=tuple(answers[answer][1]["content"] for answer in listed),
        )
        for key, listed in found.items()
    ]


def read_webmedqa(path: Path) -> list[ReferenceQuestion]:
    """The questions of a file of webMedQA (He et al. 2019), as `medQA.test.txt`.

    Each line is department, label, question id, question and answer with tabs between them; the
    answers of label 1 are the references.

    Raises:
        ValueError: no such file, a line of another form, a question id with two texts, or a
            question without an answer of label 1.
    """
    found: dict[str, _Question] = {}
    for place, line in _rows(path):
        fields = line.split("\t") if isinstance(line, str) else []
        if len(fields) != 5 or fields[1].strip() not in ("0", "1"):
            raise ValueError(
                f"{place}: not department, label (0 or 1), question id, question and answer with"
                f" tabs between them: {shown(line)}"
            )
        department, label, key, text, answer = (field.strip() for field in fields)
        _needed(key, "question id", place)
        item = found.setdefault(
            key, _Question(place, _needed(text, "question", place), department or None, [])
        )
        if item.text != text:
            raise ValueError(
                f"{place}: question {shown(key)!r} has another text than at {item.place}"
            )
        if label == "1":
            item.references.append(answer)
    return _questions(found)


def read_huatuo26m(path: Path, *, split: str = "test") -> list[ReferenceQuestion]:
    """The questions of a file of Huatuo-26M (Li et al. 2023), or of its data set on the hub.

    Rows are `{"questions", "answers"}` as published, or `{"instruction", "output"}` as passed on;
    each holds a text or a list of texts (also within a list). The first question is asked, the
    others say the same in other words. Without ids, the id is the row's number from 1 on.

    Raises:
        ValueError: no such file, a row of another form, or an id that is used twice.
    """
    found: dict[str, _Question] = {}
    for number, (place, row) in enumerate(_rows(path, split=split), start=1):
        names = ("questions", "answers"), ("instruction", "output")
        known = [pair for pair in names if isinstance(row, dict) and set(pair) <= row.keys()]
        if not known:
            raise ValueError(f"{place}: neither questions and answers nor instruction and output")
        wordings, answers = (_texts(row[name], name, place) for name in known[0])
        key = str(row["id"]).strip() if row.get("id") not in (None, "") else str(number)
        if key in found:
            raise ValueError(
                f"{place}: the id {shown(key)!r} is already used at {found[key].place}"
            )
        question = _needed(wordings[0] if wordings else "", known[0][0], place)
        category = row["label"] if isinstance(row.get("label"), str) else None
        found[key] = _Question(place, question, category, answers)
    return _questions(found)


def _questions(found: dict[str, _Question]) -> list[ReferenceQuestion]:
    for key, item in found.items():
        if not item.references:
            raise ValueError(f"{item.place}: question {shown(key)!r} has no right answer")
    return [
        ReferenceQuestion(
            id=key,
            question=item.text,
            references=tuple(item.references),
            category=item.category,
        )
        for key, item in found.items()
    ]


def _rows(path: Path, *, split: str = "train") -> Iterator[tuple[str, Any]]:
    """Place and value of each row; an unreadable row stops all."""
    empty = True
    for row in read_rows(path, split=split):
        if isinstance(row, RowError):
            raise ValueError(str(row))
        empty = False
        yield f"{row.file}:{row.line}", row.value
    if empty:
        raise ValueError(f"{path}: there are no rows")


def _member(folder: Path, name: str) -> pathlib.Path:
    """A file of a set that is published as archives, one a file."""
    path = as_path(folder) / name
    if path.is_file():
        return path
    archive = path.with_suffix(".zip")
    hint = f"; unpack {archive.name} there" if archive.is_file() else ""
    raise ValueError(f"{folder}: there is no file {name}{hint}")


def _by_id(
    path: pathlib.Path, key: str, others: Sequence[str]
) -> dict[str, tuple[str, dict[str, str]]]:
    """The rows of a CSV file with their places, by id; a blank cell is an empty text."""
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for place, row in _rows(path):
        lacking = [name for name in (key, *others) if name not in row]
        if lacking:
            raise ValueError(f"{path}: there is no column {lacking[0]}; it has {', '.join(row)}")
        name = _needed(row[key], key, place)
        if name in found:
            raise ValueError(
                f"{place}: the {key} {shown(name)!r} is already used at {found[name][0]}"
            )
        found[name] = (place, {column: (row[column] or "").strip() for column in others})
    return found


def _right_candidates(path: pathlib.Path) -> Iterator[tuple[str, str, str]]:
    """Place, question id and answer id of each candidate that is marked right."""
    header: list[str] = []
    for place, line in _rows(path):
        fields = [field.strip() for field in line.split(",")] if isinstance(line, str) else []
        if not header:
            header = fields
            if header not in (_LABELLED, _PAIRED):
                raise ValueError(
                    f"{place}: the columns are {shown(line)}; they should be"
                    f" {','.join(_LABELLED)} or {','.join(_PAIRED)}"
                )
            continue
        row = dict(zip(header, fields, strict=False))
        if len(fields) != len(header) or row.get("label", "1") not in ("0", "1"):
            raise ValueError(f"{place}: not a row of {','.join(header)}: {shown(line)}")
        if header == _PAIRED:
            yield place, row["question_id"], row["pos_ans_id"]
        elif row["label"] == "1":
            yield place, row["question_id"], row["ans_id"]


_LABELLED = ["question_id", "ans_id", "cnt", "label"]
_PAIRED = ["question_id", "pos_ans_id", "neg_ans_id"]


def _texts(value: Any, name: str, place: str) -> list[str]:
    """The texts of a cell: one, a list of them, or lists within a list."""
    if isinstance(value, str):
        return [value.strip()]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item, name, place)]
    if value is None:
        return [""]
    raise ValueError(f"{place}: {name} is a {type(value).__name__}; it should be text, or a list")


def _needed(value: str | None, name: str, place: str) -> str:
    if value is None or not value.strip():
        raise ValueError(f"{place}: {name} is empty")
    return value.strip()
