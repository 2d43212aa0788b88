"""Loads a Hugging Face checkpoint tensor by tensor, straight into its shards.

Delta weights are supported: a model published as its difference from a base that may not be
redistributed. HuatuoGPT-13B is one, over Ziya-LLaMA-13B: the base is added to every tensor except
those whose shape or meaning the fine-tuning changed, which are published whole.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike

from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig
from huatuo_jax.backbone.transformer import Head, abstract_params
from huatuo_jax.core import sharding
from huatuo_jax.hf.safetensors_files import common_dtype
from huatuo_jax.hf.tensor_table import TensorRule, is_legacy_buffer, tensor_rules

Progress = Callable[[int, int], None]

# Base models are saved without the prefix of the class that holds them.
_BASE_PREFIXES = ("model.", "transformer.")
_HEAD = "lm_head.weight"
_LISTED = 5
_ALIGNMENT = 64  # bytes
# Tensors of delta weights that are not differences.
_PUBLISHED_WHOLE = re.compile(r"(^|\.)(embed_tokens\.weight|lm_head\.weight|rotary_emb\.inv_freq)$")


class Tensors(Protocol):
    """The tensors of a checkpoint, each read when it is asked for."""

    @property
    def folder(self) -> pathlib.Path:
        """The folder that holds them, for messages."""

    def names(self) -> tuple[str, ...]:
        """Names every tensor."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of a tensor."""

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor into a new array."""


def load_params(
    source: Tensors,
    cfg: BackboneConfig,
    *,
    layout: str,
    head: Head,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Loads the parameters of a checkpoint onto the devices of the partition rules.

    The host builds one stacked parameter at a time, and only the shards of its own devices; every
    tensor is read once.

    Args:
        source: the checkpoint's tensors.
        cfg: the backbone its config describes.
        layout: the config's `model_type`.
        head: `score` for a sequence classifier.
        mesh: of the parameters; None for the first device alone.
        dtype: of the parameters; None keeps that of the checkpoint.
        on_progress: called with tensors done and tensors in all.

    Returns:
        Nested dict, as `transformer.init_params` makes it.

    Raises:
        ValueError: tensors are missing, unexpected or misshapen (they are named), or a dimension
            does not divide over the mesh.
    """
    rules = tensor_rules(cfg, layout, head)
    prefix = _prefix(source, rules)
    source = _with_embedding(source, rules[0].names[0].removeprefix(prefix), cfg)
    total = _check_tensors(source, rules, cfg, head, prefix)
    shapes = _flatten(abstract_params(cfg, ComputeConfig(), head=head))
    done = 0
    flat: dict[str, jax.Array] = {}
    for rule in rules:
        names = [_names(rule, layer, prefix) for layer in _layers(rule, cfg)]
        kept = common_dtype({source.dtype(name) for part in names for name in part})
        chosen = np.dtype(kept if dtype is None else dtype)
        place = _sharding(rule.path, shapes[rule.path], chosen, mesh)
        buffers = _Buffers(shapes[rule.path].shape, chosen, place, stacked=rule.stacked)
        for layer, part in enumerate(names):
            parts = [source.read(name).astype(kept, copy=False) for name in part]
            buffers.fill(layer, rule.join(parts))
            done += len(part)
            if on_progress is not None:
                on_progress(done, total)
        flat[rule.path] = buffers.to_array()
    return nested(flat)


class _Buffers:
    """Host memory for the shards of one parameter that lie on this host's devices."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype,
        place: jax.sharding.Sharding,
        *,
        stacked: bool,
    ) -> None:
        self._shape, self._place, self._stacked = shape, place, stacked
        self._slices = {
            device: tuple(
                part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True)
            )
            for device, index in place.addressable_devices_indices_map(shape).items()
        }
        # Replicas share one buffer.
        self._buffers = {
            bounds: _aligned([stop - start for start, stop in bounds], dtype)
            for bounds in set(self._slices.values())
        }

    def fill(self, layer: int, value: np.ndarray) -> None:
        """Copies one layer's value (or the whole, where layers are not stacked) into the shards."""
        for bounds, buffer in self._buffers.items():
            inner = bounds[1:] if self._stacked else bounds
            target = buffer[layer] if self._stacked else buffer
            np.copyto(target, value[tuple(slice(*b) for b in inner)], casting="unsafe")

    def to_array(self) -> jax.Array:
        """Moves the parameter to its devices and frees this host's memory."""
        shards = [
            jax.device_put(self._buffers[bounds], device) for device, bounds in self._slices.items()
        ]
        self._buffers = {}
        array = jax.make_array_from_single_device_arrays(self._shape, self._place, shards)
        # Wait, or the host's copies of several parameters accumulate during the transfer.
        return jax.block_until_ready(array)


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Allocates aligned memory, which a CPU device uses without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _sharding(
    path: str, leaf: jax.ShapeDtypeStruct, dtype: np.dtype, mesh: Mesh | None
) -> jax.sharding.Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    tree = nested({path: jax.ShapeDtypeStruct(leaf.shape, dtype)})
    return jax.tree.leaves(sharding.parameter_shardings(tree, mesh))[0]


def _prefix(source: Tensors, rules: tuple[TensorRule, ...]) -> str:
    """Returns the prefix that the names of a bare base model lack."""
    expected = next(prefix for prefix in _BASE_PREFIXES if rules[0].names[0].startswith(prefix))
    bare = not any(name.startswith(expected) for name in source.names())
    return expected if bare else ""


@dataclasses.dataclass(frozen=True)
class _Renamed:
    """The tensors of a checkpoint, one of them under another name."""

    source: Tensors
    stored: str
    name: str

    @property
    def folder(self) -> pathlib.Path:
        return self.source.folder

    def names(self) -> tuple[str, ...]:
        return tuple(self.name if one == self.stored else one for one in self.source.names())

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(self._stored(name))

    def dtype(self, name: str) -> np.dtype:
        return self.source.dtype(self._stored(name))

    def read(self, name: str) -> np.ndarray:
        return self.source.read(self._stored(name))

    def _stored(self, name: str) -> str:
        return self.stored if name == self.name else name


def _with_embedding(source: Tensors, embedding: str, cfg: BackboneConfig) -> Tensors:
    """Gives the one matrix of a tied model, saved under either name, the embedding's name."""
    names = source.names()
    if cfg.tie_embeddings and embedding not in names and _HEAD in names:
        return _Renamed(source, _HEAD, embedding)
    return source


def _layers(rule: TensorRule, cfg: BackboneConfig) -> range:
    return range(cfg.num_layers if rule.stacked else 1)


def _names(rule: TensorRule, layer: int, prefix: str) -> list[str]:
    return [name.removeprefix(prefix).replace("{layer}", str(layer)) for name in rule.names]


def _check_tensors(
    source: Tensors,
    rules: tuple[TensorRule, ...],
    cfg: BackboneConfig,
    head: Head,
    prefix: str,
) -> int:
    """Compares the checkpoint with the table before reading; returns the number of tensors."""
    expected: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        for layer in _layers(rule, cfg):
            expected |= dict(zip(_names(rule, layer, prefix), rule.shapes, strict=True))
    found = {name for name in source.names() if not is_legacy_buffer(name)}
    if cfg.tie_embeddings and head == "lm" and _HEAD in found:
        _check_tied(source, rules[0].names[0].removeprefix(prefix))
        found.remove(_HEAD)
    problems = _list("lacks tensors", [name for name in expected if name not in found])
    problems += _list("has unexpected tensors", sorted(found - set(expected)))
    problems += _list(
        "has misshapen tensors",
        [
            f"{name} {source.shape(name)} instead of {shape}"
            for name, shape in expected.items()
            if name in found and source.shape(name) != shape
        ],
    )
    if problems:
        raise ValueError(f"{source.folder}: the checkpoint {'; '.join(problems)}")
    return len(expected)


def _check_tied(source: Tensors, embedding: str) -> None:
    """Refuses a saved head of a tied model that differs from the embedding."""
    if not np.array_equal(source.read(_HEAD), source.read(embedding)):
        raise ValueError(
            f"{source.folder}: config.json ties the head to the embedding, but {_HEAD} "
            f"differs from {embedding}: set tie_word_embeddings to false"
        )


def _list(what: str, items: list[str]) -> list[str]:
    if not items:
        return []
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return [f"{what} {', '.join(items[:_LISTED])}{more}"]


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        sharding.path_name(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the dict of dicts with the given paths, such as `layers/qkv/kernel`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


@dataclasses.dataclass(frozen=True)
class DeltaSource:
    """The tensors of base plus delta, each summed when it is read; no whole model is in memory.

    Sums are taken in float32 and rounded to the delta's dtype.
    """

    delta: Tensors
    base: Tensors

    def __post_init__(self) -> None:
        """Checks that delta and base fit together, before anything is read."""
        for name in self.delta.names():
            if _PUBLISHED_WHOLE.search(name):
                continue
            if name not in self.base.names():
                raise ValueError(f"{self.base.folder}: the base lacks {name} of the delta")
            if self.base.shape(name) != self.delta.shape(name):
                raise ValueError(
                    f"{self.base.folder}: {name} is {self.base.shape(name)} in the base, "
                    f"{self.delta.shape(name)} in the delta: not the base of this delta"
                )

    @property
    def folder(self) -> pathlib.Path:
        """The delta's folder."""
        return self.delta.folder

    def names(self) -> tuple[str, ...]:
        """Names every tensor of the delta."""
        return self.delta.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self.delta.shape(name)

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of a tensor: that of the delta."""
        return self.delta.dtype(name)

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor of base plus delta into a new array."""
        difference = self.delta.read(name)
        if _PUBLISHED_WHOLE.search(name):
            return difference
        total = difference.astype(np.float32) + self.base.read(name).astype(np.float32)
        return total.astype(difference.dtype)
