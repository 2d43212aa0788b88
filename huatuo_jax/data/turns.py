"""From the turns of a row, in whatever shape, to checked messages.

A turn is a pair (role as written, content as written). `check_turns` is the one place that decides
what a dialogue may look like; the other functions only find the turns in a row.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huatuo_jax.data.records import Message, Messages, Role, is_empty

Turn = tuple[object, object]
JsonRow = Mapping[str, Any]

MAX_TURN_CHARS = 100_000
EMPTY_SYSTEM = "empty system turn left out"
UNANSWERED = "last unanswered turn dropped"

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


class RowProblem(ValueError):
    """A row that cannot become a record; the text is the reason."""


class RowLeftOut(Exception):
    """A sound row that gives no record, for a reason that is counted by its text."""


def check_turns(
    turns: Iterable[Turn], *, max_turn_chars: int, empty_answer: bool = False
) -> tuple[Messages, tuple[str, ...]]:
    """Messages of the turns, and what had to be mended.

    Holds: known roles; text that is there, is not too long and can be written as UTF-8; a system
    message only first; then user and assistant in turns, the user first.

    Args:
        turns: in order.
        max_turn_chars: characters of a turn at most.
        empty_answer: whether the last turn may be an empty one of the assistant.

    Raises:
        RowProblem: something of this does not hold.
    """
    messages: list[Message] = []
    repairs: list[str] = []
    turns = list(turns)
    for number, (name, content) in enumerate(turns, start=1):
        role = _ROLE_OF.get(name.strip().lower()) if isinstance(name, str) else None
        if role is None:
            raise RowProblem(f"turn {number} has the unknown role {repr(name)[:40]}")
        text = _checked_text(content, f"turn {number} ({role})", max_turn_chars)
        is_answer = role == "assistant" and number == len(turns)
        if is_empty(text) and not (is_answer and empty_answer):
            if role != "system":
                raise RowProblem(f"turn {number} ({role}) is empty")
            repairs.append(EMPTY_SYSTEM)
            continue
        _check_order(messages, role, number)
        messages.append(Message(role, text))
    if not any(message.role == "user" for message in messages):
        raise RowProblem("no user turn" if messages else "no turns")
    return tuple(messages), tuple(repairs)


def dialogue_messages(
    turns: Iterable[Turn], *, max_turn_chars: int, empty_answer: bool = False
) -> tuple[Messages, tuple[str, ...]]:
    """Checked messages that end with the assistant: a last, unanswered question is dropped."""
    messages, repairs = check_turns(turns, max_turn_chars=max_turn_chars, empty_answer=empty_answer)
    if not any(message.role == "assistant" for message in messages):
        raise RowProblem("no assistant turn")
    if messages[-1].role == "user":
        return messages[:-1], (*repairs, UNANSWERED)
    return messages, repairs


def prompt_messages(
    turns: Iterable[Turn], *, max_turn_chars: int
) -> tuple[Messages, tuple[str, ...]]:
    """Checked messages that end with the user."""
    messages, repairs = check_turns(turns, max_turn_chars=max_turn_chars)
    if messages[-1].role != "user":
        raise RowProblem(f"the prompt ends with a turn of the {messages[-1].role}, not of the user")
    return messages, repairs


def checked_text(row: JsonRow, key: str, *, max_turn_chars: int) -> str:
    """The text under a key, not empty.

    Raises:
        RowProblem: it is not text, is empty, too long, or cannot be written as UTF-8.
    """
    text = _checked_text(row[key], key, max_turn_chars)
    if not text.strip():
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


# The shapes that turns have in rows.


def has(row: object, *keys: str) -> bool:
    """Whether the row is an object with something under every key (null counts as nothing)."""
    return isinstance(row, Mapping) and all(row.get(key) is not None for key in keys)


def present(row: object, keys: Iterable[str]) -> tuple[str, ...]:
    """Those of the keys under which the row holds something."""
    return tuple(key for key in keys if has(row, key))


def listed_turns(items: object, name: str) -> list[Turn]:
    """Turns of a list of `{from, value}` (ShareGPT) or `{role, content}` (OpenAI)."""
    if not isinstance(items, list):
        raise RowProblem(f"{name} is {type(items).__name__}, not a list of turns")
    turns: list[Turn] = []
    for number, item in enumerate(items, start=1):
        if isinstance(item, Mapping) and {"role", "content"} <= item.keys():
            turns.append((item["role"], item["content"]))
        elif isinstance(item, Mapping) and {"from", "value"} <= item.keys():
            turns.append((item["from"], item["value"]))
        else:
            held = f"keys {sorted(map(str, item))}" if isinstance(item, Mapping) else "no keys"
            raise RowProblem(f"turn {number} needs role and content, or from and value; has {held}")
    return turns


def huatuo_turns(items: object) -> list[Turn]:
    """Turns of HuatuoGPT's strings `问：...` and `答：...`, in a list or in JSON text of one."""
    if isinstance(items, str):
        try:
            items = json.loads(items)
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
        turns.append((role, item[len(_PATIENT_MARKS[0]) :]))
    return turns


def is_huatuo_list(value: object) -> bool:
    """Whether the value is a list that begins with a string `问：...` or `答：...`."""
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        return False
    return value[0].startswith(_PATIENT_MARKS + _DOCTOR_MARKS)


def history_turns(row: JsonRow) -> list[Turn]:
    """Turns of Alpaca's `system`, and of `history`, a list of pairs [user, assistant]."""
    turns: list[Turn] = [("system", row["system"])] if has(row, "system") else []
    history = row["history"] if has(row, "history") else []
    if not isinstance(history, list):
        raise RowProblem(f"history is {type(history).__name__}, not a list of pairs")
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowProblem(f"history[{number - 1}] is not a pair of question and answer")
        turns += [("user", pair[0]), ("assistant", pair[1])]
    return turns


def instruction_turns(row: JsonRow, key: str) -> list[Turn]:
    """Alpaca's turns up to the question: system, history, and instruction with input below it."""
    instruction, context = row[key], row["input"] if has(row, "input") else ""
    if isinstance(instruction, str) and isinstance(context, str):
        parts = [part for part in (instruction, context) if part.strip()]
        return [*history_turns(row), ("user", "\n".join(parts))]
    wrong = context if isinstance(instruction, str) else instruction
    return [*history_turns(row), ("user", wrong)]
