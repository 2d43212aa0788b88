"""Cross-entropy in chunks against the plain computation over all logits at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import Transformer, init_params
from huatuo_jax.core import sharding
from huatuo_jax.training.losses import (
    next_tokens,
    score_tokens,
    sum_log_probs,
    sums_by_kind,
    token_scores,
)
from tests.training.tiny import TINY

HEADS = {
    "untied": TINY,
    "tied": dataclasses.replace(TINY, tie_embeddings=True),
    "norm_head": dataclasses.replace(TINY, norm_head=True, family="baichuan2"),
}


def _inputs(cfg, *, rows=3, length=11, seed=0):
    key = jax.random.key(seed)
    params = init_params(key, cfg, ComputeConfig())
    hidden_BTD = jax.random.normal(key, (rows, length, cfg.hidden_size))
    draw = np.random.default_rng(seed)
    targets_BT = jnp.asarray(draw.integers(0, cfg.vocab_size, (rows, length)))
    wanted_BT = jnp.asarray(draw.random((rows, length)) < 0.4)
    return params, hidden_BTD, targets_BT, wanted_BT


def _plain_log_probs(params, hidden_BTD, targets_BT, wanted_BT, cfg, temperature):
    logits_BTV = Transformer(cfg).apply({"params": params}, hidden_BTD, method="logits")
    log_probs_BTV = jax.nn.log_softmax(logits_BTV / temperature, axis=-1)
    picked_BT = jnp.take_along_axis(log_probs_BTV, targets_BT[:, :, None], axis=-1)[..., 0]
    return jnp.where(wanted_BT, picked_BT, 0.0), logits_BTV.argmax(axis=-1)


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def _given(logits_BTV, _):
    return logits_BTV


def _chunked(params, hidden_BTD, targets_BT, wanted_BT, cfg, temperature, chunk):
    model = Transformer(cfg)
    return token_scores(
        functools.partial(model.apply, {}, method="logits"),
        model.apply({"params": params}, method="head"),
        *(hidden_BTD, targets_BT, wanted_BT),
        temperature=temperature,
        chunk=chunk,
    )


@pytest.mark.parametrize(
    ("head", "chunk", "temperature"),
    [("untied", 4, 1.0), ("untied", 64, 0.7), ("tied", 1, 0.7), ("norm_head", 11, 1.3)],
)
def test_chunked_scores_equal_the_plain_computation(head, chunk, temperature):
    cfg = HEADS[head]
    inputs = _inputs(cfg)
    expected, best = _plain_log_probs(*inputs, cfg, temperature)
    chunked = functools.partial(_chunked, cfg=cfg, temperature=temperature, chunk=chunk)
    scores = jax.jit(chunked)(*inputs)
    np.testing.assert_allclose(scores.log_probs_BT, expected, rtol=1e-5, atol=1e-6)
    _, _, targets_BT, wanted_BT = inputs
    np.testing.assert_array_equal(scores.correct_BT, (best == targets_BT) & wanted_BT)
    assert scores.log_probs_BT.dtype == jnp.float32


@pytest.mark.parametrize("head", HEADS)
def test_gradients_of_chunks_equal_those_of_the_plain_computation(head):
    cfg = HEADS[head]
    params, hidden_BTD, targets_BT, wanted_BT = _inputs(cfg)
    weights_BT = jax.random.normal(jax.random.key(5), wanted_BT.shape)

    def plain(params, hidden_BTD):
        log_probs, _ = _plain_log_probs(params, hidden_BTD, targets_BT, wanted_BT, cfg, 0.9)
        return (weights_BT * log_probs).sum()

    def chunked(params, hidden_BTD):
        scores = _chunked(params, hidden_BTD, targets_BT, wanted_BT, cfg, 0.9, 3)
        return (weights_BT * scores.log_probs_BT).sum()

    expected = jax.jit(jax.grad(plain, argnums=(0, 1)))(params, hidden_BTD)
    found = jax.jit(jax.grad(chunked, argnums=(0, 1)))(params, hidden_BTD)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected
    )


def _rows(cfg, *, rows=3, length=11):
    draw = np.random.default_rng(0)
    return {
        "token_ids": jnp.asarray(draw.integers(0, cfg.vocab_size, (rows, length))),
        "segment_ids": jnp.ones((rows, length), jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(length), (rows, length)),
    }, jnp.asarray(draw.random((rows, length)) < 0.4).at[:, 0].set(False)


@pytest.mark.parametrize("head", HEADS)
def test_a_sum_has_the_value_and_gradient_of_the_scores_it_is_of(head):
    cfg = HEADS[head]
    variables = {"params": init_params(jax.random.key(0), cfg, ComputeConfig())}
    batch, mask_BT = _rows(cfg)
    model = Transformer(cfg)

    def of_scores(variables):
        scores = score_tokens(model, variables, batch, mask_BT, chunk=3)
        return -0.7 * scores.log_probs_BT.sum(), scores

    def of_sum(variables):
        total, scores = sum_log_probs(model, variables, batch, mask_BT, chunk=3)
        return -0.7 * total, scores

    expected, gradient = jax.jit(jax.value_and_grad(of_scores, has_aux=True))(variables)
    found, of_found = jax.jit(jax.value_and_grad(of_sum, has_aux=True))(variables)
    # The same but for the last bits, as the program without a gradient may be fused otherwise.
    to_last_bits = functools.partial(np.testing.assert_allclose, rtol=2.5e-7, atol=0)
    jax.tree.map(to_last_bits, jax.jit(of_sum)(variables), found)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found[0], expected[0])
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), of_found, gradient
    )


@pytest.mark.parametrize(("frozen", "products"), [((), 3), (("lm_head",), 2)])
def test_a_sum_makes_no_logits_again_and_no_gradient_of_a_frozen_head(frozen, products):
    params = init_params(jax.random.key(0), TINY, ComputeConfig())
    batch, mask_BT = _rows(TINY)
    trained = {name: part for name, part in params.items() if name not in frozen}

    def total(trained):
        return sum_log_probs(Transformer(TINY), {"params": params | trained}, batch, mask_BT)[0]

    def is_product_of_logits(equation):
        shapes = [one.aval.shape for one in (*equation.invars, *equation.outvars)]
        is_product = equation.primitive.name == "dot_general"
        return is_product and any(TINY.padded_vocab_size in shape for shape in shapes)

    jaxpr = jax.make_jaxpr(jax.grad(total))(trained).jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    assert sum(map(is_product_of_logits, _equations(used))) == products


def test_scores_are_float64_where_the_logits_are():
    with jax.enable_x64(True):
        logits_BTV = jax.random.normal(jax.random.key(0), (2, 5, 7), jnp.float64)
        targets_BT = jnp.asarray([[0, 1, 2, 3, 4], [6, 5, 4, 3, 2]])
        wanted_BT = jnp.ones((2, 5), bool)
        score = jax.jit(functools.partial(token_scores, _given, None, chunk=2))
        scores = score(logits_BTV, targets_BT, wanted_BT)
        expected = jax.nn.log_softmax(logits_BTV, axis=-1)
        picked = jnp.take_along_axis(expected, targets_BT[:, :, None], axis=-1)[..., 0]
        assert scores.log_probs_BT.dtype == jnp.float64
        np.testing.assert_allclose(scores.log_probs_BT, picked, rtol=1e-13)


def test_logits_as_large_as_thousands_neither_overflow_nor_vanish():
    logits_BTV = jnp.asarray([[[5000.0, 0.0, -5000.0]]])
    wanted_BT = jnp.ones((1, 1), bool)
    for target, expected in ((0, 0.0), (1, -5000.0), (2, -10_000.0)):
        targets_BT = jnp.full((1, 1), target)
        scores = token_scores(_given, None, logits_BTV, targets_BT, wanted_BT)
        assert float(scores.log_probs_BT[0, 0]) == expected


def test_chunks_without_a_wanted_position_are_not_computed():
    """The skipped branch is what makes prompts free, so a NaN there must not be seen."""
    hidden_BTD = jnp.zeros((2, 8, 4)).at[:, 4:].set(jnp.nan)
    wanted_BT = jnp.zeros((2, 8), bool).at[:, :4].set(True)
    targets_BT = jnp.zeros((2, 8), jnp.int32)

    def total(hidden_BTD):
        scores = token_scores(_given, None, hidden_BTD, targets_BT, wanted_BT, chunk=4)
        return scores.log_probs_BT.sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(hidden_BTD)
    np.testing.assert_allclose(value, -8 * np.log(4), rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_the_whole_logits_never_stand_in_memory():
    """The largest array of the compiled gradient is one chunk's logits, not the batch's."""
    rows, length, width, vocabulary, chunk = 4, 256, 16, 4096, 32
    kernel_DV = jnp.ones((width, vocabulary))
    wanted_BT = jnp.ones((rows, length), bool)
    targets_BT = jnp.zeros((rows, length), jnp.int32)

    def total(kernel_DV, hidden_BTD):
        scores = token_scores(jnp.matmul, kernel_DV, hidden_BTD, targets_BT, wanted_BT, chunk=chunk)
        return scores.log_probs_BT.sum()

    hidden_BTD = jnp.ones((rows, length, width))
    compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(kernel_DV, hidden_BTD).compile()
    whole = rows * length * vocabulary * 4
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 2


def test_the_gradient_of_scores_keeps_neither_logits_nor_a_copy_of_the_head():
    """A chunk that may be left out returns what it keeps, or zeros in its place."""
    rows, length, width, vocabulary = 2, 12, 8, 64
    wanted_BT = jnp.ones((rows, length), bool)

    def total(kernel_DV, hidden_BTD):
        return jnp.sin(_scores_of(hidden_BTD, kernel_DV, wanted_BT, 4).log_probs_BT).sum()

    gradient = jax.grad(total, argnums=(0, 1))
    traced = jax.make_jaxpr(gradient)(
        jnp.ones((width, vocabulary)), jnp.ones((rows, length, width))
    )
    conditions = [one for one in _equations(traced.jaxpr) if one.primitive.name == "cond"]
    shapes = [out.aval.shape for one in conditions for out in one.outvars]
    # The sum of the head's gradients.
    assert [shape for shape in shapes if vocabulary in shape] == [(width, vocabulary)]
    assert len(conditions) == 2


def _scores_of(hidden_BTD, kernel_DV, wanted_BT, chunk):
    targets_BT = jnp.zeros(wanted_BT.shape, int)
    return token_scores(jnp.matmul, kernel_DV, hidden_BTD, targets_BT, wanted_BT, chunk=chunk)


def _sum_of_scores(hidden_BTD, kernel_DV, wanted_BT, chunk):
    return _scores_of(hidden_BTD, kernel_DV, wanted_BT, chunk).log_probs_BT.sum()


@pytest.mark.parametrize(
    ("rows", "length", "shards", "chunk"),
    [(32, 128, 1, 32), (32, 128, 4, 128), (4, 512, 1, 128), (3, 1024, 1, 128), (512, 16, 1, 8)],
)
def test_of_many_short_rows_a_device_holds_the_logits_of_few_positions(rows, length, shards, chunk):
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((rows, length, 4), jnp.float32),
            ((4, 999), jnp.float32),
            ((rows, length), jnp.bool_),
        )
    ]
    mesh = sharding.make_mesh(fsdp=shards, devices=jax.devices()[:shards])
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(functools.partial(_sum_of_scores, chunk=128))(*shapes)

    products = [one for one in _equations(jaxpr.jaxpr) if one.primitive.name == "dot_general"]
    assert {one.outvars[0].aval.shape for one in products} == {(rows, chunk, 999)}


def test_of_many_short_rows_no_logits_of_unwanted_positions_are_computed():
    """The NaN of those positions would be seen in chunks of 128, which hold them too."""
    wanted_BT = jnp.broadcast_to(jnp.arange(128) % 2 == 0, (32, 128))
    wanted_BTD = jnp.broadcast_to(wanted_BT[:, :, None], (32, 128, 4))
    hidden_BTD = jnp.where(wanted_BTD, 1.0, jnp.nan)
    kernel_DV = jnp.ones((4, 9))
    differentiate = jax.jit(jax.value_and_grad(_sum_of_scores, argnums=(0, 1)), static_argnums=3)
    value, gradients = differentiate(hidden_BTD, kernel_DV, wanted_BT, 128)
    np.testing.assert_allclose(value, -32 * 64 * np.log(9), rtol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in gradients)


@pytest.mark.parametrize("head", ["untied", "tied"])
def test_a_vocabulary_split_over_the_tensor_axis_scores_the_same(head):
    cfg = HEADS[head]
    inputs = _inputs(cfg, rows=4)
    params, hidden_BTD, targets_BT, wanted_BT = inputs

    def total(params, hidden_BTD, targets_BT, wanted_BT):
        scores = _chunked(params, hidden_BTD, targets_BT, wanted_BT, cfg, 1.0, 4)
        return scores.log_probs_BT.sum(), scores.log_probs_BT

    differentiate = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    expected = differentiate(*inputs)
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.parameter_shardings(params, mesh))
        rows = jax.device_put((hidden_BTD, targets_BT, wanted_BT), sharding.batch_sharding(mesh))
        found = differentiate(params, *rows)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=5e-6), found, expected
    )


def test_next_tokens_moves_each_token_to_the_position_that_predicts_it():
    ids_BT = jnp.asarray([[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(next_tokens(ids_BT), [[2, 3, 0], [5, 6, 0]])
    mask_BT = jnp.asarray([[False, True, True]])
    np.testing.assert_array_equal(next_tokens(mask_BT), [[True, True, False]])


def test_sums_by_kind_equal_a_loop():
    values_BT = np.asarray([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], np.float32)
    kind_ids_BT = np.asarray([[0, 2, 2], [1, 0, 7]])
    sums_K = sums_by_kind(jnp.asarray(values_BT), jnp.asarray(kind_ids_BT), 3)
    np.testing.assert_array_equal(sums_K, [17.0, 8.0, 6.0])


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="temperature=0"):
        token_scores(
            *(_given, None),
            jnp.ones((1, 1, 2)),
            jnp.zeros((1, 1), int),
            jnp.ones((1, 1), bool),
            temperature=0,
        )
