"""Data of a Python program: rows become a file of a run, values become prompts.

Stages read files, whose content is part of a run's identity. Rows that are given in memory are
written to a file that is named by a hash of its content: the same rows give the same file, so that
a run with them can resume, and other rows are recognized.
"""

import hashlib
import json
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from huatuo_jax.core import distributed
from huatuo_jax.core.files import as_path, check_address, write_rows
from huatuo_jax.core.progress import tell
from huatuo_jax.data.answers import AnswerToTokenize, Sampled
from huatuo_jax.data.formats.dialogues import PROMPT_FORMATS, Terms, recognise
from huatuo_jax.data.formats.turns import (
    MAX_TURN_CHARS,
    RowLeftOut,
    RowProblem,
    Turn,
    TurnLike,
    listed_turns,
    prompt_messages,
)
from huatuo_jax.data.records import Message, Messages, Prompt, answer, content_id
from huatuo_jax.data.text import NotJson, json_value

FOLDER = "python_data"
"""The folder of the workdir for files of rows that were given in memory."""

Rows = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
"""A path (or the name of a data set on the Hub), or rows: dicts, or a `datasets.Dataset`."""

DialogueLike = str | Sequence[Message | Mapping[str, Any]] | Mapping[str, Any] | Prompt
"""The user's words; or messages; or a row with messages, as in a file of prompts."""

_SOURCE = "python"
_HASH_DIGITS = 16


def as_file(
    data: Rows,
    workdir: str | os.PathLike[str],
    name: str,
    *,
    say: Callable[[str], object] = tell,
) -> str:
    """Returns a path that a stage can read: the given one, or that of a file of the rows.

    Args:
        data: a path, which is returned unchanged; or the rows.
        workdir: of the run; rows are written to `python_data/{name}-{hash}.jsonl` in it.
        name: of the data, also in messages.
        say: called with a line for each kind of value that was converted to JSON.

    Raises:
        ValueError: an unusable address, there are no rows, one is not a dict, or it
            holds a value that JSON cannot represent.
        OSError: the file cannot be written.
    """
    if isinstance(data, str | os.PathLike):
        check_address(data, name=name)
        return os.fspath(data)
    check_address(workdir, name="workdir")
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise ValueError(
            f"{name} is a {type(data).__name__}; it should be a list of rows (dicts), a "
            "datasets.Dataset (one split of a DatasetDict), or a path"
        )
    # An iterator is held in memory, as it is read twice.
    rows = list(data) if iter(data) is data else data
    whole, mended, number = hashlib.sha256(), Counter[str](), 0
    for row, notes in _json_rows(rows, name):
        whole.update(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace"))
        whole.update(b"\n")
        mended.update(notes)
        number += 1
    if not number:
        raise ValueError(f"{name} is empty: it should hold at least one row")
    path = as_path(workdir) / FOLDER / f"{name}-{whole.hexdigest()[:_HASH_DIGITS]}.jsonl"
    distributed.check_joined()
    distributed.check_same(f"the content of {name}", path.name)
    distributed.by_first(f"file of {name}", lambda: _write(path, rows, name))
    if distributed.is_first():
        for note, count in mended.items():
            say(f"{name}: {count} of {number} rows: {note}")
    return str(path)


def as_prompt(dialogue: DialogueLike, *, name: str = "dialogue") -> Prompt:
    """Returns a prompt, checked as the rows of a file of prompts are.

    Without an id of its own it gets one that follows from its text.

    Args:
        dialogue: see `DialogueLike`.
        name: in messages.

    Raises:
        ValueError: it has no turns, an empty one or one that is not text, an unknown role, roles
            out of order, or does not end with the user.
    """
    try:
        if isinstance(dialogue, Mapping):
            row = json_value(dialogue).value
            terms = Terms(file_name=_SOURCE)
            (prompt,) = recognise(row, PROMPT_FORMATS).convert(row, terms).records
            assert isinstance(prompt, Prompt)
            return prompt
        whole = dialogue if isinstance(dialogue, Prompt) else None
        turns = _turns(dialogue if whole is None else whole.messages, name)
        messages, _ = prompt_messages(turns, max_turn_chars=MAX_TURN_CHARS)
    except (RowProblem, RowLeftOut, NotJson) as problem:
        raise ValueError(f"{name}: {problem}") from None
    return whole or prompt_of(messages)


def prompt_of(messages: Messages) -> Prompt:
    """Returns the prompt of messages that are valid already; its id follows from them."""
    return Prompt(content_id(_SOURCE, messages), messages, _SOURCE)


def as_prompts(dialogues: Iterable[DialogueLike], *, name: str) -> list[Prompt]:
    """Applies `as_prompt` to several dialogues, named `{name}[{index}]` in messages.

    Raises:
        ValueError: as `as_prompt`; or it is not a list of dialogues.
    """
    if isinstance(dialogues, str | bytes | Mapping | Prompt) or not isinstance(dialogues, Iterable):
        raise ValueError(
            f"{name} is a {type(dialogues).__name__}; it should be a list of dialogues"
        )
    return [as_prompt(one, name=f"{name}[{index}]") for index, one in enumerate(dialogues)]


def as_answer(
    response: str, sampled: Sampled | None = None, *, name: str = "response"
) -> AnswerToTokenize:
    """Returns a response for scoring; an empty one is a response like any other.

    Args:
        response: its text.
        sampled: its sampled ids; None if they are not known.
        name: in messages.

    Raises:
        ValueError: it is not text.
    """
    if not isinstance(response, str):
        raise ValueError(f"{name} is {type(response).__name__}, not text")
    return AnswerToTokenize(answer(response), sampled or Sampled())


def _turns(dialogue: object, name: str) -> Sequence[TurnLike]:
    if isinstance(dialogue, str):
        return [Turn("user", dialogue)]
    if not isinstance(dialogue, Sequence) or isinstance(dialogue, bytes):
        raise ValueError(
            f"{name} is a {type(dialogue).__name__}; it should be text, a list of messages with "
            "role and content, or a dict with messages"
        )
    if all(isinstance(item, Message) for item in dialogue):
        messages: Messages = tuple(dialogue)
        return messages
    return listed_turns([_as_row(item) for item in dialogue], name)


def _as_row(item: object) -> object:
    return {"role": item.role, "content": item.content} if isinstance(item, Message) else item


def _json_rows(
    rows: Iterable[object], name: str
) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """Yields each row in JSON's own types, with the conversions made."""
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{name}[{index}] is a {type(row).__name__}; a row should be a dict, with the "
                "fields of a line of a file"
            )
        try:
            converted = json_value(row)
        except NotJson as problem:
            raise ValueError(f"{name}[{index}]: {problem}") from None
        yield converted.value, converted.notes


def _write(path: pathlib.Path, rows: Iterable[object], name: str) -> None:
    if not path.exists():
        write_rows(path, (row for row, _ in _json_rows(rows, name)))
