"""Gauges against numpy over the answers alone, put together from parts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.dpo import preference_numbers, preference_sums
from huatuo_jax.ppo import metrics
from huatuo_jax.ppo.losses import policy_loss, value_loss
from tests.ppo.ragged import make_rollout

PARTS = [slice(0, 3), slice(3, 6)]


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


ROLLOUT_SUMS = jax.jit(metrics.rollout_sums)
DISTINCT_SUMS = jax.jit(metrics.distinct_sums, static_argnames="n")
POLICY_LOSS = jax.jit(functools.partial(policy_loss, clip_low=0.2, clip_high=0.28))
VALUE_LOSS = jax.jit(functools.partial(value_loss, clip=0.2))


def _added(parts):
    """What micro-batches, devices and processes do with sums."""
    return jax.tree.map(lambda *sums: sum(sums), *parts)


def test_gauges_of_the_policy_are_means_over_tokens():
    rollout = make_rollout(5).with_junk(np.nan)
    sums = _added(
        POLICY_LOSS(
            rollout.log_probs_BT[part],
            rollout.old_BT[part],
            rollout.advantages_BT[part],
            rollout.mask_BT[part],
        ).others
        for part in PARTS
    )
    numbers = metrics.policy_numbers(sums | {"entropy": 32.0}, prefix="ppo")
    log_ratios = (rollout.log_probs_BT - rollout.old_BT)[rollout.mask_BT]
    advantages, ratios = rollout.advantages_BT[rollout.mask_BT], np.exp(log_ratios)
    assert numbers == pytest.approx(
        {
            "ppo/ratio": ratios.mean(),
            "ppo/clipped_low": ((ratios < 0.8) & (advantages < 0)).mean(),
            "ppo/clipped_high": ((ratios > 1.28) & (advantages > 0)).mean(),
            "ppo/dual_clipped": 0.0,
            "ppo/approximate_kl_k1_per_token": -log_ratios.mean(),
            "ppo/approximate_kl_k3_per_token": (ratios - 1 - log_ratios).mean(),
            "ppo/approximate_kl_k3_per_sequence": (ratios - 1 - log_ratios).sum() / 5,
            "ppo/entropy": 2.0,
        },
        rel=1e-10,
    )


def test_gauges_of_the_critic_hold_its_explained_variance():
    rollout = make_rollout().with_junk(np.nan)
    sums = _added(
        VALUE_LOSS(
            rollout.values_BT[part],
            rollout.old_values_BT[part],
            rollout.rewards_BT[part] + 3,
            rollout.mask_BT[part],
        ).others
        for part in PARTS
    )
    numbers = metrics.value_numbers(sums, prefix="critic")
    values, returns = (
        array[rollout.mask_BT] for array in (rollout.values_BT, rollout.rewards_BT + 3)
    )
    explained = 1 - (returns - values).var() / returns.var()
    assert numbers["critic/explained_variance"] == pytest.approx(explained, rel=1e-10)
    assert numbers["critic/value"] == pytest.approx(values.mean())
    assert numbers["critic/return"] == pytest.approx(returns.mean())
    squared = np.square(returns - values).mean()
    assert numbers["critic/value_error_squared"] == pytest.approx(squared)
    assert 0 < numbers["critic/value_clipped"] < 1


def _rollout_sums(rollout, part=slice(None), *, sampler_BT=None, scores_B=None):
    sampler_BT = rollout.log_probs_BT if sampler_BT is None else sampler_BT
    scores_B = rollout.scores_B if scores_B is None else scores_B
    ended_B = np.array([True, False, True, True, False, True])
    return ROLLOUT_SUMS(
        rollout.old_BT[part],
        rollout.reference_BT[part],
        sampler_BT[part],
        scores_B[part],
        ended_B[part],
        rollout.mask_BT[part],
    )


def test_gauges_of_a_rollout_equal_numpy_over_its_answers():
    rollout = make_rollout().with_junk(np.nan)
    numbers = metrics.rollout_numbers(
        _added([_rollout_sums(rollout, part) for part in PARTS]), prefix="ppo"
    )
    mask_BT, is_answer_B = rollout.mask_BT, rollout.lengths_B > 0
    ratios = (rollout.old_BT - rollout.reference_BT)[mask_BT]
    k3 = np.exp(-ratios) - 1 + ratios
    lengths, scores = rollout.lengths_B[is_answer_B], rollout.scores_B[is_answer_B]
    differences = (rollout.log_probs_BT - rollout.old_BT)[mask_BT]
    assert numbers == pytest.approx(
        {
            "ppo/kl_per_sequence": ratios.sum() / 5,
            "ppo/kl_per_token": ratios.mean(),
            "ppo/kl_k3_per_sequence": k3.sum() / 5,
            "ppo/kl_k3_per_token": k3.mean(),
            "ppo/sampled_entropy": -rollout.old_BT[mask_BT].mean(),
            "ppo/sampler_mismatch": np.exp(np.abs(differences)).mean(),
            "ppo/eos_rate": 3 / 5,  # The third row has no answer.
            "ppo/response_length": lengths.mean(),
            "ppo/response_length_deviation": lengths.std(),
            "ppo/score": scores.mean(),
            "ppo/score_deviation": scores.std(),
            "ppo/score_length_correlation": np.corrcoef(scores, lengths)[0, 1],
        },
        rel=1e-10,
    )


def test_a_sampler_that_agrees_has_mismatch_one():
    rollout = make_rollout()
    sums = _rollout_sums(rollout, sampler_BT=rollout.old_BT)
    assert metrics.rollout_numbers(sums, prefix="ppo")["ppo/sampler_mismatch"] == 1


@pytest.mark.parametrize("x64", [True, False])
def test_a_correlation_without_variance_is_no_number(x64):
    with jax.enable_x64(x64):
        sums = _rollout_sums(make_rollout(), scores_B=np.full(6, 0.1))
    numbers = metrics.rollout_numbers(sums, prefix="ppo")
    assert math.isnan(numbers["ppo/score_length_correlation"])
    assert numbers["ppo/score_deviation"] == 0


def test_means_of_nothing_are_no_numbers():
    empty = make_rollout(lengths=(0,) * 6)
    numbers = metrics.rollout_numbers(_rollout_sums(empty), prefix="ppo")
    assert all(math.isnan(value) for value in numbers.values())


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("starts", [None, (2, 5, 0, 0, 1, 4)])
def test_distinct_n_equals_a_set_of_each_answers_ngrams(n, starts):
    rollout = make_rollout(starts=starts)
    rollout.tokens_BT[3] = [1, 2, 1, 2, 1, 2]
    sums = _added(
        DISTINCT_SUMS(jnp.asarray(rollout.tokens_BT[part]), jnp.asarray(rollout.mask_BT[part]), n=n)
        for part in PARTS
    )
    shares = []
    for row, slots in rollout.places():
        tokens = [int(rollout.tokens_BT[row, t]) for t in slots]
        ngrams = [tuple(tokens[t : t + n]) for t in range(len(tokens) - n + 1)]
        if ngrams:
            shares.append(len(set(ngrams)) / len(ngrams))
    assert min(shares) < 1
    number = metrics.distinct_numbers(sums, n=n, prefix="ppo")
    assert number == {f"ppo/distinct_{n}": pytest.approx(np.mean(shares))}


def test_an_ngram_longer_than_the_slots_is_refused():
    with pytest.raises(ValueError, match="n=3 must be between 1 and the 2 slots"):
        metrics.distinct_sums(jnp.zeros((1, 2), int), jnp.ones((1, 2), bool), n=3)


def test_gauges_of_preferences_are_means_over_pairs():
    chosen, rejected = jnp.array([1.0, -1.0, 0.5, 0.0]), jnp.array([0.0, 2.0, 0.5, 0.0])
    labels, mask = jnp.array([0.9, 0.2, 1.0, 0.0]), jnp.array([True, True, True, False])
    sums = preference_sums(chosen, rejected, labels, mask)
    assert preference_numbers(sums, prefix="dpo") == pytest.approx(
        {
            "dpo/chosen_reward": 0.5 / 3,
            "dpo/rejected_reward": 2.5 / 3,
            "dpo/margin": -2 / 3,
            "dpo/accuracy": 2.5 / 3,
        }
    )


def test_rewards_that_differ_by_rounding_alone_are_a_tie():
    chosen_B = jnp.array([1e-7, 2e-7, -1e-7, 0.5])
    sums = preference_sums(
        chosen_B, jnp.zeros(4), jnp.ones(4), jnp.ones(4, bool), rounding_B=jnp.full(4, 1.5e-7)
    )
    assert float(sums["agreed"]) == 0.5 + 1 + 0.5 + 1
    assert float(sums["chosen_reward"]) == pytest.approx(float(chosen_B.sum()))
