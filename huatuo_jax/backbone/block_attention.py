"""Attention in plain XLA: blocks of queries, each against only the keys that it may see."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

_MASKED_SCORE = -1e30  # Finite: a row of padding attends to itself instead of becoming NaN.
_MOST_BLOCKS = 16  # Each one is a copy of its products in the compiled program.


def attend_in_blocks(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
    alibi_slopes_N: jax.Array | None,
    query_chunk: int,
) -> jax.Array:
    """Chunks of queries against only the keys before their end: the upper half is never computed.

    Scores of a chunk are made again in the backward pass, so `[T, T]` is never held.
    """
    length = q_BTNH.shape[1]
    chunk = max(query_chunk, -(-length // _MOST_BLOCKS))
    blocks, masks = [], []
    for start in range(0, length, chunk):
        low = 0 if sliding_window is None else max(0, start - sliding_window + 1)
        block = _Block(low, start, min(start + chunk, length))
        blocks.append(block)
        masks.append(
            _mask(
                positions_BT[:, block.queries],
                positions_BT[:, block.keys],
                None if segment_ids_BT is None else segment_ids_BT[:, block.queries],
                None if segment_ids_BT is None else segment_ids_BT[:, block.keys],
                sliding_window,
            )
        )
    output_BKGTH = _weigh(
        tuple(blocks),
        *_heads_first(q_BTNH, k_BTKH, v_BTKH),
        tuple(masks),
        _by_group(alibi_slopes_N, k_BTKH.shape[2]),
    )
    return output_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def attend_block(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segments_BT: jax.Array | None,
    k_segments_BS: jax.Array | None,
    sliding_window: int | None,
    alibi_slopes_N: jax.Array | None,
) -> jax.Array:
    """Attention of some queries to some keys, in plain XLA; softmax in at least float32.

    A query sees a key of its segment at its own position or before, within the window.

    Returns:
        `[B, T, N, H]` in the dtype of the queries.
    """
    mask = _mask(q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS, sliding_window)
    slopes_KG = _by_group(alibi_slopes_N, k_BSKH.shape[2])
    output_BKGTH, _ = _weigh_block(*_heads_first(q_BTNH, k_BSKH, v_BSKH), mask, slopes_KG)
    return output_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


class _Block(NamedTuple):
    """Some queries, from `start` to `end`, and the keys that they may see, from `low` to `end`."""

    low: int
    start: int
    end: int

    @property
    def queries(self) -> slice:
        return slice(self.start, self.end)

    @property
    def keys(self) -> slice:
        return slice(self.low, self.end)


class _Mask(NamedTuple):
    """Whether each query of a block sees each of its keys, and how far it lies back."""

    visible_BTS: jax.Array
    distance_BTS: jax.Array


def _mask(
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segments_BT: jax.Array | None,
    k_segments_BS: jax.Array | None,
    sliding_window: int | None,
) -> _Mask:
    distance_BTS = q_positions_BT[:, :, None] - k_positions_BS[:, None, :]
    visible_BTS = distance_BTS >= 0
    if q_segments_BT is not None and k_segments_BS is not None:
        visible_BTS &= q_segments_BT[:, :, None] == k_segments_BS[:, None, :]
    if sliding_window is not None:
        visible_BTS &= distance_BTS < sliding_window
    return _Mask(visible_BTS, distance_BTS)


def _heads_first(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scaled queries by group, keys and values, all with heads before tokens.

    Once for all blocks: every product then reads its inputs as they lie.
    """
    batch, length, num_heads, head_dim = q_BTNH.shape
    num_kv_heads = k_BSKH.shape[2]
    groups = num_heads // num_kv_heads
    q_BTKGH = (q_BTNH * head_dim**-0.5).reshape(batch, length, num_kv_heads, groups, head_dim)
    return q_BTKGH.transpose(0, 2, 3, 1, 4), k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)


def _by_group(slopes_N: jax.Array | None, num_kv_heads: int) -> jax.Array | None:
    return None if slopes_N is None else slopes_N.reshape(num_kv_heads, -1)


_HEADS = ((0, 1), (0, 1))  # The batch dimensions B and K of every product.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weigh(
    blocks: tuple[_Block, ...],
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    masks: tuple[_Mask, ...],
    slopes_KG: jax.Array | None,
) -> jax.Array:
    """Softmax attention of scaled queries, block by block; one set of keys is kept for all blocks.

    Beside the inputs only the output and the scores' total are kept. The backward pass is
    FlashAttention's (arXiv 2205.14135, appendix B): weights again from the total's logarithm, and
    the softmax's gradient from the output's.
    """
    return _weigh_forward(blocks, q_BKGTH, k_BKSH, v_BKSH, masks, slopes_KG)[0]


_Saved = tuple[
    jax.Array, jax.Array, jax.Array, tuple[_Mask, ...], jax.Array | None, jax.Array, jax.Array
]


def _weigh_forward(
    blocks: tuple[_Block, ...],
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    masks: tuple[_Mask, ...],
    slopes_KG: jax.Array | None,
) -> tuple[jax.Array, _Saved]:
    outputs, log_totals = [], []
    for block, mask in zip(blocks, masks, strict=True):
        q, k, v = (
            q_BKGTH[:, :, :, block.queries],
            k_BKSH[:, :, block.keys],
            v_BKSH[:, :, block.keys],
        )
        output_BKGTH, log_total_BKGT1 = _weigh_block(q, k, v, mask, slopes_KG)
        outputs.append(output_BKGTH)
        log_totals.append(log_total_BKGT1)
    output_BKGTH, log_total_BKGT1 = _joined(outputs), _joined(log_totals)
    saved = (q_BKGTH, k_BKSH, v_BKSH, masks, slopes_KG, output_BKGTH, log_total_BKGT1)
    return output_BKGTH, saved


def _weigh_backward(
    blocks: tuple[_Block, ...], saved: _Saved, gradient_BKGTH: jax.Array
) -> tuple[jax.Array | None, ...]:
    q_BKGTH, k_BKSH, v_BKSH, masks, slopes_KG, output_BKGTH, log_total_BKGT1 = saved
    mean_BKGT1 = (gradient_BKGTH.astype(log_total_BKGT1.dtype) * output_BKGTH).sum(
        axis=-1, keepdims=True
    )
    to_queries = []
    to_k_BKSH, to_v_BKSH = jnp.zeros_like(k_BKSH), jnp.zeros_like(v_BKSH)
    for block, mask in zip(blocks, masks, strict=True):
        q, gradient, mean, log_total = (
            array[:, :, :, block.queries]
            for array in (q_BKGTH, gradient_BKGTH, mean_BKGT1, log_total_BKGT1)
        )
        k, v = k_BKSH[:, :, block.keys], v_BKSH[:, :, block.keys]
        weights_BKGTS = jnp.exp(_scores(q, k, mask, slopes_KG) - log_total)
        to_q, to_k, to_v = _block_gradients(q, k, v, weights_BKGTS, gradient, mean)
        to_queries.append(to_q)
        to_k_BKSH = to_k_BKSH.at[:, :, block.keys].add(to_k)
        to_v_BKSH = to_v_BKSH.at[:, :, block.keys].add(to_v)
    return _joined(to_queries), to_k_BKSH, to_v_BKSH, None, None


_weigh.defvjp(_weigh_forward, _weigh_backward)


def _joined(parts: list[jax.Array]) -> jax.Array:
    """Blocks of queries in their order."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=3)


def _scores(
    q_BKGTH: jax.Array, k_BKSH: jax.Array, mask: _Mask, slopes_KG: jax.Array | None
) -> jax.Array:
    """Masked scores `[B, K, G, T, S]`, in at least float32."""
    scores_BKGTS = jax.lax.dot_general(
        q_BKGTH,
        k_BKSH,
        (((4,), (3,)), _HEADS),
        preferred_element_type=jnp.promote_types(q_BKGTH.dtype, jnp.float32),
    )
    if slopes_KG is not None:
        slopes_1KG11 = slopes_KG.astype(scores_BKGTS.dtype)[None, :, :, None, None]
        distance_B11TS = mask.distance_BTS[:, None, None].astype(scores_BKGTS.dtype)
        scores_BKGTS -= slopes_1KG11 * distance_B11TS
    return jnp.where(mask.visible_BTS[:, None, None], scores_BKGTS, _MASKED_SCORE)


def _weigh_block(
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    mask: _Mask,
    slopes_KG: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """A block's output `[B, K, G, T, H]`, and the logarithm of its scores' total, H being 1."""
    scores_BKGTS = _scores(q_BKGTH, k_BKSH, mask, slopes_KG)
    largest_BKGT1 = scores_BKGTS.max(axis=-1, keepdims=True)
    weights_BKGTS = jnp.exp(scores_BKGTS - largest_BKGT1)
    total_BKGT1 = weights_BKGTS.sum(axis=-1, keepdims=True)
    output_BKGTH = jax.lax.dot_general(
        weights_BKGTS.astype(v_BKSH.dtype),
        v_BKSH,
        (((4,), (2,)), _HEADS),
        preferred_element_type=scores_BKGTS.dtype,
    )
    output_BKGTH = (output_BKGTH / total_BKGT1).astype(v_BKSH.dtype)
    return output_BKGTH, largest_BKGT1 + jnp.log(total_BKGT1)


def _block_gradients(
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    weights_BKGTS: jax.Array,
    gradient_BKGTH: jax.Array,
    mean_BKGT1: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a block's output asks of its queries, keys and values."""
    to_weights_BKGTS = jax.lax.dot_general(
        gradient_BKGTH, v_BKSH, (((4,), (3,)), _HEADS), preferred_element_type=weights_BKGTS.dtype
    )
    to_scores_BKGTS = (weights_BKGTS * (to_weights_BKGTS - mean_BKGT1)).astype(q_BKGTH.dtype)
    to_q_BKGTH = jax.lax.dot_general(to_scores_BKGTS, k_BKSH, (((4,), (2,)), _HEADS))
    tokens = ((2, 3), (2, 3))
    to_k_BKSH = jax.lax.dot_general(to_scores_BKGTS, q_BKGTH, (tokens, _HEADS))
    weights_BKGTS = weights_BKGTS.astype(v_BKSH.dtype)
    to_v_BKSH = jax.lax.dot_general(weights_BKGTS, gradient_BKGTH, (tokens, _HEADS))
    return to_q_BKGTH, to_k_BKSH, to_v_BKSH
