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
from typing import Literal

import jax

from huatuo_jax import sharding
from huatuo_jax.backbone import fused_attention
from huatuo_jax.backbone.block_attention import attend_in_blocks
from huatuo_jax.backbone.config import Kernel

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
        sharding.platform_in_use(),
        length=q_BTNH.shape[1],
        head_dim=q_BTNH.shape[-1],
        dtype=str(q_BTNH.dtype),
        alibi=alibi_slopes_N is not None,
    )
    if fit == "splash":
        return fused_attention.splash(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, sliding_window)
    if fit == "cudnn":
        return fused_attention.cudnn(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, sliding_window)
    return attend_in_blocks(
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
