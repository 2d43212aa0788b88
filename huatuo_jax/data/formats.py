"""Row formats: how each is recognised by its keys, and how it becomes a record.

A `Format` is tried row by row, so that a file may mix shapes. Here stand the formats of dialogues
and prompts; comparisons, and cases and exams, have files of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from huatuo_jax.data.records import KINDS, Dialogue, Kind, Prompt, Record, content_id
from huatuo_jax.data.turns import (
    DIALOGUE_KEYS,
    INSTRUCTION_KEYS,
    MAX_TURN_CHARS,
    QUESTION_KEYS,
    JsonRow,
    RowProblem,
    Turn,
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
)

Family = Literal["dialogue", "prompt", "comparison", "case", "exam"]

ANSWER_KEYS = ("answer", "response", "output", "completion", "reply", "回答", "答案", "Answer")
EXAM_KEYS = ("options", "option", "Options", "A")
_ID_KEYS = ("id", "_id", "conversation_id", "dialogue_id")


@dataclass(frozen=True)
class Terms:
    """What the reader adds to a row: the source's name and kind, and the limits.

    A given `source` or `kind` is stronger than the row's own; `file_name` serves where neither is.
    `empty_answers` takes dialogues whose last answer is empty, too.
    """

    file_name: str
    source: str | None = None
    kind: Kind | None = None
    max_turn_chars: int = MAX_TURN_CHARS
    empty_answers: bool = False


@dataclass(frozen=True)
class Converted:
    """The records of one row, and what had to be mended on the way."""

    records: tuple[Record, ...]
    repairs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """One shape of rows: `keys` says in words what `matches` looks for."""

    name: str
    family: Family
    keys: str
    matches: Callable[[Any], bool]
    convert: Callable[[Any, Terms], Converted]


def recognise(row: object, formats: Sequence[Format]) -> Format:
    """The first of the formats that the row has the keys of.

    Raises:
        RowProblem: none; the text lists the keys of the row and the formats.
    """
    for row_format in formats:
        if row_format.matches(row):
            return row_format
    known = "; ".join(f"{row_format.name} ({row_format.keys})" for row_format in formats)
    raise RowProblem(f"{describe(row)}, no known format. Known: {known}")


def describe(row: object) -> str:
    """The keys that hold something, for messages."""
    if not isinstance(row, Mapping):
        return f"a row that is a {type(row).__name__}, not an object"
    return f"a row with the keys {', '.join(sorted(map(str, present(row, row)))) or '(none)'}"


def identity(
    row: object, terms: Terms, *, used: Sequence[str], content: object
) -> tuple[str, str, dict[str, Any]]:
    """The id, the source and the remaining fields of a row.

    A row without an id of its own gets one from its source and content. Where `terms` overrule the
    row's source, that stays in the remaining fields as `original_source`.
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
    """The one key of several spellings that the row has.

    Raises:
        RowProblem: it has more than one, and which is meant cannot be told.
    """
    found = present(row, keys)
    if len(found) > 1:
        raise RowProblem(f"more than one {what}: {', '.join(found)} (an adapter could choose)")
    return found[0]


def dialogue_key(row: JsonRow) -> str:
    """The key under which the row lists its turns."""
    return only_key(row, DIALOGUE_KEYS, "list of turns")


def is_listed(row: object) -> bool:
    """Whether the row lists turns under one of the usual keys."""
    return bool(present(row, DIALOGUE_KEYS))


def is_question(row: object) -> bool:
    """Whether the row has a question in a column of its own."""
    return bool(present(row, (*QUESTION_KEYS, "input")))


def _dialogue(
    row: object, turns: Sequence[Turn], terms: Terms, *, used: Sequence[str]
) -> Converted:
    messages, repairs = dialogue_messages(
        turns, max_turn_chars=terms.max_turn_chars, empty_answer=terms.empty_answers
    )
    kind = terms.kind or (row["kind"] if isinstance(row, Mapping) and has(row, "kind") else None)
    if kind is not None and kind not in KINDS:
        raise RowProblem(f"kind is {str(kind)[:40]!r}, not one of {', '.join(KINDS)}")
    used = (*used, "kind")
    row_id, source, extra = identity(row, terms, used=used, content=messages)
    return Converted((Dialogue(row_id, messages, kind, source, extra),), repairs)


def _from_huatuo(row: Any, terms: Terms) -> Converted:
    if isinstance(row, list):
        return _dialogue(row, huatuo_turns(row), terms, used=())
    key = "json_dialogue" if has(row, "json_dialogue") else "data"
    return _dialogue(row, huatuo_turns(row[key]), terms, used=(key,))


def _from_listed(row: Any, terms: Terms) -> Converted:
    key = dialogue_key(row)
    turns = listed_turns(row[key], key)
    return _dialogue(row, _with_system(row, turns), terms, used=(key, "system"))


def _with_system(row: JsonRow, turns: list[Turn]) -> list[Turn]:
    """ShareGPT keeps the system text beside the turns now and then."""
    return [("system", row["system"]), *turns] if has(row, "system") else turns


def _ends_open(row: Any) -> bool:
    if not is_listed(row) or not has(row, "reference"):
        return False
    turns = row[present(row, DIALOGUE_KEYS)[0]]
    return (
        isinstance(turns, list)
        and bool(turns)
        and has(turns[-1], "role", "content")
        and (turns[-1]["role"] == "user")
    )


def _from_referenced(row: Any, terms: Terms) -> Converted:
    key = dialogue_key(row)
    turns = [*listed_turns(row[key], key), ("assistant", row["reference"])]
    return _dialogue(row, turns, terms, used=(key, "reference"))


def _instruction_key(row: JsonRow) -> str:
    return only_key(row, INSTRUCTION_KEYS, "instruction")


def is_instruction(row: object) -> bool:
    """Whether the row has Alpaca's instruction."""
    return bool(present(row, INSTRUCTION_KEYS))


def instruction_prompt(row: JsonRow) -> tuple[list[Turn], tuple[str, ...]]:
    """Alpaca's turns up to the question, and the keys that they came from."""
    key = _instruction_key(row)
    return instruction_turns(row, key), (key, "input", "history", "system")


def question_prompt(row: JsonRow) -> tuple[list[Turn], tuple[str, ...]]:
    """The turns up to a question in a column of its own, and the keys that they came from."""
    # `input` is context below the question, and the question itself where there is no other.
    asked = present(row, QUESTION_KEYS)
    key = only_key(row, QUESTION_KEYS, "question") if asked else "input"
    used = (key, "input", "history", "system")
    if key == "input":
        return [*history_turns(row), ("user", row[key])], used
    return instruction_turns(row, key), used


def _from_alpaca(row: Any, terms: Terms) -> Converted:
    turns, used = instruction_prompt(row)
    turns = [*turns, ("assistant", row["output"])]
    return _dialogue(row, turns, terms, used=(*used, "output"))


def _is_question_answer(row: Any) -> bool:
    return is_question(row) and bool(present(row, ANSWER_KEYS)) and not present(row, EXAM_KEYS)


def _from_question_answer(row: Any, terms: Terms) -> Converted:
    turns, used = question_prompt(row)
    key = only_key(row, ANSWER_KEYS, "answer")
    return _dialogue(row, [*turns, ("assistant", row[key])], terms, used=(*used, key))


def _is_huatuo(row: Any) -> bool:
    if isinstance(row, list):
        return is_huatuo_list(row)
    return has(row, "json_dialogue") or (has(row, "data") and isinstance(row["data"], list))


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
    limit = terms.max_turn_chars
    messages, repairs = prompt_messages(turns, max_turn_chars=limit)
    reference_text = checked_text(row, reference, max_turn_chars=limit) if reference else None
    diagnosis = (
        checked_text(row, "diagnosis", max_turn_chars=limit) if has(row, "diagnosis") else None
    )
    taken = (
        (*used, "diagnosis", "reference")
        if reference is None
        else (*used, "diagnosis", "reference", reference)
    )
    row_id, source, extra = identity(row, terms, used=taken, content=messages)
    prompt = Prompt(row_id, messages, source, reference_text, diagnosis, extra)
    return Converted((prompt,), repairs)


def _reference_key(row: JsonRow) -> str | None:
    found = present(row, ("reference", *ANSWER_KEYS))
    return found[0] if found else None


def _prompt_from_listed(row: Any, terms: Terms) -> Converted:
    key = dialogue_key(row)
    turns = _with_system(row, listed_turns(row[key], key))
    reference = "reference" if has(row, "reference") else None
    return _prompt(row, turns, terms, used=(key, "system"), reference=reference)


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
