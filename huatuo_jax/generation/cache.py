"""The key/value cache: rows of keys and values, one row an answer, all of one static length.

Heads come before positions, `[B, K, S, H]`, so that one decode step reads each row's keys in one
piece. Layers are either stacked in one array (a leading L) or a tuple of arrays; every function
here counts dimensions from the end and takes both.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from huatuo_jax import sharding
from huatuo_jax.backbone.config import BackboneConfig

Layers = Any  # One array [L, B, K, S, H], or a tuple of L arrays [B, K, S, H].


class Cache(NamedTuple):
    """What a row's next token is computed from.

    Attributes:
        keys: rotated where the model rotates; grouped heads stay grouped.
        values: as they were projected.
        tokens_BS: int32, the token at each position. What stands past a row's end means nothing.
    """

    keys: Layers
    values: Layers
    tokens_BS: Any

    @property
    def length(self) -> int:
        """Positions S a row has room for."""
        return self.tokens_BS.shape[1]


def empty(
    cfg: BackboneConfig, *, rows: int, length: int, dtype: DTypeLike, split_layers: bool
) -> Cache:
    """A cache of zeros."""
    shape = (rows, cfg.num_kv_heads, length, cfg.head_dim)

    def layers() -> Layers:
        if split_layers:
            return tuple(jnp.zeros(shape, dtype) for _ in range(cfg.num_layers))
        return jnp.zeros((cfg.num_layers, *shape), dtype)

    return Cache(layers(), layers(), jnp.zeros((rows, length), jnp.int32))


def shardings(cfg: BackboneConfig, mesh: Mesh, *, split_layers: bool) -> Cache:
    """Where a cache lies: rows like a batch, heads like attention's."""
    layer = P(sharding.BATCH_AXES, "tensor", None, None)
    stacked = NamedSharding(mesh, P(None, *layer))
    layers = (NamedSharding(mesh, layer),) * cfg.num_layers if split_layers else stacked
    return Cache(layers, layers, NamedSharding(mesh, P(sharding.BATCH_AXES, None)))


def num_bytes(cfg: BackboneConfig, *, rows: int, length: int, dtype: DTypeLike) -> int:
    """Bytes of a cache, on all devices together."""
    numbers = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim
    return rows * length * (numbers * jnp.dtype(dtype).itemsize + 4)


def write_step(layers: Layers, new: Layers, positions_B: jax.Array) -> Layers:
    """Puts one token's keys (or values) into each row, at the row's own position.

    Args:
        layers: `[..., B, K, S, H]`, or a tuple of such.
        new: `[..., B, 1, K, H]`, as a layer projects them, of the same structure.
        positions_B: int32.
    """

    def write_row(row_KSH: jax.Array, new_1KH: jax.Array, position: jax.Array) -> jax.Array:
        new_K1H = jnp.swapaxes(new_1KH, 0, 1).astype(row_KSH.dtype)
        return jax.lax.dynamic_update_slice(row_KSH, new_K1H, (0, position, 0))

    def write(array: jax.Array, added: jax.Array) -> jax.Array:
        write_rows = jax.vmap(write_row)
        if array.ndim == 5:
            return jax.vmap(write_rows, in_axes=(0, 0, None))(array, added, positions_B)
        return write_rows(array, added, positions_B)

    return jax.tree.map(write, layers, new)


def write_start(layers: Layers, new: Layers) -> Layers:
    """Puts the first T tokens' keys (or values), `[..., B, T, K, H]`, at each row's start."""

    def write(array: jax.Array, added: jax.Array) -> jax.Array:
        added = jnp.swapaxes(added, -3, -2).astype(array.dtype)
        return jax.lax.dynamic_update_slice(array, added, (0,) * array.ndim)

    return jax.tree.map(write, layers, new)


def copy_row(
    target: Cache, source: Cache, *, source_row: jax.Array, target_row: jax.Array
) -> Cache:
    """Copies one row of a longer (or equal) cache over a row of another, up to its length."""
    length = target.length

    def copy(to: jax.Array, of: jax.Array, row_dim: int, length_dim: int) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(of, source_row, 1, row_dim % of.ndim)
        row = jax.lax.slice_in_dim(row, 0, length, axis=length_dim)
        return jax.lax.dynamic_update_slice_in_dim(to, row, target_row, row_dim % to.ndim)

    def copy_layers(to: Layers, of: Layers) -> Layers:
        return jax.tree.map(lambda a, b: copy(a, b, -4, -2), to, of)

    return Cache(
        copy_layers(target.keys, source.keys),
        copy_layers(target.values, source.values),
        copy(target.tokens_BS, source.tokens_BS, -2, -1),
    )


def grow(cache: Cache, length: int) -> Cache:
    """The same rows with room for more positions."""
    added = length - cache.length

    def pad(array: jax.Array, length_dim: int) -> jax.Array:
        widths = [(0, 0)] * array.ndim
        widths[length_dim] = (0, added)
        return jnp.pad(array, widths)

    def pad_layers(layers: Layers) -> Layers:
        return jax.tree.map(lambda array: pad(array, -2), layers)

    return Cache(pad_layers(cache.keys), pad_layers(cache.values), pad(cache.tokens_BS, -1))
