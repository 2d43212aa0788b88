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
cuDNN's would be a 16-bit one, too coarse for distant tokens. All three are causal, and measure
distance, by index, which equals position because positions rise by one inside a segment.

A row of trees holds sequences that begin alike, with the common tokens once, see `Trees`.
"""

import functools
import logging
from typing import Any, Literal

import jax
import jax.numpy as jnp

from huatuo_jax.backbone.blockwise_attention import ROWS, Trees, attend_in_blocks, on_shards
from huatuo_jax.backbone.config import Kernel
from huatuo_jax.core import sharding

logger = logging.getLogger(__name__)


def cudnn(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
    trees: Trees | None = None,
) -> jax.Array:
    """Runs cuDNN's flash attention through jax.

    Returns:
        `[B, T, N, H]`.
    """
    visible = visible_tokens(segment_ids_BT, sliding_window, trees)
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, implementation="cudnn", **visible)


def visible_tokens(
    segment_ids_BT: jax.Array | None, sliding_window: int | None, trees: Trees | None = None
) -> dict[str, Any]:
    """Returns the arguments of `jax.nn.dot_product_attention` for the visible tokens.

    Segments and trees become a mask of `[B, 1, T, T]`.
    """
    mask_B1TT = None
    if segment_ids_BT is not None:
        mask_B1TT = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
    if trees is not None:
        index_T = jnp.arange(trees.ends_BT.shape[1])
        branch_BTT = index_T[None, :, None] < trees.ends_BT[:, None, :]
        if sliding_window is not None:  # jax's own would count the tokens of other branches.
            distance_BTT = trees.depths_BT[:, :, None] - trees.depths_BT[:, None, :]
            branch_BTT &= distance_BTT < sliding_window
            sliding_window = None
        branch_B1TT = branch_BTT[:, None]
        mask_B1TT = branch_B1TT if mask_B1TT is None else mask_B1TT & branch_B1TT
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
    return on_shards(local, ROWS)(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


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
    trees: Trees | None = None,
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
        trees: of rows of trees; None where no sequences share tokens.

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
        trees=trees is not None,
    )
    if fit == "splash":
        return splash(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, sliding_window)
    if fit == "cudnn":
        return cudnn(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, sliding_window, trees)
    return attend_in_blocks(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        segment_ids_BT,
        sliding_window,
        alibi_slopes_N,
        query_chunk,
        trees,
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


def _splash_local(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    sliding_window: int | None,
    interpret: bool,
) -> jax.Array:
    # Imported here: it takes as long as a quarter of jax, and only a TPU needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    length, num_heads, head_dim = q_BTNH.shape[1:]
    # Blocks of 512 where they divide the length: few steps that still fit VMEM.
    block = next(size for size in (512, 256, 128) if length % size == 0)
    if sliding_window is None:
        mask: splash_attention_mask.Mask = splash_attention_mask.CausalMask((length, length))
    else:
        mask = splash_attention_mask.LocalMask((length, length), (sliding_window - 1, 0), 0)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * num_heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segments = splash_attention_kernel.SegmentIds(q=segment_ids_BT, kv=segment_ids_BT)
    q_BNTH, k_BKTH, v_BKTH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    output_BNTH = jax.vmap(kernel)(q_BNTH * head_dim**-0.5, k_BKTH, v_BKTH, segments)
    return output_BNTH.swapaxes(1, 2).astype(q_BTNH.dtype)


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
