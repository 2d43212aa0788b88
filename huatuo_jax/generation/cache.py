"""The key/value cache: a pool of pages on the device, and the table of their owners on the host.

A page holds the keys and values of positions of one row (one answer). A row owns as many pages as
its length needs, anywhere in the pool, so that a decode step reads what the answers need rather
than what the longest of them would. Heads come before positions, `[P, K, S, H]` with S the
positions of a page, so that a head's keys of a page are contiguous. Layers are either stacked in
one array (a leading L) or a tuple of arrays; every function here counts dimensions from the end and
takes both. A tuple's keys have their positions last, `[P, K, H, S]`: on CPU the product of a few
queries with the keys of a page then reads them where they lie, and else it copies them first.

On a mesh, rows and pages are split over the batch axes and heads over `tensor`; a row's pages lie
in its own shard. `on_shards` runs functions that look pages up inside the shards, so that no key
travels.
"""

import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.core import sharding

Layers = Any  # One array [L, P, K, S, H], or a tuple of L arrays [P, K, S, H]; keys: [P, K, H, S].

ROWS_SPEC = P(sharding.BATCH_AXES)  # Arrays [B, ...] and [P, ...] without heads.
HEADS_SPEC = P(sharding.BATCH_AXES, None, "tensor", None)  # Keys, values, queries [B, T, K, H].
PAGES_SPEC = P(sharding.BATCH_AXES, "tensor", None, None)
_NONE = -1
_GIGA = 1e9


class Cache(NamedTuple):
    """The keys, values and tokens of all rows so far.

    Attributes:
        keys: rotated where the model rotates; grouped heads stay grouped. Those of a tuple have
            their positions last.
        values: as projected.
        tokens_PS: int32, the token at each position. Values past a row's end have no meaning.
    """

    keys: Layers
    values: Layers
    tokens_PS: Any

    @property
    def num_pages(self) -> int:
        """Returns the number of pages of the pool, owned and free ones."""
        return self.tokens_PS.shape[0]

    @property
    def page_size(self) -> int:
        """Returns the number of positions S of a page."""
        return self.tokens_PS.shape[1]


class Pages(NamedTuple):
    """The owner of each page; on a mesh, rows and pages are counted within their shard.

    Attributes:
        table_BM: int32, each row's pages in the order of positions, then -1.
        rows_P: int32, the row of each page, -1 for a free one.
        starts_P: int32, the position of each page's first token.
    """

    table_BM: Any
    rows_P: Any
    starts_P: Any


def empty(
    cfg: BackboneConfig, *, num_pages: int, page_size: int, dtype: DTypeLike, split_layers: bool
) -> Cache:
    """Makes a cache of zeros."""
    page = (page_size, cfg.head_dim)

    def layers(page: tuple[int, ...]) -> Layers:
        shape = (num_pages, cfg.num_kv_heads, *page)
        if split_layers:
            return tuple(jnp.zeros(shape, dtype) for _ in range(cfg.num_layers))
        return jnp.zeros((cfg.num_layers, *shape), dtype)

    keys = layers(page[::-1] if split_layers else page)
    return Cache(keys, layers(page), jnp.zeros((num_pages, page_size), jnp.int32))


def shardings(cfg: BackboneConfig, mesh: Mesh, *, split_layers: bool) -> Cache:
    """Returns the shardings of a cache: pages like a batch, heads like attention's."""
    stacked = NamedSharding(mesh, P(None, *PAGES_SPEC))
    layers = (NamedSharding(mesh, PAGES_SPEC),) * cfg.num_layers if split_layers else stacked
    return Cache(layers, layers, NamedSharding(mesh, ROWS_SPEC))


def num_bytes(cfg: BackboneConfig, *, positions: int, dtype: DTypeLike) -> int:
    """Returns the bytes of this many positions of a cache, on all devices together."""
    numbers = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim
    return positions * (numbers * jnp.dtype(dtype).itemsize + 4)


def on_shards(function: Callable[..., Any], *, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Wraps the function to run on each shard of the mesh in use (`jax.set_mesh`), if any."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def layer_specs(layers: Layers, spec: P) -> Any:
    """Returns a layer's spec for each array of `layers`, stacked ones included."""
    return jax.tree.map(lambda array: P(*(None,) * (array.ndim - 4), *spec), layers)


def write_step(
    layers: Layers,
    new: Layers,
    pages: Pages,
    positions_B: jax.Array,
    *,
    positions_last: bool = False,
) -> Layers:
    """Writes one token's keys (or values) into each row, at the row's own position.

    Call within a shard. A row without a page there writes nothing.

    Args:
        layers: `[..., P, K, S, H]`, or a tuple of such.
        new: `[..., B, 1, K, H]`, as a layer projects them, of the same structure.
        pages: the owners of the pages.
        positions_B: int32.
        positions_last: the layers are `[..., P, K, H, S]`.
    """
    in_turn = sharding.platform_in_use() == "tpu" and not positions_last

    def write_layers(pool: jax.Array, added: jax.Array) -> jax.Array:
        page_size = pool.shape[-1 if positions_last else -2]
        places = _places(pages, positions_B, page_size=page_size)
        added = added.squeeze(-3).astype(pool.dtype)
        if in_turn:
            return _write_in_turn(pool, added, *places)
        return _write_at_once(pool, added, *places, positions_last=positions_last)

    return jax.tree.map(write_layers, layers, new)


def write_tokens(
    tokens_PS: jax.Array, tokens_B: jax.Array, pages: Pages, positions_B: jax.Array
) -> jax.Array:
    """Writes one token into each row, as `write_step` does its keys."""
    pages_B, offsets_B = _places(pages, positions_B, page_size=tokens_PS.shape[1])
    return tokens_PS.at[pages_B, offsets_B].set(tokens_B, mode="drop")


def seen_tokens(
    tokens_PS: jax.Array, pages: Pages, positions_B: jax.Array, *, vocab_size: int
) -> jax.Array:
    """Returns a mask `[B, V]` of the tokens of each row before its position, within a shard."""
    ends_P = positions_B[pages.rows_P]
    places_PS = pages.starts_P[:, None] + jnp.arange(tokens_PS.shape[1])[None, :]
    before_PS = (places_PS < ends_P[:, None]) & (pages.rows_P >= 0)[:, None]
    # Tokens of no row are sent past the vocabulary, and dropped.
    tokens_PS = jnp.where(before_PS, tokens_PS, vocab_size)
    none_BV = jnp.zeros((len(positions_B), vocab_size), dtype=bool)
    return none_BV.at[pages.rows_P[:, None], tokens_PS].set(True, mode="drop")


def write_start(layers: Layers, new: Layers, *, positions_last: bool = False) -> Layers:
    """Writes the first T tokens' keys (or values), `[..., R, T, K, H]`, at each row's start.

    Row r owns the r-th of R equal parts of the pages, in their order. `positions_last` is as for
    `write_step`.
    """

    def write(array: jax.Array, added: jax.Array) -> jax.Array:
        *lead, rows, length, num_heads, head_dim = added.shape
        num_pages, page_size = array.shape[-4], array.shape[-1 if positions_last else -2]
        used = -(-length // page_size)
        widths = [(0, 0)] * added.ndim
        widths[-3] = (0, used * page_size - length)
        added = jnp.pad(added.astype(array.dtype), widths)
        added = added.reshape(*lead, rows, used, page_size, num_heads, head_dim)
        added = jnp.moveaxis(added, -3, -1) if positions_last else jnp.swapaxes(added, -3, -2)
        own = array.reshape(*lead, rows, num_pages // rows, *array.shape[-3:])
        own = jax.lax.dynamic_update_slice(own, added, (0,) * own.ndim)
        return own.reshape(array.shape)

    return jax.tree.map(write, layers, new)


def write_pages(
    pool_PKSH: jax.Array, new_RTKH: jax.Array, starts_R: jax.Array, *, positions_last: bool = False
) -> jax.Array:
    """Writes T tokens' keys (or values) into each row from the start of a page, within a shard.

    Args:
        pool_PKSH: of one layer; rows own pages as in `write_start`.
        new_RTKH: what passes a row's last page is dropped.
        starts_R: int32, the position of each row's first token, a multiple of the page size.
        positions_last: the pool is `[P, K, H, S]`.
    """
    page_size = pool_PKSH.shape[3 if positions_last else 2]
    new_RUSKH = _cut_into_pages(new_RTKH.astype(pool_PKSH.dtype), page_size)
    # In the order of the pool.
    new_RU = jnp.moveaxis(new_RUSKH, 2, 4) if positions_last else jnp.swapaxes(new_RUSKH, 2, 3)
    own_RM = pool_PKSH.reshape(len(starts_R), -1, *pool_PKSH.shape[1:])
    return _put_pages(own_RM, new_RU, starts_R // page_size).reshape(pool_PKSH.shape)


def write_page_tokens(tokens_PS: jax.Array, new_RT: jax.Array, starts_R: jax.Array) -> jax.Array:
    """Writes tokens into each row from the start of a page, as `write_pages` does their keys."""
    page_size = tokens_PS.shape[1]
    own_RMS = tokens_PS.reshape(len(starts_R), -1, page_size)
    new_RUS = _cut_into_pages(new_RT, page_size)
    return _put_pages(own_RMS, new_RUS, starts_R // page_size).reshape(tokens_PS.shape)


def write_start_tokens(tokens_PS: jax.Array, tokens_RT: jax.Array) -> jax.Array:
    """Writes tokens at each row's start, as `write_start` does their keys."""
    rows, length = tokens_RT.shape
    own_RS = tokens_PS.reshape(rows, -1)
    return jax.lax.dynamic_update_slice(own_RS, tokens_RT, (0, 0)).reshape(tokens_PS.shape)


def copy_pages(target: Cache, source: Cache, sources_M: jax.Array, targets_M: jax.Array) -> Cache:
    """Copies pages of one cache over pages of another, within a shard.

    Args:
        target: the cache to copy into.
        source: the cache to copy from.
        sources_M: int32, pages to copy, counted over all shards.
        targets_M: int32, the page to overwrite with each, counted likewise; then -1.
    """
    mesh = jax.sharding.get_abstract_mesh()
    here = 0 if mesh.empty else jax.lax.axis_index(sharding.BATCH_AXES)

    def copy_page(index: jax.Array, target: Cache) -> Cache:
        page = sources_M[index] - here * source.num_pages
        place = targets_M[index] - here * target.num_pages
        is_mine = (page >= 0) & (page < source.num_pages)
        is_here = (place >= 0) & (place < target.num_pages)

        def copy(to: jax.Array, of: jax.Array) -> jax.Array:
            dim = max(of.ndim - 4, 0)  # Tokens are [P, S].
            content = jax.lax.dynamic_slice_in_dim(of, page, 1, dim)
            if not mesh.empty:
                content = jax.lax.psum(jnp.where(is_mine, content, 0), sharding.BATCH_AXES)
                before = jax.lax.dynamic_slice_in_dim(to, place, 1, dim)
                content = jnp.where(is_here, content, before)
            return jax.lax.dynamic_update_slice_in_dim(to, content, place, dim)

        return jax.tree.map(copy, target, source)

    return jax.lax.fori_loop(0, (targets_M >= 0).sum(), copy_page, target)


def grow(cache: Cache, *, added: int) -> Cache:
    """Returns the cache with `added` more pages after its own, within a shard."""

    def pad(array: jax.Array) -> jax.Array:
        widths = [(0, 0)] * array.ndim
        widths[max(array.ndim - 4, 0)] = (0, added)
        return jnp.pad(array, widths)

    return jax.tree.map(pad, cache)


def shrink(cache: Cache, targets_N: jax.Array) -> Cache:
    """Returns the cache without its last N pages, within a shard.

    Args:
        cache: of more than N pages.
        targets_N: int32, the pages that the last ones are moved to; those past the end are dropped.
    """

    def move(pool: jax.Array) -> jax.Array:
        kept = len(pool) - len(targets_N)
        return pool[:kept].at[targets_N].set(pool[kept:], mode="drop")

    return jax.tree.map(lambda array: (jax.vmap(move) if array.ndim == 5 else move)(array), cache)


class PageTable:
    """The owners of pages, on the host.

    On a mesh a row's pages lie in its own shard, and are counted within it.

    Attributes:
        pages: the owners, as arguments of the programs.
    """

    def __init__(self, *, rows: int, pages_per_row: int, page_size: int, shards: int = 1) -> None:
        """Makes a table without pages.

        Args:
            rows: number of rows, a multiple of `shards`.
            pages_per_row: pages of a row at most.
            page_size: positions of a page.
            shards: number of shards, with equal numbers of rows and pages.
        """
        assert rows % shards == 0
        self._page_size, self._shards = page_size, shards
        self._rows_per_shard = rows // shards
        self._counts_B = np.zeros(rows, np.int32)
        nothing = np.zeros(0, np.int32)
        self.pages = Pages(np.full((rows, pages_per_row), _NONE, np.int32), nothing, nothing)

    @property
    def num_pages(self) -> int:
        """Returns the number of owned and free pages, of all shards."""
        return len(self.pages.rows_P)

    @property
    def num_owned(self) -> int:
        """Returns the number of owned pages, of all shards."""
        return int(self._counts_B.sum())

    def needed(self, lengths_B: Sequence[int] | np.ndarray) -> int:
        """Returns the number of pages, of all shards, that rows of these lengths need."""
        counts = self._counts_for(lengths_B).reshape(self._shards, -1)
        return int(counts.sum(axis=1).max()) * self._shards

    def of_rows(self, rows_R: np.ndarray) -> Pages:
        """Returns the pages of some rows, which count from 0 in each shard, in the given order.

        Args:
            rows_R: equally many of each shard, one shard after another; all rows that own pages.
        """
        per_shard = len(rows_R) // self._shards
        places = np.full(len(self._counts_B), _NONE, np.int32)
        places[rows_R] = np.arange(len(rows_R)) % per_shard
        owners_P = self.pages.rows_P.reshape(self._shards, -1)
        firsts = self._rows_per_shard * np.arange(self._shards)[:, None]
        renamed_P = np.where(owners_P == _NONE, _NONE, places[owners_P + firsts])
        assert (renamed_P == _NONE).sum() == (owners_P == _NONE).sum(), "a row is left out"
        return Pages(self.pages.table_BM[rows_R], renamed_P.reshape(-1), self.pages.starts_P)

    def fit(self, lengths_B: Sequence[int] | np.ndarray) -> None:
        """Gives each row the pages for its length, and takes back the others.

        A row keeps its pages in their order. There must be enough free ones, see `needed`.
        """
        counts_B = self._counts_for(lengths_B)
        for row in np.flatnonzero(counts_B < self._counts_B):
            self._take_back(int(row), int(counts_B[row]))
        for row in np.flatnonzero(counts_B > self._counts_B):
            self._give(int(row), int(counts_B[row]))

    def grow(self, num_pages: int) -> None:
        """Grows to this many pages; the new ones are free."""
        added = (num_pages - self.num_pages) // self._shards
        assert added >= 0 and num_pages % self._shards == 0

        def pad(numbers_P: np.ndarray, value: int) -> np.ndarray:
            parts = numbers_P.reshape(self._shards, -1)
            return np.pad(parts, ((0, 0), (0, added)), constant_values=value).reshape(-1)

        self.pages = self.pages._replace(
            rows_P=pad(self.pages.rows_P, _NONE), starts_P=pad(self.pages.starts_P, 0)
        )

    def shrink(self, num_pages: int) -> np.ndarray:
        """Shrinks to this many pages, which must be enough for the owned ones.

        Returns:
            The targets of the last pages of each shard, one shard after another: pages to
            overwrite, or the new number of a shard's pages for a page without an owner.
        """
        kept = num_pages // self._shards
        assert num_pages < self.num_pages and num_pages % self._shards == 0
        rows = self.pages.rows_P.reshape(self._shards, -1).copy()
        starts = self.pages.starts_P.reshape(self._shards, -1).copy()
        targets = np.full((self._shards, rows.shape[1] - kept), kept, np.int32)
        for shard in range(self._shards):
            moved = kept + np.flatnonzero(rows[shard, kept:] != _NONE)
            free = np.flatnonzero(rows[shard, :kept] == _NONE)[: len(moved)]
            assert len(free) == len(moved)
            targets[shard, moved - kept] = free
            rows[shard, free], starts[shard, free] = rows[shard, moved], starts[shard, moved]
            owners = shard * self._rows_per_shard + rows[shard, free]
            self.pages.table_BM[owners, starts[shard, free] // self._page_size] = free
        self.pages = self.pages._replace(
            rows_P=rows[:, :kept].reshape(-1), starts_P=starts[:, :kept].reshape(-1)
        )
        return targets.reshape(-1)

    def _counts_for(self, lengths_B: Sequence[int] | np.ndarray) -> np.ndarray:
        return -(-np.asarray(lengths_B, np.int32) // self._page_size)

    def _shard_of(self, row: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Returns the row's number within its shard, and the shard's part of the two arrays."""
        shard, row = divmod(row, self._rows_per_shard)
        part = slice(*(np.array([shard, shard + 1]) * (self.num_pages // self._shards)))
        return row, self.pages.rows_P[part], self.pages.starts_P[part]

    def _give(self, row: int, count: int) -> None:
        own, rows_P, starts_P = self._shard_of(row)
        owned = int(self._counts_B[row])
        # The first free ones, so that little moves when the cache shrinks.
        taken = np.flatnonzero(rows_P == _NONE)[: count - owned]
        assert len(taken) == count - owned, "no page is free"
        rows_P[taken] = own
        starts_P[taken] = np.arange(owned, count) * self._page_size
        self.pages.table_BM[row, owned:count] = taken
        self._counts_B[row] = count

    def _take_back(self, row: int, count: int) -> None:
        _, rows_P, _ = self._shard_of(row)
        owned = int(self._counts_B[row])
        rows_P[self.pages.table_BM[row, count:owned]] = _NONE
        self.pages.table_BM[row, count:owned] = _NONE
        self._counts_B[row] = count


def check_fits(
    cfg: BackboneConfig,
    *,
    slots: int,
    prompt_rows: int,
    kept_pages: int,
    max_length: int,
    page_size: int,
    pages: tuple[int, ...],
    dtype: DTypeLike,
    mesh: Mesh | None,
    memory_bytes: int | None,
) -> None:
    """Raises ValueError if the cache is larger than the free memory.

    Args:
        cfg: the backbone.
        slots: rows of the cache, in the worst case of `max_length` each.
        prompt_rows: rows of the prompt cache.
        kept_pages: pages of the prefix cache.
        max_length: positions of a row at most.
        page_size: positions of a page.
        pages: the cache's buckets; while it grows into the last, the one before is there too.
        dtype: of keys and values.
        mesh: devices that share it; None for one.
        memory_bytes: free memory of all devices together; None reads it from the devices.
    """
    page = num_bytes(cfg, positions=page_size, dtype=dtype)
    others = (prompt_rows * -(-max_length // page_size) + kept_pages) * page
    slot = page * sum(pages[-2:]) / slots
    needed = slots * slot + others
    free = _free_bytes(mesh) if memory_bytes is None else memory_bytes
    if needed > free:
        further = " or a smaller prefix_cache_pages" if kept_pages else ""
        fitting = max(math.floor((free - others) / slot), 0)
        raise ValueError(
            f"slots={slots} of max_length={max_length} tokens need {needed / _GIGA:.3g} GB of "
            f"cache, {free / _GIGA:.3g} GB are free: {fitting} slots of that length would fit; "
            f"use fewer slots or a smaller max_length{further}"
        )


def _cut_into_pages(new_RT: jax.Array, page_size: int) -> jax.Array:
    """Returns an array `[R, T, ...]` as `[R, U, S, ...]`, its last page filled up with zeros."""
    widths = [(0, 0)] * new_RT.ndim
    widths[1] = (0, -new_RT.shape[1] % page_size)
    padded = jnp.pad(new_RT, widths)
    return padded.reshape(len(new_RT), -1, page_size, *new_RT.shape[2:])


def _put_pages(own_RM: jax.Array, new_RU: jax.Array, firsts_R: jax.Array) -> jax.Array:
    """Returns rows of M pages, U of them replaced from each row's first on, where they exist.

    No index is clamped, and nothing is scattered, which would be slow on TPUs.
    """
    num_new = new_RU.shape[1]

    def put(own_M: jax.Array, new_U: jax.Array, first: jax.Array) -> jax.Array:
        index_M = jnp.arange(len(own_M)) - first
        taken_M = new_U[jnp.clip(index_M, 0, num_new - 1)]
        is_new_M = (index_M >= 0) & (index_M < num_new)
        return jnp.where(is_new_M.reshape(-1, *(1,) * (own_M.ndim - 1)), taken_M, own_M)

    return jax.vmap(put)(own_RM, new_RU, firsts_R)


def _write_at_once(
    pool: jax.Array,
    new: jax.Array,
    pages_B: jax.Array,
    offsets_B: jax.Array,
    *,
    positions_last: bool,
) -> jax.Array:
    """Writes `[..., B, K, H]` into pages `[..., P, K, S, H]`; a page past the last is dropped."""
    if pool.ndim == 5:
        write = functools.partial(_write_at_once, positions_last=positions_last)
        return jax.vmap(write, in_axes=(0, 0, None, None))(pool, new, pages_B, offsets_B)
    if positions_last:
        return pool.at[pages_B, :, :, offsets_B].set(new, mode="drop")
    return pool.at[pages_B, :, offsets_B].set(new, mode="drop")


def _write_in_turn(
    pool: jax.Array, new: jax.Array, pages_B: jax.Array, offsets_B: jax.Array
) -> jax.Array:
    """Writes the same as `_write_at_once`, row after row, for TPUs.

    For a scatter, XLA:TPU (libtpu 0.0.42) would change the layout of all pages before and after
    each step, as it places a token's layers beside each other; hence the fixed layout, which is
    also that of the cache between programs.
    """
    as_it_lies = Layout(tuple(range(pool.ndim)))
    last = pool.shape[-4] - 1

    def write_row(row: jax.Array, pool: jax.Array) -> jax.Array:
        page, offset = jnp.minimum(pages_B[row], last), offsets_B[row]
        start: list[Any] = [0] * (pool.ndim - 4) + [page, 0, offset, 0]
        new_1K1H = jax.lax.dynamic_slice_in_dim(new, row, 1, new.ndim - 3)[..., None, :]
        old_1K1H = jax.lax.dynamic_slice(pool, start, new_1K1H.shape)
        new_1K1H = jnp.where(pages_B[row] <= last, new_1K1H, old_1K1H)
        pool = with_layout_constraint(pool, as_it_lies)
        return jax.lax.dynamic_update_slice(pool, new_1K1H, start)

    return jax.lax.fori_loop(0, len(pages_B), write_row, pool)


def _places(pages: Pages, positions_B: jax.Array, *, page_size: int) -> tuple[jax.Array, jax.Array]:
    """Returns page and offset of a position; the page is past the last where a row has none."""
    pages_B = jnp.take_along_axis(pages.table_BM, (positions_B // page_size)[:, None], axis=1)[:, 0]
    return jnp.where(pages_B < 0, len(pages.rows_P), pages_B), positions_B % page_size


def _free_bytes(mesh: Mesh | None) -> float:
    """Returns the free memory of the devices, on CPU that of the machine."""
    devices = [jax.devices()[0]] if mesh is None else list(mesh.devices.flat)
    local = [device for device in devices if device.process_index == jax.process_index()]
    if local[0].platform == "cpu":
        return _free_host_bytes()  # All virtual devices share it.
    statistics = [device.memory_stats() for device in local]
    if any(one is None or "bytes_limit" not in one for one in statistics):
        return math.inf
    least = min(one["bytes_limit"] - one["bytes_in_use"] for one in statistics)
    return float(least * len(devices))


def _free_host_bytes() -> float:
    table = pathlib.Path("/proc/meminfo")
    if not table.is_file():  # Not Linux: unknown.
        return math.inf
    for line in table.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return float(value.split()[0]) * 1024
    return math.inf
