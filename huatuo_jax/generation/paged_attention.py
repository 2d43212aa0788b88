"""Attention of one query a row to keys and values in pages, read where they lie.

Each page is weighed by itself, and so is the query's own token where no page holds it yet. A row's
parts are then put together by the largest score and the total of each, as FlashAttention does
blocks (arXiv 2205.14135). Pages are looked up in the order of positions: an answer is the same to
the last bit wherever its pages lie.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from huatuo_jax.generation.cache import Pages

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
