"""Causal attention over rows of one or several segments, by one of three kernels.

| kernel   | platform | segments          | window | ALiBi | grouped heads |
|----------|----------|-------------------|--------|-------|---------------|
| `xla`    | any      | yes               | yes    | yes   | yes           |
| `cudnn`  | gpu      | as quadratic bias | yes    | no    | yes           |
| `splash` | tpu      | yes               | yes    | no    | yes           |

| kernel   | dtypes            | rows        | heads             |
|----------|-------------------|-------------|-------------------|
| `xla`    | all               | all         | all               |
| `cudnn`  | bfloat16, float16 | T % 2 = 0   | H % 8 = 0, <= 128 |
| `splash` | bfloat16, float32 | T % 128 = 0 | H % 128 = 0       |

`auto` takes the platform's own kernel where it fits and logs once where it does not; a kernel
chosen by name that does not fit is an error. ALiBi stays with XLA: splash takes no bias, and
cuDNN's would be a 16-bit one, too coarse for distant tokens. All three are causal, and measure
distance, by index, which equals position because positions rise by one inside a segment.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import PartitionSpec as P

from huatuo_jax.backbone import positions
from huatuo_jax.backbone.config import Kernel
from huatuo_jax.core import sharding

_MASKED_SCORE = -1e30  # Finite: keys of a block that a query sees none of give it no NaN.
_LEAST_BLOCK = 256  # Tokens of a block on an accelerator.
_PRODUCT = ((0, 1), (0, 1))  # The batch dimensions A and K of every product.
_HEADS, _ROWS = P(sharding.BATCH_AXES, None, "tensor", None), P(sharding.BATCH_AXES, None)
logger = logging.getLogger(__name__)


def attend_in_blocks(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
    alibi_slopes_N: jax.Array | None,
    query_chunk: int,
) -> jax.Array:
    """Attends block by block, forward and backward, where a block's queries see a block's keys.

    The bounds of the loops over blocks come from the segments: time follows the visible pairs,
    memory the tokens, and the program's size is the same for every length. On a mesh each device
    takes its own rows and heads, where they divide among the devices.
    """
    batch, length = q_BTNH.shape[:2]
    first_BT = first_visible(batch, length, segment_ids_BT, sliding_window)
    on_cpu = sharding.platform_in_use() == "cpu"
    # A CPU skips most row by row. Other devices need many rows, and large blocks, to be busy; and
    # a program that the compiler divides among devices has no rows of its own.
    own = sharding.divides(_HEADS, k_BTKH.shape)
    row_by_row = own and on_cpu
    num_blocks = -(-length // (query_chunk if on_cpu else max(query_chunk, _LEAST_BLOCK)))
    block = -(-length // num_blocks)
    attend_rows: Callable[..., jax.Array]
    attend_rows = functools.partial(_attend_rows, block=block, row_by_row=row_by_row)
    if own:
        attend_rows = _on_shards(attend_rows, _ROWS, P("tensor"))
    return attend_rows(q_BTNH, k_BTKH, v_BTKH, first_BT, alibi_slopes_N)


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


def cudnn(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
) -> jax.Array:
    """Runs cuDNN's flash attention through jax.

    Returns:
        `[B, T, N, H]`.
    """
    visible = visible_tokens(segment_ids_BT, sliding_window)
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, implementation="cudnn", **visible)


def visible_tokens(segment_ids_BT: jax.Array | None, sliding_window: int | None) -> dict[str, Any]:
    """Returns the arguments of `jax.nn.dot_product_attention` for the visible tokens.

    Segments become a mask of `[B, 1, T, T]`.
    """
    mask_B1TT = None
    if segment_ids_BT is not None:
        mask_B1TT = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
    # jax counts the tokens before the query, the config counts the query as well.
    window = None if sliding_window is None else (sliding_window - 1, 0)
    return {"mask": mask_B1TT, "is_causal": True, "local_window_size": window}


def splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Runs splash attention, each device on its own rows and heads of the mesh in use.

    Args:
        q_BTNH: queries.
        k_BTKH: keys.
        v_BTKH: values.
        segment_ids_BT: int32, or None for one segment a row.
        sliding_window: tokens that a query sees, itself included; None for all before it.
        interpret: run the kernel's program on any device, slowly, for tests.

    Returns:
        `[B, T, N, H]`.
    """
    if segment_ids_BT is None:
        segment_ids_BT = jnp.zeros(q_BTNH.shape[:2], dtype=jnp.int32)
    local = functools.partial(_splash_local, sliding_window=sliding_window, interpret=interpret)
    return _on_shards(local, _ROWS)(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
    alibi_slopes_N: jax.Array | None,
    kernel: Kernel,
    query_chunk: int,
) -> jax.Array:
    """Computes causal attention of rows to themselves, scores scaled by `H ** -0.5`.

    Args:
        q_BTNH: queries.
        k_BTKH: keys; each key/value head serves N / K query heads in a row.
        v_BTKH: values.
        segment_ids_BT: int32, tokens see their own segment only; 0 for padding, whose output has no
            meaning. None for one segment a row.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it.
        alibi_slopes_N: decrease of a score per token of distance; None without ALiBi.
        kernel: a kernel's name, or `auto`.
        query_chunk: tokens of a block in the XLA kernel, see `ComputeConfig`.

    Returns:
        `[B, T, N, H]` in the dtype of the queries.

    Raises:
        ValueError: the kernel chosen by name does not fit.
    """
    fit = choose_kernel(
        kernel,
        # A named kernel does not depend on it, and asking makes jax look for its devices.
        sharding.platform_in_use() if kernel == "auto" else None,
        length=q_BTNH.shape[1],
        head_dim=q_BTNH.shape[-1],
        dtype=str(q_BTNH.dtype),
        alibi=alibi_slopes_N is not None,
    )
    if fit == "splash":
        return splash(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, sliding_window)
    if fit == "cudnn":
        return cudnn(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, sliding_window)
    return attend_in_blocks(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        segment_ids_BT,
        sliding_window,
        alibi_slopes_N,
        query_chunk,
    )


@functools.cache  # Traced once for each stack of layers, so this also logs the warning once.
def choose_kernel(
    wanted: Kernel, platform: str | None, *, length: int, head_dim: int, dtype: str, alibi: bool
) -> Literal["xla", "cudnn", "splash"]:
    """Chooses the kernel that computes attention, by the table at this module's top.

    Args:
        wanted: a kernel's name, or `auto`.
        platform: `cpu`, `gpu` or `tpu`, for `auto`.
        length: tokens T a row.
        head_dim: width H of a head.
        dtype: of queries, keys and values.
        alibi: scores have ALiBi's bias.

    Raises:
        ValueError: the kernel chosen by name does not fit; gives the reasons.
    """
    own: dict[str, Literal["xla", "cudnn", "splash"]] = {"gpu": "cudnn", "tpu": "splash"}
    candidate: Literal["xla", "cudnn", "splash"]
    candidate = own.get(platform or "cpu", "xla") if wanted == "auto" else wanted
    if candidate == "xla":
        return "xla"
    misfits = _misfits(candidate, length=length, head_dim=head_dim, dtype=dtype, alibi=alibi)
    if not misfits:
        return candidate
    if wanted == "auto":
        logger.warning("attention runs on XLA, not %s: %s", candidate, "; ".join(misfits))
        return "xla"
    raise ValueError(f"attention kernel {wanted!r} does not fit: {'; '.join(misfits)}")


class _Visible(NamedTuple):
    """The keys that queries see, in blocks.

    Attributes:
        first_BIC: index of the first key that each query sees; I blocks of C tokens.
        first_block_RI: index of the first block of keys that any query of a block sees, in each of
            R groups of rows.
    """

    first_BIC: jax.Array
    first_block_RI: jax.Array


# Blocks of queries are [B, I, K, Q, H], where Q = G C are those of all G heads that a key/value
# head serves; blocks of keys and values are [B, J, K, C, H], where J = I. A loop's body takes
# A = B / R rows.
_Saved = tuple[jax.Array, jax.Array, jax.Array, _Visible, jax.Array | None, jax.Array, jax.Array]


def _on_shards(function: Callable[..., jax.Array], *more: P) -> Callable[..., jax.Array]:
    """Wraps a function of queries, keys, values and more to run on each device's rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(_HEADS, _HEADS, _HEADS, *more),
        out_specs=_HEADS,
        check_vma=False,  # Neither Pallas calls nor the loops over blocks carry replication types.
    )


def _attend_rows(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    first_BT: jax.Array,
    slopes_N: jax.Array | None,
    *,
    block: int,
    row_by_row: bool,
) -> jax.Array:
    """Cuts rows into blocks, attends, and puts the blocks' outputs together."""
    batch, length, num_heads, head_dim = q_BTNH.shape
    num_kv_heads = k_BTKH.shape[2]
    num_blocks = -(-length // block)
    missing = num_blocks * block - length

    def cut(array_BTNH: jax.Array) -> jax.Array:
        padded = jnp.pad(array_BTNH, ((0, 0), (0, missing), (0, 0), (0, 0)))
        parts_BICKGH = padded.reshape(batch, num_blocks, block, num_kv_heads, -1, head_dim)
        blocks_BIKGCH = parts_BICKGH.transpose(0, 1, 3, 4, 2, 5)
        return blocks_BIKGCH.reshape(batch, num_blocks, num_kv_heads, -1, head_dim)

    index_T = jnp.arange(length, length + missing, dtype=jnp.int32)
    added_BT = jnp.broadcast_to(index_T[None], (batch, missing))  # Each sees itself only.
    first_BIC = jnp.concatenate([first_BT, added_BT], axis=1).reshape(batch, num_blocks, block)
    groups = batch if row_by_row else 1
    first_block_BI = first_BIC[:, :, 0] // block
    visible = _Visible(first_BIC, first_block_BI.reshape(groups, -1, num_blocks).min(axis=1))
    slopes_KG = None if slopes_N is None else slopes_N.reshape(num_kv_heads, -1)
    output_BIKQH = _weigh(
        cut(q_BTNH * head_dim**-0.5), cut(k_BTKH), cut(v_BTKH), visible, slopes_KG
    )
    parts_BIKGCH = output_BIKQH.reshape(batch, num_blocks, num_kv_heads, -1, block, head_dim)
    padded_BTNH = parts_BIKGCH.transpose(0, 1, 4, 2, 3, 5).reshape(batch, -1, num_heads, head_dim)
    return padded_BTNH[:, :length]


@jax.custom_vjp
def _weigh(
    q_BIKQH: jax.Array,
    k_BJKCH: jax.Array,
    v_BJKCH: jax.Array,
    visible: _Visible,
    slopes_KG: jax.Array | None,
) -> jax.Array:
    """Computes softmax attention of scaled queries, block by block.

    Both passes are FlashAttention's (arXiv 2205.14135, algorithms 1 and 4): beside the inputs only
    the output and the logarithm of the weights' total are saved, and the backward pass recomputes
    the weights from it.
    """
    return _weigh_forward(q_BIKQH, k_BJKCH, v_BJKCH, visible, slopes_KG)[0]


def _weigh_forward(
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
    saved = (q_BIKQH, k_BJKCH, v_BJKCH, visible, slopes_KG, output_BIKQH, log_total_BIKQ1)
    return output_BIKQH, saved


def _weigh_backward(saved: _Saved, gradient_BIKQH: jax.Array) -> tuple[jax.Array | None, ...]:
    q_BIKQH, k_BJKCH, v_BJKCH, visible, slopes_KG, output_BIKQH, log_total_BIKQ1 = saved
    wide = log_total_BIKQ1.dtype
    mean_BIKQ1 = (gradient_BIKQH.astype(wide) * output_BIKQH).sum(axis=-1, keepdims=True)
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
    """

    rows: jax.Array | int
    num_rows: int
    block: jax.Array
    first_block: jax.Array
    first_AC: jax.Array

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
        if slopes_KG is not None:
            distance_11CC = (queries_1C1 - keys_11C).astype(scores_AKQC.dtype)[None]
            bias_KGCC = slopes_KG.astype(scores_AKQC.dtype)[:, :, None, None] * distance_11CC
            scores_AKQC -= bias_KGCC.reshape(1, *scores_AKQC.shape[1:])
        visible_ACC = (self.first_AC[:, :, None] <= keys_11C) & (keys_11C <= queries_1C1)
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
        return step(_Place(group * num_rows, num_rows, block, first_block, first_AC), carry)

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


def _splash_local(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    sliding_window: int | None,
    interpret: bool,
) -> jax.Array:
    length, num_heads, head_dim = q_BTNH.shape[1:]
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([_splash_mask(length, sliding_window)] * num_heads),
        block_sizes=_block_sizes(length),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segments = splash_attention_kernel.SegmentIds(q=segment_ids_BT, kv=segment_ids_BT)
    q_BNTH, k_BKTH, v_BKTH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    output_BNTH = jax.vmap(kernel)(q_BNTH * head_dim**-0.5, k_BKTH, v_BKTH, segments)
    return output_BNTH.swapaxes(1, 2).astype(q_BTNH.dtype)


def _splash_mask(length: int, sliding_window: int | None) -> splash_attention_mask.Mask:
    if sliding_window is None:
        return splash_attention_mask.CausalMask((length, length))
    return splash_attention_mask.LocalMask((length, length), (sliding_window - 1, 0), 0)


def _block_sizes(length: int) -> splash_attention_kernel.BlockSizes:
    """Returns blocks of 512 where they divide the length: few steps that still fit VMEM."""
    block = next(size for size in (512, 256, 128) if length % size == 0)
    return splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )


def _misfits(kernel: str, *, length: int, head_dim: int, dtype: str, alibi: bool) -> list[str]:
    """Lists the reasons why a fused kernel does not take this input."""
    found = ["it takes no ALiBi bias"] if alibi else []
    if kernel == "cudnn":
        if dtype not in ("bfloat16", "float16"):
            found.append(f"it takes 16-bit inputs, not {dtype}")
        if length % 2:
            found.append(f"rows of {length} tokens are not even")
        if head_dim > 128 or head_dim % 8:
            found.append(f"head_dim={head_dim} is not a multiple of 8 up to 128")
    else:
        if dtype not in ("bfloat16", "float32"):
            found.append(f"it takes bfloat16 or float32, not {dtype}")
        if length % 128:
            found.append(f"rows of {length} tokens are not a multiple of 128")
        if head_dim % 128:
            found.append(f"head_dim={head_dim} is not a multiple of 128")
    return found
