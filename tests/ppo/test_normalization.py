"""Masked moments put together from parts, and whitening by them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.ppo.advantages import combine, moments, no_moments, whiten
from tests.ppo.ragged import make_rollout


def test_moments_of_parts_combine_to_those_of_the_whole():
    with jax.enable_x64(True):
        rollout = make_rollout().with_junk(np.nan)
        parts = [slice(0, 1), slice(1, 3), slice(3, 6)]
        found = functools.reduce(
            combine,
            [moments(rollout.values_BT[part], rollout.mask_BT[part]) for part in parts],
            no_moments(jnp.float64),
        )
        variance = found.variance
    inside = rollout.values_BT[rollout.mask_BT]
    assert int(found.count) == len(inside) == 16
    assert float(found.mean) == pytest.approx(inside.mean(), rel=1e-12)
    assert float(variance) == pytest.approx(inside.var(), rel=1e-12)


def test_running_statistics_keep_a_variance_that_is_small_beside_the_mean():
    draw = np.random.default_rng(0)
    values_nB = (1000 + 0.1 * draw.normal(size=(50, 64))).astype(np.float32)
    running = no_moments()
    for values_B in values_nB:
        running = combine(running, moments(values_B, jnp.ones(64, bool)))
    assert running.mean.dtype == jnp.float32
    assert running.variance == pytest.approx(values_nB.astype(np.float64).var(), rel=1e-2)


def test_nothing_seen_changes_nothing():
    seen = moments(jnp.array([[1.0, 2.0]]), jnp.ones((1, 2), bool))
    unseen = moments(jnp.array([[jnp.nan]]), jnp.zeros((1, 1), bool))
    for both in (combine(seen, unseen), combine(unseen, seen), combine(no_moments(), seen)):
        assert (both.count, both.mean, both.squares) == (2.0, 1.5, 0.5)
    assert unseen.variance == 0


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_is_over_the_tokens_of_the_whole_batch(shift_mean):
    with jax.enable_x64(True):
        rollout = make_rollout().with_junk(np.nan)
        statistics = moments(rollout.values_BT, rollout.mask_BT)
        found_BT = np.asarray(
            whiten(rollout.values_BT, rollout.mask_BT, statistics, shift_mean=shift_mean)
        )
    inside = rollout.values_BT[rollout.mask_BT]
    shifted = inside - inside.mean() if shift_mean else inside
    expected = shifted / np.sqrt(inside.var() + 1e-8)
    np.testing.assert_allclose(found_BT[rollout.mask_BT], expected, rtol=1e-12)
    np.testing.assert_array_equal(found_BT[~rollout.mask_BT], 0)


@pytest.mark.parametrize("value", [0.7, -1.0, 0.0, 100.3, -3e-20, 7e30])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_numbers_that_are_all_equal_gives_zeros(value, shift_mean):
    for shape in ((1, 1), (2, 3), (7, 11), (64, 129)):
        values_BT = jnp.full(shape, value, jnp.float32)
        mask_BT = jnp.arange(values_BT.size).reshape(shape) % 5 != 3
        found = jax.jit(moments)(values_BT, mask_BT)
        assert found.mean == jnp.float32(value) and found.variance == 0
        whitened_BT = jax.jit(functools.partial(whiten, shift_mean=shift_mean))(
            values_BT, mask_BT, found
        )
        np.testing.assert_array_equal(whitened_BT, 0)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_keeps_a_number_that_is_none(shift_mean):
    values_BT, mask_BT = jnp.array([[1.0, jnp.nan, 1.0]]), jnp.ones((1, 3), bool)
    found_BT = whiten(values_BT, mask_BT, moments(values_BT, mask_BT), shift_mean=shift_mean)
    assert np.isnan(found_BT).all()


def test_whitening_does_not_enlarge_the_rounding_of_a_large_mean():
    values_BT = jnp.array([[1e4, 1e4, np.nextafter(np.float32(1e4), np.float32(2e4))]])
    mask_BT = jnp.ones((1, 3), bool)
    for shift_mean in (True, False):
        statistics = moments(values_BT, mask_BT)
        found_BT = whiten(values_BT, mask_BT, statistics, shift_mean=shift_mean)
        np.testing.assert_array_equal(found_BT, 0)


def test_whitening_rewards_keeps_their_signs_and_their_zeros():
    values_BT = jnp.array([[0.0, 0.0, -1.0], [0.0, 0.5, 3.0]])
    mask_BT = jnp.ones((2, 3), bool)
    found_BT = whiten(values_BT, mask_BT, moments(values_BT, mask_BT), shift_mean=False)
    np.testing.assert_array_equal(np.sign(found_BT), np.sign(values_BT))
    assert np.var(found_BT) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("value", [0.1, -3.3, 1e-25, 1e25])
def test_running_statistics_of_equal_numbers_have_no_variance(value):
    running = no_moments()
    for size in (3, 7, 1, 12, 5):
        values_B = jnp.full(size, value, jnp.float32)
        running = combine(running, moments(values_B, jnp.ones(size, bool)))
    assert (running.mean, running.count) == (jnp.float32(value), 28)
    assert running.standard_deviation == 0


def test_a_number_far_from_the_others_leaves_mean_and_variance_their_digits():
    draw = np.random.default_rng(1)
    values_N = draw.normal(size=20_000).astype(np.float32)
    values_N[77] = 1e4
    found = moments(jnp.asarray(values_N), jnp.ones(20_000, bool))
    exact_N = values_N.astype(np.float64)
    assert float(found.mean) == pytest.approx(exact_N.mean(), rel=1e-5)
    assert float(found.variance) == pytest.approx(exact_N.var(), rel=1e-5)
