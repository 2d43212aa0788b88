r"""Files and folders that are complete or absent, and JSON Lines files, whole or appended to.

Complete files are written beside their place and renamed into it. All paths are of this machine's
file system: an address such as `gs://bucket/run`, of which a folder named `gs:` would be made, is
refused by `check_local`.

JSON Lines, the files between stages, hold one object a line in UTF-8 and are split at `\n` alone:
`str.splitlines` also cuts at U+2028, U+2029 and U+0085, which JSON text may hold unescaped. A line
end written as `\r\n` is read too, and blank lines are skipped.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

# Values of some flags are named, as NAME=PATH or SET:PATH. `pathlib` leaves one slash of two.
_ADDRESS = re.compile(r"(?:[\w.-]+[=:])?(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?P<second>/?)")
_UNFINISHED = re.compile(r"\.tmp-[0-9a-f]{8}$")
Row = dict[str, Any]
Unfinished = Literal["read", "skip"]


def check_local(path: str | os.PathLike[str], *, name: str) -> None:
    """Raises ValueError where a path is an address, such as `gs://bucket/run`.

    Args:
        path: as the user gave it, or what `pathlib` made of it (`gs:/bucket/run`).
        name: of the field, for the message.
    """
    found = _ADDRESS.match(os.fspath(path))
    if found is None or (isinstance(path, str) and not found["second"]):
        return
    scheme = found["scheme"].lower()
    advice = "mount the bucket or disk as a folder, or copy the file, and give that path"
    if scheme == "file":
        advice = "give the path alone"
    elif scheme in ("http", "https"):
        advice = "download the file and give its path"
    raise ValueError(f"{name}={os.fspath(path)} is an address, where a path is needed: {advice}")


def make_folder(path: str | os.PathLike[str]) -> None:
    """Makes a folder and those above it, where they are missing.

    Raises:
        ValueError: the path is an address.
        OSError: it cannot be made.
    """
    check_local(path, name="folder")
    pathlib.Path(path).mkdir(parents=True, exist_ok=True)


def is_unfinished(path: str | os.PathLike[str]) -> bool:
    """Tells whether a folder is left from an interrupted write, and must never be loaded.

    The name decides, because such a folder can look complete: it is complete only after the rename.
    """
    return _UNFINISHED.search(pathlib.Path(path).name) is not None


def new_nonce() -> str:
    """Returns eight random hexadecimal digits for a temporary name."""
    return secrets.token_hex(4)


def temporary_name(target: str | os.PathLike[str], nonce: str) -> pathlib.Path:
    """Returns the folder beside `target` where it is written first, `TARGET.tmp-NONCE`."""
    target = pathlib.Path(os.path.abspath(target))
    return target.with_name(f"{target.name}.tmp-{nonce}")


def write_file(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file, complete or not at all; text as UTF-8.

    Raises:
        OSError: it cannot be written.
    """
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(beside, path)


def hash_of_files(paths: Iterable[pathlib.Path]) -> str:
    """Returns a hash of the files' names and bytes, in the order given; of code, on any Python."""
    whole = hashlib.sha256()
    for path in paths:
        whole.update(path.name.encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()


@contextlib.contextmanager
def writing_directory(
    target: str | os.PathLike[str], *, overwrite: bool = False, nonce: str | None = None
) -> Iterator[pathlib.Path]:
    """Yields a new folder to fill, which becomes `target` when the block ends without an error.

    The folder is `TARGET.tmp-NONCE` beside the target. At the end every file is flushed to the
    disk and the folder is renamed, so that a kill at any moment leaves either the old target or
    the new one, and at worst a `.tmp-` folder, which `is_unfinished` knows. An exception in the
    block removes the folder and leaves the target as it was. Leftovers of killed writers are
    removed once a whole target stands; those of writers that still run are left alone.

    Args:
        target: the local folder to make; its parents are made too.
        overwrite: replace a target that is there and not empty. It is removed only after the new
            one is complete.
        nonce: the temporary name's last part, where several processes have to agree on it.

    Yields:
        The folder to write into.

    Raises:
        FileExistsError: the target is a file, or a folder with something in it and no `overwrite`.
        ValueError: the target is an address, or its own name is that of an unfinished folder.
        OSError: it cannot be written.
    """
    check_local(target, name="target")
    target = pathlib.Path(os.path.abspath(target))
    _check_target(target, overwrite=overwrite)
    temporary = temporary_name(target, nonce or new_nonce())
    make_folder(temporary.parent)
    if target.exists():
        _remove_leftovers(target)
    temporary.mkdir()
    lock = os.open(temporary, os.O_RDONLY)
    try:
        _try_lock(lock)
        yield temporary
        # Checked again: another writer may have finished in the meantime.
        _check_target(target, overwrite=overwrite)
        _flush(temporary)
        _rename_into_place(temporary, target)
        _remove_leftovers(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _check_target(target: pathlib.Path, *, overwrite: bool) -> None:
    if is_unfinished(target):
        raise ValueError(
            f"target: {target} is named like an unfinished folder, choose a name that does not "
            "end in .tmp- and eight hexadecimal digits"
        )
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file, a folder is to be written there")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(f"{target} is there and not empty, overwrite it or choose another")


def _rename_into_place(temporary: pathlib.Path, target: pathlib.Path) -> None:
    """Moves a complete folder to its place; an older one there is removed last."""
    if not (target.is_dir() and any(target.iterdir())):
        os.replace(temporary, target)
        _flush_one(target.parent)
        return
    # A folder with files in it cannot be replaced in one step. Killed between the two renames,
    # both folders remain, whole, under `.tmp-` names, and nothing removes them: leftovers are
    # only swept where a target stands.
    aside = temporary_name(target, new_nonce())
    os.replace(target, aside)
    try:
        os.replace(temporary, target)
    except BaseException:
        os.replace(aside, target)
        raise
    _flush_one(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(target: pathlib.Path) -> None:
    """Removes unfinished folders of this target whose writer is gone."""
    for leftover in target.parent.glob(f"{_escaped(target.name)}.tmp-*"):
        if not is_unfinished(leftover) or not leftover.is_dir():
            continue
        with contextlib.suppress(OSError):
            lock = os.open(leftover, os.O_RDONLY)
            try:
                if _try_lock(lock):
                    shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(lock)


def lock_file(file: int, path: pathlib.Path) -> None:
    """Locks an open file for this process; the kernel unlocks it when the process ends.

    Raises:
        ValueError: another process has locked it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"{path}: another process writes this file") from error


def _try_lock(folder: int) -> bool:
    """Locks an open folder until its process ends; False where that fails."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process writes there, or the file system has no locks
        return False
    return True


def _flush(folder: pathlib.Path) -> None:
    for where, _, names in os.walk(folder):
        for name in names:
            _flush_one(pathlib.Path(where, name))
        _flush_one(pathlib.Path(where))


def _flush_one(path: pathlib.Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _escaped(name: str) -> str:
    """Returns a name as a glob pattern that matches only itself."""
    return re.sub(r"([*?[])", r"[\1]", name)


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
    with open(path, "rb") as file:
        end = 0
        for number, raw in enumerate(file, start=1):
            end += len(raw)
            if unfinished == "skip" and not raw.endswith(b"\n"):
                return
            if raw.strip():
                yield Line(number, end, _row(path, number, raw))


def read_row_at(path: str | os.PathLike[str], place: int) -> Row:
    """Returns the row whose line begins at a byte of a file.

    Raises:
        ValueError: the line is not UTF-8, not JSON or not an object.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        file.seek(place)
        return _row(f"{os.fspath(path)} from byte {place}", 1, file.readline())


def read_rows(path: str | os.PathLike[str], *, unfinished: Unfinished) -> list[Row]:
    """Returns the objects of a file in order; errors as `read_lines`."""
    return [line.row for line in read_lines(path, unfinished=unfinished)]


def write_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a file, complete or not at all; an older one is replaced.

    Raises:
        ValueError: the path is an address, or a row cannot be written as JSON (number and id).
        OSError: the file cannot be written.
    """
    check_local(path, name="path")
    path = pathlib.Path(path)
    make_folder(path.parent)
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


class AppendedFile(contextlib.AbstractContextManager["AppendedFile"]):
    """An append-only JSON Lines file, cut back when a run resumes; a context manager.

    A killed process leaves complete rows, but for a last line without its end, which every cut
    removes. Appended rows survive a crash of the machine from the next `sync` on.
    """

    def __init__(self, path: str | os.PathLike[str], *, locked: bool) -> None:
        """Opens the file, or makes it; cuts nothing yet.

        Args:
            path: the file.
            locked: refuse a second process that opens the file locked.

        Raises:
            ValueError: the path is an address, or another process has locked it.
            OSError: it cannot be opened.
        """
        check_local(path, name="path")
        self.path = pathlib.Path(path)
        make_folder(self.path.parent)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if locked:
                lock_file(self._file, self.path)
        except BaseException:
            os.close(self._file)
            raise

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()

    def lines(self) -> Iterator[Line]:
        """Yields the lines that have an end; errors as `read_lines`."""
        return read_lines(self.path, unfinished="skip")

    def cut(self, end: int) -> None:
        """Removes all bytes from `end` on, as `Line.end` gives it; 0 removes all."""
        if end != os.fstat(self._file).st_size:
            os.ftruncate(self._file, end)

    def cut_unfinished(self) -> None:
        """Removes a last line that has no line end."""
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            whole = self.path.read_bytes()
            self.cut(whole.rfind(b"\n") + 1)

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
        data = b"".join(_encoded(self.path, number, row) for number, row in enumerate(rows, 1))
        while data:  # Usually one write, so that a kill leaves a line or nothing.
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
    # A lone surrogate, which UTF-8 lacks, becomes JSON's escape of it.
    return f"{text}\n".encode("utf-8", "backslashreplace")
