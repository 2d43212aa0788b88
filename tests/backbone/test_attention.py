import functools
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from huatuo_jax.backbone import attention, positions
from huatuo_jax.backbone import attention as fused_attention
from huatuo_jax.core import sharding

KERNEL_INPUT = {"length": 256, "head_dim": 128, "dtype": "bfloat16", "alibi": False}


def heads(batch: int, length: int, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple:
    generator = np.random.default_rng(length)
    return tuple(
        generator.normal(size=(batch, length, count, head_dim)).astype(np.float32)
        for count in (num_heads, num_kv_heads, num_kv_heads)
    )


def segments_of(batch: int, length: int) -> np.ndarray:
    """Each row another way of cutting it into padding, two segments and padding."""
    segments_BT = np.zeros((batch, length), np.int32)
    for row in range(batch):
        start, middle, end = row, length // 2 - row, length - 2 * row
        segments_BT[row, start:middle], segments_BT[row, middle:end] = 1, 2
    return segments_BT


def assert_equal_at_tokens(found, expected, segments_BT, *, atol):
    """Equal but for padding, whose output means nothing."""
    real_BT = np.ones(found.shape[:2]) if segments_BT is None else np.asarray(segments_BT)
    np.testing.assert_allclose(found[real_BT > 0], expected[real_BT > 0], atol=atol)


def attend_by_loop(q_BTNH, k_BTKH, v_BTKH, segments_BT, window, slopes_N):
    output_BTNH = np.zeros(q_BTNH.shape)
    groups = q_BTNH.shape[2] // k_BTKH.shape[2]
    for b, t, n in np.ndindex(q_BTNH.shape[:3]):
        first = max(0, t - (window or t + 1) + 1)
        seen = [s for s in range(first, t + 1) if segments_BT[b, s] == segments_BT[b, t]]
        scores = [
            q_BTNH[b, t, n] @ k_BTKH[b, s, n // groups] / np.sqrt(q_BTNH.shape[3])
            - (0 if slopes_N is None else slopes_N[n] * (t - s))
            for s in seen
        ]
        weights = np.exp(scores - np.max(scores))
        values = v_BTKH[b, seen, n // groups]
        output_BTNH[b, t, n] = weights @ values / weights.sum()
    return output_BTNH


def attend_on_xla(q_BTNH, k_BTKH, v_BTKH, segments_BT, *, window, slopes_N=None, query_chunk=256):
    if segments_BT is None:
        segments_BT = jnp.zeros(q_BTNH.shape[:2], jnp.int32)
    return attention.attend(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        positions_BT=positions.positions_from_segments(segments_BT),
        segment_ids_BT=segments_BT,
        sliding_window=window,
        alibi_slopes_N=None if slopes_N is None else jnp.asarray(slopes_N),
        kernel="xla",
        query_chunk=query_chunk,
    )


@pytest.mark.parametrize(
    ("num_kv_heads", "window", "alibi", "query_chunk"),
    [
        *itertools.product((1, 2, 6), (None, 4), (False, True), (5,)),
        *[(2, 1, False, 4), (6, 1, True, 64), (2, 4, False, 64), (2, 100, True, 5)],
    ],
)
def test_attention_equals_a_plain_loop(num_kv_heads, window, alibi, query_chunk):
    q, k, v = heads(2, 13, 6, num_kv_heads, 4)
    segments_BT = segments_of(2, 13)
    slopes_N = positions.alibi_slopes(6) if alibi else None
    attend = functools.partial(
        attend_on_xla, window=window, slopes_N=slopes_N, query_chunk=query_chunk
    )
    found = jax.jit(attend)(q, k, v, segments_BT)
    expected = attend_by_loop(q, k, v, segments_BT, window, slopes_N)
    assert_equal_at_tokens(found, expected, segments_BT, atol=2e-6)


def test_long_rows_are_cut_into_a_bounded_number_of_chunks():
    q, k, v = heads(1, 40, 2, 2, 4)
    attend = functools.partial(attend_on_xla, segments_BT=None, window=None, query_chunk=1)
    expected = attend_by_loop(q, k, v, np.zeros((1, 40)), None, None)
    np.testing.assert_allclose(jax.jit(attend)(q, k, v), expected, atol=2e-6)
    chunks = str(jax.make_jaxpr(attend)(q, k, v)).count("= exp")
    assert chunks == 14  # of ceil(40 / 16) = 3 queries


def test_rows_without_segments_are_one_segment():
    q, k, v = heads(2, 7, 2, 2, 4)
    found = attention.attend(
        *(q, k, v),
        positions_BT=jnp.broadcast_to(jnp.arange(7)[None], (2, 7)),
        segment_ids_BT=None,
        sliding_window=3,
        alibi_slopes_N=None,
        kernel="auto",
        query_chunk=3,
    )
    np.testing.assert_allclose(found, attend_by_loop(q, k, v, np.ones((2, 7)), 3, None), atol=2e-6)


@pytest.mark.parametrize(("window", "alibi"), [(None, False), (3, True)])
def test_gradients_of_attention_equal_finite_differences(window, alibi):
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x, jnp.float64) for x in heads(1, 9, 4, 2, 4)]
        attend = functools.partial(
            attend_on_xla,
            segments_BT=jnp.asarray(segments_of(1, 9)),
            window=window,
            slopes_N=positions.alibi_slopes(4) if alibi else None,
            query_chunk=4,
        )
        assert jax.eval_shape(attend, *arrays).dtype == jnp.float64
        check_grads(jax.jit(attend), arrays, order=1, modes=["rev"], atol=1e-7, rtol=1e-7)


# The token that each token of a row follows: two trees of several branches, and one of one token.
FOLLOWS = (None, 0, 1, 1, 3, 0, 5, 5, None, 8, 9, 8, None)


def branch_to(token: int) -> list[int]:
    before = FOLLOWS[token]
    return [token] if before is None else [*branch_to(before), token]


def trees():
    branches = [branch_to(token) for token in range(len(FOLLOWS))]
    positions_BT = np.array([[len(branch) - 1 for branch in branches]])
    ends_BT = np.array(
        [
            [
                1 + max(t for t, branch in enumerate(branches) if token in branch)
                for token in range(13)
            ]
        ]
    )
    return branches, jnp.asarray(positions_BT), jnp.asarray(ends_BT)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("alibi", [False, True])
def test_a_token_of_a_tree_sees_its_own_branch_as_if_it_were_alone(window, alibi):
    q, k, v = heads(1, 13, 4, 2, 8)
    slopes_N = positions.alibi_slopes(4) if alibi else None
    branches, positions_BT, ends_BT = trees()
    found = attention.attend(
        *(q, k, v),
        positions_BT=positions_BT,
        segment_ids_BT=None,
        sliding_window=window,
        alibi_slopes_N=None if slopes_N is None else jnp.asarray(slopes_N),
        kernel="xla",
        query_chunk=4,
        subtree_ends_BT=ends_BT,
    )
    for token, branch in enumerate(branches):
        alone = [array[:, branch] for array in (q, k, v)]
        expected = attend_by_loop(*alone, np.ones((1, len(branch))), window, slopes_N)
        np.testing.assert_allclose(found[0, token], expected[0, -1], atol=2e-6)
    if not alibi:
        visible = attention.visible_tokens(None, window, positions_BT, ends_BT)
        asked_of_cudnn = jax.nn.dot_product_attention(q, k, v, implementation="xla", **visible)
        np.testing.assert_allclose(asked_of_cudnn, found, atol=2e-6)


def test_scores_of_16_bit_inputs_are_softmaxed_in_float32():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in heads(1, 64, 2, 2, 16))
    found = attend_on_xla(q, k, v, None, window=None)
    assert found.dtype == jnp.bfloat16
    wide = [np.asarray(x, np.float64) for x in (q, k, v)]
    expected = attend_by_loop(*wide, np.zeros((1, 64)), None, None)
    # The weights and the output are rounded to 8 bits once each.
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=0.02)


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("segmented", [False, True])
def test_what_cudnn_is_asked_for_is_what_xla_computes(window, segmented):
    """jax computes the same call without cuDNN, which proves window and segment conventions."""
    q, k, v = heads(2, 14, 4, 2, 8)
    segments_BT = jnp.asarray(segments_of(2, 14)) if segmented else None
    positions_BT = jnp.broadcast_to(jnp.arange(14)[None], (2, 14))
    visible = fused_attention.visible_tokens(segments_BT, window, positions_BT)
    found = jax.nn.dot_product_attention(q, k, v, implementation="xla", **visible)
    expected = jax.jit(functools.partial(attend_on_xla, window=window))(q, k, v, segments_BT)
    assert_equal_at_tokens(found, expected, segments_BT, atol=2e-6)


def weighted_output(attend, segments_BT, weights_BTNH, *arrays):
    output_BTNH = attend(*arrays, segments_BT)
    return jnp.sum(output_BTNH * weights_BTNH), output_BTNH


def assert_splash_agrees(arrays, segments_BT, *, window):
    weights_BTNH = np.random.default_rng(1).normal(size=arrays[0].shape).astype(np.float32)
    if segments_BT is not None:
        weights_BTNH *= np.asarray(segments_BT > 0)[:, :, None, None]
    outcomes = []
    for attend in (
        functools.partial(attend_on_xla, window=window),
        functools.partial(fused_attention.splash, sliding_window=window, interpret=True),
    ):
        loss = functools.partial(weighted_output, attend, segments_BT, weights_BTNH)
        output_and_gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        (_, output_BTNH), gradients = jax.jit(output_and_gradients)(*arrays)
        outcomes.append((output_BTNH * (weights_BTNH != 0), *gradients))
    for expected, found in zip(*outcomes, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("num_kv_heads", "window", "segmented"),
    [
        (2, 100, True),
        pytest.param(4, None, False, marks=pytest.mark.slow),
        pytest.param(1, None, True, marks=pytest.mark.slow),
        pytest.param(2, 1, False, marks=pytest.mark.slow),
    ],
)
def test_splash_equals_xla_forward_and_backward(num_kv_heads, window, segmented):
    arrays = heads(1, 256, 4, num_kv_heads, 128)
    segments_BT = jnp.asarray(segments_of(1, 256)) if segmented else None
    assert_splash_agrees(arrays, segments_BT, window=window)


def test_splash_equals_xla_on_a_mesh():
    arrays, segments_BT = heads(4, 128, 4, 2, 128), jnp.asarray(segments_of(4, 128))
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        assert_splash_agrees(arrays, segments_BT, window=40)


def test_splash_keeps_the_dtype_of_its_inputs():
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in heads(1, 128, 1, 1, 128)]
    found = fused_attention.splash(*arrays, None, None, interpret=True)
    expected = attend_on_xla(*arrays, None, window=None)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(expected, np.float32), atol=0.03
    )


@pytest.mark.parametrize(
    ("wanted", "platform", "change", "kernel"),
    [
        ("auto", "cpu", {}, "xla"),
        ("auto", "gpu", {}, "cudnn"),
        ("auto", "tpu", {}, "splash"),
        ("auto", "gpu", {"head_dim": 64, "dtype": "float16"}, "cudnn"),
        ("auto", "tpu", {"dtype": "float32"}, "splash"),
        ("xla", "tpu", {}, "xla"),
        ("xla", "gpu", {"alibi": True, "length": 7, "head_dim": 5}, "xla"),
        # A CPU compiles for accelerators, so a name is not checked against the platform.
        ("splash", "cpu", {}, "splash"),
        ("cudnn", "cpu", {}, "cudnn"),
    ],
)
def test_the_kernel_that_fits_is_chosen_silently(wanted, platform, change, kernel, caplog):
    attention.choose_kernel.cache_clear()
    assert attention.choose_kernel(wanted, platform, **{**KERNEL_INPUT, **change}) == kernel
    assert not caplog.records


MISFITS = [
    ("cudnn", {"alibi": True}, "it takes no ALiBi bias"),
    ("cudnn", {"dtype": "float32"}, "it takes 16-bit inputs, not float32"),
    ("cudnn", {"length": 7}, "rows of 7 tokens are not even"),
    ("cudnn", {"head_dim": 256}, "head_dim=256 is not a multiple of 8 up to 128"),
    ("cudnn", {"head_dim": 12}, "head_dim=12 is not a multiple of 8 up to 128"),
    ("splash", {"alibi": True}, "it takes no ALiBi bias"),
    ("splash", {"trees": True}, "it takes no trees"),
    ("splash", {"dtype": "float16"}, "it takes bfloat16 or float32, not float16"),
    ("splash", {"length": 200}, "rows of 200 tokens are not a multiple of 128"),
    ("splash", {"head_dim": 64}, "head_dim=64 is not a multiple of 128"),
]


@pytest.mark.parametrize(("kernel", "change", "why"), MISFITS)
def test_a_kernel_asked_for_by_name_that_does_not_fit_is_an_error(kernel, change, why):
    with pytest.raises(ValueError, match=f"'{kernel}' does not fit: {why}"):
        attention.choose_kernel(kernel, "cpu", **{**KERNEL_INPUT, **change})


@pytest.mark.parametrize(("kernel", "change", "why"), MISFITS)
def test_auto_falls_back_to_xla_and_says_so_once(kernel, change, why, caplog):
    attention.choose_kernel.cache_clear()
    platform = {"cudnn": "gpu", "splash": "tpu"}[kernel]
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            chosen = attention.choose_kernel("auto", platform, **{**KERNEL_INPUT, **change})
            assert chosen == "xla"
    assert [record.getMessage() for record in caplog.records] == [
        f"attention runs on XLA, not {kernel}: {why}"
    ]


def test_all_misfits_are_told_together():
    everything = {"length": 7, "head_dim": 5, "dtype": "float32", "alibi": True}
    with pytest.raises(ValueError) as caught:
        attention.choose_kernel("cudnn", "gpu", **everything)
    assert str(caught.value).count(";") == 3


def test_attend_refuses_a_kernel_that_does_not_fit_its_input():
    q, k, v = heads(1, 6, 2, 2, 4)
    for kernel, segments in itertools.product(("cudnn", "splash"), (None, jnp.ones((1, 6)))):
        with pytest.raises(ValueError, match=f"attention kernel '{kernel}' does not fit"):
            attention.attend(
                *(q, k, v),
                positions_BT=jnp.arange(6)[None],
                segment_ids_BT=segments,
                sliding_window=None,
                alibi_slopes_N=None,
                kernel=kernel,
                query_chunk=4,
            )
