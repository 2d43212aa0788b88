"""The model's forward pass with a cache: prompts into it, and one more token for every row.

Layers are stacked and scanned, or a tuple and unrolled. The first compiles in a time independent of
their number; the second reads every weight and key in place, which on CPU saves a copy of each in
every step. In a step, a tuple's layers write their new keys in place before attention reads them.
Stacked layers are only read by the scan, which would copy a whole layer to write into it; all their
new keys are written after it.

Attention weighs each page by itself, and so the query's own token where no page holds it yet. A
row's parts are then combined by the largest score and the total of each, as FlashAttention combines
blocks (arXiv 2205.14135). Pages are read in the order of positions: an answer is the same to the
last bit wherever its pages lie.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.backbone.layers import Rows, attend_to_rows, slopes
from huatuo_jax.backbone.transformer import Layer, Transformer
from huatuo_jax.core import sharding
from huatuo_jax.generation import cache as caches
from huatuo_jax.generation.cache import Cache, Pages

_MASKED_SCORE = -1e30  # Finite: a row without pages gets a number, which is never read.
_HEADS = ((0, 1), (0, 1))  # The batch dimensions P and K of both products.
Variables = dict[str, Any]
KeysValues = tuple[jax.Array, jax.Array]


def attend_pages(
    q_BNH: jax.Array,
    own: tuple[jax.Array, jax.Array] | None,
    k_PKSH: jax.Array,
    v_PKSH: jax.Array,
    pages: Pages,
    positions_B: jax.Array,
    *,
    sliding_window: int | None,
    alibi_slopes_N: jax.Array | None,
    keys_positions_last: bool = False,
) -> jax.Array:
    """Attends each row's query to the row's keys at its position and before.

    Args:
        q_BNH: queries, not scaled.
        own: keys and values `[B, K, H]` of the same tokens, whose positions in the pages are then
            not read; None where the pages hold them.
        k_PKSH: keys; each key/value head serves N / K query heads in a row.
        v_PKSH: values.
        pages: the owners of the pages.
        positions_B: int32, the queries' positions.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it.
        alibi_slopes_N: decrease of a score per token of distance; None without ALiBi.
        keys_positions_last: the keys are `[P, K, H, S]`.

    Returns:
        `[B, N, H]` in the dtype of the values. Softmax and sums are in at least float32. Rows
        without pages get meaningless numbers.
    """
    batch, _, head_dim = q_BNH.shape
    q_BKGH = (q_BNH * head_dim**-0.5).reshape(batch, k_PKSH.shape[1], -1, head_dim)
    places_PS = pages.starts_P[:, None] + jnp.arange(v_PKSH.shape[2])[None, :]
    distance_PS = positions_B[pages.rows_P][:, None] - places_PS
    visible_PS = distance_PS >= (0 if own is None else 1)
    if sliding_window is not None:
        visible_PS &= distance_PS < sliding_window
    scores_PNS = _scores(q_BKGH[pages.rows_P], k_PKSH, positions_last=keys_positions_last)
    if alibi_slopes_N is not None:
        slopes_1N1 = alibi_slopes_N[None, :, None].astype(scores_PNS.dtype)
        scores_PNS -= slopes_1N1 * distance_PS[:, None].astype(scores_PNS.dtype)
    scores_PNS = jnp.where(visible_PS[:, None], scores_PNS, _MASKED_SCORE)
    parts = _of_rows(_weighed(scores_PNS, v_PKSH), pages.table_BM)
    if own is not None:
        k_BK1H, v_BK1H = (new.astype(k_PKSH.dtype)[:, :, None] for new in own)
        parts = _joined(_weighed(_scores(q_BKGH, k_BK1H), v_BK1H), parts)
    # The product that follows would on CPU be fused with all this and compute it many times over.
    return jax.lax.optimization_barrier(_put_together(parts).astype(v_PKSH.dtype))


def prefill(model: Transformer, variables: Variables, cache: Cache, tokens_BT: jax.Array) -> Cache:
    """Returns the cache with these tokens at the start of its rows.

    Args:
        model: the backbone.
        variables: its own, layers stacked or split.
        cache: its pages belong to B rows in their order, of at least T positions each.
        tokens_BT: padded on the right; cached values of padding are never read, because a later
            token overwrites a position before it reads it.
    """
    batch, length = tokens_BT.shape
    positions_T = jnp.arange(length, dtype=jnp.int32)
    rows = _rows(model, jnp.broadcast_to(positions_T[None, :], (batch, length)))
    stored = jax.tree.leaves(cache.keys)[0].dtype

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, memory: None
    ) -> tuple[jax.Array, KeysValues]:
        # Rounded like what is read later, so that it makes no difference which part was cached.
        k, v = (x.astype(stored).astype(x.dtype) for x in (k, v))
        return attend_to_rows(q, k, v, rows, model.cfg, model.compute), (k, v)

    hidden_BTD = _apply_outer(model, variables, tokens_BT, method="embed")
    _, (keys, values) = _through_layers(model, variables, hidden_BTD, rows, attend, None)
    return Cache(
        caches.write_start(cache.keys, keys, positions_last=isinstance(cache.keys, tuple)),
        caches.write_start(cache.values, values),
        caches.write_start_tokens(cache.tokens_PS, tokens_BT),
    )


def extend(
    model: Transformer,
    variables: Variables,
    cache: Cache,
    tokens_BT: jax.Array,
    starts_B: jax.Array,
    *,
    max_length: int,
) -> Cache:
    """Returns the cache with these tokens in its rows, after those that are there.

    Args:
        model: the backbone.
        variables: its own, layers stacked or split.
        cache: its pages belong to B rows in their order; each holds all positions before the start.
        tokens_BT: padded on the right, as for `prefill`.
        starts_B: int32, the position of each row's first token, a multiple of the page size.
        max_length: positions of a row that are in use; those of padding may be further.
    """
    positions_BT = starts_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :]
    # Clipped, as under dynamic rotary scaling the furthest one would change all angles.
    rows = _rows(model, jnp.minimum(positions_BT, max_length - 1))
    attend_to_own_pages = _extending(model.cfg, split=isinstance(cache.keys, tuple))

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, memory: KeysValues
    ) -> tuple[jax.Array, KeysValues]:
        return attend_to_own_pages(q, k, v, memory, starts_B, slopes(model.cfg))

    hidden_BTD = _apply_outer(model, variables, tokens_BT, method="embed")
    memory = (cache.keys, cache.values)
    _, (keys, values) = _through_layers(model, variables, hidden_BTD, rows, attend, memory)
    write_tokens = caches.on_shards(
        caches.write_page_tokens, in_specs=(caches.ROWS_SPEC,) * 3, out_specs=caches.ROWS_SPEC
    )
    return Cache(keys, values, write_tokens(cache.tokens_PS, tokens_BT, starts_B))


def attend_own_pages(
    q_BTNH: jax.Array,
    k_PKSH: jax.Array,
    v_PKSH: jax.Array,
    starts_B: jax.Array,
    *,
    sliding_window: int | None,
    alibi_slopes_N: jax.Array | None,
    keys_positions_last: bool = False,
) -> jax.Array:
    """Attends rows of queries to the pages of the same rows, page after page.

    Args:
        q_BTNH: queries, not scaled.
        k_PKSH: keys; row b owns the b-th of B equal parts of the pages, in their order.
        v_PKSH: values.
        starts_B: int32, the position of each row's first query.
        sliding_window: as for `attend_pages`.
        alibi_slopes_N: as for `attend_pages`.
        keys_positions_last: as for `attend_pages`.

    Returns:
        `[B, T, N, H]` in the dtype of the values. Softmax and sums are in at least float32.
    """
    batch, length, num_heads, head_dim = q_BTNH.shape
    num_kv_heads, page_size = v_PKSH.shape[1:3]
    keys_dims = (((3,), (2 if keys_positions_last else 3,)), _HEADS)
    keys, values = (x.reshape(batch, -1, *x.shape[1:]) for x in (k_PKSH, v_PKSH))
    q_BTKGH = (q_BTNH * head_dim**-0.5).reshape(batch, length, num_kv_heads, -1, head_dim)
    # Queries of all heads that share a key/value head in one dimension, `[B, K, G * T, H]`.
    q_BKQH = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, -1, head_dim)
    positions_BT = starts_B[:, None] + jnp.arange(length)[None, :]
    dtype = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    slopes_N111 = None if alibi_slopes_N is None else alibi_slopes_N.astype(dtype)[:, None, None]

    def add_page(page: jax.Array, before: _Parts) -> _Parts:
        k_BKSH = jax.lax.dynamic_index_in_dim(keys, page, axis=1, keepdims=False)
        v_BKSH = jax.lax.dynamic_index_in_dim(values, page, axis=1, keepdims=False)
        scores_BKQS = jax.lax.dot_general(q_BKQH, k_BKSH, keys_dims, preferred_element_type=dtype)
        scores_BNTS = scores_BKQS.reshape(batch, num_heads, length, page_size)
        places_S = page * page_size + jnp.arange(page_size)
        distance_BTS = positions_BT[:, :, None] - places_S[None, None, :]
        visible_BTS = distance_BTS >= 0
        if sliding_window is not None:
            visible_BTS &= distance_BTS < sliding_window
        if slopes_N111 is not None:
            scores_BNTS -= slopes_N111[None] * distance_BTS[:, None].astype(dtype)
        scores_BNTS = jnp.where(visible_BTS[:, None], scores_BNTS, _MASKED_SCORE)
        largest_BNT = jnp.maximum(before.largest, scores_BNTS.max(axis=-1))
        weights_BNTS = jnp.exp(scores_BNTS - largest_BNT[..., None])
        weights_BKQS = weights_BNTS.astype(v_BKSH.dtype).reshape(scores_BKQS.shape)
        values_BKQH = jax.lax.dot_general(
            weights_BKQS, v_BKSH, (((3,), (2,)), _HEADS), preferred_element_type=dtype
        )
        kept_BNT = jnp.exp(before.largest - largest_BNT)
        return _Parts(
            largest_BNT,
            kept_BNT * before.total + weights_BNTS.sum(axis=-1),
            kept_BNT[..., None] * before.values + values_BKQH.reshape(before.values.shape),
        )

    shape = (batch, num_heads, length)
    nothing = _Parts(
        jnp.full(shape, _MASKED_SCORE, dtype),
        jnp.zeros(shape, dtype),
        jnp.zeros((*shape, head_dim), dtype),
    )
    num_pages = jnp.minimum(positions_BT.max() // page_size + 1, keys.shape[1])
    parts = jax.lax.fori_loop(0, num_pages, add_page, nothing)
    attended_BNTH = (parts.values / parts.total[..., None]).astype(v_PKSH.dtype)
    return attended_BNTH.transpose(0, 2, 1, 3)


def decode(
    model: Transformer,
    variables: Variables,
    tokens_B: jax.Array,
    positions_B: jax.Array,
    rows: Rows,
    cache: Cache,
    pages: Pages,
) -> tuple[jax.Array, Cache]:
    """Runs one more token of each row; returns next-token logits `[B, V]` and the cache.

    Args:
        model: the backbone.
        variables: its own, layers stacked or split.
        tokens_B: the token of each row.
        positions_B: its position; the row's pages hold all positions before.
        rows: of these positions, see `rows_at`.
        cache: updated in place where it is donated.
        pages: the owners of its pages; a row without pages gets meaningless logits.
    """
    split = isinstance(cache.keys, tuple)
    memory = (cache.keys, cache.values)
    attend_to_pages = _attending(model.cfg, split=split)

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, memory: KeysValues
    ) -> tuple[jax.Array, KeysValues]:
        own: KeysValues | None = (k, v)
        if split:
            memory, own = _written(memory, (k, v), pages, positions_B, split=True), None
        attended = attend_to_pages(q, own, memory, pages, positions_B, slopes(model.cfg))
        return attended, memory if split else (k, v)

    embedding = variables["params"]["embedding"]
    if sharding.platform_in_use() == "cpu":
        # Tied to the tokens: XLA:CPU reads rows of a bfloat16 table as float32, and would convert
        # all of it before the loop over steps, and hold the copy.
        embedding, tokens_B = jax.lax.optimization_barrier((embedding, tokens_B))
    params = {**variables["params"], "embedding": embedding}
    tokens_B1 = tokens_B[:, None]
    hidden_B1D = _apply_outer(model, variables | {"params": params}, tokens_B1, method="embed")
    hidden_B1D, (keys, values) = _through_layers(model, variables, hidden_B1D, rows, attend, memory)
    if not split:
        keys, values = _written(memory, (keys, values), pages, positions_B, split=False)
    write_tokens = caches.on_shards(
        caches.write_tokens, in_specs=(caches.ROWS_SPEC,) * 4, out_specs=caches.ROWS_SPEC
    )
    tokens_PS = write_tokens(cache.tokens_PS, tokens_B, pages, positions_B)
    hidden_B1D = _apply_outer(model, variables, hidden_B1D, method="normalise")
    logits_B1V = _apply_outer(model, variables, hidden_B1D, method="logits")
    return logits_B1V[:, 0], Cache(keys, values, tokens_PS)


def rows_at(model: Transformer, positions_B: jax.Array) -> Rows:
    """Returns the rotations of one token of each row, for `decode`.

    Computed inside a step, they would on CPU be computed anew in every layer, and for each page.
    """
    return _rows(model, positions_B[:, None])


class _Parts(NamedTuple):
    """The attention of queries over parts of their rows, which are pages or their own tokens.

    Attributes:
        largest: largest score, `[..., N]`.
        total: sum of the weights, which are 1 for the largest score, `[..., N]`.
        values: sum of the values by these weights, `[..., N, H]`.
    """

    largest: jax.Array
    total: jax.Array
    values: jax.Array


def _scores(q_PKGH: jax.Array, k_PKSH: jax.Array, *, positions_last: bool = False) -> jax.Array:
    """Returns scores `[P, N, S]`, query heads in one dimension.

    With a separate dimension G of size 1, reductions on CPU are far slower.
    """
    scores_PKGS = jax.lax.dot_general(
        q_PKGH,
        k_PKSH,
        (((3,), (2 if positions_last else 3,)), _HEADS),
        preferred_element_type=jnp.promote_types(q_PKGH.dtype, jnp.float32),
    )
    return scores_PKGS.reshape(len(q_PKGH), -1, scores_PKGS.shape[-1])


def _weighed(scores_PNS: jax.Array, v_PKSH: jax.Array) -> _Parts:
    num_parts, num_heads, size = scores_PNS.shape
    largest_PN = scores_PNS.max(axis=-1)
    weights_PNS = jnp.exp(scores_PNS - largest_PN[..., None])
    values_PKGH = jax.lax.dot_general(
        weights_PNS.astype(v_PKSH.dtype).reshape(num_parts, v_PKSH.shape[1], -1, size),
        v_PKSH,
        (((3,), (2,)), _HEADS),
        preferred_element_type=scores_PNS.dtype,
    )
    values_PNH = values_PKGH.reshape(num_parts, num_heads, -1)
    return _Parts(largest_PN, weights_PNS.sum(axis=-1), values_PNH)


def _of_rows(parts: _Parts, table_BM: jax.Array) -> _Parts:
    """Gathers the parts of each row's pages: `[B, M, N]` and `[B, M, N, H]`."""
    largest_PN, total_PN, values_PNH = parts
    largest_BMN = jnp.where(table_BM[..., None] >= 0, largest_PN[table_BM], _MASKED_SCORE)
    return _Parts(largest_BMN, total_PN[table_BM], values_PNH[table_BM])


def _joined(own: _Parts, of_rows: _Parts) -> _Parts:
    """Puts the own token's part before those of each row's pages."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a[:, None], b], axis=1), own, of_rows)


def _put_together(parts: _Parts) -> jax.Array:
    """Combines the values of the parts of rows into `[B, N, H]`."""
    largest_BMN, total_BMN, values_BMNH = parts
    # Zero for parts not owned or not visible, as another part of the row has a far larger score.
    scale_BMN = jnp.exp(largest_BMN - largest_BMN.max(axis=1, keepdims=True))
    total_BN = (scale_BMN * total_BMN).sum(axis=1)
    values_BNH = (scale_BMN[..., None] * values_BMNH).sum(axis=1)
    return values_BNH / total_BN[..., None]


def _attending(cfg: BackboneConfig, *, split: bool) -> Callable[..., jax.Array]:
    """Returns the function that attends each row's query to pages on its own shard.

    Its result is `[B, 1, N, H]`. Queries, keys and slopes are split by heads, the rest by rows.
    `split` says that layers are a tuple.
    """

    def attend(
        q_B1NH: jax.Array,
        own: KeysValues | None,
        memory: KeysValues,
        pages: Pages,
        positions_B: jax.Array,
        alibi_slopes_N: jax.Array | None,
    ) -> jax.Array:
        attended_BNH = attend_pages(
            q_B1NH[:, 0],
            None if own is None else (own[0][:, 0], own[1][:, 0]),
            *memory,
            pages,
            positions_B,
            sliding_window=cfg.sliding_window,
            alibi_slopes_N=alibi_slopes_N,
            keys_positions_last=split,
        )
        return attended_BNH[:, None].astype(q_B1NH.dtype)

    heads, pool, rows = caches.HEADS_SPEC, caches.PAGES_SPEC, caches.ROWS_SPEC
    return caches.on_shards(
        attend, in_specs=(heads, heads, pool, rows, rows, P("tensor")), out_specs=heads
    )


def _extending(cfg: BackboneConfig, *, split: bool) -> Callable[..., tuple[jax.Array, KeysValues]]:
    """Returns the function that writes a layer's keys and values and attends to its pages.

    It runs on each shard, and returns `[B, T, N, H]` and the layer's pages. `split` says that
    layers are a tuple.
    """

    def attend(
        q_BTNH: jax.Array,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        memory: KeysValues,
        starts_B: jax.Array,
        alibi_slopes_N: jax.Array | None,
    ) -> tuple[jax.Array, KeysValues]:
        keys = caches.write_pages(memory[0], k_BTKH, starts_B, positions_last=split)
        values = caches.write_pages(memory[1], v_BTKH, starts_B)
        attended_BTNH = attend_own_pages(
            q_BTNH,
            keys,
            values,
            starts_B,
            sliding_window=cfg.sliding_window,
            alibi_slopes_N=alibi_slopes_N,
            keys_positions_last=split,
        )
        return attended_BTNH.astype(q_BTNH.dtype), (keys, values)

    heads, pool, rows = caches.HEADS_SPEC, caches.PAGES_SPEC, caches.ROWS_SPEC
    return caches.on_shards(
        attend,
        in_specs=(heads, heads, heads, pool, rows, P("tensor")),
        out_specs=(heads, pool),
    )


def _written(
    memory: tuple[Any, Any],
    new: tuple[Any, Any],
    pages: Pages,
    positions_B: jax.Array,
    *,
    split: bool,
) -> tuple[Any, Any]:
    """Returns keys and values with each row's new ones, of one layer of a tuple or of all."""

    def write(memory: tuple[Any, Any], new: tuple[Any, Any], *places: Any) -> tuple[Any, Any]:
        keys = caches.write_step(memory[0], new[0], *places, positions_last=split)
        return keys, caches.write_step(memory[1], new[1], *places)

    pool = caches.layer_specs(memory, caches.PAGES_SPEC)
    heads, rows = caches.layer_specs(new, caches.HEADS_SPEC), caches.ROWS_SPEC
    on_shards = caches.on_shards(write, in_specs=(pool, heads, rows, rows), out_specs=pool)
    return on_shards(memory, new, pages, positions_B)


def _rows(model: Transformer, positions_BT: jax.Array) -> Rows:
    return model.apply({}, positions_BT, method="rows")


def _apply_outer(
    model: Transformer, variables: Variables, *arguments: jax.Array, method: str
) -> jax.Array:
    """Applies a method of the model that reads no layer."""
    params = {name: value for name, value in variables["params"].items() if name != "layers"}
    return model.apply({"params": params}, *arguments, method=method)


def _through_layers(
    model: Transformer,
    variables: Variables,
    hidden_BTD: jax.Array,
    rows: Rows,
    attend: Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, KeysValues]],
    memories: tuple[Any, Any] | None,
) -> tuple[jax.Array, tuple[Any, Any]]:
    """Runs all layers; returns the residual stream, and the results of `attend` in each.

    Args:
        model: the backbone.
        variables: its own.
        hidden_BTD: embeddings.
        rows: the tokens' positions.
        attend: attention, which gets this layer's part of `memories` last.
        memories: keys and values of every layer; None where attention needs none.
    """
    layer = Layer(model.cfg, model.compute, model.lora)

    def apply(hidden_BTD: jax.Array, weights: Variables, memory: Any) -> tuple[jax.Array, Any]:
        return layer.apply(weights, hidden_BTD, rows, lambda q, k, v: attend(q, k, v, memory))

    weights = {name: collection["layers"] for name, collection in variables.items()}
    if not isinstance(weights["params"], tuple):
        return jax.lax.scan(lambda hidden, x: apply(hidden, *x), hidden_BTD, (weights, memories))
    returned = []
    for index in range(model.cfg.num_layers):
        own = {name: layers[index] for name, layers in weights.items()}
        memory = None if memories is None else (memories[0][index], memories[1][index])
        hidden_BTD, new = apply(hidden_BTD, own, memory)
        returned.append(new)
    keys, values = zip(*returned, strict=True)
    return hidden_BTD, (keys, values)
