"""The weights of a Hugging Face model folder, one tensor at a time, in either kind of file.

PyTorch files (`pytorch_model*.bin`) are read without torch, which is no dependency at run time,
and without running their pickles.

PyTorch has two layouts. Since torch 1.6 a file is a zip archive: `data.pkl` describes the tensors,
each storage (the block of bytes behind one or more tensors) is an uncompressed entry `data/KEY`.
Before, and still with `_use_new_zipfile_serialization=False`, it is a series of pickles, then the
storages. Either way the description is a pickle, which can ask Python for any function; the
unpickler here knows a short list of names and stops at every other.
"""

import collections
import dataclasses
import io
import json
import math
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from huatuo_jax.core.files import open_binary, read_into
from huatuo_jax.hf.safetensors_files import (
    SUPPORTED_DTYPES,
    read_safetensors_layout,
)

_ZIP_MAGIC = b"PK\x03\x04"
# The pickle of 0x1950A86A20F9469CFC6C, with which torch opens its older files.
_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_RESAVE = 'load it with torch and save it again: torch.save(torch.load(path, map_location="cpu"))'

_STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    # Counted in bytes; the tensor names its own dtype.
    "UntypedStorage": "uint8",
}


class _Dtype(NamedTuple):
    # Replaces a numpy dtype in the pickle, whose __setstate__ a pickle could call.
    name: str


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    num_bytes: int


class _Tensor(NamedTuple):
    storage: _Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Callable:
    """A function that a pickle may call but, unlike a plain function, not set attributes on."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it tries to alter a function")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TorchTensor:
    """One tensor of a PyTorch file, on disk until it is read.

    `strides` counts elements, as torch does, one for each dimension of `shape`; `byte_offset` is
    where the first element lies in the file at `path`.
    """

    path: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    byte_offset: int

    def read(self) -> np.ndarray:
        """Reads the tensor into a new, writable, C-contiguous array in host memory.

        Only the span from the tensor's first to its last element is read. A tensor stored in
        another order (a saved transpose, say) needs that span beside the result for a moment.
        Any number of threads may read at once: each call opens the file for itself.

        Raises:
            ValueError: The file has become shorter since it was opened.
        """
        if self.strides == _contiguous_strides(self.shape) or math.prod(self.shape) <= 1:
            array = np.empty(self.shape, self.dtype)
            self._fill(array)
            return array
        span = np.empty(_spanned_elements(self.shape, self.strides), self.dtype)
        self._fill(span)
        byte_strides = [stride * self.dtype.itemsize for stride in self.strides]
        view = np.lib.stride_tricks.as_strided(span, self.shape, byte_strides, writeable=False)
        return np.array(view, order="C", copy=True)

    def _fill(self, array: np.ndarray) -> None:
        # Plain reads into the destination: pages of a memory map would count as resident memory
        # of this process, and a whole checkpoint would pass through it.
        remaining = array.reshape(-1).view(np.uint8).data
        if missing := read_into(self.path, self.byte_offset, remaining):
            raise ValueError(
                f"{self.path}: {missing} bytes of a tensor are missing; the file became shorter "
                "while it was read, copy or download it again"
            )


def read_torch_layout(path: pathlib.Path) -> dict[str, TorchTensor]:
    """Finds every tensor of one file written by `torch.save` from a state dict, in its order.

    Nothing that the file asks for is imported or run, and no tensor data is read.

    Raises:
        ValueError: The file is damaged or cut short, was written on a big-endian machine, is not a
            flat dict of tensors, or asks for anything but tensors of the supported dtypes.
    """
    with open_binary(path) as file:
        try:
            return _read_layout(path, file)
        except _RefusedError as error:
            raise ValueError(f"{path}: {error}") from error
        except Exception as error:  # Damage makes zipfile and the unpickler fail in any way.
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"{path}: damaged or cut short ({reason}); copy or download it again"
            ) from error


class _RefusedError(Exception):
    """The file may be undamaged, but its content is not supported or refused."""


def _read_layout(path: pathlib.Path, file: BinaryIO) -> dict[str, TorchTensor]:
    start = file.read(len(_LEGACY_MAGIC))
    file.seek(0)
    if start.startswith(_ZIP_MAGIC):
        state, byte_offsets = _read_zip(file)
    elif start == _LEGACY_MAGIC:
        state, byte_offsets = _read_legacy(file)
    else:
        raise _RefusedError(
            "not a file of torch.save in either of its layouts, or cut short; if torch can read "
            f"it, {_RESAVE}"
        )
    if not isinstance(state, dict):
        raise _RefusedError(f"holds a {type(state).__name__}; it must be a dict of tensors")
    tensors = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise _RefusedError(
                f"{name!r} is a {type(value).__name__.lstrip('_')}; each entry must be a name and "
                "a tensor, as a model's state_dict() has them"
            )
        tensors[name] = _locate(path, name, value, byte_offsets)
    return tensors


def _locate(
    path: pathlib.Path, name: str, value: _Tensor, byte_offsets: dict[str, int]
) -> TorchTensor:
    numbers = (value.offset, *value.shape, *value.strides)
    well_formed = all(type(number) is int and number >= 0 for number in numbers)
    if not well_formed or len(value.shape) != len(value.strides):
        raise _RefusedError(f"tensor {name} has no valid shape, strides or offset")
    last = value.offset + _spanned_elements(value.shape, value.strides)
    if last * value.dtype.itemsize > value.storage.num_bytes:
        raise _RefusedError(f"tensor {name} reaches past the end of its storage")
    return TorchTensor(
        path=path,
        dtype=value.dtype,
        shape=value.shape,
        strides=value.strides,
        byte_offset=byte_offsets[value.storage.key] + value.offset * value.dtype.itemsize,
    )


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Counts the elements between neighbours along each dimension of a C-contiguous array."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _spanned_elements(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Counts the elements from the first to the last of a strided array, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _read_zip(file: BinaryIO) -> tuple[object, dict[str, int]]:
    """Returns the unpickled state and, for each storage, where its bytes start in the file."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise _RefusedError("a zip archive, but not one of torch.save")
        folder = pickles[0].removesuffix("data.pkl")
        # Older versions of torch wrote no byte order; their files are taken for little-endian.
        if f"{folder}byteorder" in entries:
            _check_byte_order(archive.read(f"{folder}byteorder") == b"little")
        unpickler = _TensorUnpickler(io.BytesIO(archive.read(pickles[0])))
    state = unpickler.load()
    byte_offsets = {}
    for storage in unpickler.storages.values():
        entry = entries[f"{folder}data/{storage.key}"]
        if entry.file_size != storage.num_bytes:
            raise ValueError(f"storage {storage.key} is not of the size that its tensors need")
        byte_offsets[storage.key] = _entry_start(file, entry)
    return state, byte_offsets


def _entry_start(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    # The directory at the end of a zip file locates an entry's own header, which ends in a name
    # and padding whose lengths it alone holds.
    file.seek(entry.header_offset)
    header = file.read(30)
    start = entry.header_offset + 30
    start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise _RefusedError(f"entry {entry.filename} is compressed; {_RESAVE}")
    if not header.startswith(_ZIP_MAGIC) or start + entry.file_size > _end_of(file):
        raise ValueError(f"entry {entry.filename} does not lie where it should")
    return start


def _read_legacy(file: BinaryIO) -> tuple[object, dict[str, int]]:
    """Returns the unpickled state and, for each storage, where its bytes start in the file."""
    _TensorUnpickler(file).load()  # The magic number.
    _TensorUnpickler(file).load()  # The protocol version.
    system: Any = _TensorUnpickler(file).load()
    _check_byte_order(system["little_endian"])
    unpickler = _TensorUnpickler(file)
    state = unpickler.load()
    keys: Any = _TensorUnpickler(file).load()
    byte_offsets = {}
    start = file.tell()
    for key in keys:
        storage = unpickler.storages[key]
        file.seek(start)
        num_elements = int.from_bytes(file.read(8), "little")
        end = start + 8 + storage.num_bytes
        if num_elements * storage.dtype.itemsize != storage.num_bytes or end > _end_of(file):
            raise ValueError(f"storage {key} is not of the size that its tensors need")
        byte_offsets[key] = start + 8
        start = end
    return state, byte_offsets


def _check_byte_order(is_little_endian: bool) -> None:
    if is_little_endian is not True:
        raise _RefusedError(f"written on a big-endian machine; on a little-endian one, {_RESAVE}")


def _end_of(file: BinaryIO) -> int:
    return file.seek(0, os.SEEK_END)


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles descriptions of tensors and refuses everything else.

    `storages` collects every storage that the pickle mentions, by key.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        # Quoted, as a hostile name could hold anything, line ends and terminal codes too.
        asked_for = f"{module}.{name}"
        raise _RefusedError(
            f"its pickle asks for {asked_for!r}, which was refused and not run; only tensors of "
            f"{', '.join(SUPPORTED_DTYPES)} are read"
        )

    def persistent_load(self, saved_id: Any) -> _Storage:
        kind, dtype, key, _, num_elements, *view = saved_id
        is_view = len(view) > 0 and view[0] is not None
        if kind != "storage" or not isinstance(dtype, _Dtype) or is_view:
            raise _RefusedError(f"its storages are those of a very old torch; {_RESAVE}")
        if type(key) is not str or type(num_elements) is not int:
            raise ValueError("a storage without key or size")
        storage_dtype = SUPPORTED_DTYPES[dtype.name]
        storage = _Storage(key, storage_dtype, num_elements * storage_dtype.itemsize)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"storage {key} is described in two ways")
        return storage


def _rebuild_tensor_v2(
    storage: _Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    backward_hooks: object,
    metadata: object = None,
) -> _Tensor:
    # `metadata` marks a tensor whose bytes are to be negated or conjugated on load.
    if metadata:
        raise ValueError("a tensor with its sign or conjugation still pending")
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without a storage")
    return _Tensor(storage, storage.dtype, offset, tuple(shape), tuple(strides))


def _rebuild_tensor_v3(
    storage: _Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    backward_hooks: object,
    dtype: _Dtype,
    metadata: object = None,
) -> _Tensor:
    tensor = _rebuild_tensor_v2(
        storage, offset, shape, strides, requires_grad, backward_hooks, metadata
    )
    return tensor._replace(dtype=SUPPORTED_DTYPES[dtype.name])


def _rebuild_parameter(data: _Tensor, requires_grad: bool, backward_hooks: object) -> _Tensor:
    return data


# Every name that a pickle may ask for, with its replacement.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Callable(_rebuild_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3"): _Callable(_rebuild_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): _Callable(_rebuild_parameter),
    ("torch", "Size"): _Callable(tuple),
}
_ALLOWED |= {
    (module, name): _Dtype(dtype)
    for name, dtype in _STORAGE_DTYPES.items()
    for module in ("torch", "torch.cuda", "torch.storage")
}
_ALLOWED |= {("torch", name): _Dtype(name) for name in SUPPORTED_DTYPES}


class StoredTensor(Protocol):
    """A tensor that is read on demand."""

    @property
    def path(self) -> pathlib.Path:
        """The file that holds it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""

    @property
    def dtype(self) -> np.dtype:
        """The stored dtype; bfloat16 is that of ml_dtypes."""

    def read(self) -> np.ndarray:
        """Reads it into a new, writable, C-contiguous array."""


_Layout = Callable[[pathlib.Path], Mapping[str, StoredTensor]]

# The file names of transformers, in its order: safetensors first, one file before shards.
_SINGLE_AND_INDEX: tuple[tuple[str, str, _Layout], ...] = (
    ("model.safetensors", "model.safetensors.index.json", read_safetensors_layout),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", read_torch_layout),
)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """The tensors of a model folder: names, shapes and dtypes in memory, data read on demand.

    Keeps no file open and no data in memory, and is safe to share between threads. Tensors that
    share memory in torch (tied weights) are read separately, each into its own array.
    """

    folder: pathlib.Path
    tensors: Mapping[str, StoredTensor]

    def names(self) -> tuple[str, ...]:
        """Names every tensor, shard by shard in the order of the files."""
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self.tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of a tensor as it is stored; bfloat16 is that of ml_dtypes."""
        return self.tensors[name].dtype

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor into a new, writable, C-contiguous array; no other data is touched."""
        return self.tensors[name].read()


def open_tensor_source(folder: pathlib.Path) -> TensorSource:
    """Finds the weights of a Hugging Face model folder and checks all their files.

    Reads `model.safetensors` or its shards, else `pytorch_model.bin` or its shards. Every file is
    checked to be complete before any tensor is read. A tensor of a shard that the index does not
    mention counts as present, as in transformers.

    Raises:
        FileNotFoundError: The folder holds no weights, or a shard that the index names is absent.
        ValueError: A file is damaged, cut short, or not weights; the index names a tensor that its
            shard lacks; a tensor lies in two shards; a pickle asks for more than tensors.
    """
    for single_name, index_name, read_layout in _SINGLE_AND_INDEX:
        if (folder / single_name).is_file():
            return TensorSource(folder, _read_file(folder / single_name, read_layout))
        if (folder / index_name).is_file():
            return TensorSource(folder, _read_shards(folder / index_name, read_layout))
    wanted = " or ".join(f"{single} or {index}" for single, index, _ in _SINGLE_AND_INDEX)
    raise FileNotFoundError(f"{folder}: no weights here; there must be {wanted}")


def _read_file(path: pathlib.Path, read_layout: _Layout) -> Mapping[str, StoredTensor]:
    with open_binary(path) as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(
                f"{path}: a Git LFS pointer in place of the weights; run `git lfs pull` there"
            )
    return read_layout(path)


def _read_shards(index_path: pathlib.Path, read_layout: _Layout) -> dict[str, StoredTensor]:
    shard_of = _read_weight_map(index_path)
    shard_names = sorted(set(shard_of.values()))
    # All shards are looked for before the first is opened, so that an interrupted download is
    # reported at once.
    for shard_name in shard_names:
        if not (index_path.parent / shard_name).is_file():
            raise FileNotFoundError(
                f"{index_path.parent / shard_name}: missing, though {index_path.name} names it; "
                "download the folder again"
            )
    tensors: dict[str, StoredTensor] = {}
    for shard_name in shard_names:
        for name, tensor in _read_file(index_path.parent / shard_name, read_layout).items():
            if name in tensors:
                raise ValueError(
                    f"{tensor.path}: holds tensor {name}, which {tensors[name].path.name} holds "
                    "too; each tensor must be in one shard"
                )
            tensors[name] = tensor
    for name, shard_name in shard_of.items():
        if name not in tensors or tensors[name].path.name != shard_name:
            raise ValueError(
                f"{index_path.parent / shard_name}: lacks tensor {name}, which {index_path.name} "
                "says it holds"
            )
    return tensors


def _read_weight_map(index_path: pathlib.Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        shard_of = {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index_path}: not an index of weights; it must be JSON with a weight_map from tensor "
            "names to file names"
        ) from error
    for shard_name in shard_of.values():
        # An index comes from elsewhere; it must not lead out of its folder.
        if pathlib.PurePath(shard_name).name != shard_name or shard_name in ("", ".."):
            raise ValueError(f"{index_path}: shard {shard_name!r} must be a plain file name")
    if not shard_of:
        raise ValueError(f"{index_path}: its weight_map names no tensor")
    return shard_of
