"""Rows out of files: JSON, JSON Lines, CSV, plain lines, parquet, Arrow folders, the hub.

What a file holds is told from its content where that is possible, so that JSON Lines under a
`.json` ending reads as what it is. Text is UTF-8 (a byte-order mark is taken off) or GB18030,
decoded strictly. What is wrong with one row comes out as a `RowError` in its place; what is wrong
with the file as a whole is a `ValueError`.
"""

import csv
import json
import os
import pathlib
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from huatuo_jax.data.text_lines import Line, read_lines

Layout = Literal["json lines", "json list", "json object", "csv", "lines", "datasets", "hub"]

_SAMPLE_LINES = 20
_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"\s*")


class Row(NamedTuple):
    """One row as it stood in the file; `line` is where it begins, counted from 1.

    In parquet, Arrow and hub data, which have no lines, `line` is the number of the row.
    """

    file: str
    line: int
    value: Any


@dataclass(frozen=True)
class RowError:
    """A row that could not be read, where it stands, and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        """`file:line: reason`, as compilers write it."""
        return f"{self.file}:{self.line}: {self.reason}"


def read_rows(path: str | os.PathLike[str], *, split: str = "train") -> Iterator[Row | RowError]:
    """Yields the rows of a file, a folder or a hub data set (`owner/name`), in order.

    JSON Lines, CSV, plain lines and parquet are streamed; a JSON list is loaded whole.

    Args:
        path: the file, the folder, or the name on the hub.
        split: which part to read where the data has named parts.

    Raises:
        ValueError: there is no such file, nothing here reads it, it is neither UTF-8 nor GB18030,
            or a JSON list breaks off (the rows behind the break cannot be counted).
    """
    layout = find_layout(path)
    if layout in ("datasets", "hub"):
        yield from _dataset_rows(str(path), layout, split)
    elif layout == "json lines":
        yield from _json_lines(pathlib.Path(path))
    elif layout == "csv":
        yield from _csv_rows(pathlib.Path(path))
    elif layout == "lines":
        for line in read_lines(pathlib.Path(path)):
            if line.text.strip():
                yield _line_row(str(path), line, line.text.rstrip("\r\n"))
    else:
        yield from _json_document(pathlib.Path(path), layout)


def find_layout(path: str | os.PathLike[str]) -> Layout:
    """Tells how the rows of a file are laid out, from its content before its ending.

    Raises:
        ValueError: there is no such file, or nothing here reads it.
    """
    file = pathlib.Path(path)
    if file.is_dir():
        return "datasets"
    if not file.exists():
        if _HUB_NAME.fullmatch(str(path)) and file.suffix.lower() not in _ENDINGS:
            return "hub"
        raise ValueError(f"{path}: no such file or folder (a hub data set is named owner/name)")
    suffix = file.suffix.lower()
    if suffix in (".parquet", ".arrow"):
        return "datasets"
    if suffix in (".csv", ".tsv"):
        return "csv"
    sample = _first_lines(file)
    if not sample:
        raise ValueError(f"{path}: the file is empty")
    if sample[0].lstrip()[0] in "{[":
        return _json_layout(sample, suffix)
    if suffix in (".jsonl", ".ndjson"):
        return "json lines"
    if suffix == ".txt":
        return "lines"
    raise ValueError(
        f"{path}: neither JSON nor a known ending; {', '.join(_ENDINGS)} and folders of"
        " datasets can be read"
    )


def _first_lines(path: pathlib.Path) -> list[str]:
    """The first lines that are not blank, as far as telling the layout needs them."""
    sample: list[str] = []
    for line in read_lines(path):
        if line.text.strip():
            sample.append(line.text)
        if len(sample) == _SAMPLE_LINES:
            break
    return sample


def _json_layout(sample: list[str], suffix: str) -> Layout:
    """JSON Lines if a line is a whole value by itself, else a list or an object over many lines."""
    opening = sample[0].lstrip()[0]
    whole: Layout = "json list" if opening == "[" else "json object"
    first = _complete(sample[0])
    if first is not None and len(sample) > 1:
        return "json lines"
    if first is not None:
        # One line: a list of rows, unless it is itself the row (a bare list of turns).
        is_row = isinstance(first, list) and any(isinstance(item, str) for item in first)
        return "json lines" if is_row else whole
    # The first line is cut, or the value goes on. A later line that is whole tells.
    others = [line for line in sample[1:] if line.startswith(opening)]
    if any(_complete(line) is not None for line in others):
        if opening == "{" or suffix in (".jsonl", ".ndjson"):
            return "json lines"
    return whole


def _complete(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _line_row(file: str, line: Line, value: object) -> Row | RowError:
    return RowError(file, line.number, line.fault) if line.fault else Row(file, line.number, value)


def _json_lines(path: pathlib.Path) -> Iterator[Row | RowError]:
    for line in read_lines(path):
        if not line.text.strip():
            continue
        if line.fault:
            yield RowError(str(path), line.number, line.fault)
            continue
        try:
            yield Row(str(path), line.number, json.loads(line.text.strip()))
        except (ValueError, RecursionError) as problem:
            yield RowError(str(path), line.number, _json_reason(problem, line.text))


def _json_reason(problem: Exception, text: str) -> str:
    if not isinstance(problem, json.JSONDecodeError):
        return f"not JSON: {problem}"
    cut = problem.pos >= len(text.rstrip()) or problem.msg.startswith("Unterminated string")
    hint = " (the line seems cut off)" if cut else ""
    return f"not JSON: {problem.msg} at column {problem.colno}{hint}"


def _json_document(path: pathlib.Path, layout: Layout) -> Iterator[Row]:
    """The rows of a JSON list, or of an object that maps ids to rows, or the object itself."""
    lines = []
    for line in read_lines(path):
        if line.fault:
            raise ValueError(f"{path}:{line.number}: {line.fault}")
        lines.append(line.text)
    text = "".join(lines)
    items = _scan(path, text, "]" if layout == "json list" else "}")
    if layout == "json list":
        for _, line_number, value in items:
            yield Row(str(path), line_number, value)
        return
    fields = list(items)
    if len(fields) > 1 and all(isinstance(value, dict) for _, _, value in fields):
        for key, line_number, value in fields:
            yield Row(str(path), line_number, {"id": key, **value})
    else:
        yield Row(str(path), 1, {key: value for key, _, value in fields})


def _scan(path: pathlib.Path, text: str, closing: str) -> Iterator[tuple[str, int, Any]]:
    """Yields (key, line, value) of the list or object that is the whole text, one at a time."""
    position, line, counted = _skip_space(text, _skip_space(text, 0) + 1), 1, 0
    count = 0
    try:
        while text[position] != closing:
            if count:
                position = _skip_mark(text, position, ",")
            key = ""
            line, counted = line + text.count("\n", counted, position), position
            if closing == "}":
                key, position = _DECODER.raw_decode(text, position)
                position = _skip_mark(text, _skip_space(text, position), ":")
            value, position = _DECODER.raw_decode(text, position)
            yield key, line, value
            count += 1
            position = _skip_space(text, position)
        if text[position + 1 :].strip():
            raise json.JSONDecodeError("Text after the end", text, position + 1)
    except (json.JSONDecodeError, IndexError, RecursionError) as problem:
        broken = text.count("\n", 0, getattr(problem, "pos", len(text))) + 1
        reason = getattr(problem, "msg", None)
        if reason is None:
            ended = isinstance(problem, IndexError)
            reason = "the file ends before the list or object does" if ended else str(problem)
        raise ValueError(
            f"{path}:{broken}: not JSON: {reason}, after {count} good rows;"
            " the rows behind cannot be read"
        ) from problem


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _skip_mark(text: str, position: int, mark: str) -> int:
    if text[position] != mark:
        raise json.JSONDecodeError(f"Expecting {mark!r}", text, position)
    return _skip_space(text, position + 1)


class _LineFeed:
    """Lines for the csv module that remembers what a row took, and can take lines back."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._again: deque[Line] = deque()
        self.taken: list[Line] = []

    def __iter__(self) -> "_LineFeed":
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self.taken.append(line)
        return line.text

    def give_back_all_but_first(self) -> None:
        self._again.extendleft(reversed(self.taken[1:]))


def _csv_rows(path: pathlib.Path) -> Iterator[Row | RowError]:
    """CSV rows as dicts by header; `line` is where the row begins, quoted line breaks counted."""
    csv.field_size_limit(2**31 - 1)  # A turn that is too long is reported later, by its length.
    feed = _LineFeed(read_lines(path))
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(feed, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        feed.taken = []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as problem:
            # An unclosed quote may have swallowed good rows: go on at the very next line.
            feed.give_back_all_but_first()
            yield RowError(str(path), feed.taken[0].number, f"not CSV: {problem} (a stray quote?)")
            continue
        first = feed.taken[0].number
        fault = next((line.fault for line in feed.taken if line.fault), None)
        if header is None:
            if fault:
                raise ValueError(f"{path}:{first}: {fault}")
            header = fields
        elif fault:
            yield RowError(str(path), first, fault)
        elif len(fields) not in (0, len(header)):
            yield RowError(str(path), first, f"{len(fields)} fields, the header has {len(header)}")
        elif fields:
            yield Row(str(path), first, dict(zip(header, fields, strict=True)))


def _dataset_rows(path: str, layout: Layout, split: str) -> Iterator[Row]:
    import datasets  # Takes seconds to import, and plain files do not need it.

    folder = pathlib.Path(path)
    try:
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            rows = datasets.load_from_disk(path)
            if isinstance(rows, datasets.DatasetDict):
                rows = _one_split(rows, path, split)
        elif folder.suffix.lower() in (".parquet", ".arrow") and folder.is_file():
            rows = datasets.load_dataset(
                folder.suffix.lower()[1:], data_files={split: path}, split=split, streaming=True
            )
        else:
            rows = datasets.load_dataset(path, split=split, streaming=layout == "datasets")
        for number, value in enumerate(rows, start=1):
            yield Row(path, number, value)
    except Exception as problem:  # The library raises whatever its many back ends raise.
        first_line = str(problem).strip().split("\n")[0]
        hint = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        where = f"the hub{hint}" if layout == "hub" else f"split {split!r}"
        raise ValueError(
            f"{path}: cannot be read from {where}: {type(problem).__name__}: {first_line}"
        ) from problem


def _one_split(parts: Any, path: str, split: str) -> Any:
    if split not in parts:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(parts)}")
    return parts[split]
