r"""Paths, files that are complete or absent, and JSON Lines files, whole or appended to.

A path is one of a file system or an address such as `gs://bucket/run`: `as_path` makes either, with
the methods of `pathlib.Path`. On a file system complete files are written beside their place and
renamed into it; `core.addresses` says what holds in a bucket.

JSON Lines, the files between stages, hold one object a line in UTF-8 and are split at `\n` alone:
`str.splitlines` also cuts at U+2028, U+2029 and U+0085, which JSON text may hold unescaped. A line
end written as `\r\n` is read too, and blank lines are skipped.
"""

import atexit
import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Literal, NamedTuple, cast

# Values of some flags are named, as NAME=PATH or SET:PATH. `pathlib` leaves one slash of two.
_ADDRESS = re.compile(
    r"(?:[\w.-]+[=:])?(?P<address>[A-Za-z][A-Za-z0-9+.-]+:/(?P<second>/?).*)", re.DOTALL
)
_ONE_SLASH = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")
_COPY_BYTES = 8 * 2**20
_READ_BYTES = 4 * 2**20
_held: set[pathlib.Path] = set()  # Locks of this process.
Row = dict[str, Any]
Unfinished = Literal["read", "skip"]


def as_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the path of a file or folder, which may be an address.

    For an address it is a `core.addresses.Address`, which has the methods of `pathlib.Path`. What
    `pathlib` made of an address (`gs:/bucket/run`) is taken too.

    Raises:
        ValueError: an unusable address, see `check_address`.
    """
    text = os.fspath(path)
    if isinstance(path, pathlib.PurePath):
        text = _ONE_SLASH.sub(r"\1://", text)
    if not is_address(text):
        return pathlib.Path(path)
    scheme = text.partition("://")[0].lower()
    if scheme == "file":
        raise ValueError(f"{text} is an address, where a path is needed: give the path alone")
    if scheme in ("http", "https"):
        raise ValueError(f"{text} is an address on the web: download the file and give its path")
    return cast(pathlib.Path, _addresses().open_address(text))


def is_address(path: str | os.PathLike[str]) -> bool:
    """Tells an address, such as `gs://bucket/run`, from a path of a file system."""
    return "://" in os.fspath(path)


def absolute(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns a path without `..` and links as it is seen from the root; an address as it is."""
    given = as_path(path)
    return given if is_address(given) else pathlib.Path(os.path.abspath(given))


def check_address(path: str | os.PathLike[str], *, name: str) -> None:
    """Raises ValueError where a path is an unusable address; paths are not looked at.

    Args:
        path: as the user gave it; alone, or as NAME=PATH or SET:PATH.
        name: of the field, for the message.

    Raises:
        ValueError: nothing knows the scheme, no such bucket, no right to read, no login.
    """
    found = _ADDRESS.fullmatch(os.fspath(path))
    if found is None or (isinstance(path, str) and not found["second"]):
        return
    given = found["address"]
    try:
        address = as_path(given if found["second"] else pathlib.Path(given))
        _addresses().reach(address)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def check_local(path: str | os.PathLike[str], *, name: str, why: str) -> None:
    """Raises ValueError where a path is an address.

    Args:
        path: the path.
        name: of the field, for the message.
        why: the reason, after a colon.
    """
    if is_address(as_path(path)):
        raise ValueError(f"{name}={os.fspath(path)} is an address: {why}")


def error_of_server(error: BaseException) -> str | None:
    """Returns a line for an error of a bucket's server or of the login; None for other errors."""
    return _addresses().reason(error) if "huatuo_jax.core.addresses" in sys.modules else None


def _addresses() -> Any:
    from huatuo_jax.core import addresses  # 0.2 s, which those who use no address need not spend.

    return addresses


def make_folder(path: str | os.PathLike[str]) -> None:
    """Makes a folder and those above it, where they are missing; a bucket needs none.

    Raises:
        OSError: it cannot be made.
    """
    path = as_path(path)
    if not is_address(path):
        path.mkdir(parents=True, exist_ok=True)


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Removes a folder with all that it holds, as far as that goes; there may be none."""
    path = as_path(path)
    if is_address(path):
        _addresses().remove_tree(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def staged_folder(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a folder of the file system whose files are put into `path` when the block ends.

    For code of others that writes into local folders only; a local `path` is yielded itself.
    """
    path = as_path(path)
    if not is_address(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        yield folder
        for file in sorted(one for one in folder.rglob("*") if one.is_file()):
            copy_file(file, path / file.relative_to(folder).as_posix())


def local_copy(path: str | os.PathLike[str], patterns: Iterable[str] = ("*",)) -> pathlib.Path:
    """Returns a folder of the file system with a folder's files; a local `path` itself.

    For code of others that reads from local folders only. A copy has the folder's name, is made
    anew where the files changed, and lies in the system's folder for temporary files until the
    process ends.

    Args:
        path: the folder.
        patterns: of the files that are needed, as `glob` takes them.
    """
    path = as_path(path)
    if not is_address(path):
        return path
    shapes = [pathlib.PurePosixPath(pattern) for pattern in patterns]
    wanted = {
        name: told
        for name, told in sorted(_addresses().objects_below(path).items())
        if any(len(name.parts) == len(one.parts) and name.match(str(one)) for one in shapes)
    }
    return _copied(path, tuple(wanted), repr(wanted))


@functools.cache
def _copied(folder: pathlib.Path, names: tuple[pathlib.PurePosixPath, ...], _: str) -> pathlib.Path:
    made = tempfile.mkdtemp(prefix="huatuo-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    copy = pathlib.Path(made, folder.name)
    make_folder(copy)
    for name in names:
        copy_file(folder / str(name), copy / name)
    return copy


def files_below(folder: pathlib.Path) -> dict[pathlib.PurePosixPath, int]:
    """Returns the size in bytes of each file below a folder, by its path from there, in order."""
    if is_address(folder):
        told = _addresses().objects_below(folder)
        found = {name: int(told[name]["size"]) for name in told}
    else:
        found = {
            pathlib.PurePosixPath(path.relative_to(folder).as_posix()): path.stat().st_size
            for path in folder.rglob("*")
            if path.is_file()
        }
    return dict(sorted(found.items()))


def copy_file(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copies a file from and to a file system or a bucket; an object appears when it is whole."""
    source, target = as_path(source), as_path(target)
    make_folder(target.parent)
    with open_binary(source) as file:
        chunks = iter(lambda: file.read(_COPY_BYTES), b"")
        if is_address(target):
            write_chunks(target, chunks)
            return
        with target.open("wb") as copy:
            copy.writelines(chunks)


def open_binary(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file for reading bytes; one in a bucket is read in ranges.

    Raises:
        OSError: it cannot be read.
    """
    path = as_path(path)
    if is_address(path):
        return cast(BinaryIO, io.BufferedReader(_addresses().Reader(path), _READ_BYTES))
    return path.open("rb")


def size_of(path: pathlib.Path) -> int:
    """Returns a file's length in bytes."""
    if is_address(path):
        return int(_addresses().Reader(path).seek(0, os.SEEK_END))
    return path.stat().st_size


def read_into(path: pathlib.Path, place: int, target: memoryview) -> int:
    """Fills memory with a range of a file; returns the number of bytes that the file lacks.

    Args:
        path: the file.
        place: where the range begins, in bytes.
        target: to be filled; its length is that of the range.
    """
    file: io.RawIOBase
    file = _addresses().Reader(path) if is_address(path) else path.open("rb", buffering=0)
    with file:
        file.seek(place)
        while len(target) and (count := file.readinto(target)):
            target = target[count:]
    return len(target)


def write_chunks(path: pathlib.Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes an object of a bucket from its pieces: complete, or not at all."""
    address: Any = path
    _addresses().write_chunks(address.fs, address.path, chunks)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], *, waits: bool = False) -> Iterator[None]:
    """Holds the lock of a file or folder in a bucket, see `addresses.BucketLock`.

    Blocks may be nested. On a file system nothing is locked: there each file that grows is.

    Args:
        path: the file or folder.
        waits: wait until another run gives it back.

    Raises:
        ValueError: another run holds it; names its process and host.
        OSError: the bucket cannot be written.
    """
    path = as_path(path)
    if not is_address(path) or path in _held:
        yield
        return
    lock = _addresses().BucketLock(path, waits=waits)
    _held.add(path)
    try:
        yield
    finally:
        _held.remove(path)
        lock.release()


def write_file(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file, complete or not at all; text as UTF-8.

    Raises:
        OSError: it cannot be written.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    if is_address(path):
        write_chunks(path, [data])
        return
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_bytes(data)
    os.replace(beside, path)


def hash_of_files(paths: Iterable[pathlib.Path]) -> str:
    """Returns a hash of the files' names and bytes, in the order given; of code, on any Python."""
    whole = hashlib.sha256()
    for path in paths:
        whole.update(path.name.encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()


def lock_file(file: int, path: pathlib.Path) -> None:
    """Locks an open file for this process; the kernel unlocks it when the process ends.

    Raises:
        ValueError: another process has locked it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"{path}: another process writes this file") from error


@contextlib.contextmanager
def locked_file(path: pathlib.Path) -> Iterator[None]:
    """Holds the lock of a file that is there, on a file system or in a bucket.

    Raises:
        ValueError: another process has locked it.
    """
    if is_address(path):
        with locked(path):
            yield
        return
    with path.open("rb") as file:
        lock_file(file.fileno(), path)
        yield


class Line(NamedTuple):
    """One line of a file.

    Attributes:
        number: counted from 1.
        end: offset of the byte after its line end.
        row: its object.
    """

    number: int
    end: int
    row: Row


def read_lines(path: str | os.PathLike[str], *, unfinished: Unfinished) -> Iterator[Line]:
    """Yields the lines of a file in order.

    Args:
        path: the file.
        unfinished: `read` takes a last line without a line end like any other (files that were
            written whole, or by others), `skip` ignores it (appended files, where a killed run
            left it).

    Raises:
        ValueError: a line that is not UTF-8, not JSON or not an object; with file and line.
        OSError: the file cannot be read.
    """
    with open_binary(path) as file:
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
    """Writes a file, complete or not at all; an older one is replaced.

    Raises:
        ValueError: a row cannot be written as JSON (number and id).
        OSError: the file cannot be written.
    """
    path = as_path(path)
    make_folder(path.parent)
    encoded = (_encoded(path, number, row) for number, row in enumerate(rows, start=1))
    if is_address(path):
        write_chunks(path, encoded)
        return
    beside = path.with_name(f"{path.name}.tmp")
    try:
        with beside.open("wb") as file:
            file.writelines(encoded)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


class AppendedFile(contextlib.AbstractContextManager["AppendedFile"]):
    """An append-only JSON Lines file, cut back when a run resumes; a context manager.

    A killed process leaves complete rows, but for a last line without its end, which every cut
    removes. Appended rows survive a crash of the machine from the next `sync` on, and in a bucket
    (see `addresses.GrowingObject`) a kill too.
    """

    def __init__(self, path: str | os.PathLike[str], *, locked: bool) -> None:
        """Opens the file, or makes it; cuts nothing yet.

        Args:
            path: the file.
            locked: refuse a second process that opens the file locked.

        Raises:
            ValueError: another process has locked it.
            OSError: it cannot be opened.
        """
        self.path = as_path(path)
        make_folder(self.path.parent)
        self._file: Any
        with contextlib.ExitStack() as opened:
            if not is_address(self.path):
                self._file = _GrowingFile(self.path, locked=locked)
            else:
                if locked:
                    opened.callback(_addresses().BucketLock(self.path).release)
                self._file = _addresses().GrowingObject(self.path)
            opened.callback(self._file.close)
            self._closing = opened.pop_all()

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()

    def size(self) -> int:
        """Returns the file's length in bytes: where the next row will begin."""
        return int(self._file.size())

    def lines(self) -> Iterator[Line]:
        """Yields the lines that have an end; errors as `read_lines`."""
        self._file.flush()
        return read_lines(self.path, unfinished="skip")

    def row_at(self, place: int) -> Row:
        """Returns the row whose line begins at a byte; errors as `read_lines`."""
        self._file.flush()
        with open_binary(self.path) as file:
            file.seek(place)
            return _row(f"{self.path} from byte {place}", 1, file.readline())

    def cut(self, end: int) -> None:
        """Removes all bytes from `end` on, as `Line.end` gives it; 0 removes all."""
        if end != self.size():
            self._file.cut(end)

    def cut_unfinished(self) -> None:
        """Removes a last line that has no line end."""
        if not self._file.ends_a_line():
            with open_binary(self.path) as file:
                *_, last = file
            self.cut(self.size() - len(last))

    def keep_while(self, keeps: Callable[[Row], bool]) -> None:
        """Removes the first row for which `keeps` is False, and all after it.

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
        self._file.write(
            b"".join(_encoded(self.path, number, row) for number, row in enumerate(rows, 1))
        )

    def sync(self) -> None:
        """Puts all rows on disk."""
        self._file.sync()

    def close(self) -> None:
        """Puts all rows on disk and closes the file."""
        self._closing.close()

    def remove(self) -> None:
        """Removes the file and closes it."""
        self._file.cut(0)
        self.path.unlink()
        self.close()


class _GrowingFile:
    """A file of a file system that grows."""

    def __init__(self, path: pathlib.Path, *, locked: bool) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if locked:
                lock_file(self._file, path)
        except BaseException:
            os.close(self._file)
            raise

    def size(self) -> int:
        return os.fstat(self._file).st_size

    def ends_a_line(self) -> bool:
        size = self.size()
        return not size or os.pread(self._file, 1, size - 1) == b"\n"

    def cut(self, end: int) -> None:
        os.ftruncate(self._file, end)

    def write(self, data: bytes) -> None:
        while data:  # Usually one write, so that a kill leaves a line or nothing.
            data = data[os.write(self._file, data) :]

    def flush(self) -> None:
        pass  # The operating system shows at once what was written.

    def sync(self) -> None:
        os.fsync(self._file)

    def close(self) -> None:
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
    # A lone surrogate, which UTF-8 lacks, becomes JSON's escape of it.
    return f"{text}\n".encode("utf-8", "backslashreplace")
