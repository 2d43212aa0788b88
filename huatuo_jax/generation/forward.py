"""The model's forward pass with a cache: prompts into it, and one token more for every row.

Layers come stacked, and are scanned, or as a tuple, and are written out one after another. The
first compiles as fast for many layers as for one; the second reads every weight and key where it
lies, which on CPU spares a copy of each in every step.

In a step, a tuple's layers take their new keys in before they are read, in place. Stacked ones
are only read by the scan, which would copy a whole layer to write into it: all their new keys are
put in after it.

Attention of one query a row to keys and values in pages, read where they lie.

Each page is weighed by itself, and so is the query's own token where no page holds it yet. A row's
parts are then put together by the largest score and the total of each, as FlashAttention does
blocks (arXiv 2205.14135). Pages are looked up in the order of positions: an answer is the same to
the last bit wherever its pages lie.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.backbone.layers import Rows, attend_to_rows, slopes
from huatuo_jax.backbone.transformer import Layer, Transformer
from huatuo_jax.generation import cache as caches
from huatuo_jax.generation.cache import Cache, Pages

_MASKED_SCORE = -1e30  # Finite: what a row without pages gathers is a number, which nobody reads.
_HEADS = ((0, 1), (0, 1))  # The batch dimensions P and K of both products.


class _Parts(NamedTuple):
    """What queries gather from parts of their rows, which are pages or their own tokens.

    Attributes:
        largest: score, `[..., N]`.
        total: of the weights, which are 1 for the largest score, `[..., N]`.
        values: summed by these weights, `[..., N, H]`.
    """

    largest: jax.Array
    total: jax.Array
    values: jax.Array


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
) -> jax.Array:
    """What each row's query gathers from the row's keys at its position and before.

    Args:
        q_BNH: queries, not scaled.
        own: keys and values `[B, K, H]` of the same tokens, whose place in the pages is not read
            then; None where the pages hold them.
        k_PKSH: keys; each key/value head serves N / K query heads in a row.
        v_PKSH: values.
        pages: who owns what.
        positions_B: int32, where the queries stand.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it.
        alibi_slopes_N: what a score loses per token of distance; None without ALiBi.

    Returns:
        `[B, N, H]` in the dtype of the values. Softmax and sums are in at least float32. Rows
        without pages gather numbers that mean nothing.
    """
    batch, _, head_dim = q_BNH.shape
    q_BKGH = (q_BNH * head_dim**-0.5).reshape(batch, k_PKSH.shape[1], -1, head_dim)
    places_PS = pages.starts_P[:, None] + jnp.arange(k_PKSH.shape[2])[None, :]
    distance_PS = positions_B[pages.rows_P][:, None] - places_PS
    visible_PS = distance_PS >= (0 if own is None else 1)
    if sliding_window is not None:
        visible_PS &= distance_PS < sliding_window
    scores_PNS = _scores(q_BKGH[pages.rows_P], k_PKSH)
    if alibi_slopes_N is not None:
        slopes_1N1 = alibi_slopes_N[None, :, None].astype(scores_PNS.dtype)
        scores_PNS -= slopes_1N1 * distance_PS[:, None].astype(scores_PNS.dtype)
    scores_PNS = jnp.where(visible_PS[:, None], scores_PNS, _MASKED_SCORE)
    parts = _of_rows(_weighed(scores_PNS, v_PKSH), pages.table_BM)
    if own is not None:
        k_BK1H, v_BK1H = (new.astype(k_PKSH.dtype)[:, :, None] for new in own)
        parts = _joined(_weighed(_scores(q_BKGH, k_BK1H), v_BK1H), parts)
    # What follows is a product, which on CPU would take all this in and compute it many times over.
    return jax.lax.optimization_barrier(_put_together(parts).astype(v_PKSH.dtype))


def _scores(q_PKGH: jax.Array, k_PKSH: jax.Array) -> jax.Array:
    """`[P, N, S]`: query heads in one dimension.

    Where G is 1, reductions on CPU are far slower with it apart.
    """
    scores_PKGS = jax.lax.dot_general(
        q_PKGH,
        k_PKSH,
        (((3,), (3,)), _HEADS),
        preferred_element_type=jnp.promote_types(q_PKGH.dtype, jnp.float32),
    )
    return scores_PKGS.reshape(len(q_PKGH), -1, k_PKSH.shape[2])


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
    """Of each row those of its pages: `[B, M, N]` and `[B, M, N, H]`."""
    largest_PN, total_PN, values_PNH = parts
    largest_BMN = jnp.where(table_BM[..., None] >= 0, largest_PN[table_BM], _MASKED_SCORE)
    return _Parts(largest_BMN, total_PN[table_BM], values_PNH[table_BM])


def _joined(own: _Parts, of_rows: _Parts) -> _Parts:
    """The own token's part before those of each row's pages."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a[:, None], b], axis=1), own, of_rows)


def _put_together(parts: _Parts) -> jax.Array:
    """The values `[B, N, H]` of rows from those of their parts."""
    largest_BMN, total_BMN, values_BMNH = parts
    # Zero for what is not owned or not seen, as some part of the row has a far larger score.
    scale_BMN = jnp.exp(largest_BMN - largest_BMN.max(axis=1, keepdims=True))
    total_BN = (scale_BMN * total_BMN).sum(axis=1)
    values_BNH = (scale_BMN[..., None] * values_BMNH).sum(axis=1)
    return values_BNH / total_BN[..., None]


Variables = dict[str, Any]
KeysValues = tuple[jax.Array, jax.Array]


def prefill(model: Transformer, variables: Variables, tokens_BT: jax.Array, cache: Cache) -> Cache:
    """The cache with these tokens at the start of its rows.

    Args:
        model: the backbone.
        variables: its own, layers stacked or split.
        tokens_BT: padded on the right; what the padding leaves in the cache is never read, because
            a later token overwrites a position before it looks at it.
        cache: whose pages are those of as many rows, in their order, of at least T positions.
    """
    batch, length = tokens_BT.shape
    positions_T = jnp.arange(length, dtype=jnp.int32)
    rows = _rows(model, jnp.broadcast_to(positions_T[None, :], (batch, length)))

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, memory: None
    ) -> tuple[jax.Array, KeysValues]:
        return attend_to_rows(q, k, v, rows, model.cfg, model.compute), (k, v)

    hidden_BTD = _apply_outer(model, variables, tokens_BT, method="embed")
    _, (keys, values) = _through_layers(model, variables, hidden_BTD, rows, attend, None)
    return Cache(
        caches.write_start(cache.keys, keys),
        caches.write_start(cache.values, values),
        caches.write_start_tokens(cache.tokens_PS, tokens_BT),
    )


def decode(
    model: Transformer,
    variables: Variables,
    tokens_B: jax.Array,
    positions_B: jax.Array,
    cache: Cache,
    pages: Pages,
) -> tuple[jax.Array, Cache]:
    """Each row's next-token logits `[B, V]` after one more token, and the cache with it.

    Args:
        model: the backbone.
        variables: its own, layers stacked or split.
        tokens_B: the token of each row.
        positions_B: where it stands; the row's pages hold all positions before.
        cache: updated in place where it is donated.
        pages: who owns what of it; a row without pages has logits that mean nothing.
    """
    rows = _rows(model, positions_B[:, None])
    split = isinstance(cache.keys, tuple)
    memory = (cache.keys, cache.values)
    attend_to_pages = _attending(model.cfg)

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, memory: KeysValues
    ) -> tuple[jax.Array, KeysValues]:
        own: KeysValues | None = (k, v)
        if split:
            memory, own = _written(memory, (k, v), pages, positions_B), None
        attended = attend_to_pages(q, own, memory, pages, positions_B, slopes(model.cfg))
        return attended, memory if split else (k, v)

    hidden_B1D = _apply_outer(model, variables, tokens_B[:, None], method="embed")
    hidden_B1D, (keys, values) = _through_layers(model, variables, hidden_B1D, rows, attend, memory)
    if not split:
        keys, values = _written(memory, (keys, values), pages, positions_B)
    write_tokens = caches.on_shards(
        caches.write_tokens, in_specs=(caches.ROWS_SPEC,) * 4, out_specs=caches.ROWS_SPEC
    )
    tokens_PS = write_tokens(cache.tokens_PS, tokens_B, pages, positions_B)
    hidden_B1D = _apply_outer(model, variables, hidden_B1D, method="normalise")
    logits_B1V = _apply_outer(model, variables, hidden_B1D, method="logits")
    return logits_B1V[:, 0], Cache(keys, values, tokens_PS)


def _attending(cfg: BackboneConfig) -> Callable[..., jax.Array]:
    """What each row's query gathers, `[B, 1, N, H]`, from pages on its own shard.

    Queries, keys and slopes are split by heads, the rest by rows.
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
        )
        return attended_BNH[:, None].astype(q_B1NH.dtype)

    heads, pool, rows = caches.HEADS_SPEC, caches.PAGES_SPEC, caches.ROWS_SPEC
    return caches.on_shards(
        attend, in_specs=(heads, heads, pool, rows, rows, P("tensor")), out_specs=heads
    )


def _written(
    memory: tuple[Any, Any], new: tuple[Any, Any], pages: Pages, positions_B: jax.Array
) -> tuple[Any, Any]:
    """Keys and values with each row's new ones, of one layer or of all."""
    pool = caches.layer_specs(memory, caches.PAGES_SPEC)
    heads, rows = caches.layer_specs(new, caches.HEADS_SPEC), caches.ROWS_SPEC
    write = caches.on_shards(caches.write_step, in_specs=(pool, heads, rows, rows), out_specs=pool)
    return write(memory, new, pages, positions_B)


def _rows(model: Transformer, positions_BT: jax.Array) -> Rows:
    return model.apply({}, positions_BT, method="rows")


def _apply_outer(
    model: Transformer, variables: Variables, *arguments: jax.Array, method: str
) -> jax.Array:
    """A method of the model that reads no layer."""
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
    """The residual stream after all layers, and what `attend` handed back in each.

    Args:
        model: the backbone.
        variables: its own.
        hidden_BTD: embeddings.
        rows: where the tokens stand.
        attend: attention, told this layer's part of `memories` last.
        memories: keys and values of every layer; None where attention needs none.
    """
    layer = Layer(model.cfg, model.compute, model.lora)

    def apply(hidden_BTD: jax.Array, weights: Variables, memory: Any) -> tuple[jax.Array, Any]:
        return layer.apply(weights, hidden_BTD, rows, lambda q, k, v: attend(q, k, v, memory))

    weights = {name: collection["layers"] for name, collection in variables.items()}
    if not isinstance(weights["params"], tuple):
        return jax.lax.scan(lambda hidden, x: apply(hidden, *x), hidden_BTD, (weights, memories))
    handed_back = []
    for index in range(model.cfg.num_layers):
        own = {name: layers[index] for name, layers in weights.items()}
        memory = None if memories is None else (memories[0][index], memories[1][index])
        hidden_BTD, new = apply(hidden_BTD, own, memory)
        handed_back.append(new)
    keys, values = zip(*handed_back, strict=True)
    return hidden_BTD, (keys, values)
