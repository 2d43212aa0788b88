"""Attention of one query a row to keys and values in pages, read where they lie.

Each page is weighed by itself, and a row's pages are then put together by the largest score and
the total of each, as FlashAttention does blocks (arXiv 2205.14135). They are looked up in the
order of positions: an answer is the same to the last bit wherever its pages lie.
"""

import jax
import jax.numpy as jnp

from huatuo_jax.generation.cache import Pages

_MASKED_SCORE = -1e30  # Finite: what a row without pages gathers is a number, which nobody reads.
_HEADS = ((0, 1), (0, 1))  # The batch dimensions P and K of both products.


def attend_pages(
    q_BNH: jax.Array,
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
    batch, num_heads, head_dim = q_BNH.shape
    num_kv_heads, page_size = k_PKSH.shape[1:3]
    q_BKGH = (q_BNH * head_dim**-0.5).reshape(batch, num_kv_heads, -1, head_dim)
    places_PS = pages.starts_P[:, None] + jnp.arange(page_size)[None, :]
    distance_PS = positions_B[pages.rows_P][:, None] - places_PS
    visible_PS = distance_PS >= 0
    if sliding_window is not None:
        visible_PS &= distance_PS < sliding_window
    scores_PKGS = jax.lax.dot_general(
        q_BKGH[pages.rows_P],
        k_PKSH,
        (((3,), (3,)), _HEADS),
        preferred_element_type=jnp.promote_types(q_BNH.dtype, jnp.float32),
    )
    # Query heads in one dimension: where G is 1, reductions on CPU are far slower with it apart.
    scores_PNS = scores_PKGS.reshape(-1, num_heads, page_size)
    if alibi_slopes_N is not None:
        slopes_1N1 = alibi_slopes_N[None, :, None].astype(scores_PNS.dtype)
        scores_PNS -= slopes_1N1 * distance_PS[:, None].astype(scores_PNS.dtype)
    scores_PNS = jnp.where(visible_PS[:, None], scores_PNS, _MASKED_SCORE)
    largest_PN = scores_PNS.max(axis=-1)
    weights_PNS = jnp.exp(scores_PNS - largest_PN[..., None])
    values_PKGH = jax.lax.dot_general(
        weights_PNS.astype(v_PKSH.dtype).reshape(scores_PKGS.shape),
        v_PKSH,
        (((3,), (2,)), _HEADS),
        preferred_element_type=scores_PNS.dtype,
    )
    values_PNH = values_PKGH.reshape(-1, num_heads, head_dim)
    values_BNH = _put_together(largest_PN, weights_PNS.sum(axis=-1), values_PNH, pages.table_BM)
    # What follows is a product, which on CPU would take all this in and compute it many times over.
    return jax.lax.optimization_barrier(values_BNH.astype(v_PKSH.dtype))


def _put_together(
    largest_PN: jax.Array, total_PN: jax.Array, values_PNH: jax.Array, table_BM: jax.Array
) -> jax.Array:
    """The values of rows from those of their pages: `[B, N, H]`."""
    largest_BMN = jnp.where(table_BM[..., None] >= 0, largest_PN[table_BM], _MASKED_SCORE)
    # Zero for what is not owned, as an owned page of the row has a far larger score.
    scale_BMN = jnp.exp(largest_BMN - largest_BMN.max(axis=1, keepdims=True))
    total_BN = (scale_BMN * total_PN[table_BM]).sum(axis=1)
    values_BNH = (scale_BMN[..., None] * values_PNH[table_BM]).sum(axis=1)
    return values_BNH / total_BN[..., None]
