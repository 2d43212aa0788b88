"""Rows of data files: JSON, JSON Lines, CSV, plain lines, parquet, Arrow folders and the Hub.

The layout is recognized by the content if possible, so JSON Lines with a `.json` ending are read as
JSON Lines. `huatuo_jax.data.text` decodes text and converts every value to JSON's own types, so
that it can be written again. A fault in one row is a `RowError` in its place; a fault in the file
as a whole is a `ValueError`.
"""

import csv
import json
import os
import pathlib
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from huatuo_jax.core.files import as_path, check_local
from huatuo_jax.data.formats.turns import FIELD_NAMES, is_huatuo_list, is_turn
from huatuo_jax.data.records import shown
from huatuo_jax.data.text import Line, NotJson, choose_encoding, json_value, read_lines

Layout = Literal["json lines", "json list", "json object", "csv", "lines", "datasets", "hub"]

_SAMPLE_LINES = 20
_REASON_CHARS = (220, 100)  # of the start and the end of a longer reason
_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SPACE = re.compile(r"\s*")


class Row(NamedTuple):
    """One row of a file; `line` is where it begins, counted from 1.

    In parquet, Arrow and hub data, which have no lines, `line` is the number of the row. `mended`
    names the conversions that made the value JSON.
    """

    file: str
    line: int
    value: Any
    mended: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowError:
    """A row that could not be read: its file, its line and the reason."""

    file: str
    line: int
    reason: str

    def __post_init__(self) -> None:
        """Shortens a reason that quotes much of the row."""
        object.__setattr__(self, "reason", shortened(self.reason))

    def __str__(self) -> str:
        """Returns `file:line: reason`, as compilers write it."""
        return f"{self.file}:{self.line}: {self.reason}"


def shortened(reason: str) -> str:
    """Shortens a reason to some hundred characters; a longer one loses its middle."""
    first, last = _REASON_CHARS
    if len(reason) <= first + last + 5:
        return reason
    return f"{reason[:first]} ... {reason[-last:]}"


def read_rows(
    path: str | os.PathLike[str], *, split: str = "train", encoding: str | None = None
) -> Iterator[Row | RowError]:
    """Yields the rows of a file, a folder or a hub data set (`owner/name`), in order.

    JSON Lines, CSV, plain lines and parquet are streamed; a JSON list is loaded whole. The files of
    a folder are read one after the other, each by itself, so their columns may differ.

    Args:
        path: the file, the folder, or the name on the hub.
        split: the part to read if the data has named parts.
        encoding: of text files; None detects it (`huatuo_jax.data.text.choose_encoding`).

    Raises:
        ValueError: there is no such file, its format or encoding is not recognized, a CSV header
            names a column twice, or a JSON list breaks off (the rows after the break cannot be
            counted).
    """
    for row in _rows_as_written(path, split, encoding):
        if isinstance(row, RowError):
            yield row
            continue
        try:
            value, mended = json_value(row.value)
        except NotJson as problem:
            yield RowError(row.file, row.line, str(problem))
        else:
            yield Row(row.file, row.line, value, mended)


def _rows_as_written(
    path: str | os.PathLike[str], split: str, encoding: str | None
) -> Iterator[Row | RowError]:
    layout, file = find_layout(path, encoding), as_path(path)
    if layout in ("datasets", "hub"):
        yield from _dataset_rows(str(path), layout, split, encoding)
    elif layout == "json lines":
        yield from _json_lines(file, encoding)
    elif layout == "csv":
        yield from _csv_rows(file, encoding)
    elif layout == "lines":
        for line in read_lines(file, encoding):
            if line.text.strip():
                yield _line_row(str(path), line, line.text.rstrip("\r\n"))
    else:
        yield from _json_document(file, layout, encoding)


def find_layout(path: str | os.PathLike[str], encoding: str | None = None) -> Layout:
    """Recognizes the layout of a file's rows, by its content first and its ending second.

    Raises:
        ValueError: there is no such file, or its format or encoding is not recognized.
    """
    file = as_path(path)
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
        choose_encoding(file, encoding)
        return "csv"
    sample = _first_lines(file, encoding)
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


def _first_lines(path: pathlib.Path, encoding: str | None) -> list[str]:
    """Returns the first lines that are not blank, enough to recognize the layout."""
    sample: list[str] = []
    for line in read_lines(path, encoding):
        if line.text.strip():
            sample.append(line.text)
        if len(sample) == _SAMPLE_LINES:
            break
    return sample


def _json_layout(sample: list[str], suffix: str) -> Layout:
    """Returns JSON Lines if one line is a whole value, else a list or object over many lines."""
    opening = sample[0].lstrip()[0]
    whole: Layout = "json list" if opening == "[" else "json object"
    first = _complete(sample[0])
    if first is not None and len(sample) > 1:
        return "json lines"
    if first is not None:
        # One line: a list of rows, unless it is itself the row (a bare list of turns).
        is_row = isinstance(first, list) and any(isinstance(item, str) for item in first)
        return "json lines" if is_row else whole
    # The first line is cut, or the value continues. A later line that is complete decides.
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


def _fields_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object of a JSON text; refuses a field that occurs twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        repeated = _repeated(name for name, _ in pairs)
        raise ValueError(f"the field {shown(repeated[0])!r} occurs twice in one object")
    return fields


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


_DECODER = json.JSONDecoder(object_pairs_hook=_fields_once)


def _json_lines(path: pathlib.Path, encoding: str | None) -> Iterator[Row | RowError]:
    for line in read_lines(path, encoding):
        if not line.text.strip():
            continue
        if line.fault:
            yield RowError(str(path), line.number, line.fault)
            continue
        try:
            yield Row(str(path), line.number, _DECODER.decode(line.text.strip()))
        except (ValueError, RecursionError) as problem:
            yield RowError(str(path), line.number, _json_reason(problem, line.text))


def _json_reason(problem: Exception, text: str) -> str:
    if not isinstance(problem, json.JSONDecodeError):
        return f"not JSON: {problem}"
    cut = problem.pos >= len(text.rstrip()) or problem.msg.startswith("Unterminated string")
    hint = " (the line seems cut off)" if cut else ""
    return f"not JSON: {problem.msg} at column {problem.colno}{hint}"


def _json_document(path: pathlib.Path, layout: Layout, encoding: str | None) -> Iterator[Row]:
    """Yields the rows of a JSON list or of an object from ids to rows, or the object itself."""
    lines = []
    for line in read_lines(path, encoding):
        if line.fault:
            raise ValueError(f"{path}:{line.number}: {line.fault}")
        lines.append(line.text.rstrip("\r\n"))
    text = "\n".join(lines)
    items = _scan(path, text, "]" if layout == "json list" else "}")
    if layout == "json list":
        for _, line_number, value in items:
            yield Row(str(path), line_number, value)
        return
    fields = list(items)
    if len(fields) > 1 and all(_is_row_by_id(key, value) for key, _, value in fields):
        for key, line_number, value in fields:
            yield Row(str(path), line_number, _row_with_id(key, value))
    else:
        try:
            yield Row(str(path), 1, _fields_once([(key, value) for key, _, value in fields]))
        except ValueError as problem:
            raise ValueError(f"{path}: {problem}") from None


def _is_row_by_id(key: str, value: object) -> bool:
    """Returns whether a field of the document is a row under its id, not a field of one row."""
    if key in FIELD_NAMES:
        return False
    if isinstance(value, list):
        return is_huatuo_list(value) or (bool(value) and all(map(is_turn, value)))
    return isinstance(value, dict)


def _row_with_id(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, list):
        return {"id": key, ("data" if is_huatuo_list(value) else "messages"): value}
    return {"id": key, **value}


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
    except (ValueError, IndexError, RecursionError) as problem:
        broken = text.count("\n", 0, getattr(problem, "pos", position)) + 1
        reason = getattr(problem, "msg", None)
        if reason is None:
            ended = isinstance(problem, IndexError)
            reason = "the file ends before the list or object does" if ended else str(problem)
        raise ValueError(
            f"{path}:{broken}: not JSON: {reason}, after {count} good rows;"
            " the rows after it cannot be read"
        ) from problem


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _skip_mark(text: str, position: int, mark: str) -> int:
    if text[position] != mark:
        raise json.JSONDecodeError(f"Expecting {mark!r}", text, position)
    return _skip_space(text, position + 1)


class _LineFeed:
    """Lines for the csv module; records the lines of a row, and can take lines back."""

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


def _csv_rows(path: pathlib.Path, encoding: str | None) -> Iterator[Row | RowError]:
    """Yields CSV rows as dicts by header; `line` is where a row begins, quoted breaks counted.

    A blank cell is an absent value.
    """
    csv.field_size_limit(2**31 - 1)  # Turns that are too long are reported later, by their length.
    feed = _LineFeed(read_lines(path, encoding))
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
            # An unclosed quote may have swallowed good rows: continue at the very next line.
            feed.give_back_all_but_first()
            yield RowError(str(path), feed.taken[0].number, f"not CSV: {problem} (a stray quote?)")
            continue
        first = feed.taken[0].number
        fault = next((line.fault for line in feed.taken if line.fault), None)
        if header is None:
            if fault:
                raise ValueError(f"{path}:{first}: {fault}")
            header = _csv_header(fields, f"{path}:{first}")
        elif fault:
            yield RowError(str(path), first, fault)
        elif len(fields) not in (0, len(header)):
            yield RowError(str(path), first, f"{len(fields)} fields, the header has {len(header)}")
        elif fields:
            cells = (cell if cell.strip() else None for cell in fields)
            yield Row(str(path), first, dict(zip(header, cells, strict=True)))


def _csv_header(fields: Sequence[str], place: str) -> list[str]:
    """Returns the names of the columns; several without a name are numbered."""
    names = [field.strip() for field in fields]
    repeated = [name for name in _repeated(names) if name]
    if repeated:
        raise ValueError(f"{place}: the header names the column {shown(repeated[0])!r} twice")
    if names.count("") > 1:
        names = [name or f"column {number}" for number, name in enumerate(names, start=1)]
    return names


def _dataset_rows(
    path: str, layout: Layout, split: str, encoding: str | None
) -> Iterator[Row | RowError]:
    import datasets  # Takes seconds to import, and plain files do not need it.

    folder = as_path(path)
    if files := _files_of_folder(folder, split):
        for file in files:
            yield from _rows_as_written(file, split, encoding)
        return
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
    except Exception as problem:  # The library raises the errors of its many back ends.
        first_line = shortened(str(problem).strip().split("\n")[0])
        hint = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        where = f"the hub{hint}" if layout == "hub" else f"split {split!r}"
        raise ValueError(
            f"{path}: cannot be read from {where}: {type(problem).__name__}: {first_line}"
        ) from problem


def _one_split(parts: Any, path: str, split: str) -> Any:
    if split not in parts:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(map(str, parts))}")
    return parts[split]


def _files_of_folder(folder: pathlib.Path, split: str) -> list[str]:
    """Returns a folder's files of one split; none if the `datasets` library has to read them.

    The library itself requires the same columns in all of them.
    """
    import datasets

    saved = (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
    if saved or not folder.is_dir():
        return []
    check_local(folder, name="path", why="name the files of a folder in a bucket one by one")
    try:
        parts = datasets.load_dataset_builder(str(folder)).config.data_files or {}
    except Exception as problem:  # As in `_dataset_rows`.
        first_line = shortened(str(problem).strip().split("\n")[0])
        raise ValueError(f"{folder}: cannot be read: {first_line}") from problem
    files = list(map(str, _one_split(parts, str(folder), split)))
    known = all(pathlib.Path(file).suffix.lower() in _ENDINGS for file in files)
    return files if known else []
