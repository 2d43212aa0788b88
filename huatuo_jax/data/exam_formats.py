"""Row formats of medical cases and of multiple-choice questions."""

import re
from collections.abc import Mapping
from typing import Any

from huatuo_jax.data.formats import Converted, Format, Terms, identity, only_key
from huatuo_jax.data.records import Case, ExamQuestion
from huatuo_jax.data.turns import JsonRow, RowProblem, checked_text, has, present, structured

_DEPARTMENT_KEYS = ("department", "Department")
_QUESTION_KEYS = ("question", "Question")
_OPTIONS_KEYS = ("options", "option", "Options")
_ANSWER_KEYS = ("answer_idx", "answer", "Answer")
_EXPLANATION_KEYS = ("explanation", "Explanation", "rationale")
_LETTERS = "ABCDEFGHIJ"
# `A text`, `A. text`, `A、text`, `(A) text`, each on a line of its own.
_LETTERED_LINE = re.compile(r"[(（]?([A-J])(?:[)）.、:：]\s*|\s+)(.*)", re.DOTALL)


def _from_case(row: Any, terms: Terms) -> Converted:
    limit = terms.max_turn_chars
    department = [key for key in present(row, _DEPARTMENT_KEYS) if str(row[key]).strip()]
    medical_case = checked_text(row, "medical_case", max_turn_chars=limit)
    diagnosis = checked_text(row, "doctor_diagnosis", max_turn_chars=limit)
    used = ("medical_case", "doctor_diagnosis", *department[:1])
    row_id, source, extra = identity(row, terms, used=used, content=[medical_case, diagnosis])
    case = Case(
        id=row_id,
        medical_case=medical_case,
        doctor_diagnosis=diagnosis,
        department=str(row[department[0]]) if department else None,
        source=source,
        extra=extra,
    )
    return Converted((case,))


CASE_FORMATS: tuple[Format, ...] = (
    Format(
        "case",
        "case",
        "medical_case, doctor_diagnosis; department may be there",
        lambda row: has(row, "medical_case", "doctor_diagnosis"),
        _from_case,
    ),
)


def _is_exam(row: Any) -> bool:
    has_options = bool(present(row, _OPTIONS_KEYS)) or has(row, "A", "B")
    return has_options and bool(present(row, _QUESTION_KEYS)) and bool(present(row, _ANSWER_KEYS))


def _from_exam(row: Any, terms: Terms) -> Converted:
    question_key = only_key(row, _QUESTION_KEYS, "question")
    question = checked_text(row, question_key, max_turn_chars=terms.max_turn_chars)
    options, option_keys = _options(row)
    answer_key = present(row, _ANSWER_KEYS)[0]  # answer_idx is the letter beside a spelt answer.
    explanation = _explanation_keys(row)
    used = (question_key, answer_key, "answer", *option_keys, *explanation)
    row_id, source, extra = identity(row, terms, used=used, content=[question, options])
    exam_question = ExamQuestion(
        id=row_id,
        question=question,
        options=options,
        answer=_letters(row[answer_key], options),
        source=source,
        explanation=row[explanation[0]] if explanation else None,
        extra=extra,
    )
    return Converted((exam_question,))


def _explanation_keys(row: JsonRow) -> tuple[str, ...]:
    """The key of the explanation, if there is text under it; an empty CSV cell is none."""
    keys = present(row, _EXPLANATION_KEYS)[:1]
    if keys and not isinstance(row[keys[0]], str):
        raise RowProblem(f"{keys[0]} is {type(row[keys[0]]).__name__}, not text")
    return keys if keys and row[keys[0]].strip() else ()


def _options(row: JsonRow) -> tuple[dict[str, str], tuple[str, ...]]:
    """The options by letter, and the keys that they came from."""
    found = present(row, _OPTIONS_KEYS)
    given = structured(row[found[0]]) if found else None
    if not found:
        keys = tuple(letter for letter in _LETTERS if has(row, letter))
        options = {letter: row[letter] for letter in keys}
    elif isinstance(given, Mapping):
        options, keys = dict(given), found
    elif isinstance(given, list):
        options, keys = dict(zip(_LETTERS, given, strict=False)), found
    else:
        options, keys = options_from_text(given), found
    # Tables keep a column for the fifth option of questions that have four.
    options = {key: text for key, text in options.items() if text not in (None, "")}
    if len(options) < 2 or not all(isinstance(text, str) for text in options.values()):
        raise RowProblem(f"the options are not at least two texts: {str(options)[:60]}")
    if not set(options) <= set(_LETTERS):
        raise RowProblem(f"the options are lettered {', '.join(options)}, not A, B, ...")
    return options, keys


def options_from_text(text: object) -> dict[str, str]:
    """Options that stand one a line in one text; a line without the next letter goes on.

    Raises:
        RowProblem: the text does not begin with option A.
    """
    if not isinstance(text, str):
        raise RowProblem(f"the options are {type(text).__name__}, not text")
    options: dict[str, str] = {}
    for line in text.strip().split("\n"):
        match = _LETTERED_LINE.fullmatch(line.strip())
        if match and match.group(1) == _LETTERS[len(options)]:
            options[match.group(1)] = match.group(2).strip()
        elif options:
            options[_LETTERS[len(options) - 1]] += f"\n{line.strip()}"
        else:
            raise RowProblem(f"the options do not begin with A: {text[:40]!r}")
    return options


def _letters(value: object, options: Mapping[str, str]) -> str:
    """The letters of an answer such as `B`, `(B)`, `BCD` or `B, C`, in order."""
    if not isinstance(value, str):
        raise RowProblem(f"the answer is {type(value).__name__}, not letters")
    letters = re.sub(r"[()（）\s,，、]", "", value)
    if not letters or not set(letters) <= set(options):
        raise RowProblem(f"the answer {value[:40]!r} is not letters out of {''.join(options)}")
    return "".join(sorted(set(letters)))


EXAM_FORMATS: tuple[Format, ...] = (
    Format(
        "exam question",
        "exam",
        "question, answer (letters), and options by letter, in a list, in one text, or in columns",
        _is_exam,
        _from_exam,
    ),
)
