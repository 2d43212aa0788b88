"""Masked moments put together from parts, and whitening by them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.rl.moments import combine, moments, no_moments, whiten
from tests.rl.ragged import make_rollout


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


def test_whitening_numbers_that_are_all_alike_gives_zeros():
    mask_BT = jnp.ones((2, 3), bool)
    values_BT = jnp.full((2, 3), 0.7)
    whitened_BT = whiten(values_BT, mask_BT, moments(values_BT, mask_BT))
    np.testing.assert_allclose(whitened_BT, 0, atol=1e-2)
