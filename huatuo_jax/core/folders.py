"""Folders that are complete or absent: written beside their place, or with a marker.

On a file system a folder is filled under another name and renamed. A bucket has no rename: there an
object in the folder says that it is unfinished, until all else is written.
"""

import contextlib
import fcntl
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator

from huatuo_jax.core.files import (
    absolute,
    as_path,
    is_address,
    make_folder,
    remove_folder,
    write_file,
)

_UNFINISHED = re.compile(r"\.tmp-[0-9a-f]{8}$")
_MARKER = ".unfinished"  # The object in a bucket.


def is_unfinished(path: str | os.PathLike[str]) -> bool:
    """Tells whether a folder is left from an interrupted write, and must never be loaded.

    On a file system the name decides, because such a folder can look complete: it is complete only
    after the rename. In a bucket it is an object, which is removed last.
    """
    path = as_path(path)
    if is_address(path):
        return (path / _MARKER).exists()
    return _UNFINISHED.search(path.name) is not None


def is_written(path: str | os.PathLike[str]) -> bool:
    """Tells whether a file or a folder is there and complete.

    Of a folder in a bucket there are objects from the beginning of its writing on.
    """
    return as_path(path).exists() and not is_unfinished(path)


def new_nonce() -> str:
    """Returns eight random hexadecimal digits for a temporary name."""
    return secrets.token_hex(4)


def temporary_name(target: str | os.PathLike[str], nonce: str) -> pathlib.Path:
    """Returns the folder where `target` is written: `TARGET.tmp-NONCE`, or itself in a bucket."""
    target = absolute(target)
    if is_address(target):
        return target
    return target.with_name(f"{target.name}.tmp-{nonce}")


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

    In a bucket the folder is the target, and an object in it tells `is_unfinished` until the end;
    an older target is removed first.

    Args:
        target: the folder to make; its parents are made too.
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
    target = absolute(target)
    if is_address(target):
        with _writing_objects(target, overwrite=overwrite):
            yield target
        return
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


@contextlib.contextmanager
def _writing_objects(target: pathlib.Path, *, overwrite: bool) -> Iterator[None]:
    if not is_unfinished(target):
        _check_target(target, overwrite=overwrite)
    marker = target / _MARKER
    # The marker stands before the first object is gone, and is the last to go.
    write_file(marker, "")
    _empty(target)
    try:
        yield
    except BaseException:
        _empty(target)
        marker.unlink()
        raise
    marker.unlink()


def _empty(folder: pathlib.Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            remove_folder(path)
        elif path.name != _MARKER:
            path.unlink()


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
