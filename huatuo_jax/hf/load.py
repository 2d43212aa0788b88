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
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike

from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig
from huatuo_jax.backbone.transformer import Head, abstract_params
from huatuo_jax.core import sharding
from huatuo_jax.hf.safetensors_files import common_dtype
from huatuo_jax.hf.tensor_table import SCORE_WEIGHT, TensorRule, is_legacy_buffer, tensor_rules
from huatuo_jax.hf.weight_files import StoredTensor, TensorSource

Progress = Callable[[int, int], None]

# Base models are saved without the prefix of the class that holds them.
_BASE_PREFIXES = ("model.", "transformer.")
_HEAD = "lm_head.weight"
_LISTED = 5
_ALIGNMENT = 64  # bytes
# Tensors of delta weights that are not differences.
_PUBLISHED_WHOLE = re.compile(r"(^|\.)(embed_tokens\.weight|lm_head\.weight|rotary_emb\.inv_freq)$")


@dataclasses.dataclass(frozen=True)
class _Sum:
    """A tensor of delta weights plus that of the base, summed when it is read.

    The sum is taken in float32 and rounded to the delta's dtype.
    """

    delta: StoredTensor
    base: StoredTensor

    @property
    def path(self) -> pathlib.Path:
        return self.delta.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.delta.shape

    @property
    def dtype(self) -> np.dtype:
        return self.delta.dtype

    def read(self) -> np.ndarray:
        total = self.delta.read().astype(np.float32) + self.base.read().astype(np.float32)
        return total.astype(self.dtype)


def add_delta(delta: TensorSource, base: TensorSource) -> TensorSource:
    """Returns the tensors of base plus delta; no whole model is in memory.

    Raises:
        ValueError: delta and base do not fit together.
    """
    summed: dict[str, StoredTensor] = {}
    for name, tensor in delta.tensors.items():
        if _PUBLISHED_WHOLE.search(name):
            summed[name] = tensor
            continue
        if name not in base.tensors:
            raise ValueError(f"{base.folder}: the base lacks {name} of the delta")
        if base.shape(name) != tensor.shape:
            raise ValueError(
                f"{base.folder}: {name} is {base.shape(name)} in the base, "
                f"{tensor.shape} in the delta: not the base of this delta"
            )
        summed[name] = _Sum(tensor, base.tensors[name])
    return TensorSource(delta.folder, summed)


def load_params(
    source: TensorSource,
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
        head: `score` for a sequence classifier, of one label or two (see `is_score_model`).
        mesh: of the parameters; None for the first device alone.
        dtype: of the parameters; None keeps that of the checkpoint.
        on_progress: called with tensors done and tensors in all.

    Returns:
        Nested dict, as `transformer.init_params` makes it.

    Raises:
        ValueError: tensors are missing, unexpected or misshapen (they are named), or a dimension
            does not divide over the mesh.
    """
    rules = tensor_rules(cfg, layout, head, labels=_labels(source))
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


def _labels(source: TensorSource) -> int:
    """The labels of a sequence classifier; 1 where there is none."""
    has_two = SCORE_WEIGHT in source.tensors and source.shape(SCORE_WEIGHT)[0] == 2
    return 2 if has_two else 1


def _prefix(source: TensorSource, rules: tuple[TensorRule, ...]) -> str:
    """Returns the prefix that the names of a bare base model lack."""
    expected = next(prefix for prefix in _BASE_PREFIXES if rules[0].names[0].startswith(prefix))
    bare = not any(name.startswith(expected) for name in source.names())
    return expected if bare else ""


def _with_embedding(source: TensorSource, embedding: str, cfg: BackboneConfig) -> TensorSource:
    """Gives the one matrix of a tied model, saved under either name, the embedding's name."""
    if not cfg.tie_embeddings or embedding in source.tensors or _HEAD not in source.tensors:
        return source
    renamed = {embedding if name == _HEAD else name: one for name, one in source.tensors.items()}
    return TensorSource(source.folder, renamed)


def _layers(rule: TensorRule, cfg: BackboneConfig) -> range:
    return range(cfg.num_layers if rule.stacked else 1)


def _names(rule: TensorRule, layer: int, prefix: str) -> list[str]:
    return [name.removeprefix(prefix).replace("{layer}", str(layer)) for name in rule.names]


def _check_tensors(
    source: TensorSource,
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


def _check_tied(source: TensorSource, embedding: str) -> None:
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
