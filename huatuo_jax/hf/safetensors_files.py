"""Safetensors files: tensors read one at a time, and written in shards with one in memory.

Reading is the safetensors library's. Writing is done here, because `safetensors.serialize_file`
takes all tensors of a file at once: a shard of 5 GB would have to be in memory, where this writer
holds one tensor; and on a full disk the error names the missing bytes.
"""

import contextlib
import dataclasses
import decimal
import io
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from huatuo_jax.core.files import is_address, open_binary, read_into, write_chunks

# The dtypes that both kinds of weight file support.
SUPPORTED_DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint64": np.dtype(np.uint64),
    "uint32": np.dtype(np.uint32),
    "uint16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}

_BOTH_HALVES = {SUPPORTED_DTYPES["float16"], SUPPORTED_DTYPES["bfloat16"]}

# The format's names of our dtypes, widest first: the order in which the safetensors library lays
# tensors out, so that each starts at a multiple of its own width.
_FORMAT_NAMES = {
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "uint32": "U32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "uint16": "U16",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_DTYPE_BY_FORMAT_NAME = {text: SUPPORTED_DTYPES[name] for name, text in _FORMAT_NAMES.items()}
_FORMAT_NAME_BY_DTYPE = {dtype: text for text, dtype in _DTYPE_BY_FORMAT_NAME.items()}
_LAYOUT_ORDER = {dtype: order for order, dtype in enumerate(_FORMAT_NAME_BY_DTYPE)}

_MOST_HEADER_BYTES = 100 * 10**6  # The library's own bound.

# transformers refuses a file whose metadata does not name the framework that wrote it.
TRANSFORMERS_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})

_BYTES_PER_UNIT = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for suffix, base in (("B", 1000), ("IB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}


def common_dtype(dtypes: Collection[np.dtype]) -> np.dtype:
    """Returns the narrowest dtype that holds all of these; float32 for float16 and bfloat16.

    These two have no common dtype in NumPy: one has the longer mantissa, the other the range.
    """
    if _BOTH_HALVES <= set(dtypes):
        dtypes = [*(set(dtypes) - _BOTH_HALVES), np.dtype(np.float32)]
    return np.result_type(*dtypes)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsTensor:
    """One tensor of a safetensors file, on disk until it is read.

    Attributes:
        path: the file.
        name: of the tensor.
        dtype: of its elements.
        shape: of the array.
        place: where its data begins, in bytes, in a file of a bucket; None on a file system.
    """

    path: pathlib.Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    place: int | None = None

    def read(self) -> np.ndarray:
        """Reads the tensor into a new, writable, C-contiguous array in host memory.

        Any number of threads may read at once: each call opens the file for itself.

        Raises:
            ValueError: The file was damaged or cut short after it was opened.
        """
        if self.place is not None:
            array = np.empty(self.shape, self.dtype)
            if read_into(self.path, self.place, array.reshape(-1).view(np.uint8).data):
                raise ValueError(f"{self.path}: became shorter; copy it again")
            return array
        with _opened(self.path) as file:
            array = file.get_tensor(self.name)
        return array


class TensorToWrite(NamedTuple):
    """A tensor described ahead of time, so that files are planned before its data exist."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    produce: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        """The size of the tensor's data on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def parse_size(size: int | str) -> int:
    """Converts a size such as 5_000_000, "200MB", "5GB" or "1.5GiB" into bytes.

    As huggingface_hub does, GB is 10**9 bytes; GiB is 2**30. Case does not matter.

    Raises:
        ValueError: The text is not a size, or the size is not at least one byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _BYTES_PER_UNIT:
        raise ValueError(f"{size!r} is not a size; write it as bytes or like 5GB, 200MB or 1.5GiB")
    num_bytes = int(decimal.Decimal(match[1]) * _BYTES_PER_UNIT[match[2].upper()])
    if num_bytes < 1:
        raise ValueError(f"{size!r} is not a size; it must be at least one byte")
    return num_bytes


def read_safetensors_layout(path: pathlib.Path) -> dict[str, SafetensorsTensor]:
    """Lists every tensor of one safetensors file, in the order of the file; reads no data.

    Raises:
        ValueError: The file is damaged or cut short, or holds a dtype that is not supported.
    """
    if is_address(path):
        return _layout_in_a_bucket(path)
    tensors = {}
    with _opened(path) as opened:
        for name in opened.offset_keys():
            stored = opened.get_slice(name)
            tensors[name] = SafetensorsTensor(
                path=path,
                name=name,
                dtype=_dtype_of(stored.get_dtype(), path=path, name=name),
                shape=tuple(stored.get_shape()),
            )
    return tensors


def _layout_in_a_bucket(path: pathlib.Path) -> dict[str, SafetensorsTensor]:
    """Reads the header, which the library does for local files only.

    Its length is in the first 8 bytes; it is JSON, and its offsets count from its end.
    """
    tensors = {}
    try:
        with open_binary(path) as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            num_bytes = file.seek(0, os.SEEK_END)
            if begin > min(num_bytes, _MOST_HEADER_BYTES):
                raise ValueError("its header does not end")
            file.seek(8)
            header = json.loads(file.read(begin - 8))
        header.pop("__metadata__", None)
        end = begin
        for name, stored in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape, offsets = tuple(map(int, stored["shape"])), stored["data_offsets"]
            dtype = _dtype_of(stored["dtype"], path=path, name=name)
            if begin + offsets[0] != end:
                raise ValueError(f"tensor {name} does not begin where the one before ends")
            end += math.prod(shape) * dtype.itemsize
            if begin + offsets[1] != end:
                raise ValueError(f"tensor {name} has another size than its shape")
            tensors[name] = SafetensorsTensor(
                path=path, name=name, dtype=dtype, shape=shape, place=begin + offsets[0]
            )
        if end != num_bytes:
            raise ValueError(f"it has {num_bytes} bytes of {end}")
    except _OtherDtype:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path}: damaged or cut short ({error}); copy or download it again"
        ) from error
    return tensors


class _OtherDtype(ValueError):
    """A tensor's dtype is not supported."""


def _dtype_of(stored: str, *, path: pathlib.Path, name: str) -> np.dtype:
    if stored not in _DTYPE_BY_FORMAT_NAME:
        raise _OtherDtype(
            f"{path}: tensor {name} has dtype {stored}; supported dtypes are "
            f"{', '.join(_DTYPE_BY_FORMAT_NAME)}"
        )
    return _DTYPE_BY_FORMAT_NAME[stored]


def write_safetensors(
    folder: pathlib.Path,
    tensors: Sequence[TensorToWrite],
    *,
    max_shard_size: int,
    metadata: Mapping[str, str] = TRANSFORMERS_METADATA,
) -> None:
    """Writes tensors as transformers does: `model.safetensors`, or shards and their index.

    Shards are filled in the order of `tensors`; one bigger than `max_shard_size` (bytes) gets a
    shard of its own. Within a file the safetensors library's order holds (widest dtype first, then
    by name), and in that order each tensor is produced, written and dropped, so that one at a time
    is in memory. Files are on the disk, not only in its cache, when this returns.

    The folder must exist. Write into one that nobody reads yet and rename it when it is complete:
    after an error the files written so far remain.

    Raises:
        ValueError: There is no tensor, a name comes twice, a dtype is not supported,
            `max_shard_size` is not positive, or a produced array differs from its description.
        FileExistsError: The folder holds safetensors weights already.
        OSError: Writing failed, as on a full disk; the message has the number of missing bytes.
    """
    _check_plan(folder, tensors, max_shard_size)
    shards = plan_shards(tensors, max_shard_size=max_shard_size)
    if len(shards) == 1:
        contents = {"model.safetensors": shards[0]}
    else:
        contents = {
            f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
            for number, shard in enumerate(shards, start=1)
        }
    headers = {filename: _encode_header(shard, metadata) for filename, shard in contents.items()}
    index = b"" if len(shards) == 1 else _encode_index(contents)
    total_size = sum(tensor.num_bytes for tensor in tensors)
    writer = _DurableWriter(total_size + sum(map(len, headers.values())) + len(index))
    write_file = write_chunks if is_address(folder) else writer.write_file

    for filename, shard in contents.items():
        produced = (_produced_bytes(tensor) for tensor in _in_file_order(shard))
        write_file(folder / filename, itertools.chain([headers[filename]], produced))
    if len(shards) > 1:
        write_file(folder / "model.safetensors.index.json", [index])


def plan_shards(
    tensors: Sequence[TensorToWrite], *, max_shard_size: int
) -> list[list[TensorToWrite]]:
    """Splits tensors into shards of at most `max_shard_size` bytes, as huggingface_hub does.

    A tensor bigger than that gets a shard of its own, before the shard that is being filled.
    """
    shards: list[list[TensorToWrite]] = []
    filling: list[TensorToWrite] = []
    filled = 0
    for tensor in tensors:
        if tensor.num_bytes > max_shard_size:
            shards.append([tensor])
            continue
        if filled + tensor.num_bytes > max_shard_size:
            shards.append(filling)
            filling, filled = [], 0
        filling.append(tensor)
        filled += tensor.num_bytes
    if filling:
        shards.append(filling)
    return shards


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    """Opens a file with the safetensors library, which checks its header and its size.

    It reads with `pread`: pages of a memory map would count as resident memory of this process,
    and a whole checkpoint would pass through it.
    """
    try:
        with safe_open(path, framework="np", backend="pread") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path}: damaged or cut short ({error}); copy or download it again"
        ) from error


class _DurableWriter:
    """Writes new files through to the disk and counts the bytes that are missing."""

    def __init__(self, num_planned_bytes: int) -> None:
        self.num_planned_bytes = num_planned_bytes
        self.num_missing_bytes = num_planned_bytes

    def write_file(self, path: pathlib.Path, chunks: Iterable[bytes | memoryview]) -> None:
        # Only errors of our own calls name `path`: producing a chunk may read other files.
        with self._naming_missing_bytes(path):
            file = open(path, "xb", buffering=0)
        with file:
            for chunk in chunks:
                with self._naming_missing_bytes(path):
                    self._write_all(file, chunk)
                del chunk  # Else it would stay in memory until the next one is there.
            with self._naming_missing_bytes(path):
                # Some file systems report a full disk only here.
                os.fsync(file.fileno())
        _sync_folder(path.parent)

    def _write_all(self, file: io.FileIO, chunk: bytes | memoryview) -> None:
        # An unbuffered file may write only a part, and returns how much.
        remaining = memoryview(chunk)
        while len(remaining) > 0:
            num_written = file.write(remaining)
            self.num_missing_bytes -= num_written
            remaining = remaining[num_written:]

    @contextlib.contextmanager
    def _naming_missing_bytes(self, path: pathlib.Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}; {self.num_missing_bytes} of {self.num_planned_bytes} bytes "
                "of the weights could not be written",
                str(path),
            ) from error


def _sync_folder(folder: pathlib.Path) -> None:
    # The names of new files are part of the folder, which is synced by itself.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _in_file_order(shard: Sequence[TensorToWrite]) -> list[TensorToWrite]:
    return sorted(shard, key=lambda tensor: (_LAYOUT_ORDER[tensor.dtype], tensor.name))


def _encode_header(shard: Sequence[TensorToWrite], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for tensor in _in_file_order(shard):
        end = start + tensor.num_bytes
        header[tensor.name] = {
            "dtype": _FORMAT_NAME_BY_DTYPE[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _encode_index(contents: Mapping[str, Sequence[TensorToWrite]]) -> bytes:
    tensors = [tensor for shard in contents.values() for tensor in shard]
    index = {
        "metadata": {
            "total_parameters": sum(t.num_bytes // t.dtype.itemsize for t in tensors),
            "total_size": sum(t.num_bytes for t in tensors),
        },
        "weight_map": {
            tensor.name: filename for filename, shard in contents.items() for tensor in shard
        },
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _produced_bytes(tensor: TensorToWrite) -> memoryview:
    array = tensor.produce()
    if array.shape != tensor.shape or array.dtype != tensor.dtype:
        raise ValueError(
            f"tensor {tensor.name} was announced as {tensor.dtype}{list(tensor.shape)} but came as "
            f"{array.dtype}{list(array.shape)}"
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _check_plan(
    folder: pathlib.Path, tensors: Sequence[TensorToWrite], max_shard_size: int
) -> None:
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size is {max_shard_size}; it must be at least one byte")
    if not tensors:
        raise ValueError("there are no tensors to write")
    seen = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise ValueError(f"tensor {tensor.name} is to be written twice; names must be unique")
        if tensor.dtype not in _FORMAT_NAME_BY_DTYPE:
            raise ValueError(
                f"tensor {tensor.name} has dtype {tensor.dtype}; supported dtypes are "
                f"{', '.join(SUPPORTED_DTYPES)}"
            )
        seen.add(tensor.name)
    # A stale shard beside a new index, or the other way round, would load as a mixture.
    for stale in sorted(folder.glob("model*.safetensors*")):
        raise FileExistsError(f"{stale}: weights are here already; write into an empty folder")
