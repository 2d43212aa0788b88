"""All uses of Orbax, behind a few functions; no other module imports it.

A training state is stored as named arrays: one path for each leaf.
"""

import dataclasses
import logging
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint._src.path import gcs_utils

from huatuo_jax.core.files import is_address
from huatuo_jax.hf.load import nested

# Arrays are stored in chunks of at most this size, because restoring onto another mesh reads each
# chunk that a shard touches whole: unbounded, a shard of an array that was saved from one device
# would pull all of it through host memory. Smaller chunks save nothing: below 32 MiB the C
# allocator keeps the freed buffers.
_CHUNK_BYTES = 64 * 2**20

# A save that takes longer counts as failed.
_TIMEOUT_S = 6 * 3600

# Deleted steps are renamed into this folder first, so that a kill during a deletion never leaves
# half a checkpoint under its step's name.
DELETED = ".deleted"

# The object that Orbax writes last into a step in a bucket.
COMMITTED = "commit_success.txt"

# How Orbax names the folder of an unfinished step, after the step.
UNFINISHED = ".orbax-checkpoint-tmp"

# `[os_error_code='28']` in newer versions of TensorStore, `[OS error 28: ...]` in older ones.
_SYSTEM_ERROR = re.compile(r"\[os[ _]error(?:_code)?[ ='\"]+(\d+)", re.IGNORECASE)

_KEYS = "random_keys"

# Orbax would ask for the kind of each bucket, with another library and the right to see the bucket
# itself. Lists of objects are the same in all kinds.
gcs_utils.is_hierarchical_namespace_enabled = lambda _: False


@dataclasses.dataclass(frozen=True)
class LeafKind:
    """The shape and dtype of a leaf; the dtype of a typed random key is like `key<fry>`."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        """Returns the form of messages, `(2, 8) float32`."""
        return f"{self.shape} {self.dtype}"


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by path, `optimizer/0/mu/layers/qkv/kernel`, in tree order.

    Fields of named tuples and dataclasses go by their name, elements of lists by their index.

    Raises:
        ValueError: the tree is a single leaf or has none, a name is empty or holds a slash, or two
            leaves would have the same path.
    """
    named: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [jax.tree_util.keystr((key,), simple=True) for key in keys]
        path = "/".join(names)
        if not names:
            raise ValueError("state: must be a tree of arrays (a dict, say), it is a single leaf")
        if any(not name or "/" in name for name in names):
            raise ValueError(f"state: {path!r} has a name that is empty or holds a slash")
        if path in named:
            raise ValueError(f"state: two leaves are named {path!r}")
        named[path] = leaf
    if not named:
        raise ValueError("state: must hold at least one array, it holds none")
    return named


def is_random_key(leaf: Any) -> bool:
    """Tells a typed random key (`jax.random.key`), concrete or abstract, from other leaves."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and bool(jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key))


def kind_of(leaf: Any) -> LeafKind:
    """Returns the kind of an array, an abstract array, or a Python or NumPy number."""
    if not hasattr(leaf, "shape"):
        leaf = np.asarray(leaf)
    return LeafKind(shape=tuple(leaf.shape), dtype=str(leaf.dtype))


def mismatches(
    saved: Mapping[str, LeafKind], wanted: Mapping[str, LeafKind], *, partial: bool
) -> list[str]:
    """Lists the paths that differ, as `layers/qkv/kernel: saved (2, 8), wanted (2, 16)`.

    With `partial`, saved paths that are not wanted are ignored.
    """
    lines = []
    for path in sorted(saved.keys() | wanted.keys()):
        if path not in saved:
            lines.append(f"{path}: not saved, wanted {wanted[path]}")
        elif path not in wanted:
            if not partial:
                lines.append(f"{path}: saved {saved[path]}, not wanted")
        elif saved[path] != wanted[path]:
            lines.append(f"{path}: {_contrast(saved[path], wanted[path])}")
    return lines


def _contrast(saved: LeafKind, wanted: LeafKind) -> str:
    """Returns the parts that differ: the shapes, the dtypes, or both."""
    if saved.dtype == wanted.dtype:
        return f"saved {saved.shape}, wanted {wanted.shape}"
    if saved.shape == wanted.shape:
        return f"saved {saved.dtype}, wanted {wanted.dtype}"
    return f"saved {saved}, wanted {wanted}"


class _WithoutNoise(logging.Filter):
    """Drops Orbax's stack dumps of failed saves, which are raised as errors too.

    Also its warning that files written without OCDBT have no OCDBT files to merge.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        from_orbax = f"orbax{os.sep}checkpoint{os.sep}" in record.pathname
        is_noise = record.exc_info or "Skipping merge of OCDBT" in str(record.msg)
        return not (from_orbax and is_noise)


logging.getLogger("absl").addFilter(_WithoutNoise())


def check_place(path: str | os.PathLike[str], *, name: str) -> None:
    """Raises ValueError for an address that Orbax cannot write to.

    Args:
        path: the folder.
        name: of the field, for the message.
    """
    if is_address(path) and not os.fspath(path).startswith("gs://"):
        raise ValueError(
            f"{name}={os.fspath(path)}: checkpoints and Orbax models are written to disks and to "
            "gs:// alone; choose such a folder, and copy it afterwards"
        )


def open_manager(
    directory: str,
    *,
    keep_newest: int,
    score: Callable[[Mapping[str, float]], float] | None,
    asynchronous: bool,
    clean: bool,
) -> ocp.CheckpointManager:
    """Opens a folder of steps; `clean` removes unfinished saves.

    Args:
        directory: an absolute local path or a bucket address.
        keep_newest: how many of the newest steps to keep.
        score: from a step's metrics to a number; the step with the highest is kept too, of equal
            ones the newest.
        asynchronous: whether saves are written in the background.
        clean: whether unfinished saves are deleted on opening.
    """
    policies: list[Any] = [ocp.checkpoint_managers.LatestN(n=keep_newest)]
    if score is not None:
        policies.append(
            ocp.checkpoint_managers.BestN(
                get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False
            )
        )
    options = ocp.CheckpointManagerOptions(
        create=False,
        cleanup_tmp_directories=clean,
        todelete_subdir=DELETED,
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
        # Orbax writes metrics only where it has something to compare.
        best_fn=score or (lambda metrics: 0.0),
        enable_async_checkpointing=asynchronous,
        async_options=ocp.AsyncOptions(timeout_secs=_TIMEOUT_S),
    )
    registry = ocp.DefaultCheckpointHandlerRegistry()
    for name in ("config", "extra"):
        handler = ocp.JsonCheckpointHandler(filename=f"{name}.json")
        registry.add(name, ocp.args.JsonSave, handler)
        registry.add(name, ocp.args.JsonRestore, handler)
    return ocp.CheckpointManager(directory, options=options, handler_registry=registry)


def step_arguments(state: Any, *, config: Mapping[str, Any], extra: Mapping[str, Any]) -> Any:
    """Returns the arguments of `save_step`; ValueError for a state that Orbax does not save."""
    return ocp.args.Composite(
        state=_save_args(state),
        config=ocp.args.JsonSave(dict(config)),
        extra=ocp.args.JsonSave(dict(extra)),
    )


def save_step(
    manager: ocp.CheckpointManager, step: int, arguments: Any, *, metrics: Mapping[str, float]
) -> None:
    """Starts writing a step; on return the arrays may be donated or changed."""
    manager.save(step, args=arguments, metrics=dict(metrics), force=True)


def write_arrays(path: pathlib.Path, state: Any) -> None:
    """Writes a tree of arrays to a new folder, atomically; every process must call it.

    Raises:
        ValueError: the tree cannot be saved.
        OSError: the folder cannot be written.
    """
    arguments = _save_args(state)
    with ocp.Checkpointer(_lean_writer(state)) as checkpointer:
        try:
            checkpointer.save(os.fspath(path), args=arguments)
        except Exception as error:
            if system_error_number(error) is None:
                raise
            raise as_os_error(error, f"{path} was not written") from error


def read_arrays(path: pathlib.Path, abstract_state: Any, *, partial: bool) -> Any:
    """Reads a tree of arrays, each device its own shards, bit for bit as they were saved.

    If the arrays lie on devices of several processes, all of them have to call this; one alone may
    call it for arrays of its own. Beyond the arrays themselves the host holds at most the bytes of
    the largest of them and 2 GB of data in flight; from a bucket, twice those of the largest.

    Args:
        path: a folder written by `write_arrays`, or a step's `state`.
        abstract_state: the tree to return, with a `jax.ShapeDtypeStruct` for each array. One
            without a sharding lands on the first device. Where a leaf is a NumPy array or a number
            instead, one of the same kind is returned.
        partial: whether saved arrays outside `abstract_state` may stay unread.

    Raises:
        ValueError: the saved tree has other paths, shapes or dtypes; every difference is listed.
        OSError: the files cannot be read.
    """
    saved, key_implementations = _described(path)
    wanted = named_leaves(abstract_state)
    wrong = mismatches(
        saved, {name: kind_of(leaf) for name, leaf in wanted.items()}, partial=partial
    )
    if wrong:
        raise ValueError("\n  ".join([f"{path} does not hold the wanted arrays:", *wrong]))
    stored = _read_stored(path, wanted)
    leaves = [
        _as_wanted(stored[name], leaf, key_implementations.get(name))
        for name, leaf in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)


def system_error_number(error: BaseException) -> int | None:
    """Returns the operating system's number for an error, from anywhere in its chain of causes.

    TensorStore reports a full disk as a ValueError of many lines, with the number in its text.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno
        if found := _SYSTEM_ERROR.search(str(cause)):
            return int(found[1])
        cause = cause.__cause__ or cause.__context__
    return None


def as_os_error(error: BaseException, doing: str) -> OSError:
    """Returns one line for a failed read or write, with the system's reason if there is one."""
    number = system_error_number(error)
    if number is not None:
        return OSError(number, f"{doing}: {os.strerror(number)}")
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return OSError(f"{doing}: {first_line}")


def _lean_writer(state: Any) -> Any:
    """Returns a handler that holds copies of about one array's bytes at a time while it writes."""
    largest = max((leaf.nbytes for leaf in jax.tree.leaves(state)), default=1)
    # An array that reaches the limit is refused, hence a little more than the largest. OCDBT would
    # keep written data in memory until one of its data files is full.
    return ocp.PyTreeCheckpointHandler(
        save_device_host_concurrent_gb=1.01 * largest / 10**9 + 0.01, use_ocdbt=False
    )


def _save_args(state: Any) -> Any:
    named = named_leaves(state)
    if empty := [name for name, leaf in named.items() if 0 in kind_of(leaf).shape]:
        raise ValueError(f"state: {empty[0]} has no elements, which cannot be saved")
    key_implementations = {
        name: {"dtype": str(leaf.dtype), "implementation": str(jax.random.key_impl(leaf))}
        for name, leaf in named.items()
        if is_random_key(leaf)
    }
    stored = nested({name: _stored(leaf) for name, leaf in named.items()})
    return ocp.args.PyTreeSave(
        stored,
        save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), stored),
        custom_metadata={_KEYS: key_implementations},
    )


def _stored(leaf: Any) -> Any:
    """Returns the form a leaf has on disk: keys as their data, numbers as NumPy arrays."""
    if is_random_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _described(path: pathlib.Path) -> tuple[dict[str, LeafKind], dict[str, str]]:
    """Returns the kind of each saved leaf, and the implementation of each random key."""
    try:
        metadata = ocp.PyTreeCheckpointHandler().metadata(epath.Path(os.fspath(path)))
    except Exception as error:
        raise as_os_error(error, f"{path} cannot be read") from error
    if _KEYS not in (metadata.custom_metadata or {}):
        raise OSError(f"{path} cannot be read: its list of arrays is missing or damaged")
    keys = metadata.custom_metadata[_KEYS]
    saved = {}
    for name, leaf in named_leaves(metadata.tree).items():
        shape, dtype = tuple(leaf.shape), str(np.dtype(leaf.dtype))
        if name in keys:  # the last dimension is the key's own data
            shape, dtype = shape[:-1], keys[name]["dtype"]
        saved[name] = LeafKind(shape=shape, dtype=dtype)
    return saved, {name: key["implementation"] for name, key in keys.items()}


def _read_stored(path: pathlib.Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    arguments = nested({name: _restore_args(leaf) for name, leaf in wanted.items()})
    # Data in flight is in host memory a second time, and from a bucket a third: as it came. Orbax
    # refuses a read larger than this.
    largest_gb = max(map(_stored_bytes, wanted.values())) / 1e9
    most_gb = 1.01 * largest_gb + 0.01 if is_address(path) else math.ceil(largest_gb) + 1
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=most_gb)
    readers = ocp.options.MultiprocessingOptions()
    if len(holders := _holders(wanted)) == 1:
        readers = ocp.options.MultiprocessingOptions(
            primary_host=min(holders), active_processes=holders
        )
    with ocp.Checkpointer(handler, multiprocessing_options=readers) as checkpointer:
        try:
            tree = checkpointer.restore(
                os.fspath(path),
                args=ocp.args.PyTreeRestore(
                    item=jax.tree.map(lambda _: 0, arguments),
                    restore_args=arguments,
                    partial_restore=True,
                ),
            )
            return named_leaves(jax.block_until_ready(tree))
        except Exception as error:
            raise as_os_error(error, f"{path} cannot be read") from error


def _is_on_devices(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def _place(leaf: Any) -> jax.sharding.Sharding:
    return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _holders(wanted: Mapping[str, Any]) -> set[int]:
    """Returns the processes whose devices will hold the arrays."""
    places = [_place(leaf) for leaf in wanted.values() if _is_on_devices(leaf)]
    devices: set[jax.Device] = set().union(*(place.device_set for place in places))
    return {device.process_index for device in devices}


def _restore_args(leaf: Any) -> Any:
    if not _is_on_devices(leaf):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    # A key's data has one more dimension, which no sharding of the key names, so it holds there.
    data = jax.eval_shape(jax.random.key_data, leaf) if is_random_key(leaf) else leaf
    return ocp.ArrayRestoreArgs(sharding=_place(leaf), global_shape=data.shape, dtype=data.dtype)


def _stored_bytes(leaf: Any) -> int:
    kind = kind_of(leaf)
    # A random key takes 8 or 16 bytes.
    item_bytes = 16 if is_random_key(leaf) else np.dtype(kind.dtype).itemsize
    return math.prod(kind.shape) * item_bytes


def _as_wanted(stored: Any, leaf: Any, implementation: str | None) -> Any:
    if implementation is not None:
        return jax.random.wrap_key_data(stored, impl=implementation)
    if isinstance(leaf, np.ndarray) or _is_on_devices(leaf):
        return stored
    return stored[()] if isinstance(leaf, np.generic) else stored.item()
