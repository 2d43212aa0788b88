"""The schedule's closed form, the bound on the norm, and what weight decay leaves alone."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from huatuo_jax.backbone.config import ComputeConfig, preset
from huatuo_jax.backbone.transformer import abstract_params
from huatuo_jax.core.sharding import path_name
from huatuo_jax.training.optimizer import (
    OptimizerConfig,
    clip_by_norm,
    is_decayed,
    learning_rate,
    make_optimizer,
)


def _rates(num_steps, **fields):
    cfg = OptimizerConfig(learning_rate=2.0, **fields)
    return [float(learning_rate(update, cfg, num_steps)) for update in range(num_steps + 2)]


def test_a_cosine_after_a_warm_up_has_its_closed_form():
    expected = [0.5, 1.0, 1.5, 2.0]
    for update in range(4, 12):
        share = min((update - 4) / 6, 1)
        expected.append(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2))
    np.testing.assert_allclose(_rates(10, warmup_steps=4, final_share=0.1), expected, rtol=1e-6)


def test_a_line_after_a_warm_up_by_share_has_its_closed_form():
    expected = [1.0, 2.0] + [2.0 * (8 - step) / 8 for step in range(9)] + [0.0]
    np.testing.assert_allclose(
        _rates(10, decay="linear", warmup_share=0.2), expected, rtol=1e-6, atol=1e-7
    )


def test_a_constant_rate_without_a_warm_up_is_constant():
    assert _rates(3, decay="constant") == [2.0] * 5


def test_a_share_of_updates_is_rounded_up():
    assert OptimizerConfig(learning_rate=1.0, warmup_share=0.05).num_warmup_steps(101) == 6


def test_weight_decay_leaves_norms_and_biases_alone():
    for name in ("bloom_560m", "qwen2_0.5b", "qwen3_0.6b"):
        params = abstract_params(preset(name), ComputeConfig())
        decided = jax.tree_util.tree_leaves_with_path(is_decayed(params))
        for path, decayed in decided:
            last = path_name(path).split("/")[-1]
            assert decayed == (last in ("kernel", "table")), path_name(path)
        assert {decayed for _, decayed in decided} == {True, False}


def test_decayed_weights_shrink_and_others_stay_when_gradients_are_zero():
    params = {"kernel": jnp.ones(3), "bias": jnp.ones(3), "norm": {"scale": jnp.ones(3)}}
    cfg = OptimizerConfig(learning_rate=0.5, decay="constant", weight_decay=0.1)
    transformation = make_optimizer(cfg, num_steps=4).transformation
    changes, _ = transformation.update(
        jax.tree.map(jnp.zeros_like, params), transformation.init(params), params
    )
    after = optax.apply_updates(params, changes)
    np.testing.assert_allclose(after["kernel"], 1 - 0.5 * 0.1, rtol=1e-6)
    np.testing.assert_array_equal(after["bias"], 1.0)
    np.testing.assert_array_equal(after["norm"]["scale"], 1.0)


def test_steps_are_those_of_optax_and_one_that_is_not_applied_changes_nothing():
    cfg = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, weight_decay=0.1, beta2=0.99)
    ours = make_optimizer(cfg, num_steps=9)
    theirs = optax.adamw(
        ours.learning_rate, b1=0.9, b2=0.99, eps=cfg.epsilon, weight_decay=0.1, mask=is_decayed
    )
    draw = np.random.default_rng(0)
    params = {
        "kernel": jnp.asarray(draw.normal(size=(4, 3)), jnp.float32),
        "bias": jnp.asarray(draw.normal(size=3), jnp.float32),
    }
    step = jax.jit(ours.step)
    found, expected = (params, ours.transformation.init(params)), (params, theirs.init(params))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for number in range(9):
        gradients = jax.tree.map(lambda p: jnp.asarray(draw.normal(size=p.shape), p.dtype), params)
        if number in (0, 4):  # Also the first, before there is any moment.
            gradients["bias"] = gradients["bias"].at[1].set(jnp.nan)
            before = found
            found = step(gradients, found[1], found[0], applied=False)
            jax.tree.map(np.testing.assert_array_equal, found, before)
            continue
        found = step(gradients, found[1], found[0], applied=True)
        changes, state = theirs.update(gradients, expected[1], expected[0])
        expected = optax.apply_updates(expected[0], changes), state
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), found, expected
        )


def test_a_step_on_a_cpu_holds_no_copy_of_the_moments():
    params = {"kernel": jnp.ones(2**20)}
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1), num_steps=4)

    def update(params, opt_state, inputs):
        gradients = {"kernel": params["kernel"] * inputs}
        clipped = clip_by_norm(gradients, optax.tree.norm(gradients), 1.0)
        return optimizer.step(clipped, opt_state, params, applied=jnp.isfinite(inputs[0]))

    compiled = (
        jax.jit(update, donate_argnums=(0, 1))
        .lower(params, optimizer.transformation.init(params), jnp.ones(2**20))
        .compile()
    )
    # That of the gradient, which the norm is taken of before.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * 4 * 2**20


def test_clipping_scales_long_gradients_and_leaves_short_ones_bit_for_bit():
    gradients = {"a": jnp.asarray([3.0, 0.0]), "b": jnp.asarray([[4.0]])}
    clipped = clip_by_norm(gradients, optax.tree.norm(gradients), 2.0)
    np.testing.assert_allclose(clipped["a"], [1.2, 0.0], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [[1.6]], rtol=1e-6)
    for bound in (5.0, 7.3, None):
        kept = clip_by_norm(gradients, optax.tree.norm(gradients), bound)
        np.testing.assert_array_equal(kept["a"], gradients["a"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"decay": "exponential"}, "decay='exponential' must be one of"),
        ({"beta2": 1.0}, "beta2=1.0 must be at least 0 and below 1"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0 must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be 0 or more"),
        ({"warmup_share": 0.1, "warmup_steps": 3}, "warmup_steps=3 must be None where"),
        ({"warmup_share": 1.1}, "warmup_share=1.1 must be between 0 and 1"),
        ({"final_share": 2.0}, "final_share=2.0 must be between 0 and 1"),
    ],
)
def test_a_setting_that_cannot_be_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(OptimizerConfig(learning_rate=1.0), **fields)


def test_a_warm_up_longer_than_the_run_is_refused():
    cfg = OptimizerConfig(learning_rate=1.0, warmup_steps=11)
    with pytest.raises(ValueError, match="warmup_steps=11 must be at most the 10 updates"):
        make_optimizer(cfg, num_steps=10)
