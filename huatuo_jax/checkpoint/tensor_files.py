"""The weights of a Hugging Face model folder, one tensor at a time, whatever kind its files are."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from huatuo_jax.checkpoint.safetensors_files import read_safetensors_layout
from huatuo_jax.checkpoint.stored_tensor import StoredTensor
from huatuo_jax.checkpoint.torch_files import read_torch_layout

_Layout = Callable[[pathlib.Path], dict[str, StoredTensor]]

# The file names of transformers, in its order: safetensors first, one file before shards.
_SINGLE_AND_INDEX: tuple[tuple[str, str, _Layout], ...] = (
    ("model.safetensors", "model.safetensors.index.json", read_safetensors_layout),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", read_torch_layout),
)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """The tensors of a model folder: names, shapes and dtypes at hand, data read when asked for.

    Keeps no file open and no data in memory, and is safe to share between threads. Tensors that
    share memory in torch (tied weights) are read separately, each into its own array.
    """

    folder: pathlib.Path
    tensors: Mapping[str, StoredTensor]

    def names(self) -> tuple[str, ...]:
        """Name every tensor, shard by shard in the order of the files."""
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Tell the shape of a tensor."""
        return self.tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Tell the dtype of a tensor as it is stored; bfloat16 is that of ml_dtypes."""
        return self.tensors[name].dtype

    def read(self, name: str) -> np.ndarray:
        """Read one tensor into a new, writable, C-contiguous array; no other data is touched."""
        return self.tensors[name].read()


def open_tensor_source(folder: pathlib.Path) -> TensorSource:
    """Find the weights of a Hugging Face model folder and check all their files.

    Takes `model.safetensors` or its shards, else `pytorch_model.bin` or its shards. Every file is
    checked for wholeness before any tensor is read. A tensor that a shard holds and the index does
    not mention counts as present, as it does in transformers.

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


def _read_file(path: pathlib.Path, read_layout: _Layout) -> dict[str, StoredTensor]:
    with open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(
                f"{path}: a Git LFS pointer in place of the weights; run `git lfs pull` there"
            )
    return read_layout(path)


def _read_shards(index_path: pathlib.Path, read_layout: _Layout) -> dict[str, StoredTensor]:
    shard_of = _read_weight_map(index_path)
    shard_names = sorted(set(shard_of.values()))
    # All shards are looked for before the first is opened: the message about an interrupted
    # download should come at once.
    for shard_name in shard_names:
        if not (index_path.parent / shard_name).is_file():
            raise FileNotFoundError(
                f"{index_path.parent / shard_name}: absent, though {index_path.name} names it; "
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
