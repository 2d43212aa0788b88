"""Turns of a row, in any of the usual shapes, made checked messages.

`check_turns` is the one place that defines a valid dialogue; the other functions only find the
turns in a row.
"""

import ast
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from huatuo_jax.data.records import Message, Messages, Role, is_empty, shown, unmarked
from huatuo_jax.data.text import NotJson, json_value

JsonRow = Mapping[str, Any]

MAX_TURN_CHARS = 100_000
EMPTY_SYSTEM = "empty system turn left out"
UNANSWERED = "last unanswered turn dropped"
REASONING = "reasoning beside the text of a turn left out"
OTHER_FIELDS = "fields of a turn that are neither role nor text left out"
USER_TRAINED = "mark to train a turn that is no answer left out"

_ROLES: dict[Role, tuple[str, ...]] = {
    "system": ("system",),
    "user": ("user", "human", "patient", "患者", "病人", "用户"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "model", "doctor", "医生", "huatuogpt"),
}
_ROLE_OF: dict[str, Role] = {name: role for role, names in _ROLES.items() for name in names}
_PATIENT_MARKS = ("问：", "问:")
_DOCTOR_MARKS = ("答：", "答:")
QUESTION_KEYS = ("question", "query", "ask", "prompt", "问题", "Question")
INSTRUCTION_KEYS = ("instruction", "instruct")
DIALOGUE_KEYS = ("conversations", "conversation", "messages")
ANSWER_KEYS = (
    *("answer", "response", "output", "completion", "reply", "回答", "答案", "Answer", "Response"),
)
FIELD_NAMES = frozenset(
    (*QUESTION_KEYS, *INSTRUCTION_KEYS, *DIALOGUE_KEYS, *ANSWER_KEYS)
    + ("answers", "responses", "outputs", "completions", "chosen", "rejected", "history", "data")
    + ("options", "option", "Options", "input", "system", "reference", "json_dialogue")
)
"""Names of a row's fields: in a document such a field is no row under its id."""

_TURN_KEYS = (("role", "content"), ("from", "value"))
_TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")


class Turn(NamedTuple):
    """A turn as written.

    Attributes:
        role: any of the usual names.
        content: the text.
        trained: False if the row marks this answer as not to be trained.
        left_out: fields of the turn that a message does not hold, as reasons to count.
    """

    role: object
    content: object
    trained: bool = True
    left_out: tuple[str, ...] = ()


TurnLike = Turn | Message | tuple[object, object]


class RowProblem(ValueError):
    """Raised for a row that is no record; the text is the reason."""


class RowLeftOut(Exception):
    """Raised for a valid row that gives no record; its text is the reason to count."""


def check_turns(
    turns: Iterable[TurnLike], *, max_turn_chars: int, empty_answer: bool = False
) -> tuple[Messages, tuple[str, ...]]:
    """Returns the messages of the turns, and the repairs that were needed.

    Valid are: known roles; text that is visible, not too long and can be written as UTF-8; a system
    message only first; then user and assistant in turn, the user first.

    Args:
        turns: in order.
        max_turn_chars: characters of a turn at most.
        empty_answer: whether the last turn may be an empty one of the assistant.

    Raises:
        RowProblem: the turns are not valid.
    """
    messages: list[Message] = []
    repairs: list[str] = []
    turns = list(turns)
    for number, item in enumerate(turns, start=1):
        turn = Turn(*item)
        role = _role_of(turn.role)
        if role is None:
            raise RowProblem(f"turn {number} has the unknown role {repr(turn.role)[:40]}")
        text = _checked_text(turn.content, f"turn {number} ({role})", max_turn_chars)
        repairs += (note for note in turn.left_out if note not in repairs)
        is_answer = role == "assistant" and number == len(turns)
        if is_empty(text) and not (is_answer and empty_answer):
            if role != "system":
                raise RowProblem(f"turn {number} ({role}) is empty")
            repairs.append(EMPTY_SYSTEM)
            continue
        _check_order(messages, role, number)
        messages.append(Message(role, text, turn.trained or role != "assistant"))
    if not any(message.role == "user" for message in messages):
        raise RowProblem("no user turn" if messages else "no turns")
    return tuple(messages), tuple(repairs)


def dialogue_messages(
    turns: Iterable[TurnLike], *, max_turn_chars: int, empty_answer: bool = False
) -> tuple[Messages, tuple[str, ...]]:
    """Returns checked messages that end with the assistant; drops a last, unanswered question."""
    messages, repairs = check_turns(turns, max_turn_chars=max_turn_chars, empty_answer=empty_answer)
    if not any(message.role == "assistant" for message in messages):
        raise RowProblem("no assistant turn")
    if messages[-1].role == "user":
        return messages[:-1], (*repairs, UNANSWERED)
    return messages, repairs


def prompt_messages(
    turns: Iterable[TurnLike], *, max_turn_chars: int
) -> tuple[Messages, tuple[str, ...]]:
    """Returns checked messages that end with the user; trained marks are dropped."""
    messages, repairs = check_turns(turns, max_turn_chars=max_turn_chars)
    if messages[-1].role != "user":
        raise RowProblem(f"the prompt ends with a turn of the {messages[-1].role}, not of the user")
    return unmarked(messages), repairs


def checked_text(row: JsonRow, key: str, *, max_turn_chars: int) -> str:
    """Returns the text under a key, not empty.

    Raises:
        RowProblem: it is not text, is empty, too long, or cannot be written as UTF-8.
    """
    text = _checked_text(row[key], key, max_turn_chars)
    if is_empty(text):
        raise RowProblem(f"{key} is empty")
    return text


def _checked_text(content: object, where: str, max_turn_chars: int) -> str:
    if not isinstance(content, str):
        raise RowProblem(f"{where} is {type(content).__name__}, not text")
    if len(content) > max_turn_chars:
        raise RowProblem(
            f"{where} has {len(content):,} characters, more than max_turn_chars={max_turn_chars:,}"
        )
    try:
        content.encode()
    except UnicodeEncodeError as problem:
        half = f"\\u{ord(content[problem.start]):04x}"
        raise RowProblem(f"{where} holds half a character ({half})") from None
    return content


def _check_order(before: Sequence[Message], role: Role, number: int) -> None:
    last = before[-1].role if before else None
    if role == "system" and before:
        raise RowProblem(f"turn {number} is a system turn in the middle of the dialogue")
    if role == "assistant" and last in (None, "system"):
        raise RowProblem("the dialogue starts with the assistant")
    if role == last:
        raise RowProblem(f"turns {number - 1} and {number} are both of the {role}")


def has(row: object, *keys: str) -> bool:
    """Returns whether the row is an object with a value (not null) under every key."""
    return isinstance(row, Mapping) and all(row.get(key) is not None for key in keys)


def present(row: object, keys: Iterable[str]) -> tuple[str, ...]:
    """Returns the keys under which the row has a value."""
    return tuple(key for key in keys if has(row, key))


def structured(value: object) -> Any:
    """Parses a list or object that a cell's text spells in JSON or Python; else the value.

    CSV and parquet columns hold lists as JSON text; pandas writes Python's form into CSV.
    """
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    found = None
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(value.strip())
            break
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    if not isinstance(found, list | dict | tuple):
        return value
    try:
        return json_value(found).value
    except NotJson as problem:
        raise RowProblem(str(problem)) from None


def as_list(value: object) -> list[Any] | None:
    """Returns a value as a list: a list, its text, or an object of equally long columns.

    `datasets` stores a list of objects as such an object. None for any other value.

    Raises:
        RowProblem: the columns are not equally long.
    """
    value = structured(value)
    if isinstance(value, Mapping) and value and all(isinstance(c, list) for c in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise RowProblem(f"the columns {shown(', '.join(value))} are not equally long")
        return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    return value if isinstance(value, list) else None


def is_turn(item: object) -> bool:
    """Returns whether it is an object with the keys of a turn."""
    return isinstance(item, Mapping) and any(item.keys() >= set(keys) for keys in _TURN_KEYS)


def as_turns(value: object) -> list[Any] | None:
    """Returns a value, or the value that it spells, as a list of turns; None if it is none."""
    items = as_list(value)
    return items if items and all(map(is_turn, items)) else None


def listed_turns(items: object, name: str) -> list[Turn]:
    """Returns the turns of a list of `{from, value}` (ShareGPT) or `{role, content}` (OpenAI)."""
    listed = as_list(items)
    if listed is None:
        raise RowProblem(f"{name} is {type(items).__name__}, not a list of turns")
    return [_listed_turn(item, number) for number, item in enumerate(listed, start=1)]


def _listed_turn(item: object, number: int) -> Turn:
    if not isinstance(item, Mapping) or not is_turn(item):
        keys = sorted(map(str, item)) if isinstance(item, Mapping) else []
        held = f"keys {shown(keys, 100)}" if keys else "no keys"
        raise RowProblem(f"turn {number} needs role and content, or from and value; has {held}")
    there = [names for names in _TURN_KEYS if item.keys() >= set(names)]
    used = next((names for names in there if has(item, *names)), there[0])
    role, content = (item[name] for name in used)
    for key in _TOOL_KEYS:
        if _holds_something(item.get(key)):
            raise RowProblem(f"turn {number} has {key}; only text can be trained on")
    marks = _marks(item, number)
    rest = {key for key in item if key not in (*used, *marks) and _holds_something(item[key])}
    notes = {
        USER_TRAINED: True in marks.values() and _role_of(role) == "user",
        REASONING: not rest.isdisjoint(_REASONING_KEYS),
        OTHER_FIELDS: bool(rest.difference(_REASONING_KEYS)),
    }
    left_out = tuple(note for note, applies in notes.items() if applies)
    return Turn(role, _text_of_parts(content, number), False not in marks.values(), left_out)


def _marks(item: JsonRow, number: int) -> dict[str, bool]:
    """Returns the turn's marks of being trained: `weight` (OpenAI), `train`, boolean `loss`."""
    marks = {}
    for key in ("weight", "train", "loss"):
        value = item.get(key)
        if isinstance(value, bool) or (value in (0, 1) and key != "loss"):
            marks[key] = bool(value)
        elif value is not None and key != "loss":
            raise RowProblem(
                f"turn {number} has {key} {shown(repr(value))}; a turn is trained (1, true) or not"
                " (0, false)"
            )
    if has(item, "train_detail"):
        raise RowProblem(f"turn {number} has train_detail; a turn is trained as a whole or not")
    return marks


def _holds_something(value: object) -> bool:
    return value is not None and value not in ("", [], {})


def _text_of_parts(content: object, number: int) -> object:
    """Joins a content that is a list of text parts by line breaks, as servers do (vLLM)."""
    parts = as_list(content) if isinstance(content, list | Mapping) else None
    if not parts or not all(has(part, "type") for part in parts):
        return content
    texts = []
    for part in parts:
        kind, text = part["type"], part.get("text")
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise RowProblem(
                f"turn {number} has a part of type {shown(repr(kind))}; only text can be trained on"
            )
        texts.append(text)
    return "\n".join(texts)


def _role_of(name: object) -> Role | None:
    return _ROLE_OF.get(name.strip().lower()) if isinstance(name, str) else None


def huatuo_turns(items: object) -> list[Turn]:
    """Returns the turns of HuatuoGPT's strings `问：...` and `答：...`, in a list or its JSON."""
    if isinstance(items, str):
        try:
            items = json_value(json.loads(items)).value
        except (ValueError, RecursionError) as problem:
            raise RowProblem(f"json_dialogue is not JSON: {problem}") from None
    if not isinstance(items, list):
        raise RowProblem(f"the dialogue is {type(items).__name__}, not a list of strings")
    turns: list[Turn] = []
    for number, item in enumerate(items, start=1):
        if not isinstance(item, str):
            raise RowProblem(f"turn {number} is {type(item).__name__}, not text")
        if not item.startswith(_PATIENT_MARKS + _DOCTOR_MARKS):
            raise RowProblem(f"turn {number} begins with neither 问： nor 答：")
        role = "user" if item.startswith(_PATIENT_MARKS) else "assistant"
        turns.append(Turn(role, item[len(_PATIENT_MARKS[0]) :]))
    return turns


def is_huatuo_list(value: object) -> bool:
    """Returns whether the value is a list that begins with a string `问：...` or `答：...`."""
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        return False
    return value[0].startswith(_PATIENT_MARKS + _DOCTOR_MARKS)


def history_turns(row: JsonRow) -> list[Turn]:
    """Returns the turns of Alpaca's `system` and `history`: pairs, or listed turns."""
    turns = [Turn("system", row["system"])] if has(row, "system") else []
    history = as_list(row["history"]) if has(row, "history") else []
    if history is None:
        raise RowProblem(f"history is {type(row['history']).__name__}, not a list of pairs")
    if history and all(map(is_turn, history)):
        return [*turns, *listed_turns(history, "history")]
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowProblem(f"history[{number - 1}] is not a pair of question and answer")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return turns


def instruction_turns(row: JsonRow, key: str) -> list[Turn]:
    """Returns Alpaca's turns up to the question: system, history, instruction and input."""
    instruction, context = row[key], row["input"] if has(row, "input") else ""
    if isinstance(instruction, str) and isinstance(context, str):
        parts = [part for part in (instruction, context) if not is_empty(part)]
        return [*history_turns(row), Turn("user", "\n".join(parts))]
    wrong = context if isinstance(instruction, str) else instruction
    return [*history_turns(row), Turn("user", wrong)]
