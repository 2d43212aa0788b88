"""The questions of medical exams: their records, sets with all that was left out, and examples."""

import collections
import os
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Path = str | os.PathLike[str]
Kind = Literal["single", "multiple"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of an exam.

    Attributes:
        id: unique in its set.
        exam: the set by name, such as `cmb`.
        category: CMB's exam type; empty in sets without such a level.
        subject: the class that accuracy is reported by and that examples are drawn from.
        question: its text.
        options: text by label, none empty; labels are letters, or yes, no and maybe.
        answer: the labels of all right options.
        kind: whether several options may be right.
        context: what is read before the question, such as PubMedQA's abstract.
        explanation: why the answer is right, for examples with reasoning.
    """

    id: str
    exam: str
    question: str
    options: Mapping[str, str]
    answer: frozenset[str]
    kind: Kind
    category: str = ""
    subject: str = ""
    context: str = ""
    explanation: str = ""

    def __post_init__(self) -> None:
        """Validates the fields."""
        if not self.question.strip():
            raise ValueError("empty question")
        if len(self.options) < 2:
            raise ValueError("fewer than two options")
        if not all(text.strip() for text in self.options.values()):
            raise ValueError("an empty option")
        if not self.answer:
            raise ValueError("no answer")
        if not self.answer <= set(self.options):
            raise ValueError("answer key outside the options")
        if self.kind == "single" and len(self.answer) > 1:
            raise ValueError("single choice with several right answers")

    @property
    def text(self) -> str:
        """Context and question, without the options."""
        return f"{self.context}\n{self.question}" if self.context else self.question


class Exclusion(NamedTuple):
    """A row that is no question of the set.

    Attributes:
        file: the file.
        row: counted from 1, without a table's header.
        id: of the question; empty where the row has none.
        reason: in general words, which exclusions are counted by.
        detail: what the row has.
    """

    file: str
    row: int
    id: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class ExamSet:
    """The questions of a set, and all that was left out.

    Attributes:
        exam: the set by name.
        questions: in the order of the files.
        excluded: rows that are no questions.
        num_rows: rows of the files.
        num_empty_options: options without text, which were dropped from their questions.
    """

    exam: str
    questions: tuple[Question, ...]
    excluded: tuple[Exclusion, ...]
    num_rows: int
    num_empty_options: int

    def reasons(self) -> dict[str, int]:
        """The number of excluded rows by reason."""
        return dict(collections.Counter(one.reason for one in self.excluded))

    def describe(self) -> str:
        """The counts in one line."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons().items())
        return (
            f"{self.exam}: {len(self.questions)} questions of {self.num_rows} rows; excluded: "
            f"{reasons or 'none'}; empty options dropped: {self.num_empty_options}"
        )


class Unusable(Exception):
    """A row that is no question, with its reason and what it has."""

    def __init__(self, reason: str, detail: str = "") -> None:
        """Keeps both, as `Exclusion` has them."""
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


class SetBuilder:
    """Builds a set row by row."""

    def __init__(self, exam: str) -> None:
        """Begins without questions."""
        self.exam = exam
        self.questions: dict[str, Question] = {}
        self.excluded: list[Exclusion] = []
        self.num_rows = 0
        self.num_empty_options = 0

    def add(self, path: Path, row: int, name: str, build: Callable[[], Mapping[str, Any]]) -> None:
        """Adds a question, or the reason why the row is none."""
        self.num_rows += 1
        try:
            fields = dict(build())
            fields["options"], dropped = _without_empty(fields["options"], fields["answer"])
            question = _question(id=name, exam=self.exam, **fields)
            if name in self.questions:
                raise Unusable("duplicate id", question.question[:40])
        except Unusable as problem:
            self.exclude(path, row, name, problem.reason, problem.detail)
        else:
            self.questions[name] = question
            self.num_empty_options += dropped

    def exclude(self, path: Path, row: int, name: str, reason: str, detail: str = "") -> None:
        """Records a row that is no question."""
        self.excluded.append(Exclusion(os.fspath(path), row, name, reason, detail))

    def close(self, path: Path) -> ExamSet:
        """The set.

        Raises:
            ValueError: it has no question.
        """
        if not self.questions:
            first = self.excluded[0] if self.excluded else None
            said = f"row {first.row}: {first.reason} ({first.detail})" if first else "no rows"
            raise ValueError(f"{os.fspath(path)}: no question of {self.exam} can be used; {said}")
        return ExamSet(
            exam=self.exam,
            questions=tuple(self.questions.values()),
            excluded=tuple(self.excluded),
            num_rows=self.num_rows,
            num_empty_options=self.num_empty_options,
        )


def draw_examples(
    question: Question, pool: Iterable[Question], *, num_examples: int, seed: int | None
) -> list[Question]:
    """Few-shot examples of the question's own class, none of them the question itself.

    Args:
        question: the one that is asked.
        pool: of a dev or val split.
        num_examples: how many.
        seed: of the draw, which differs from question to question; None for the first ones in the
            pool's order, as CMMLU, C-Eval and MMLU have them.

    Raises:
        ValueError: the class has too few.
    """
    same_class = [
        other
        for other in pool
        if (other.category, other.subject) == (question.category, question.subject)
        and other.question.split() != question.question.split()
    ]
    if len(same_class) < num_examples:
        name = "/".join(filter(None, (question.category, question.subject))) or question.exam
        raise ValueError(
            f"num_examples: {num_examples}, but class {name} has {len(same_class)} examples "
            f"beside question {question.id}"
        )
    if seed is None:
        return same_class[:num_examples]
    return random.Random(f"{seed}:{question.id}").sample(same_class, num_examples)


def _question(**fields: Any) -> Question:
    try:
        return Question(**fields)
    except ValueError as problem:
        answer, options = "".join(sorted(fields["answer"])), ", ".join(fields["options"])
        raise Unusable(str(problem), f"answer {answer!r}, options {options}") from problem


def _without_empty(
    options: Mapping[str, str], answer: frozenset[str]
) -> tuple[dict[str, str], int]:
    kept = {label: text.strip() for label, text in options.items() if text.strip(" .。\t\n\u3000")}
    empty = answer & (set(options) - set(kept))
    if empty:
        raise Unusable("the key's option is empty", f"option {', '.join(sorted(empty))}")
    return kept, len(options) - len(kept)
