"""Attention whose cost follows the visible pairs of tokens, block by block, in XLA.

Rows hold one segment, several, or trees; a block of queries meets only the blocks of keys in which
it sees one, forward and backward.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from huatuo_jax.backbone import positions
from huatuo_jax.core import sharding

_MASKED_SCORE = -1e30  # Finite: keys of a block that a query sees none of give it no NaN.
_LEAST_BLOCK = 256  # Tokens of a block on an accelerator.
_PRODUCT = ((0, 1), (0, 1))  # The batch dimensions A and K of every product.
HEADS, ROWS = P(sharding.BATCH_AXES, None, "tensor", None), P(sharding.BATCH_AXES, None)


class Trees(NamedTuple):
    """Rows of sequences that begin alike, whose common tokens stand once.

    The tokens of a tree stand in depth-first order. A token sees itself and those that it follows:
    the tokens before it whose subtree has not ended. Distance is measured by depth.

    Attributes:
        depths_BT: int32, 0 at the root of each tree; rises by one from token to token of a branch.
        ends_BT: int32, the index behind the last token that follows each token.
    """

    depths_BT: jax.Array
    ends_BT: jax.Array


def attend_in_blocks(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
    alibi_slopes_N: jax.Array | None,
    query_chunk: int,
    trees: Trees | None = None,
) -> jax.Array:
    """Attends block by block, forward and backward, where a block's queries see a block's keys.

    The bounds of the loops over blocks come from the segments: time follows the visible pairs,
    memory the tokens, and the program's size is the same for every length. On a mesh each device
    takes its own rows and heads, where they divide among the devices.
    """
    batch, length = q_BTNH.shape[:2]
    # In a row of trees a near token of the branch can be far off by its index.
    window = sliding_window if trees is None else None
    first_BT = first_visible(batch, length, segment_ids_BT, window)
    if trees is not None:
        index_T = jnp.arange(length, dtype=jnp.int32)
        roots_BT = jax.lax.cummax(jnp.where(trees.depths_BT == 0, index_T[None], 0), axis=1)
        first_BT = jnp.maximum(first_BT, roots_BT)
    on_cpu = sharding.platform_in_use() == "cpu"
    # A CPU skips most row by row. Other devices need many rows, and large blocks, to be busy; and
    # a program that the compiler divides among devices has no rows of its own.
    own = sharding.divides(HEADS, k_BTKH.shape)
    row_by_row = own and on_cpu
    num_blocks = -(-length // (query_chunk if on_cpu else max(query_chunk, _LEAST_BLOCK)))
    block = -(-length // num_blocks)
    attend_rows: Callable[..., jax.Array]
    attend_rows = functools.partial(
        _attend_rows, block=block, row_by_row=row_by_row, window=sliding_window
    )
    if own:
        attend_rows = on_shards(attend_rows, ROWS, P("tensor"), ROWS)
    return attend_rows(q_BTNH, k_BTKH, v_BTKH, first_BT, alibi_slopes_N, trees)


def first_visible(
    batch: int, length: int, segment_ids_BT: jax.Array | None, sliding_window: int | None
) -> jax.Array:
    """Returns the index of the first token that each token sees; it sees all from there to itself.

    Args:
        batch: number of rows.
        length: of a row.
        segment_ids_BT: int32; neighbours with one id are one segment, padding (0) sees itself
            only. None for one segment a row.
        sliding_window: tokens that a query sees, itself included; None for all before it.

    Returns:
        int32 `[B, T]`, which never falls from one token to the next.
    """
    index_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
    first_BT = jnp.zeros_like(index_BT)
    if segment_ids_BT is not None:
        starts_BT = index_BT - positions.positions_from_segments(segment_ids_BT)
        first_BT = jnp.where(segment_ids_BT == 0, index_BT, starts_BT)
    if sliding_window is not None:
        first_BT = jnp.maximum(first_BT, index_BT - (sliding_window - 1))
    return first_BT


def on_shards(function: Callable[..., jax.Array], *more: P) -> Callable[..., jax.Array]:
    """Wraps a function of queries, keys, values and more to run on each device's rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(HEADS, HEADS, HEADS, *more),
        out_specs=HEADS,
        check_vma=False,  # Neither Pallas calls nor the loops over blocks carry replication types.
    )


class _Visible(NamedTuple):
    """The keys that queries see, in blocks.

    Attributes:
        first_BIC: index of the first key that each query sees; I blocks of C tokens.
        first_block_RI: index of the first block of keys that any query of a block sees, in each of
            R groups of rows.
        depths_BIC: depth of each token, in rows of trees.
        ends_BIC: index behind the last token that follows each token, in rows of trees.
        window: tokens of a branch that a query of a tree sees; None for all.
    """

    first_BIC: jax.Array
    first_block_RI: jax.Array
    depths_BIC: jax.Array | None = None
    ends_BIC: jax.Array | None = None
    window: int | None = None


# Blocks of queries are [B, I, K, Q, H], where Q = G C are those of all G heads that a key/value
# head serves; blocks of keys and values are [B, J, K, C, H], where J = I. A loop's body takes
# A = B / R rows.
_Saved = tuple[jax.Array, jax.Array, jax.Array, _Visible, jax.Array | None, jax.Array, jax.Array]


def _attend_rows(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    first_BT: jax.Array,
    slopes_N: jax.Array | None,
    trees: Trees | None,
    *,
    block: int,
    row_by_row: bool,
    window: int | None,
) -> jax.Array:
    """Cuts rows into blocks, attends, and puts the blocks' outputs together."""
    batch, length, _, head_dim = q_BTNH.shape
    num_kv_heads = k_BTKH.shape[2]
    num_blocks = -(-length // block)
    missing = num_blocks * block - length
    index_T = jnp.arange(length, length + missing, dtype=jnp.int32)
    added_BT = jnp.broadcast_to(index_T[None], (batch, missing))  # Each sees itself only.
    first_BIC = jnp.concatenate([first_BT, added_BT], axis=1).reshape(batch, num_blocks, block)
    groups = batch if row_by_row else 1
    first_block_BI = first_BIC[:, :, 0] // block
    visible = _Visible(first_BIC, first_block_BI.reshape(groups, -1, num_blocks).min(axis=1))
    if trees is not None:
        depths_BIC, ends_BIC = (
            jnp.pad(array_BT, ((0, 0), (0, missing))).reshape(first_BIC.shape) for array_BT in trees
        )
        visible = visible._replace(depths_BIC=depths_BIC, ends_BIC=ends_BIC, window=window)
    slopes_KG = None if slopes_N is None else slopes_N.reshape(num_kv_heads, -1)
    cut = functools.partial(_cut, num_kv_heads=num_kv_heads, block=block)
    blocks = cut(q_BTNH * head_dim**-0.5), cut(k_BTKH), cut(v_BTKH)
    return _weigh(length, *blocks, visible, slopes_KG)


def _cut(array_BTNH: jax.Array, *, num_kv_heads: int, block: int) -> jax.Array:
    """Returns rows, padded at their end, as blocks `[B, I, K, Q, H]` of all G heads together."""
    batch, length, _, head_dim = array_BTNH.shape
    missing = -length % block
    padded = jnp.pad(array_BTNH, ((0, 0), (0, missing), (0, 0), (0, 0)))
    parts_BICKGH = padded.reshape(
        batch, -1, block, num_kv_heads, padded.shape[2] // num_kv_heads, head_dim
    )
    blocks_BIKGCH = parts_BICKGH.transpose(0, 1, 3, 4, 2, 5)
    return blocks_BIKGCH.reshape(*blocks_BIKGCH.shape[:3], -1, head_dim)


def _joined(array_BIKQH: jax.Array, *, length: int, block: int) -> jax.Array:
    """Returns the rows `[B, T, N, H]` that `_cut` makes blocks of, without their padding."""
    batch, num_blocks, num_kv_heads, _, head_dim = array_BIKQH.shape
    parts_BIKGCH = array_BIKQH.reshape(batch, num_blocks, num_kv_heads, -1, block, head_dim)
    parts_BICKGH = parts_BIKGCH.transpose(0, 1, 4, 2, 3, 5)
    return parts_BICKGH.reshape(batch, num_blocks * block, -1, head_dim)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weigh(
    length: int,
    q_BIKQH: jax.Array,
    k_BJKCH: jax.Array,
    v_BJKCH: jax.Array,
    visible: _Visible,
    slopes_KG: jax.Array | None,
) -> jax.Array:
    """Computes softmax attention of scaled queries, block by block, as rows `[B, T, N, H]`.

    Both passes are FlashAttention's (arXiv 2205.14135, algorithms 1 and 4): beside the inputs only
    the output and the logarithm of the weights' total are saved, and the backward pass recomputes
    the weights from it. The output is saved as it is returned, as what follows keeps it too.
    """
    return _weigh_forward(length, q_BIKQH, k_BJKCH, v_BJKCH, visible, slopes_KG)[0]


def _weigh_forward(
    length: int,
    q_BIKQH: jax.Array,
    k_BJKCH: jax.Array,
    v_BJKCH: jax.Array,
    visible: _Visible,
    slopes_KG: jax.Array | None,
) -> tuple[jax.Array, _Saved]:
    wide = jnp.promote_types(q_BIKQH.dtype, jnp.float32)

    def attend_block(place: _Place, carry: tuple[jax.Array, jax.Array]) -> Any:
        q_AKQH = place.take(q_BIKQH)

        def add_keys(block: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            largest_AKQ1, total_AKQ1, sum_AKQH = state
            k_AKCH, v_AKCH = (place.take(array, block) for array in (k_BJKCH, v_BJKCH))
            scores_AKQC = place.scores(q_AKQH, k_AKCH, block, slopes_KG)
            larger_AKQ1 = jnp.maximum(largest_AKQ1, scores_AKQC.max(axis=-1, keepdims=True))
            weights_AKQC = jnp.exp(scores_AKQC - larger_AKQ1)
            shrink_AKQ1 = jnp.exp(largest_AKQ1 - larger_AKQ1)
            added_AKQH = _product(weights_AKQC.astype(v_AKCH.dtype), v_AKCH, 3, 2)
            total_AKQ1 = total_AKQ1 * shrink_AKQ1 + weights_AKQC.sum(axis=-1, keepdims=True)
            return larger_AKQ1, total_AKQ1, sum_AKQH * shrink_AKQ1 + added_AKQH

        nothing_AKQ1 = jnp.zeros((*q_AKQH.shape[:3], 1), wide)
        largest_AKQ1, total_AKQ1, sum_AKQH = place.over_keys(
            add_keys, (nothing_AKQ1 + _MASKED_SCORE, nothing_AKQ1, jnp.zeros(q_AKQH.shape, wide))
        )
        output_BIKQH, log_total_BIKQ1 = carry
        return (
            place.put(output_BIKQH, sum_AKQH / total_AKQ1),
            place.put(log_total_BIKQ1, largest_AKQ1 + jnp.log(total_AKQ1)),
        )

    output_BIKQH, log_total_BIKQ1 = _over_queries(
        visible, attend_block, (jnp.zeros_like(q_BIKQH), jnp.zeros((*q_BIKQH.shape[:4], 1), wide))
    )
    output_BTNH = _joined(output_BIKQH, length=length, block=k_BJKCH.shape[3])
    saved = (q_BIKQH, k_BJKCH, v_BJKCH, visible, slopes_KG, output_BTNH, log_total_BIKQ1)
    return output_BTNH, saved


def _weigh_backward(
    length: int, saved: _Saved, gradient_BTNH: jax.Array
) -> tuple[jax.Array | None, ...]:
    q_BIKQH, k_BJKCH, v_BJKCH, visible, slopes_KG, output_BTNH, log_total_BIKQ1 = saved
    wide = log_total_BIKQ1.dtype
    cut = functools.partial(_cut, num_kv_heads=k_BJKCH.shape[2], block=k_BJKCH.shape[3])
    mean_BTN1 = (gradient_BTNH.astype(wide) * output_BTNH).sum(axis=-1, keepdims=True)
    mean_BIKQ1, gradient_BIKQH = cut(mean_BTN1), cut(gradient_BTNH)
    # Turned once, so that no product needs the weights of a block in another layout.
    q_BIKHQ, gradient_BIKHQ = q_BIKQH.swapaxes(3, 4), gradient_BIKQH.swapaxes(3, 4)

    def attend_block(place: _Place, carry: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        q_AKQH, q_AKHQ, gradient_AKQH, gradient_AKHQ, mean_AKQ1, log_total_AKQ1 = (
            place.take(array)
            for array in (
                *(q_BIKQH, q_BIKHQ, gradient_BIKQH, gradient_BIKHQ),
                *(mean_BIKQ1, log_total_BIKQ1),
            )
        )

        def add_keys(block: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            to_q_AKQH, to_k_BJKHC, to_v_BJKHC = state
            k_AKCH, v_AKCH = (place.take(array, block) for array in (k_BJKCH, v_BJKCH))
            scores_AKQC = place.scores(q_AKQH, k_AKCH, block, slopes_KG)
            weights_AKQC = jnp.exp(scores_AKQC - log_total_AKQ1)
            to_weights_AKQC = _product(gradient_AKQH, v_AKCH, 3, 3)
            to_scores_AKQC = (weights_AKQC * (to_weights_AKQC - mean_AKQ1)).astype(q_AKQH.dtype)
            to_k_AKHC = _product(q_AKHQ, to_scores_AKQC, 3, 2)
            to_v_AKHC = _product(gradient_AKHQ, weights_AKQC.astype(v_AKCH.dtype), 3, 2)
            return (
                to_q_AKQH + _product(to_scores_AKQC, k_AKCH, 3, 2),
                place.put(to_k_BJKHC, place.take(to_k_BJKHC, block) + to_k_AKHC, block),
                place.put(to_v_BJKHC, place.take(to_v_BJKHC, block) + to_v_AKHC, block),
            )

        to_q_BIKQH, *to_keys = carry
        start = (jnp.zeros(q_AKQH.shape, wide), *to_keys)
        to_q_AKQH, to_k_BJKHC, to_v_BJKHC = place.over_keys(add_keys, start)
        return place.put(to_q_BIKQH, to_q_AKQH), to_k_BJKHC, to_v_BJKHC

    turned = k_BJKCH.swapaxes(3, 4).shape
    to_q_BIKQH, to_k_BJKHC, to_v_BJKHC = _over_queries(
        visible,
        attend_block,
        (jnp.zeros_like(q_BIKQH), jnp.zeros(turned, wide), jnp.zeros(turned, wide)),
    )
    to_k_BJKCH, to_v_BJKCH = (
        array.swapaxes(3, 4).astype(k_BJKCH.dtype) for array in (to_k_BJKHC, to_v_BJKHC)
    )
    return to_q_BIKQH, to_k_BJKCH, to_v_BJKCH, None, None


_weigh.defvjp(_weigh_forward, _weigh_backward)


class _Place(NamedTuple):
    """One block of queries of a group of rows, inside the loop over all of them.

    Attributes:
        rows: index of the first row.
        num_rows: number A of rows.
        block: index of the block of queries.
        first_block: index of the first block of keys that is seen.
        first_AC: index of the first key that each query sees.
        visible: the keys that queries see.
    """

    rows: jax.Array | int
    num_rows: int
    block: jax.Array
    first_block: jax.Array
    first_AC: jax.Array
    visible: _Visible

    def take(self, array: jax.Array, block: jax.Array | None = None) -> jax.Array:
        """Returns the rows' block, by default that of the queries."""
        return _take(array, self.rows, self.num_rows, self.block if block is None else block)

    def put(self, array: jax.Array, values: jax.Array, block: jax.Array | None = None) -> jax.Array:
        """Returns the array with the rows' block replaced."""
        start = _start(self.rows, self.block if block is None else block, array.ndim)
        return jax.lax.dynamic_update_slice(array, values[:, None].astype(array.dtype), start)

    def over_keys(self, step: Callable[..., Any], state: Any) -> Any:
        """Runs `step(block, state)` over the blocks of keys that are seen."""
        return jax.lax.fori_loop(self.first_block, self.block + 1, step, state)

    def scores(
        self, q_AKQH: jax.Array, k_AKCH: jax.Array, block: jax.Array, slopes_KG: jax.Array | None
    ) -> jax.Array:
        """Returns the masked scores `[A, K, Q, C]` of a block of keys, in at least float32."""
        num_rows, size = self.first_AC.shape
        groups = q_AKQH.shape[2] // size
        index_C = jnp.arange(size, dtype=jnp.int32)
        queries_1C1 = (self.block * size + index_C)[None, :, None]
        keys_11C = (block * size + index_C)[None, None, :]
        scores_AKQC = _product(q_AKQH, k_AKCH, 3, 3)
        visible_ACC = (self.first_AC[:, :, None] <= keys_11C) & (keys_11C <= queries_1C1)
        distance_ACC = queries_1C1 - keys_11C  # A is 1 here; no row differs.
        if self.visible.depths_BIC is not None and self.visible.ends_BIC is not None:
            depths_AC1 = self.take(self.visible.depths_BIC)[:, :, None]
            distance_ACC = depths_AC1 - self.take(self.visible.depths_BIC, block)[:, None, :]
            visible_ACC &= queries_1C1 < self.take(self.visible.ends_BIC, block)[:, None, :]
            # A token without a branch, which is padding, sees itself.
            visible_ACC |= queries_1C1 == keys_11C
            if self.visible.window is not None:
                visible_ACC &= distance_ACC < self.visible.window
        if slopes_KG is not None:
            slopes_1KG11 = slopes_KG.astype(scores_AKQC.dtype)[None, :, :, None, None]
            bias_AKGCC = slopes_1KG11 * distance_ACC.astype(scores_AKQC.dtype)[:, None, None]
            scores_AKQC -= bias_AKGCC.reshape(-1, *scores_AKQC.shape[1:])
        visible_A1GCC = jnp.broadcast_to(
            visible_ACC[:, None, None], (num_rows, 1, groups, size, size)
        )
        visible_A1QC = visible_A1GCC.reshape(num_rows, 1, groups * size, size)
        return jnp.where(visible_A1QC, scores_AKQC, _MASKED_SCORE)


def _over_queries(visible: _Visible, step: Callable[[_Place, Any], Any], carry: Any) -> Any:
    """Runs `step(place, carry)` over the blocks of queries of all rows."""
    groups, num_blocks = visible.first_block_RI.shape
    num_rows = visible.first_BIC.shape[0] // groups

    def run(index: jax.Array, carry: Any) -> Any:
        index = index.astype(jnp.int32)
        # A constant 0 tells a compiler that divides the rows among devices that all are taken.
        group, block = (0, index) if groups == 1 else (index // num_blocks, index % num_blocks)
        place = _start(group, block, 2)
        first_block = jax.lax.dynamic_slice(visible.first_block_RI, place, (1, 1))[0, 0]
        first_AC = _take(visible.first_BIC, group * num_rows, num_rows, block)
        rows = group * num_rows
        return step(_Place(rows, num_rows, block, first_block, first_AC, visible), carry)

    return jax.lax.fori_loop(0, groups * num_blocks, run, carry)


def _take(array: jax.Array, rows: jax.Array | int, num_rows: int, block: jax.Array) -> jax.Array:
    """Returns one block of some rows."""
    start = _start(rows, block, array.ndim)
    return jax.lax.dynamic_slice(array, start, (num_rows, 1, *array.shape[2:]))[:, 0]


def _start(rows: jax.Array | int, block: jax.Array, num_dims: int) -> list[jax.Array]:
    """Returns the index of the first number of a block, of one dtype as jax asks for."""
    return [jnp.asarray(index, jnp.int32) for index in (rows, block, *(0,) * (num_dims - 2))]


def _product(left: jax.Array, right: jax.Array, left_dim: int, right_dim: int) -> jax.Array:
    """Returns a product of each row and key/value head, in at least float32."""
    return jax.lax.dot_general(
        left,
        right,
        (((left_dim,), (right_dim,)), _PRODUCT),
        preferred_element_type=jnp.promote_types(left.dtype, jnp.float32),
    )
