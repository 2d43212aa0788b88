"""Files and folders that are whole or absent: written beside their place, then renamed into it."""

import contextlib
import fcntl
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator

_UNFINISHED = re.compile(r"\.tmp-[0-9a-f]{8}$")


def is_unfinished(path: str | os.PathLike[str]) -> bool:
    """Tells whether a folder is the leftover of an interrupted write, which must never be loaded.

    The name decides, because such a folder can look complete: everything is in it only after the
    rename.
    """
    return _UNFINISHED.search(pathlib.Path(path).name) is not None


def new_nonce() -> str:
    """Returns the eight hexadecimal digits that make one write's temporary name its own."""
    return secrets.token_hex(4)


def temporary_name(target: str | os.PathLike[str], nonce: str) -> pathlib.Path:
    """Returns the folder beside `target` where it is written first, `TARGET.tmp-NONCE`."""
    target = pathlib.Path(os.path.abspath(target))
    return target.with_name(f"{target.name}.tmp-{nonce}")


def write_file(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file that is never seen half written; text as UTF-8.

    Raises:
        OSError: it cannot be written.
    """
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(beside, path)


@contextlib.contextmanager
def writing_directory(
    target: str | os.PathLike[str], *, overwrite: bool = False, nonce: str | None = None
) -> Iterator[pathlib.Path]:
    """Gives a new folder to fill, which becomes `target` when the block ends without an error.

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
        ValueError: the target's own name is that of an unfinished folder.
        OSError: it cannot be written.
    """
    target = pathlib.Path(os.path.abspath(target))
    _check_target(target, overwrite=overwrite)
    temporary = temporary_name(target, nonce or new_nonce())
    temporary.parent.mkdir(parents=True, exist_ok=True)
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
    """Puts a complete folder at its place; what stood there is removed last."""
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
    """Locks an open file for this process; the kernel lets go when it ends, however it ends.

    Raises:
        ValueError: another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"{path}: another process writes this file") from error


def _try_lock(folder: int) -> bool:
    """Locks an open folder; the kernel lets go when its process ends, however it ends."""
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
