"""Positions of tokens, rotary angles and ALiBi slopes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from huatuo_jax.backbone.config import RopeConfig


def positions_from_segments(segment_ids_BT: jax.Array) -> jax.Array:
    """Returns positions that restart at 0 wherever the segment id changes.

    Args:
        segment_ids_BT: int32; neighbours with one id are one sequence. 0 marks padding.

    Returns:
        int32 `[B, T]`.
    """
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    index_BT = jnp.broadcast_to(index_T[None, :], segment_ids_BT.shape)
    starts_BT = jnp.concatenate(
        [
            jnp.ones_like(segment_ids_BT[:, :1], dtype=bool),
            segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1],
        ],
        axis=1,
    )
    first_BT = jax.lax.cummax(jnp.where(starts_BT, index_BT, 0), axis=1)
    return index_BT - first_BT


def rotary_tables(
    positions_BT: jax.Array, rope: RopeConfig, *, head_dim: int, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine of every token's rotation, computed in at least float32.

    Args:
        positions_BT: int32.
        rope: the rotary settings.
        head_dim: width H of a head.
        dtype: of the returned tables.

    Returns:
        Two arrays `[B, T, H / 2]`.
    """
    frequencies_H = _frequencies(positions_BT, rope, head_dim)
    angles_BTH = positions_BT[..., None].astype(frequencies_H.dtype) * frequencies_H[None, None, :]
    scale = _attention_factor(rope)
    return (jnp.cos(angles_BTH) * scale).astype(dtype), (jnp.sin(angles_BTH) * scale).astype(dtype)


def rotate(heads_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> jax.Array:
    """Rotates each head's pairs (i, i + H / 2), the layout of Hugging Face weights.

    Args:
        heads_BTNH: queries or keys.
        cos_BTH: `[B, T, H / 2]`.
        sin_BTH: `[B, T, H / 2]`.
    """
    first, second = jnp.split(heads_BTNH, 2, axis=-1)
    cos, sin = cos_BTH[:, :, None, :], sin_BTH[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Returns each head's slope, its decrease of scores per token of distance.

    ALiBi, arXiv 2108.12409: powers of 2^(-8/n) for n a power of two; otherwise the series of the
    next lower power of two, completed with every other slope of the next higher one.

    Returns:
        float32 `[N]`.
    """
    lower = 2 ** math.floor(math.log2(num_heads))

    def series(n: int) -> np.ndarray:
        return 2.0 ** (-8.0 / n * np.arange(1, n + 1))

    slopes_N = np.concatenate([series(lower), series(2 * lower)[::2][: num_heads - lower]])
    return slopes_N.astype(np.float32)


def _frequencies(positions_BT: jax.Array, rope: RopeConfig, head_dim: int) -> jax.Array:
    """Returns radians per position of every pair, `[H / 2]`."""
    if rope.rope_type == "dynamic":
        return _dynamic_frequencies(positions_BT, rope, head_dim)
    plain_H = rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    match rope.rope_type:
        case "default":
            scaled_H = plain_H
        case "linear":
            scaled_H = plain_H / rope.factor
        case "llama3":
            scaled_H = _llama3_frequencies(plain_H, rope)
        case "yarn":
            scaled_H = _yarn_frequencies(plain_H, rope, head_dim)
    return jnp.asarray(scaled_H, dtype=_float_dtype())


def _float_dtype() -> jnp.dtype:
    """Returns float32, or float64 where jax runs with 64 bits."""
    return jnp.zeros((), dtype=float).dtype


def _dynamic_frequencies(positions_BT: jax.Array, rope: RopeConfig, head_dim: int) -> jax.Array:
    """Returns NTK-scaled frequencies: the base grows with the longest position."""
    original = rope.original_max_positions
    assert original is not None
    dtype = _float_dtype()
    length = jnp.maximum(positions_BT.max() + 1, original).astype(dtype)
    stretch = rope.factor * length / original - (rope.factor - 1)
    theta = rope.theta * stretch ** (head_dim / (head_dim - 2))
    exponent_H = jnp.asarray(np.arange(0, head_dim, 2) / head_dim, dtype=dtype)
    return theta**-exponent_H


def _llama3_frequencies(plain_H: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Scales long wavelengths, keeps short ones and blends between (Llama 3.1)."""
    assert rope.original_max_positions is not None
    wavelength_H = 2 * np.pi / plain_H
    blend_H = (rope.original_max_positions / wavelength_H - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blend_H = np.clip(blend_H, 0.0, 1.0)
    return (1 - blend_H) * plain_H / rope.factor + blend_H * plain_H


def _yarn_frequencies(plain_H: np.ndarray, rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Interpolates dimensions that turn seldom within the original length (YaRN)."""
    assert rope.original_max_positions is not None
    original, log_theta = rope.original_max_positions, math.log(rope.theta)

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * log_theta)

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    interpolated_H = np.clip((np.arange(head_dim // 2) - low) / width, 0.0, 1.0)
    return plain_H / rope.factor * interpolated_H + plain_H * (1 - interpolated_H)


def _attention_factor(rope: RopeConfig) -> float:
    """Returns the scale of cosine and sine: 1, or for YaRN that of its equation 22."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
