"""The accelerators' own attention kernels: splash on TPU, cuDNN on GPU.

Both are causal by index, which is causal by position because positions rise with the index inside
a segment.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import PartitionSpec as P

from huatuo_jax import sharding


def cudnn(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
) -> jax.Array:
    """Flash attention of cuDNN through jax.

    Returns:
        `[B, T, N, H]`.
    """
    visible = visible_tokens(segment_ids_BT, sliding_window)
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, implementation="cudnn", **visible)


def visible_tokens(segment_ids_BT: jax.Array | None, sliding_window: int | None) -> dict[str, Any]:
    """The arguments of `jax.nn.dot_product_attention` that say which tokens a token sees.

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
    """Splash attention, each device on its own rows and heads of the mesh in use.

    Args:
        q_BTNH: queries.
        k_BTKH: keys.
        v_BTKH: values.
        segment_ids_BT: int32, or None for one segment a row.
        sliding_window: tokens a query sees, itself included; None for all before it.
        interpret: run the kernel's program on any device, slowly: for tests.

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
        splash_attention_mask.MultiHeadMask([_mask(length, sliding_window)] * num_heads),
        block_sizes=_block_sizes(length),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segments = splash_attention_kernel.SegmentIds(q=segment_ids_BT, kv=segment_ids_BT)
    q_BNTH, k_BKTH, v_BKTH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    output_BNTH = jax.vmap(kernel)(q_BNTH * head_dim**-0.5, k_BKTH, v_BKTH, segments)
    return output_BNTH.swapaxes(1, 2).astype(q_BTNH.dtype)


def _mask(length: int, sliding_window: int | None) -> splash_attention_mask.Mask:
    if sliding_window is None:
        return splash_attention_mask.CausalMask((length, length))
    return splash_attention_mask.LocalMask((length, length), (sliding_window - 1, 0), 0)


def _block_sizes(length: int) -> splash_attention_kernel.BlockSizes:
    """Blocks of 512 where they divide the length: few enough steps, small enough for VMEM."""
    block = next(size for size in (512, 256, 128) if length % size == 0)
    return splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
