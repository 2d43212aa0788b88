r"""JSON Lines, the files between stages: one object a line, in UTF-8, split at `\n` alone.

`str.splitlines` also cuts at U+2028, U+2029 and U+0085, which JSON text may hold unescaped. A line
end written as `\r\n` is read too, and blank lines are passed over.
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, NamedTuple

from huatuo_jax import atomic

Row = dict[str, Any]
Unfinished = Literal["read", "skip"]


class Line(NamedTuple):
    """One line of a file.

    Attributes:
        number: counted from 1.
        end: the byte behind its line end.
        row: its object.
    """

    number: int
    end: int
    row: Row


def read_lines(path: str | os.PathLike[str], *, unfinished: Unfinished) -> Iterator[Line]:
    """Yields the lines of a file in order.

    Args:
        path: the file.
        unfinished: what a last line without a line end is: `read` takes it like any other (files
            that were written whole, or by others), `skip` passes it over (files that grow by
            lines, where it is what a killed run left).

    Raises:
        ValueError: a line that is not UTF-8, not JSON or not an object; with file and line.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        end = 0
        for number, raw in enumerate(file, start=1):
            end += len(raw)
            if unfinished == "skip" and not raw.endswith(b"\n"):
                return
            if raw.strip():
                yield Line(number, end, _row(path, number, raw))


def read_rows(path: str | os.PathLike[str], *, unfinished: Unfinished) -> list[Row]:
    """Returns the objects of a file in order; errors as `read_lines`."""
    return [line.row for line in read_lines(path, unfinished=unfinished)]


def write_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a file whole or not at all; one that stands there is replaced.

    Raises:
        ValueError: a row that JSON cannot write, with its number and id.
        OSError: the file cannot be written.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.tmp")
    try:
        with beside.open("wb") as file:
            for number, row in enumerate(rows, start=1):
                file.write(_encoded(path, number, row))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


class AppendedFile:
    """A file that grows by rows and is cut back to one when a run resumes; a context manager.

    A kill of the process leaves rows whole, but for a last line without its end, which every cut
    removes. What is appended survives a crash of the machine from the next `sync` on.
    """

    def __init__(self, path: str | os.PathLike[str], *, locked: bool) -> None:
        """Opens the file, or makes it; nothing is cut yet.

        Args:
            path: the file.
            locked: whether another process that opens it so is refused.

        Raises:
            ValueError: another process has it.
            OSError: it cannot be opened.
        """
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if locked:
                atomic.lock_file(self._file, self.path)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> "AppendedFile":
        """Returns the file itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes it."""
        self.close()

    def lines(self) -> Iterator[Line]:
        """Yields the whole lines; errors as `read_lines`."""
        return read_lines(self.path, unfinished="skip")

    def cut(self, end: int) -> None:
        """Removes what stands behind a byte, as `Line.end` gives it; 0 removes all."""
        if end != os.fstat(self._file).st_size:
            os.ftruncate(self._file, end)

    def cut_unfinished(self) -> None:
        """Removes a last line that has no line end."""
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            whole = self.path.read_bytes()
            self.cut(whole.rfind(b"\n") + 1)

    def keep_while(self, keeps: Callable[[Row], bool]) -> None:
        """Removes the first row that is not to be kept, and all behind it.

        Raises:
            ValueError: as `read_lines`.
        """
        end = 0
        for line in self.lines():
            if not keeps(line.row):
                break
            end = line.end
        self.cut(end)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows.

        Raises:
            ValueError: a row that JSON cannot write, with its id; none is added then.
            OSError: they cannot be written.
        """
        data = b"".join(_encoded(self.path, number, row) for number, row in enumerate(rows, 1))
        while data:  # One write as a rule: what a kill can leave is a line or nothing.
            data = data[os.write(self._file, data) :]

    def sync(self) -> None:
        """Puts all rows on disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Puts all rows on disk and closes the file."""
        try:
            self.sync()
        finally:
            os.close(self._file)


def _row(path: str | os.PathLike[str], number: int, raw: bytes) -> Row:
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}:{number}: not a line of JSON: {error}") from error
    if not isinstance(value, dict):
        held = type(value).__name__
        raise ValueError(f"{os.fspath(path)}:{number}: holds a {held}, it should be an object")
    return value


def _encoded(path: pathlib.Path, number: int, row: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        name = f" (id {row['id']!r})" if "id" in row else ""
        raise ValueError(f"{path}: row {number}{name} cannot be written: {error}") from error
    # Half a surrogate pair, which UTF-8 lacks, becomes JSON's escape of it.
    return f"{text}\n".encode("utf-8", "backslashreplace")
