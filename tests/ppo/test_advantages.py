"""GAE, RLOO and GRPO against loops one can check by eye."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.ppo.advantages import gae, grpo_advantages, rloo_advantages
from tests.ppo.ragged import make_rollout


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


def _by_hand(rollout, *, gamma, lambda_, after_B):
    """The double sum of the definition."""
    advantages_BT = np.zeros_like(rollout.rewards_BT)
    for row, slots in rollout.places():
        deltas = []
        for t in slots:
            following = after_B[row] if t == slots[-1] else rollout.values_BT[row, t + 1]
            delta = rollout.rewards_BT[row, t] + gamma * following - rollout.values_BT[row, t]
            deltas.append(delta)
        for place, t in enumerate(slots):
            advantages_BT[row, t] = sum(
                (gamma * lambda_) ** k * delta for k, delta in enumerate(deltas[place:])
            )
    return advantages_BT


@pytest.mark.parametrize("starts", [None, (2, 5, 0, 0, 1, 4)])
@pytest.mark.parametrize("bootstrapped", [False, True])
@pytest.mark.parametrize(("gamma", "lambda_"), [(1.0, 0.95), (0.9, 1.0), (0.8, 0.0)])
def test_gae_equals_the_double_sum(starts, bootstrapped, gamma, lambda_):
    rollout = make_rollout(starts=starts).with_junk(np.nan)
    after_B = np.array([0.5, 0.0, np.nan, -1.0, 2.0, 0.0]) if bootstrapped else np.zeros(6)
    found = jax.jit(gae, static_argnames=("gamma", "lambda_"))(
        rollout.rewards_BT,
        rollout.values_BT,
        rollout.mask_BT,
        gamma=gamma,
        lambda_=lambda_,
        values_after_B=after_B if bootstrapped else None,
    )
    expected_BT = _by_hand(rollout, gamma=gamma, lambda_=lambda_, after_B=after_B)
    np.testing.assert_allclose(found.advantages_BT, expected_BT, rtol=1e-12, atol=1e-13)
    expected_BT += np.where(rollout.mask_BT, rollout.values_BT, 0)
    np.testing.assert_allclose(found.returns_BT, expected_BT, rtol=1e-12, atol=1e-13)


def test_with_lambda_1_returns_are_the_rewards_to_come_whatever_the_critic_says():
    rollout = make_rollout()
    found = gae(rollout.rewards_BT, rollout.values_BT, rollout.mask_BT, gamma=1.0, lambda_=1.0)
    for row, slots in rollout.places():
        for t in slots:
            to_come = rollout.rewards_BT[row, t : slots[-1] + 1].sum()
            assert found.returns_BT[row, t] == pytest.approx(to_come, abs=1e-12)


def test_padding_changes_no_bit_of_gae():
    rollout = make_rollout()
    arrays = [np.float32(rollout.rewards_BT), np.float32(rollout.values_BT), rollout.mask_BT]
    plain = gae(*arrays, gamma=1.0, lambda_=0.95)
    padded = gae(*(np.pad(array, ((0, 0), (3, 4))) for array in arrays), gamma=1.0, lambda_=0.95)
    assert plain.advantages_BT.dtype == jnp.float32
    np.testing.assert_array_equal(padded.advantages_BT[:, 3:-4], plain.advantages_BT)


def test_nothing_is_differentiated_through_advantages_and_returns():
    rollout = make_rollout()

    def total(values_BT):
        found = gae(rollout.rewards_BT, values_BT, rollout.mask_BT, gamma=1.0, lambda_=0.9)
        return (found.advantages_BT + found.returns_BT).sum()

    assert not jax.grad(total)(rollout.values_BT).any()
    rewards_BG = jnp.arange(6.0).reshape(2, 3)
    assert not jax.grad(lambda rewards: jnp.square(rloo_advantages(rewards)).sum())(
        rewards_BG
    ).any()


def test_rloo_leaves_each_answer_out_of_its_own_baseline():
    rewards_BG = np.random.default_rng(0).normal(size=(3, 4))
    found_BG = rloo_advantages(rewards_BG)
    for row, answer in np.ndindex(rewards_BG.shape):
        others = [rewards_BG[row, g] for g in range(4) if g != answer]
        expected = rewards_BG[row, answer] - sum(others) / 3
        assert found_BG[row, answer] == pytest.approx(expected)


@pytest.mark.parametrize("divide", [True, False])
def test_grpo_compares_with_the_mean_of_the_whole_group(divide):
    rewards_BG = np.random.default_rng(0).normal(size=(3, 4))
    found_BG = grpo_advantages(rewards_BG, divide_by_deviation=divide)
    for row, answer in np.ndindex(rewards_BG.shape):
        expected = rewards_BG[row, answer] - rewards_BG[row].mean()
        if divide:
            expected /= rewards_BG[row].std() + 1e-4
        assert found_BG[row, answer] == pytest.approx(expected)


@pytest.mark.parametrize("num_answers", range(2, 18))
def test_a_group_whose_rewards_are_equal_moves_nothing_at_all(num_answers):
    draw = np.random.default_rng(num_answers)
    sizes = 10.0 ** np.linspace(-30, 38, 69)
    rewards_B = np.concatenate([sizes, -sizes, 100 * draw.normal(size=200), [0.0]])
    rewards_BG = np.repeat(rewards_B.astype(np.float32)[:, None], num_answers, axis=1)
    for advantages in (
        rloo_advantages,
        functools.partial(grpo_advantages, divide_by_deviation=True),
        functools.partial(grpo_advantages, divide_by_deviation=False),
    ):
        found_BG = jax.jit(advantages)(rewards_BG)
        assert found_BG.dtype == jnp.float32
        np.testing.assert_array_equal(found_BG, 0)


def test_the_deviation_makes_as_much_of_a_rubrics_noise_as_of_a_difference():
    rewards_BG = jnp.array([[0.4, 0.6, 0.4, 0.6], [0.49, 0.51, 0.49, 0.51]])  # As tunix#953.
    divided_BG = grpo_advantages(rewards_BG, divide_by_deviation=True)
    np.testing.assert_allclose(divided_BG[1], divided_BG[0], rtol=0.02)
    plain_BG = grpo_advantages(rewards_BG, divide_by_deviation=False)
    np.testing.assert_allclose(plain_BG[1], plain_BG[0] / 10, rtol=1e-5)


def test_a_reward_far_from_the_others_leaves_them_their_digits():
    rewards_BG = np.float32([[1000.0, 0.5, 0.25, 0.125], [-1000.0, 3.0, 3.5, 2.0]])
    exact_BG = np.float64(rewards_BG)
    found_BG = grpo_advantages(rewards_BG, divide_by_deviation=False)
    exact_BG -= exact_BG.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(found_BG, exact_BG, rtol=2e-7)


def test_a_group_of_one_is_refused():
    rewards_BG = jnp.zeros((4, 1))
    with pytest.raises(ValueError, match="1 answer to a prompt must be at least 2"):
        rloo_advantages(rewards_BG)
    with pytest.raises(ValueError, match="1 answer to a prompt must be at least 2"):
        grpo_advantages(rewards_BG, divide_by_deviation=False)
