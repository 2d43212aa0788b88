"""Row formats of dialogues, prompts, cases and exam questions: recognized by keys, made records.

A `Format` is tried row by row, so a file may mix shapes. The formats of preference pairs are in
`huatuo_jax.data.formats.preferences`.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from huatuo_jax.data.formats.turns import (
    ANSWER_KEYS,
    DIALOGUE_KEYS,
    INSTRUCTION_KEYS,
    MAX_TURN_CHARS,
    QUESTION_KEYS,
    JsonRow,
    RowLeftOut,
    RowProblem,
    Turn,
    as_list,
    as_turns,
    checked_text,
    dialogue_messages,
    has,
    history_turns,
    huatuo_turns,
    instruction_turns,
    is_huatuo_list,
    listed_turns,
    present,
    prompt_messages,
    structured,
)
from huatuo_jax.data.records import (
    KINDS,
    Case,
    Dialogue,
    ExamQuestion,
    Kind,
    Prompt,
    Record,
    content_id,
    is_empty,
    shown,
)

Family = Literal["dialogue", "prompt", "comparison", "case", "exam"]

LABELLED_BAD = "answer labelled as a bad one (KTO's label: false)"
BAD_REFERENCE = "answer labelled as a bad one not taken for a reference"
REASONING_COLUMN = (
    "chain of thought (Complex_CoT) carried along, not trained (adapter huatuo_o1 trains it)"
)

EXAM_KEYS = ("options", "option", "Options", "A")
_LABEL_KEYS = ("label", "kto_tag")
_KEYS_SHOWN = 12
_ID_KEYS = ("id", "_id", "conversation_id", "dialogue_id")
_DEPARTMENT_KEYS = ("department", "Department")
_QUESTION_KEYS = ("question", "Question")
_OPTIONS_KEYS = ("options", "option", "Options")
_ANSWER_KEYS = ("answer_idx", "answer", "Answer")
_EXPLANATION_KEYS = ("explanation", "Explanation", "rationale")
_LETTERS = "ABCDEFGHIJ"
# `A text`, `A. text`, `A、text`, `(A) text`, one on each line; a letter alone has no text.
_LETTERED_LINE = re.compile(r"[(（]?([A-J])(?:[)）.、:：]\s*|\s+|$)(.*)", re.DOTALL)


@dataclass(frozen=True)
class Terms:
    """The reader's settings for a row: the source's name and kind, and the limits.

    A given `source` or `kind` overrides the row's own; `file_name` is the source of a row without
    either. `empty_answers` accepts dialogues whose last answer is empty.
    """

    file_name: str
    source: str | None = None
    kind: Kind | None = None
    max_turn_chars: int = MAX_TURN_CHARS
    empty_answers: bool = False


@dataclass(frozen=True)
class Converted:
    """The records of one row, and the repairs that were needed."""

    records: tuple[Record, ...]
    repairs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """One shape of rows; `keys` describes in words the rows that `matches` accepts."""

    name: str
    family: Family
    keys: str
    matches: Callable[[Any], bool]
    convert: Callable[[Any, Terms], Converted]


def recognise(row: object, formats: Sequence[Format]) -> Format:
    """Returns the first of the formats whose keys the row has.

    Raises:
        RowProblem: there is none; the text lists the keys of the row and the formats.
    """
    for row_format in formats:
        if row_format.matches(row):
            return row_format
    known = "; ".join(f"{row_format.name} ({row_format.keys})" for row_format in formats)
    raise RowProblem(f"{describe(row)}, no known format. Known: {known}")


def describe(row: object) -> str:
    """Describes a row by its keys with a value, for messages."""
    if not isinstance(row, Mapping):
        return f"a row that is a {type(row).__name__}, not an object"
    keys = sorted(map(str, present(row, row)))
    more = len(keys) - _KEYS_SHOWN
    names = ", ".join(shown(key) for key in keys[:_KEYS_SHOWN]) or "(none)"
    return f"a row with the keys {names}" + (f" and {more:,} more" if more > 0 else "")


def identity(
    row: object, terms: Terms, *, used: Sequence[str], content: object
) -> tuple[str, str, dict[str, Any]]:
    """Returns the id, the source and the remaining fields of a row.

    A row without an id of its own gets one from its source and content. If `terms` override the
    row's source, it stays in the remaining fields as `original_source`.
    """
    if not isinstance(row, Mapping):
        source = terms.source or terms.file_name
        return content_id(source, content), source, {}
    own_source = row["source"] if has(row, "source") else None
    source = terms.source or (own_source if isinstance(own_source, str) else terms.file_name)
    extra = {
        key: value
        for key, value in row.items()
        if key not in (*used, "source") and value is not None
    }
    if own_source is not None and own_source != source:
        extra["original_source"] = own_source
    for key in present(row, _ID_KEYS):
        if not isinstance(row[key], bool) and str(row[key]).strip():
            extra.pop(key, None)
            return str(row[key]), source, extra
    return content_id(source, content), source, {k: v for k, v in extra.items() if k != "id"}


def only_key(row: JsonRow, keys: Sequence[str], what: str) -> str:
    """Returns the one key of several spellings that the row has.

    Raises:
        RowProblem: it has more than one, so the meant one is not known.
    """
    found = present(row, keys)
    if len(found) > 1:
        raise RowProblem(f"more than one {what}: {', '.join(found)} (an adapter could choose)")
    return found[0]


def dialogue_key(row: JsonRow) -> str:
    """Returns the key under which the row lists its turns."""
    return only_key(row, _list_keys(row) or DIALOGUE_KEYS, "list of turns")


def _list_keys(row: JsonRow) -> tuple[str, ...]:
    """Returns the usual keys of turns that hold a list, not an id of a conversation."""
    return tuple(
        key
        for key in present(row, DIALOGUE_KEYS)
        if isinstance(structured(row[key]), list | Mapping)
    )


def is_listed(row: object) -> bool:
    """Returns whether the row lists turns under one of the usual keys."""
    found = present(row, DIALOGUE_KEYS)
    if not found or not isinstance(row, Mapping):
        return False
    return bool(_list_keys(row)) or not (is_instruction(row) or is_question(row))


def is_question(row: object) -> bool:
    """Returns whether the row has a question in a column of its own."""
    return bool(present(row, (*QUESTION_KEYS, "input")))


def is_labelled_bad(row: object) -> bool:
    """Returns whether the row's answer is labelled as a bad one, as in KTO's data."""
    return any(
        row[key] is False or str(row[key]).strip().lower() == "false"
        for key in present(row, _LABEL_KEYS)
        if isinstance(row, Mapping)
    )


def _dialogue(
    row: object, turns: Sequence[Turn], terms: Terms, *, used: Sequence[str]
) -> Converted:
    if is_labelled_bad(row):
        raise RowLeftOut(LABELLED_BAD)
    messages, repairs = dialogue_messages(
        turns, max_turn_chars=terms.max_turn_chars, empty_answer=terms.empty_answers
    )
    fields, renamed = _other_meanings(row)
    row_id, source, extra = identity(fields, terms, used=used, content=messages)
    own_kind = extra.pop("kind", None)
    if has(row, "Complex_CoT"):
        repairs = (*repairs, REASONING_COLUMN)
    dialogue = Dialogue(row_id, messages, terms.kind or own_kind, source, extra)
    return Converted((dialogue,), (*repairs, *renamed))


def _other_meanings(row: object) -> tuple[object, tuple[str, ...]]:
    """Renames columns with a field's name but another meaning to `original_...`.

    A kind that is nearly one of ours is an error of spelling.
    """
    if not isinstance(row, Mapping):
        return row, ()
    others = [key for key in ("diagnosis",) if not isinstance(row.get(key), str | None)]
    if has(row, "kind") and row["kind"] not in KINDS:
        near = difflib.get_close_matches(str(row["kind"]), KINDS, n=1, cutoff=0.8)
        if near:
            raise RowProblem(f"kind is {shown(repr(row['kind']))}; did you mean {near[0]!r}?")
        others.append("kind")
    fields = {f"original_{key}" if key in others else key: row[key] for key in row}
    return fields, tuple(f"own column {key!r} carried along as 'original_{key}'" for key in others)


def _from_huatuo(row: Any, terms: Terms) -> Converted:
    if isinstance(row, list):
        return _dialogue(row, huatuo_turns(row), terms, used=())
    key = "json_dialogue" if has(row, "json_dialogue") else "data"
    turns = huatuo_turns(row[key] if key == "json_dialogue" else structured(row[key]))
    return _dialogue(row, turns, terms, used=(key,))


def _from_listed(row: Any, terms: Terms) -> Converted:
    turns, used = listed_prompt(row)
    return _dialogue(row, turns, terms, used=used)


def listed_prompt(row: JsonRow) -> tuple[list[Turn], tuple[str, ...]]:
    """Returns the turns of a row's list, and the keys they came from.

    ShareGPT rows may keep the system text outside the list.
    """
    key = dialogue_key(row)
    system = [Turn("system", row["system"])] if has(row, "system") else []
    return [*system, *listed_turns(row[key], key)], (key, "system")


def _ends_open(row: Any) -> bool:
    if not is_listed(row) or not isinstance(row.get("reference"), str):
        return False
    turns = as_turns(row[present(row, DIALOGUE_KEYS)[0]])
    return turns is not None and has(turns[-1], "role") and turns[-1]["role"] == "user"


def _from_referenced(row: Any, terms: Terms) -> Converted:
    key = dialogue_key(row)
    turns = [*listed_turns(row[key], key), Turn("assistant", row["reference"])]
    return _dialogue(row, turns, terms, used=(key, "reference"))


def _instruction_key(row: JsonRow) -> str:
    return only_key(row, INSTRUCTION_KEYS, "instruction")


def is_instruction(row: object) -> bool:
    """Returns whether the row has Alpaca's instruction."""
    return bool(present(row, INSTRUCTION_KEYS))


def instruction_prompt(row: JsonRow) -> tuple[list[Turn], tuple[str, ...]]:
    """Returns Alpaca's turns up to the question, and the keys that they came from."""
    key = _instruction_key(row)
    return instruction_turns(row, key), (key, "input", "history", "system")


def question_prompt(row: JsonRow) -> tuple[list[Turn], tuple[str, ...]]:
    """Returns the turns up to a question in its own column, and the keys they came from.

    The question may be a list of turns, as TRL's conversational `prompt`.
    """
    # `input` is context below the question, or the question itself if there is no other.
    asked = present(row, QUESTION_KEYS)
    key = only_key(row, QUESTION_KEYS, "question") if asked else "input"
    used = (key, "input", "history", "system")
    if as_turns(row[key]) is not None:
        return [*history_turns(row), *listed_turns(row[key], key)], used
    if key == "input":
        return [*history_turns(row), Turn("user", row[key])], used
    return instruction_turns(row, key), used


def answer_turns(value: object, name: str) -> list[Turn]:
    """Returns an answer as text, as one message, or as messages; the text is checked later."""
    items = as_list(value)
    if isinstance(value, Mapping) and items is None:
        return listed_turns([value], name)
    if isinstance(value, str | list) and as_turns(value) is None and not _holds_object(value):
        return [Turn("assistant", value)]
    return listed_turns(items, name) if items is not None else [Turn("assistant", value)]


def _holds_object(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(item, Mapping) for item in value)


def _from_alpaca(row: Any, terms: Terms) -> Converted:
    turns, used = instruction_prompt(row)
    turns = [*turns, *answer_turns(row["output"], "output")]
    return _dialogue(row, turns, terms, used=(*used, "output"))


def _is_question_answer(row: Any) -> bool:
    return is_question(row) and bool(present(row, ANSWER_KEYS)) and not present(row, EXAM_KEYS)


def _from_question_answer(row: Any, terms: Terms) -> Converted:
    turns, used = question_prompt(row)
    key = only_key(row, ANSWER_KEYS, "answer")
    return _dialogue(row, [*turns, *answer_turns(row[key], key)], terms, used=(*used, key))


def _is_huatuo(row: Any) -> bool:
    if isinstance(row, list):
        return is_huatuo_list(row)
    return has(row, "json_dialogue") or (
        has(row, "data") and isinstance(structured(row["data"]), list)
    )


DIALOGUE_FORMATS: tuple[Format, ...] = (
    Format(
        "huatuo",
        "dialogue",
        "a list of 问：... and 答：..., bare, under data, or as JSON text in json_dialogue",
        _is_huatuo,
        _from_huatuo,
    ),
    Format(
        "prompt with reference",
        "dialogue",
        "messages that end with the user, and reference",
        _ends_open,
        _from_referenced,
    ),
    Format(
        "turns",
        "dialogue",
        "conversations, conversation or messages: a list of from/value or role/content",
        is_listed,
        _from_listed,
    ),
    Format(
        "alpaca",
        "dialogue",
        "instruction, output; input, history and system may be there",
        lambda row: is_instruction(row) and has(row, "output"),
        _from_alpaca,
    ),
    Format(
        "question and answer",
        "dialogue",
        f"one of {', '.join(QUESTION_KEYS)} and one of {', '.join(ANSWER_KEYS)}",
        _is_question_answer,
        _from_question_answer,
    ),
)


def _prompt(
    row: JsonRow, turns: Sequence[Turn], terms: Terms, *, used: Sequence[str], reference: str | None
) -> Converted:
    messages, mended = prompt_messages(turns, max_turn_chars=terms.max_turn_chars)
    repairs = list(mended)
    texts: dict[str, str] = {}
    for key in present(row, ("diagnosis", *([] if reference is None else [reference]))):
        turns = answer_turns(row[key], key)
        text = turns[0].content if len(turns) == 1 else row[key]
        if isinstance(text, str) and is_empty(text):
            repairs.append(f"empty {key} read as none")
        elif key == reference != "reference" and is_labelled_bad(row):
            repairs.append(BAD_REFERENCE)
        else:
            texts[key] = checked_text({key: text}, key, max_turn_chars=terms.max_turn_chars)
    taken = (*used, "diagnosis", "reference", *([] if reference is None else [reference]))
    row_id, source, extra = identity(row, terms, used=taken, content=messages)
    prompt = Prompt(
        row_id, messages, source, texts.get(reference or ""), texts.get("diagnosis"), extra
    )
    return Converted((prompt,), tuple(repairs))


def _reference_key(row: JsonRow) -> str | None:
    found = present(row, ("reference", *ANSWER_KEYS))
    return found[0] if found else None


def _prompt_from_listed(row: Any, terms: Terms) -> Converted:
    turns, used = listed_prompt(row)
    reference = "reference" if has(row, "reference") else None
    return _prompt(row, turns, terms, used=used, reference=reference)


def _prompt_from_instruction(row: Any, terms: Terms) -> Converted:
    turns, used = instruction_prompt(row)
    return _prompt(row, turns, terms, used=used, reference=_reference_key(row))


def _prompt_from_question(row: Any, terms: Terms) -> Converted:
    turns, used = question_prompt(row)
    return _prompt(row, turns, terms, used=used, reference=_reference_key(row))


PROMPT_FORMATS: tuple[Format, ...] = (
    Format(
        "prompt",
        "prompt",
        "messages that end with the user; reference and diagnosis may be there",
        is_listed,
        _prompt_from_listed,
    ),
    Format(
        "instruction",
        "prompt",
        "instruction; input, history, system and output may be there",
        is_instruction,
        _prompt_from_instruction,
    ),
    Format(
        "question",
        "prompt",
        f"one of {', '.join(QUESTION_KEYS)}; an answer may be there",
        lambda row: is_question(row) and not present(row, EXAM_KEYS),
        _prompt_from_question,
    ),
)


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
    answer_key = present(row, _ANSWER_KEYS)[0]  # answer_idx is the letter of an answer in words.
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
    """Returns the key of the explanation, if there is text under it; an empty CSV cell is none."""
    keys = present(row, _EXPLANATION_KEYS)[:1]
    if keys and not isinstance(row[keys[0]], str):
        raise RowProblem(f"{keys[0]} is {type(row[keys[0]]).__name__}, not text")
    return keys if keys and row[keys[0]].strip() else ()


def _options(row: JsonRow) -> tuple[dict[str, str], tuple[str, ...]]:
    """Returns the options by letter, and the keys that they came from."""
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
    # Tables have a column for a fifth option, which most questions lack.
    options = {key: text for key, text in options.items() if text not in (None, "")}
    if len(options) < 2 or not all(isinstance(text, str) for text in options.values()):
        raise RowProblem(f"the options are not at least two texts: {str(options)[:60]}")
    if not set(options) <= set(_LETTERS):
        raise RowProblem(f"the options are lettered {', '.join(options)}, not A, B, ...")
    return options, keys


def options_from_text(text: object) -> dict[str, str]:
    """Splits a text into options, one a line; a line without the next letter continues one.

    Raises:
        RowProblem: the text does not begin with option A.
    """
    if not isinstance(text, str):
        raise RowProblem(f"the options are {type(text).__name__}, not text")
    options: dict[str, str] = {}
    for line in text.strip().split("\n"):
        match = _LETTERED_LINE.fullmatch(line.strip())
        if match and match.group(1) == _LETTERS[len(options) :][:1]:
            options[match.group(1)] = match.group(2).strip()
        elif options:
            options[_LETTERS[len(options) - 1]] += f"\n{line.strip()}"
        else:
            raise RowProblem(f"the options do not begin with A: {text[:40]!r}")
    return options


def _letters(value: object, options: Mapping[str, str]) -> str:
    """Returns the letters of an answer such as `B`, `(B)`, `BCD` or `B, C`, in order."""
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
