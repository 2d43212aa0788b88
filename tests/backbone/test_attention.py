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
from huatuo_jax.backbone.blockwise_attention import Trees, first_visible
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
    return attention.attend(
        q_BTNH,
        k_BTKH,
        v_BTKH,
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


@pytest.mark.parametrize("length", [40, 400])
def test_the_program_is_as_small_for_long_rows_as_for_short_ones(length):
    q, k, v = heads(1, length, 2, 2, 4)
    attend = functools.partial(attend_on_xla, segments_BT=None, window=None, query_chunk=3)
    products = str(jax.make_jaxpr(attend)(q, k, v)).count("dot_general")
    assert products == 2


def test_rows_of_many_blocks_equal_a_plain_loop():
    q, k, v = heads(1, 40, 2, 2, 4)
    attend = functools.partial(attend_on_xla, segments_BT=None, window=None, query_chunk=1)
    expected = attend_by_loop(q, k, v, np.zeros((1, 40)), None, None)
    np.testing.assert_allclose(jax.jit(attend)(q, k, v), expected, atol=2e-6)


def packed(*rows: tuple[int, ...]) -> jnp.ndarray:
    """Segment ids of rows, from each row's segment lengths; negative ones are padding."""
    return jnp.asarray(
        [
            np.repeat([0 if size < 0 else i + 1 for i, size in enumerate(row)], np.abs(row))
            for row in rows
        ],
        jnp.int32,
    )


PACKED = packed((-3, 20, 9, 1, 17), (50,), (8, 8, 8, 8, 18), (30, -20))


def weighted_output(attend, segments_BT, weights_BTNH, *arrays):
    output_BTNH = attend(*arrays, segments_BT)
    return jnp.sum(output_BTNH * weights_BTNH), output_BTNH


def output_and_gradients(attend, arrays, segments_BT):
    """Output and the gradients of its weighted sum; padding has neither."""
    weights_BTNH = np.random.default_rng(1).normal(size=arrays[0].shape).astype(np.float32)
    if segments_BT is not None:
        weights_BTNH *= np.asarray(segments_BT > 0)[:, :, None, None]
    loss = functools.partial(weighted_output, attend, segments_BT, weights_BTNH)
    value_and_grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, output_BTNH), gradients = jax.jit(value_and_grad)(*arrays)
    return output_BTNH * (weights_BTNH != 0), *gradients


def attend_densely(q_BTNH, k_BTKH, v_BTKH, segments_BT, *, window, slopes_N):
    """Scores of all pairs, differentiated by jax."""
    groups, length = q_BTNH.shape[2] // k_BTKH.shape[2], q_BTNH.shape[1]
    k_BTNH, v_BTNH = (jnp.repeat(x, groups, axis=2) for x in (k_BTKH, v_BTKH))
    scores_BNTS = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH) / np.sqrt(q_BTNH.shape[3])
    distance_TS = np.arange(length)[:, None] - np.arange(length)[None]
    if slopes_N is not None:
        scores_BNTS -= slopes_N[None, :, None, None] * distance_TS[None, None]
    seen_TS = (distance_TS >= 0) & (distance_TS < (window or length))
    seen_BTS = (segments_BT[:, :, None] == segments_BT[:, None]) & seen_TS[None]
    weights_BNTS = jax.nn.softmax(jnp.where(seen_BTS[:, None], scores_BNTS, -1e30))
    return jnp.einsum("bnts,bsnh->btnh", weights_BNTS, v_BTNH)


@pytest.mark.parametrize(
    ("query_chunk", "num_kv_heads", "window", "alibi"),
    [(8, 4, None, False), (16, 2, 11, False), (7, 1, None, True), (256, 2, 5, True)],
)
def test_packed_rows_have_the_gradients_of_dense_attention(
    query_chunk, num_kv_heads, window, alibi
):
    arrays = heads(4, 50, 4, num_kv_heads, 8)
    settings = {"window": window, "slopes_N": positions.alibi_slopes(4) if alibi else None}
    blocks = functools.partial(attend_on_xla, query_chunk=query_chunk, **settings)
    found = output_and_gradients(blocks, arrays, PACKED)
    expected = output_and_gradients(functools.partial(attend_densely, **settings), arrays, PACKED)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("window", [None, 8])
def test_blocks_that_no_query_sees_are_never_computed(window):
    """A number that is not one spreads through every product and every sum that it enters."""
    segments_BT = packed((8, 24, 8), (16, 16, 8), (32, -8))
    arrays = heads(3, 40, 4, 2, 8)
    attend = functools.partial(attend_on_xla, window=window, query_chunk=8)
    clean = output_and_gradients(attend, arrays, segments_BT)
    poisoned_BT = np.zeros((3, 40), bool)
    # Each row alone: what is poisoned in one is in the middle of a segment of another.
    poisoned_BT[0, 8:32] = poisoned_BT[1, :16] = poisoned_BT[1:, 32:] = True
    poisoned = [np.where(poisoned_BT[:, :, None, None], np.nan, x) for x in arrays]
    found = output_and_gradients(attend, poisoned, segments_BT)
    for one, other in zip(found, clean, strict=True):
        np.testing.assert_array_equal(one[~poisoned_BT], other[~poisoned_BT])


@pytest.mark.parametrize("batch", [4, 3])  # Three rows do not divide among four devices.
def test_xla_on_a_mesh_equals_one_device(batch):
    arrays, segments_BT = heads(batch, 50, 4, 2, 8), PACKED[:batch]
    attend = functools.partial(attend_on_xla, window=None, query_chunk=8)
    slopes_N = positions.alibi_slopes(4)
    expected = output_and_gradients(
        functools.partial(attend, slopes_N=slopes_N), arrays, segments_BT
    )
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        found = output_and_gradients(
            functools.partial(attend, slopes_N=slopes_N), arrays, segments_BT
        )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_a_token_sees_from_its_segments_start_to_itself_and_padding_only_itself():
    segments_BT = packed((-2, 3, 4, -1))
    found = first_visible(1, 10, segments_BT, None)
    np.testing.assert_array_equal(found, [[0, 1, 2, 2, 2, 5, 5, 5, 5, 9]])
    found = first_visible(1, 10, segments_BT, 3)
    np.testing.assert_array_equal(found, [[0, 1, 2, 2, 2, 5, 5, 5, 6, 9]])
    np.testing.assert_array_equal(first_visible(1, 4, None, 2), [[0, 0, 1, 2]])


def test_rows_without_segments_are_one_segment():
    q, k, v = heads(2, 7, 2, 2, 4)
    found = attention.attend(
        *(q, k, v),
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
    return branches, Trees(jnp.asarray(positions_BT), jnp.asarray(ends_BT))


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("alibi", [False, True])
def test_a_token_of_a_tree_sees_its_own_branch_as_if_it_were_alone(window, alibi):
    q, k, v = heads(1, 13, 4, 2, 8)
    slopes_N = positions.alibi_slopes(4) if alibi else None
    branches, rows_of_trees = trees()
    found = attention.attend(
        *(q, k, v),
        segment_ids_BT=None,
        sliding_window=window,
        alibi_slopes_N=None if slopes_N is None else jnp.asarray(slopes_N),
        kernel="xla",
        query_chunk=4,
        trees=rows_of_trees,
    )
    for token, branch in enumerate(branches):
        alone = [array[:, branch] for array in (q, k, v)]
        expected = attend_by_loop(*alone, np.ones((1, len(branch))), window, slopes_N)
        np.testing.assert_allclose(found[0, token], expected[0, -1], atol=2e-6)
    if not alibi:
        visible = attention.visible_tokens(None, window, rows_of_trees)
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
    visible = fused_attention.visible_tokens(segments_BT, window)
    found = jax.nn.dot_product_attention(q, k, v, implementation="xla", **visible)
    expected = jax.jit(functools.partial(attend_on_xla, window=window))(q, k, v, segments_BT)
    assert_equal_at_tokens(found, expected, segments_BT, atol=2e-6)


def assert_splash_agrees(arrays, segments_BT, *, window):
    xla = functools.partial(attend_on_xla, window=window)
    splash = functools.partial(fused_attention.splash, sliding_window=window, interpret=True)
    expected = output_and_gradients(xla, arrays, segments_BT)
    found = output_and_gradients(splash, arrays, segments_BT)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


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
                segment_ids_BT=segments,
                sliding_window=None,
                alibi_slopes_N=None,
                kernel=kernel,
                query_chunk=4,
            )
