"""Estimates of KL against its closed form, its losses against loops, and the controller."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.ppo import rewards
from tests.ppo.ragged import make_rollout


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


def test_k1_and_k3_are_the_divergence_in_expectation():
    draw = np.random.default_rng(0)
    policy, reference = (np.log(draw.dirichlet(np.ones(6))) for _ in range(2))
    divergence = (np.exp(policy) * (policy - reference)).sum()
    ratios_BT = rewards.log_ratios(policy[None], reference[None], jnp.ones((1, 6), bool))
    for estimate_BT in (ratios_BT, rewards.k3(ratios_BT)):
        assert (np.exp(policy) * estimate_BT[0]).sum() == pytest.approx(divergence)
    assert (rewards.k3(ratios_BT) >= 0).all() and (ratios_BT < 0).any()


def test_k3_keeps_its_digits_near_the_reference():
    with jax.enable_x64(False):
        found = rewards.k3(jnp.array([1e-3, -1e-3], jnp.float32))
    np.testing.assert_allclose(found, [0.5e-6, 0.5e-6], rtol=1e-3)


@pytest.mark.parametrize("kind", ["sequence_square", "k3"])
def test_losses_of_the_penalty_equal_a_loop(kind):
    rollout = make_rollout().with_junk(np.nan)
    found_B = rewards.kl_losses(
        rollout.log_probs_BT, rollout.reference_BT, rollout.mask_BT, kind=kind
    )
    for row, slots in rollout.places():
        ratios = [rollout.log_probs_BT[row, t] - rollout.reference_BT[row, t] for t in slots]
        if kind == "k3":
            expected = sum(math.exp(-ratio) - 1 + ratio for ratio in ratios)
        else:
            expected = sum(ratios) ** 2 / 2
        assert found_B[row] == pytest.approx(expected, abs=1e-12)


def test_an_unknown_loss_is_refused():
    zeros_BT, mask_BT = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    with pytest.raises(ValueError, match="kind='k1' must be 'sequence_square' or 'k3'"):
        rewards.kl_losses(zeros_BT, zeros_BT, mask_BT, kind="k1")


@pytest.mark.parametrize(
    ("kl_per_sequence", "factor"),
    [(6.0, 1.0), (6.6, 1.01), (5.4, 0.99), (100.0, 1.02), (0.0, 0.98), (-3.0, 0.98)],
)
def test_the_coefficient_moves_in_proportion_to_the_error_and_never_further(
    kl_per_sequence, factor
):
    found = rewards.next_kl_coef(
        jnp.asarray(0.05), jnp.asarray(kl_per_sequence), target_kl_per_sequence=6.0
    )
    assert found == pytest.approx(0.05 * factor, rel=1e-12)


def test_a_fixed_coefficient_stays_to_the_bit():
    coefficient = jnp.asarray(0.03, jnp.float32)
    found = rewards.next_kl_coef(coefficient, jnp.asarray(50.0), target_kl_per_sequence=None)
    assert found == coefficient and found.dtype == jnp.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_kl_per_sequence": 0.0}, "target_kl_per_sequence=0.0 must be above 0"),
        ({"target_kl_per_sequence": 6.0, "gain": 0.0}, "gain=0.0 must be above 0"),
        ({"target_kl_per_sequence": 6.0, "gain": 5.0}, "gain=5.0 must be above 0 and below 5"),
    ],
)
def test_a_controller_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        rewards.next_kl_coef(jnp.asarray(0.1), jnp.asarray(1.0), **settings)
