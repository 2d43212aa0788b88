"""Estimators without a critic, ratios of sequences and weights of the sampler, in the small world.

Rewards are mixed of two terms, and some answers have none: which ones is drawn apart from what they
say, so that the expected gradient keeps its direction and loses a known share of its length.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.ppo.advantages import (
    gae,
    group_means,
    grpo_advantages,
    have_variance,
    importance_weights,
    moments,
    reinforce_advantages,
    rloo_advantages,
    whiten,
)
from huatuo_jax.ppo.losses import policy_loss, sequence_ratios
from huatuo_jax.ppo.reward_mix import combined
from huatuo_jax.ppo.reward_terms import RewardMixConfig, RewardTerm
from huatuo_jax.training.losses import Answers, over_tokens, sum_by_answer
from tests.ppo.enumerable import ANSWERS, LONGEST, STATES, answer_arrays, make_world
from tests.ppo.test_exact_gradients import (
    SEEDS,
    _gradient_of,
    gradient_of,
    log_probs,
    mask_of,
    off_line,
    rewards_of,
)


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


def mixed_world(seed, *, beta=0.3):
    """A world whose rewards are a weighted sum of two."""
    world, logits = make_world(seed, beta=beta)
    draw = np.random.default_rng(seed + 7)
    terms = {name: draw.normal(size=len(ANSWERS)).astype(np.float32) for name in ("a", "b")}
    cfg = RewardMixConfig(
        terms=(
            RewardTerm(of="length", name="a", weight=0.5),
            RewardTerm(of="length", name="b", weight=-2.0),
        )
    )
    every = np.ones(len(ANSWERS), bool)
    found = combined(cfg, {name: (values, every) for name, values in terms.items()}, group=None)
    np.testing.assert_allclose(found.scores_N, 0.5 * terms["a"] - 2 * terms["b"], rtol=1e-5)
    return dataclasses.replace(world, rewards=np.asarray(found.scores_N, np.float64)), logits


def planted(seed, group):
    """Which places of a group have a reward, all but one; drawn once for all groups."""
    applies = np.ones(group, bool)
    applies[np.random.default_rng(seed).integers(group)] = False
    return applies


def grouped_gradient(world, logits, advantages_of, *, applies_G):
    """All groups of answers to the one prompt, each with its probability."""
    group = len(applies_G)
    rewards_BT = rewards_of(world, logits, kl_coef=world.beta)
    tuples = np.array(list(itertools.product(range(len(ANSWERS)), repeat=group)))
    index = tuples.reshape(-1)
    applies_BG = jnp.broadcast_to(jnp.asarray(applies_G), tuples.shape)
    rewarded_BT = mask_of(index) & applies_BG.reshape(-1, 1)
    # What has no reward holds junk, which must not be read.
    rewards_BT = jnp.where(rewarded_BT, rewards_BT[index], 1e6)
    advantages_BT = advantages_of(rewards_BT, rewarded_BT, applies_BG)
    weights = world.probabilities(logits)[tuples].prod(axis=1)
    return gradient_of(
        world,
        logits,
        advantages_BT,
        index=index,
        weights_B=np.repeat(weights, group) / group,
    )


def whole(estimate, rewards_BT, rewarded_BT, applies_BG):
    """An estimator of whole answers, laid on their tokens."""
    totals_BG = sum_by_answer(rewards_BT, rewarded_BT).reshape(applies_BG.shape)
    advantages_BG = estimate(totals_BG, applies_BG=applies_BG)
    return over_tokens(advantages_BG.reshape(-1), rewarded_BT)


def reinforce(rewards_BT, rewarded_BT, applies_BG, *, whitened=False):
    advantages_BT = reinforce_advantages(rewards_BT, rewarded_BT, gamma=1.0)
    if not whitened:
        return advantages_BT
    return whiten(advantages_BT, rewarded_BT, moments(advantages_BT, rewarded_BT))


def reinforce_group(rewards_BT, rewarded_BT, applies_BG):
    totals_BG = sum_by_answer(rewards_BT, rewarded_BT).reshape(applies_BG.shape)
    means_B1 = group_means(totals_BG, applies_BG=applies_BG)
    baselines_B = jnp.broadcast_to(means_B1, totals_BG.shape).reshape(-1)
    return reinforce_advantages(rewards_BT, rewarded_BT, gamma=1.0, baselines_B=baselines_B)


DR_GRPO = functools.partial(grpo_advantages, divide_by_deviation=False)

# Estimator, and the length of its gradient where all (or 2 of 3) answers have a reward.
ESTIMATORS = {
    "rloo": (functools.partial(whole, rloo_advantages), 1.0),
    "dr_grpo": (functools.partial(whole, DR_GRPO), 1 / 2),
    "reinforce": (reinforce, 1.0),
    "reinforce_group": (reinforce_group, 1 / 2),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_follow_the_objective_of_mixed_rewards_with_none_planted(name, seed):
    world, logits = mixed_world(seed)
    estimate, length = ESTIMATORS[name]
    gradient = grouped_gradient(world, logits, estimate, applies_G=planted(seed, 3))
    share, scale = off_line(gradient, world.objective_gradient(logits))
    assert share < 1e-6
    np.testing.assert_allclose(scale, -length * (2 / 3) / LONGEST, rtol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_rest_at_the_optimum_of_mixed_rewards(name, seed):
    world, _ = mixed_world(seed)
    estimate, _ = ESTIMATORS[name]
    best, beta_log_z = world.best()
    gradient = grouped_gradient(world, best, estimate, applies_G=planted(seed, 3))
    np.testing.assert_allclose(gradient, 0, atol=1e-10)
    assert world.objective(best) == pytest.approx(beta_log_z, abs=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_whitening_changes_the_length_of_reinforce_and_not_its_direction(seed):
    world, logits = mixed_world(seed)
    estimate = functools.partial(reinforce, whitened=True)
    gradient = grouped_gradient(world, logits, estimate, applies_G=planted(seed, 2))
    share, _ = off_line(gradient, world.objective_gradient(logits))
    assert share < 1e-6


@pytest.mark.parametrize("seed", SEEDS)
def test_a_deviation_has_another_optimum_with_none_planted_too(seed):
    world, logits = mixed_world(seed)
    divided = functools.partial(whole, functools.partial(grpo_advantages, divide_by_deviation=True))
    gradient = grouped_gradient(world, logits, divided, applies_G=planted(seed, 3))
    share, _ = off_line(gradient, world.objective_gradient(logits))
    assert share > 1e-2


@pytest.mark.parametrize("estimate", [reinforce, reinforce_group])
def test_descent_by_reinforce_ends_at_the_best_policy(estimate):
    world, logits = mixed_world(0, beta=1.0)
    pairs = np.array(list(itertools.product(range(len(ANSWERS)), repeat=2)))
    index = pairs.reshape(-1)
    applies_BG, mask_BT = jnp.ones(pairs.shape, bool), mask_of(index)

    def step(_, logits):
        rewards_BT = rewards_of(world, logits, kl_coef=world.beta)[index]
        advantages_BT = estimate(jnp.where(mask_BT, rewards_BT, 0), mask_BT, applies_BG)
        answers_B = jnp.exp(sum_by_answer(log_probs(logits), mask_of()))
        weights_B = jnp.repeat(answers_B[pairs].prod(axis=1), 2) / 2
        return logits - 2 * _gradient_of(
            world, logits, advantages_BT, index=index, weights_B=weights_B
        )

    reached = jax.jit(lambda start: jax.lax.fori_loop(0, 6000, step, start))(jnp.asarray(logits))
    best, _ = world.best()
    left, right = world.probabilities(np.asarray(reached)), world.probabilities(best)
    assert np.abs(left - right).sum() / 2 < 1e-3


def sequence_objective(world, logits, old, advantages, *, low, high, dual_clip):
    """GSPO's, by listing all answers: arXiv 2507.18071, equation 5."""
    total = 0.0
    for answer, advantage in zip(ANSWERS, advantages, strict=True):
        old_log_prob = world.log_prob(old, answer)
        ratio = np.exp((world.log_prob(logits, answer) - old_log_prob) / len(answer))
        gain = min(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)
        if dual_clip is not None and advantage < 0:
            gain = max(gain, dual_clip * advantage)
        total += np.exp(old_log_prob) * gain
    return total


@pytest.mark.parametrize("dual_clip", [None, 1.3])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_ratio_of_sequences_has_the_gradient_of_its_objective(seed, dual_clip):
    world, old = mixed_world(seed)
    logits = old + np.random.default_rng(1 - seed).normal(size=old.shape)
    advantages = world.rewards - world.rewards.mean()
    clips = {"clip_low": 0.1, "clip_high": 0.2, "dual_clip": dual_clip}

    def loss(logits):
        sums = jax.vmap(
            lambda *row: policy_loss(
                *(one[None] for one in row), **clips, ratio="sequence", mean_per_answer=True
            )
        )(log_probs(logits), log_probs(old), over_tokens(advantages, mask_of()), mask_of())
        weights_B = jnp.exp(sum_by_answer(log_probs(old), mask_of()))
        return (weights_B * sums.loss / sums.num_terms).sum(), sums

    (found, sums), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(logits))
    at = functools.partial(
        sequence_objective,
        world,
        old=old,
        advantages=advantages,
        low=0.1,
        high=0.2,
        dual_clip=dual_clip,
    )
    assert found == pytest.approx(-at(logits), rel=1e-12)
    expected = np.zeros_like(logits)
    for place in np.ndindex(logits.shape):
        moved = np.zeros_like(logits)
        moved[place] = 1e-6
        expected[place] = -(at(logits + moved) - at(logits - moved)) / 2e-6
    np.testing.assert_allclose(gradient, expected, atol=1e-8)
    # All tokens of an answer are clipped or none, and every case is met.
    for name in ("clipped_low", "clipped_high"):
        clipped_B, tokens_B = np.asarray(sums.others[name]), np.asarray(sums.others["tokens"])
        assert set(np.unique(clipped_B / tokens_B)) == {0.0, 1.0}
    assert bool(np.asarray(sums.others["dual_clipped"]).any()) == (dual_clip is not None)


def test_the_ratio_of_a_sequence_is_the_same_where_a_row_holds_several_answers():
    draw = np.random.default_rng(0)
    ratios_BT = jnp.asarray(draw.normal(size=(2, 3)))
    mask_BT = jnp.array([[1, 1, 1], [1, 0, 0]], bool)
    apart_BT = sequence_ratios(jnp.where(mask_BT, ratios_BT, 0), mask_BT, None)
    packed_1T = jnp.concatenate([jnp.zeros(1), ratios_BT[0], jnp.zeros(2), ratios_BT[1, :1]])[None]
    mask_1T = jnp.array([[0, 1, 1, 1, 0, 0, 1]], bool)
    answers = Answers(jnp.array([[0, 0, 0, 0, 1, 1, 1]]), 2)
    found_1T = sequence_ratios(jnp.where(mask_1T, packed_1T, 0), mask_1T, answers)
    np.testing.assert_allclose(found_1T[0, 1:4], apart_BT[0])
    np.testing.assert_allclose(found_1T[0, 6], apart_BT[1, 0])
    np.testing.assert_allclose(apart_BT[0], ratios_BT[0].mean())


def deep_sampler(logits):
    """A sampler that differs from the trainer in the states of two tokens, the last ones."""
    sampler = logits.copy()
    deepest = [row for row, prefix in enumerate(STATES) if len(prefix) == LONGEST - 1]
    sampler[deepest] += np.random.default_rng(9).normal(size=(len(deepest), 3))
    return sampler


@pytest.mark.parametrize(("cap", "is_right"), [(1e9, True), (1.0, False), (None, False)])
def test_weights_of_the_sampler_mend_its_gap_unless_they_are_truncated(cap, is_right):
    world, logits = mixed_world(1)
    sampler = deep_sampler(logits)
    rewards_BT = rewards_of(world, logits, kl_coef=world.beta)
    _, rows_BT, _ = answer_arrays()
    values_BT = jnp.where(mask_of(), world.values(logits, world.beta)[rows_BT], jnp.nan)
    # What comes later is in the critic, so that a token's advantage is right whoever sampled.
    advantages_BT = gae(rewards_BT, values_BT, mask_of(), gamma=1.0, lambda_=0.0).advantages_BT
    if cap is not None:
        weights_BT = importance_weights(log_probs(logits), log_probs(sampler), mask_of(), cap=cap)
        assert float(weights_BT.max()) <= cap
        advantages_BT = advantages_BT * weights_BT
    gradient = gradient_of(
        world, logits, advantages_BT, weights_B=jnp.asarray(world.probabilities(sampler))
    )
    share, scale = off_line(gradient, world.objective_gradient(logits))
    if is_right:
        assert share < 1e-6
        np.testing.assert_allclose(scale, -1 / LONGEST, rtol=1e-6)
    else:
        assert share > 1e-2


def test_weights_of_the_sampler_are_finite_at_any_gap():
    old_BT, sampler_BT = jnp.array([[0.0, -1e4, 0.0]]), jnp.array([[-1e4, 0.0, jnp.nan]])
    weights_BT = importance_weights(old_BT, sampler_BT, jnp.array([[1, 1, 0]], bool), cap=2.0)
    np.testing.assert_allclose(weights_BT, [[2.0, 0.0, 0.0]])


def test_a_group_has_variance_where_two_of_its_rewards_differ():
    rewards_BG = jnp.array([[1.0, 1, 1], [1, 1, 2], [1, 5, 1], [1, 5, 1], [1, 5, 2]])
    applies_BG = jnp.array([[1, 1, 1], [1, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0]], bool)
    found_B = have_variance(rewards_BG, applies_BG=applies_BG)
    assert found_B.tolist() == [False, True, False, False, False]
