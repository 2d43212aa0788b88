"""Causal attention over rows of one or several segments, or of trees, by one of three kernels.

| kernel   | platform | segments          | trees             | window | ALiBi | grouped heads |
|----------|----------|-------------------|-------------------|--------|-------|---------------|
| `xla`    | any      | yes               | yes               | yes    | yes   | yes           |
| `cudnn`  | gpu      | as quadratic bias | as quadratic bias | yes    | no    | yes           |
| `splash` | tpu      | yes               | no                | yes    | no    | yes           |

| kernel   | dtypes            | rows        | heads             |
|----------|-------------------|-------------|-------------------|
| `xla`    | all               | all         | all               |
| `cudnn`  | bfloat16, float16 | T % 2 = 0   | H % 8 = 0, <= 128 |
| `splash` | bfloat16, float32 | T % 128 = 0 | H % 128 = 0       |

`auto` takes the platform's own kernel where it fits and logs once where it does not; a kernel
chosen by name that does not fit is an error. ALiBi stays with XLA: splash takes no bias, and
cuDNN's would be a 16-bit one, too coarse for distant tokens. Splash and cuDNN are causal by index,
which equals causal by position because positions rise with the index inside a segment.

A row of trees holds sequences that begin alike, with the common tokens once. The tokens of a tree
stand in depth-first order; a token's position is its depth, and it sees itself and those that it
follows: the tokens before it whose subtree has not ended.
"""

import functools
import logging
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import PartitionSpec as P

from huatuo_jax.backbone.config import Kernel
from huatuo_jax.core import sharding

_MASKED_SCORE = -1e30  # Finite: a row of padding attends to itself instead of becoming NaN.
_MOST_BLOCKS = 16  # Each one is a copy of its products in the compiled program.
_HEADS = ((0, 1), (0, 1))  # The batch dimensions B and K of every product.
logger = logging.getLogger(__name__)


def attend_in_blocks(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
    alibi_slopes_N: jax.Array | None,
    query_chunk: int,
    subtree_ends_BT: jax.Array | None = None,
) -> jax.Array:
    """Attends in chunks of queries, each to the keys before its end, skipping the upper half.

    The backward pass recomputes the scores of a chunk, so `[T, T]` is never held.
    """
    length = q_BTNH.shape[1]
    chunk = max(query_chunk, -(-length // _MOST_BLOCKS))
    # In a row of trees a near token of the branch can be far off by its index.
    reach = length if sliding_window is None or subtree_ends_BT is not None else sliding_window
    blocks, masks = [], []
    for start in range(0, length, chunk):
        low = max(0, start - reach + 1)
        block = _Block(low, start, min(start + chunk, length))
        blocks.append(block)
        masks.append(_mask(block, positions_BT, segment_ids_BT, sliding_window, subtree_ends_BT))
    output_BKGTH = _weigh(
        tuple(blocks),
        *_heads_first(q_BTNH, k_BTKH, v_BTKH),
        tuple(masks),
        _by_group(alibi_slopes_N, k_BTKH.shape[2]),
    )
    return output_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def cudnn(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
    *,
    positions_BT: jax.Array,
    subtree_ends_BT: jax.Array | None,
) -> jax.Array:
    """Runs cuDNN's flash attention through jax.

    Returns:
        `[B, T, N, H]`.
    """
    visible = visible_tokens(segment_ids_BT, sliding_window, positions_BT, subtree_ends_BT)
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, implementation="cudnn", **visible)


def visible_tokens(
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
    positions_BT: jax.Array,
    subtree_ends_BT: jax.Array | None = None,
) -> dict[str, Any]:
    """Returns the arguments of `jax.nn.dot_product_attention` for the visible tokens.

    Segments and trees become a mask of `[B, 1, T, T]`.
    """
    if subtree_ends_BT is not None:
        # The window is in the mask: in a row of trees jax's own would count other branches' tokens.
        row = _Block(0, 0, positions_BT.shape[1])
        mask = _mask(row, positions_BT, segment_ids_BT, sliding_window, subtree_ends_BT)
        return {"mask": mask.visible_BTS[:, None], "is_causal": True, "local_window_size": None}
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
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    heads, rows = P(sharding.BATCH_AXES, None, "tensor", None), P(sharding.BATCH_AXES, None)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(heads, heads, heads, rows),
        out_specs=heads,
        check_vma=False,  # Pallas calls carry no replication types.
    )(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
    alibi_slopes_N: jax.Array | None,
    kernel: Kernel,
    query_chunk: int,
    subtree_ends_BT: jax.Array | None = None,
) -> jax.Array:
    """Computes causal attention of rows to themselves, scores scaled by `H ** -0.5`.

    Args:
        q_BTNH: queries.
        k_BTKH: keys; each key/value head serves N / K query heads in a row.
        v_BTKH: values.
        positions_BT: int32; rise by one from token to token inside a segment or a tree's branch.
        segment_ids_BT: int32, tokens see their own segment only; None for one segment a row.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it.
        alibi_slopes_N: decrease of a score per token of distance; None without ALiBi.
        kernel: a kernel's name, or `auto`.
        query_chunk: queries of a chunk in the XLA kernel, which bounds its memory.
        subtree_ends_BT: int32, the index behind the last token that follows each token, in rows
            of trees; None where no sequences share tokens.

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
        trees=subtree_ends_BT is not None,
    )
    if fit == "splash":
        return splash(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, sliding_window)
    if fit == "cudnn":
        return cudnn(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            segment_ids_BT,
            sliding_window,
            positions_BT=positions_BT,
            subtree_ends_BT=subtree_ends_BT,
        )
    return attend_in_blocks(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        positions_BT,
        segment_ids_BT,
        sliding_window,
        alibi_slopes_N,
        query_chunk,
        subtree_ends_BT,
    )


@functools.cache  # Traced once for each stack of layers, so this also logs the warning once.
def choose_kernel(
    wanted: Kernel,
    platform: str | None,
    *,
    length: int,
    head_dim: int,
    dtype: str,
    alibi: bool,
    trees: bool = False,
) -> Literal["xla", "cudnn", "splash"]:
    """Chooses the kernel that computes attention, by the table at this module's top.

    Args:
        wanted: a kernel's name, or `auto`.
        platform: `cpu`, `gpu` or `tpu`, for `auto`.
        length: tokens T a row.
        head_dim: width H of a head.
        dtype: of queries, keys and values.
        alibi: scores have ALiBi's bias.
        trees: rows hold trees of tokens.

    Raises:
        ValueError: the kernel chosen by name does not fit; gives the reasons.
    """
    own: dict[str, Literal["xla", "cudnn", "splash"]] = {"gpu": "cudnn", "tpu": "splash"}
    candidate: Literal["xla", "cudnn", "splash"]
    candidate = own.get(platform or "cpu", "xla") if wanted == "auto" else wanted
    if candidate == "xla":
        return "xla"
    misfits = _misfits(
        candidate, length=length, head_dim=head_dim, dtype=dtype, alibi=alibi, trees=trees
    )
    if not misfits:
        return candidate
    if wanted == "auto":
        logger.warning("attention runs on XLA, not %s: %s", candidate, "; ".join(misfits))
        return "xla"
    raise ValueError(f"attention kernel {wanted!r} does not fit: {'; '.join(misfits)}")


class _Mask(NamedTuple):
    """The visibility of each key to each query of a block, and the distance between them."""

    visible_BTS: jax.Array
    distance_BTS: jax.Array


_Saved = tuple[
    jax.Array, jax.Array, jax.Array, tuple[_Mask, ...], jax.Array | None, jax.Array, jax.Array
]


class _Block(NamedTuple):
    """Queries from `start` to `end`, and the keys visible to them, from `low` to `end`."""

    low: int
    start: int
    end: int

    @property
    def queries(self) -> slice:
        return slice(self.start, self.end)

    @property
    def keys(self) -> slice:
        return slice(self.low, self.end)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weigh(
    blocks: tuple[_Block, ...],
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    masks: tuple[_Mask, ...],
    slopes_KG: jax.Array | None,
) -> jax.Array:
    """Computes softmax attention of scaled queries, block by block.

    One set of keys is kept for all blocks; beside the inputs only the output and the scores' total
    are saved. The backward pass is FlashAttention's (arXiv 2205.14135, appendix B): it recomputes
    the weights from the total's logarithm, and the softmax's gradient from the output's.
    """
    return _weigh_forward(blocks, q_BKGTH, k_BKSH, v_BKSH, masks, slopes_KG)[0]


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


def _mask(
    block: _Block,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
    subtree_ends_BT: jax.Array | None,
) -> _Mask:
    queries_BT1, keys_B1S = positions_BT[:, block.queries, None], positions_BT[:, None, block.keys]
    distance_BTS = queries_BT1 - keys_B1S
    visible_BTS = distance_BTS >= 0
    if segment_ids_BT is not None:
        segments_BT1 = segment_ids_BT[:, block.queries, None]
        visible_BTS &= segments_BT1 == segment_ids_BT[:, None, block.keys]
    if subtree_ends_BT is not None:
        index_T = jnp.arange(block.end)
        visible_BTS &= index_T[None, None, block.keys] <= index_T[None, block.queries, None]
        visible_BTS &= index_T[None, block.queries, None] < subtree_ends_BT[:, None, block.keys]
    if sliding_window is not None:
        visible_BTS &= distance_BTS < sliding_window
    return _Mask(visible_BTS, distance_BTS)


def _heads_first(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns scaled queries by group, keys and values, all with heads before tokens.

    Done once for all blocks, so that every product reads its inputs in their layout.
    """
    batch, length, num_heads, head_dim = q_BTNH.shape
    num_kv_heads = k_BSKH.shape[2]
    groups = num_heads // num_kv_heads
    q_BTKGH = (q_BTNH * head_dim**-0.5).reshape(batch, length, num_kv_heads, groups, head_dim)
    return q_BTKGH.transpose(0, 2, 3, 1, 4), k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)


def _by_group(slopes_N: jax.Array | None, num_kv_heads: int) -> jax.Array | None:
    return None if slopes_N is None else slopes_N.reshape(num_kv_heads, -1)


def _joined(parts: list[jax.Array]) -> jax.Array:
    """Concatenates blocks of queries in their order."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=3)


def _scores(
    q_BKGTH: jax.Array, k_BKSH: jax.Array, mask: _Mask, slopes_KG: jax.Array | None
) -> jax.Array:
    """Returns the masked scores `[B, K, G, T, S]`, in at least float32."""
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
    """Returns a block's output `[B, K, G, T, H]` and its scores' log total, with H = 1."""
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
    """Returns the gradients of a block's queries, keys and values."""
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


def _misfits(
    kernel: str, *, length: int, head_dim: int, dtype: str, alibi: bool, trees: bool
) -> list[str]:
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
        if trees:
            found.append("it takes no trees")
        if dtype not in ("bfloat16", "float32"):
            found.append(f"it takes bfloat16 or float32, not {dtype}")
        if length % 128:
            found.append(f"rows of {length} tokens are not a multiple of 128")
        if head_dim % 128:
            found.append(f"head_dim={head_dim} is not a multiple of 128")
    return found
