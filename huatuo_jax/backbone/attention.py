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

`auto` takes the platform's own kernel where it fits and says once where it does not; a kernel
asked for by name that does not fit is an error. ALiBi stays with XLA: splash takes no bias, and
cuDNN's would be a 16-bit one, too coarse for distant tokens.
"""

import functools
import logging
from typing import Any, Literal

import jax
import jax.numpy as jnp

from huatuo_jax.backbone import fused_attention
from huatuo_jax.backbone.config import Kernel

_MASKED_SCORE = -1e30  # Finite: a row of padding attends to itself instead of becoming NaN.
_MOST_CHUNKS = 16  # Each chunk is a copy of the block in the compiled program.

logger = logging.getLogger(__name__)


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
) -> jax.Array:
    """Causal attention of rows to themselves; scores are scaled by `H ** -0.5`.

    Args:
        q_BTNH: queries.
        k_BTKH: keys; each key/value head serves N / K query heads in a row.
        v_BTKH: values.
        positions_BT: int32; rise by one from token to token inside a segment.
        segment_ids_BT: int32, tokens see their own segment only; None for one segment a row.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it.
        alibi_slopes_N: what a score loses per token of distance; None without ALiBi.
        kernel: the kernel wanted.
        query_chunk: queries at a time in the XLA kernel, which bounds its memory.

    Returns:
        `[B, T, N, H]` in the dtype of the queries.

    Raises:
        ValueError: the kernel wanted does not fit.
    """
    fit = choose_kernel(
        kernel,
        jax.default_backend(),
        length=q_BTNH.shape[1],
        head_dim=q_BTNH.shape[-1],
        dtype=str(q_BTNH.dtype),
        alibi=alibi_slopes_N is not None,
    )
    if fit == "splash":
        return fused_attention.splash(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, sliding_window)
    if fit == "cudnn":
        return fused_attention.cudnn(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, sliding_window)
    return _attend_in_chunks(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        positions_BT,
        segment_ids_BT,
        sliding_window,
        alibi_slopes_N,
        query_chunk,
    )


@functools.cache  # Traced once a layer stack, so this also makes the notice appear once.
def choose_kernel(
    wanted: Kernel, platform: str, *, length: int, head_dim: int, dtype: str, alibi: bool
) -> Literal["xla", "cudnn", "splash"]:
    """The kernel that computes attention, by the table above.

    Args:
        wanted: a kernel's name, or `auto`.
        platform: `cpu`, `gpu` or `tpu`.
        length: tokens T a row.
        head_dim: width H of a head.
        dtype: of queries, keys and values.
        alibi: whether scores carry ALiBi's bias.

    Raises:
        ValueError: the kernel wanted by name does not fit; says why.
    """
    own: dict[str, Literal["cudnn", "splash"]] = {"gpu": "cudnn", "tpu": "splash"}
    if wanted == "xla" or (wanted == "auto" and platform not in own):
        return "xla"
    candidate = own[platform] if wanted == "auto" else wanted
    misfits = _misfits(candidate, length=length, head_dim=head_dim, dtype=dtype, alibi=alibi)
    if not misfits:
        return candidate
    if wanted == "auto":
        logger.warning("attention runs on XLA, not %s: %s", candidate, "; ".join(misfits))
        return "xla"
    raise ValueError(f"attention kernel {wanted!r} does not fit: {'; '.join(misfits)}")


def _misfits(kernel: str, *, length: int, head_dim: int, dtype: str, alibi: bool) -> list[str]:
    """Why a fused kernel cannot take this input, in words."""
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


def _attend_in_chunks(
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
    chunk = max(query_chunk, -(-length // _MOST_CHUNKS))
    block = functools.partial(attend_block, sliding_window=sliding_window)
    segments = segment_ids_BT
    outputs = []
    for start in range(0, length, chunk):
        low = 0 if sliding_window is None else max(0, start - sliding_window + 1)
        rows, keys = slice(start, start + chunk), slice(low, start + chunk)
        outputs.append(
            block(
                q_BTNH[:, rows],
                k_BTKH[:, keys],
                v_BTKH[:, keys],
                q_positions_BT=positions_BT[:, rows],
                k_positions_BS=positions_BT[:, keys],
                q_segments_BT=None if segments is None else segments[:, rows],
                k_segments_BS=None if segments is None else segments[:, keys],
                alibi_slopes_N=alibi_slopes_N,
            )
        )
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


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
    batch, length, num_heads, head_dim = q_BTNH.shape
    groups = num_heads // k_BSKH.shape[2]
    q_BTKGH = (q_BTNH * head_dim**-0.5).reshape(batch, length, -1, groups, head_dim)
    distance_BTS = q_positions_BT[:, :, None] - k_positions_BS[:, None, :]
    visible_BTS = distance_BTS >= 0
    if q_segments_BT is not None and k_segments_BS is not None:
        visible_BTS &= q_segments_BT[:, :, None] == k_segments_BS[:, None, :]
    if sliding_window is not None:
        visible_BTS &= distance_BTS < sliding_window
    slopes_KG = None
    if alibi_slopes_N is not None:
        slopes_KG = alibi_slopes_N.reshape(-1, groups)
    output_BKGTH = _weigh(
        # Heads first, once: every product of the block then reads its inputs as they lie.
        q_BTKGH.transpose(0, 2, 3, 1, 4),
        k_BSKH.swapaxes(1, 2),
        v_BSKH.swapaxes(1, 2),
        visible_BTS,
        distance_BTS,
        slopes_KG,
    )
    return output_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


_HEADS = ((0, 1), (0, 1))  # The batch dimensions B and K of every product.


@jax.custom_vjp
def _weigh(
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    visible_BTS: jax.Array,
    distance_BTS: jax.Array,
    slopes_KG: jax.Array | None,
) -> jax.Array:
    """Softmax attention of scaled queries; only its output and the scores' total are kept.

    The backward pass is FlashAttention's (arXiv 2205.14135, appendix B): weights again from the
    total's logarithm, and the softmax's gradient from the output's.
    """
    return _weigh_forward(q_BKGTH, k_BKSH, v_BKSH, visible_BTS, distance_BTS, slopes_KG)[0]


def _scores(
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    visible_BTS: jax.Array,
    distance_BTS: jax.Array,
    slopes_KG: jax.Array | None,
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
        scores_BKGTS -= slopes_1KG11 * distance_BTS[:, None, None].astype(scores_BKGTS.dtype)
    return jnp.where(visible_BTS[:, None, None], scores_BKGTS, _MASKED_SCORE)


_Saved = tuple[jax.Array, jax.Array, jax.Array, tuple[Any, ...], jax.Array, jax.Array]


def _weigh_forward(
    q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, *mask: Any
) -> tuple[jax.Array, _Saved]:
    scores_BKGTS = _scores(q_BKGTH, k_BKSH, *mask)
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
    log_total_BKGT1 = largest_BKGT1 + jnp.log(total_BKGT1)
    return output_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, mask, output_BKGTH, log_total_BKGT1)


def _weigh_backward(saved: _Saved, gradient_BKGTH: jax.Array) -> tuple[jax.Array | None, ...]:
    q_BKGTH, k_BKSH, v_BKSH, mask, output_BKGTH, log_total_BKGT1 = saved
    wide = log_total_BKGT1.dtype
    weights_BKGTS = jnp.exp(_scores(q_BKGTH, k_BKSH, *mask) - log_total_BKGT1)
    mean_BKGT1 = (gradient_BKGTH.astype(wide) * output_BKGTH).sum(axis=-1, keepdims=True)
    to_weights_BKGTS = jax.lax.dot_general(
        gradient_BKGTH, v_BKSH, (((4,), (3,)), _HEADS), preferred_element_type=wide
    )
    to_scores_BKGTS = (weights_BKGTS * (to_weights_BKGTS - mean_BKGT1)).astype(q_BKGTH.dtype)
    to_q_BKGTH = jax.lax.dot_general(to_scores_BKGTS, k_BKSH, (((4,), (2,)), _HEADS))
    tokens = ((2, 3), (2, 3))
    to_k_BKSH = jax.lax.dot_general(to_scores_BKGTS, q_BKGTH, (tokens, _HEADS))
    weights_BKGTS = weights_BKGTS.astype(v_BKSH.dtype)
    to_v_BKSH = jax.lax.dot_general(weights_BKGTS, gradient_BKGTH, (tokens, _HEADS))
    return to_q_BKGTH, to_k_BKSH, to_v_BKSH, None, None, None


_weigh.defvjp(_weigh_forward, _weigh_backward)
