import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from huatuo_jax.backbone import positions
from huatuo_jax.backbone.config import RopeConfig

LLAMA31 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Settings in the words of both libraries: (rope_type, theta, H, factor, original, the rest).
SETTINGS = [
    ("default", 1e4, 128, 1.0, None, {}),
    ("default", 5e6, 64, 1.0, None, {}),
    ("linear", 1e4, 128, 4.0, None, {}),
    ("linear", 1e6, 96, 2.5, None, {}),
    ("llama3", 5e5, 128, 8.0, 8192, LLAMA31),
    ("llama3", 5e5, 64, 32.0, 8192, LLAMA31),
    ("llama3", 1e4, 32, 4.0, 128, {"low_freq_factor": 2.0, "high_freq_factor": 16.0}),
    ("yarn", 1e6, 128, 4.0, 32_768, {}),
    ("yarn", 1e4, 64, 16.0, 4096, {"beta_fast": 64.0, "beta_slow": 2.0}),
    ("yarn", 1e4, 64, 16.0, 4096, {"truncate": False}),
    ("yarn", 1e4, 64, 16.0, 4096, {"attention_factor": 1.3}),
    ("yarn", 1e4, 128, 40.0, 4096, {"mscale": 0.707, "mscale_all_dim": 0.9}),
    ("yarn", 1e4, 128, 40.0, 4096, {"mscale": 0.707}),
    ("yarn", 1e4, 64, 1.0, 4096, {}),
    ("yarn", 1e4, 16, 4.0, 16, {}),  # low and high meet at the lowest dimension
    ("yarn", 1e6, 8, 8.0, 2**20, {}),  # high is past the last dimension
]


def transformers_frequencies(
    rope_type: str,
    theta: float,
    head_dim: int,
    factor: float,
    original: int | None,
    rest: dict[str, float],
    *,
    length: int | None = None,
) -> tuple[np.ndarray, float]:
    parameters = {"rope_type": rope_type, "rope_theta": theta, "factor": factor, **rest}
    if original is not None and rope_type != "dynamic":
        parameters["original_max_position_embeddings"] = original
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=original or 2048,
        rope_parameters=parameters,
    )
    if rope_type == "default":
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
        frequencies, scale = rotary.compute_default_rope_parameters(config)
    else:
        frequencies, scale = ROPE_INIT_FUNCTIONS[rope_type](config, None, seq_len=length)
    return frequencies.numpy(), scale


def our_table(rope: RopeConfig, head_dim: int, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
    cos_BTH, sin_BTH = positions.rotary_tables(
        jnp.asarray([indices], jnp.int32), rope, head_dim=head_dim, dtype=jnp.float32
    )
    return np.asarray(cos_BTH[0]), np.asarray(sin_BTH[0])


@pytest.mark.parametrize("setting", SETTINGS)
def test_rotations_have_the_frequencies_of_transformers(setting):
    rope_type, theta, head_dim, factor, original, rest = setting
    rope = RopeConfig(
        rope_type=rope_type, theta=theta, factor=factor, original_max_positions=original, **rest
    )
    frequencies_H, scale = transformers_frequencies(*setting)
    # At position 1 angles are the frequencies themselves, at most 1 radian.
    cos_TH, sin_TH = our_table(rope, head_dim, [0, 1])
    np.testing.assert_allclose(cos_TH[0], scale, rtol=1e-6)
    np.testing.assert_allclose(np.arctan2(sin_TH[1], cos_TH[1]), frequencies_H, rtol=2e-6)
    np.testing.assert_allclose(np.hypot(sin_TH[1], cos_TH[1]), scale, rtol=1e-6)


@pytest.mark.parametrize("length", [1, 100, 128, 129, 200, 1000])
def test_dynamic_frequencies_follow_the_longest_position_as_in_transformers(length):
    setting = ("dynamic", 1e4, 64, 2.0, 128, {})
    rope = RopeConfig(rope_type="dynamic", theta=1e4, factor=2.0, original_max_positions=128)
    frequencies_H, _ = transformers_frequencies(*setting, length=length)
    cos_TH, sin_TH = our_table(rope, 64, [1, length - 1])
    np.testing.assert_allclose(np.arctan2(sin_TH[0], cos_TH[0]), frequencies_H, rtol=2e-6)
    if length > 128:
        plain_H, _ = transformers_frequencies(*setting, length=1)
        assert np.all(frequencies_H[1:] < plain_H[1:])


def test_dynamic_frequencies_look_at_the_whole_batch():
    rope = RopeConfig(rope_type="dynamic", factor=2.0, original_max_positions=8)
    both = jnp.asarray([[0, 1, 2], [20, 21, 22]], jnp.int32)
    cos_BTH, _ = positions.rotary_tables(both, rope, head_dim=16, dtype=jnp.float32)
    alone_BTH, _ = positions.rotary_tables(both[:1], rope, head_dim=16, dtype=jnp.float32)
    assert not np.allclose(cos_BTH[0, 1], alone_BTH[0, 1])


def test_rotation_by_hand():
    """Pair (i, i + H / 2) turns by position * theta^(-2 i / H)."""
    head_dim, position = 6, 5
    vector = np.arange(1.0, 7.0)
    cos_BTH, sin_BTH = positions.rotary_tables(
        jnp.full((1, 1), position, jnp.int32), RopeConfig(), head_dim=head_dim, dtype=jnp.float32
    )
    turned = positions.rotate(jnp.asarray(vector, jnp.float32)[None, None, None], cos_BTH, sin_BTH)
    for i in range(3):
        angle = position * 10_000.0 ** (-2 * i / head_dim)
        turned_pair = complex(vector[i], vector[i + 3]) * complex(math.cos(angle), math.sin(angle))
        np.testing.assert_allclose(turned[0, 0, 0, i], turned_pair.real, rtol=1e-5)
        np.testing.assert_allclose(turned[0, 0, 0, i + 3], turned_pair.imag, rtol=1e-5)


def test_rotary_tables_have_the_dtype_asked_for_and_are_exact_in_float64():
    with jax.enable_x64(True):
        indices = jnp.asarray([[0, 3, 70_000]], jnp.int32)
        cos_BTH, sin_BTH = positions.rotary_tables(
            indices, RopeConfig(theta=1e6), head_dim=8, dtype=jnp.float64
        )
        assert cos_BTH.dtype == sin_BTH.dtype == jnp.float64
        angles = np.outer([0, 3, 70_000], 1e6 ** (-np.arange(0, 8, 2) / 8))
        np.testing.assert_allclose(cos_BTH[0], np.cos(angles), atol=1e-11)
        np.testing.assert_allclose(sin_BTH[0], np.sin(angles), atol=1e-11)
        heads = jnp.ones((1, 3, 2, 8), jnp.float64)
        assert positions.rotate(heads, cos_BTH, sin_BTH).dtype == jnp.float64
    narrow, _ = positions.rotary_tables(
        jnp.asarray([[0, 3]], jnp.int32), RopeConfig(), head_dim=8, dtype=jnp.bfloat16
    )
    assert narrow.dtype == jnp.bfloat16


def test_dynamic_frequencies_are_exact_in_float64():
    with jax.enable_x64(True):
        rope = RopeConfig(rope_type="dynamic", factor=2.0, original_max_positions=8)
        cos_BTH, _ = positions.rotary_tables(
            jnp.asarray([[0, 31]], jnp.int32), rope, head_dim=8, dtype=jnp.float64
        )
        theta = 10_000 * (2.0 * 32 / 8 - 1.0) ** (8 / 6)
        np.testing.assert_allclose(
            cos_BTH[0, 1], np.cos(31 * theta ** (-np.arange(0, 8, 2) / 8)), atol=1e-12
        )


@pytest.mark.parametrize("num_heads", range(1, 129))
def test_alibi_slopes_are_those_of_bloom(num_heads):
    mask = torch.ones((1, 2), dtype=torch.int64)
    bias = build_alibi_tensor(mask, num_heads, torch.float32)[:, 0, 1]
    slopes = positions.alibi_slopes(num_heads)
    assert slopes.dtype == np.float32
    np.testing.assert_allclose(slopes, bias.numpy(), rtol=1e-6)


def test_positions_restart_where_the_segment_changes():
    generator = np.random.default_rng(0)
    segments_BT = generator.integers(0, 3, (50, 17)).astype(np.int32)
    expected_BT = np.zeros_like(segments_BT)
    for row, column in np.ndindex(50, 17):
        if column and segments_BT[row, column] == segments_BT[row, column - 1]:
            expected_BT[row, column] = expected_BT[row, column - 1] + 1
    found_BT = positions.positions_from_segments(jnp.asarray(segments_BT))
    assert found_BT.dtype == jnp.int32
    np.testing.assert_array_equal(found_BT, expected_BT)
