"""Advantages and value targets: GAE with a critic, and the estimators that need none.

Means, variances and whitening are masked. Their moments can be combined, so that those of parts
(micro-batches, rollouts) give those of the whole.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from huatuo_jax.training.losses import last_tokens, masked, next_tokens, over_tokens, wide

_EPSILON = 1e-8

# Numbers that differ from their mean by no more units in its last place are taken as equal.
_ROUNDING = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and variance of numbers seen so far.

    Kept as deviations from the mean, and not as the sum of squares, because that loses all digits
    of a variance that is small beside the mean. `combine` adds those of micro-batches, devices or
    rollouts: kept from one rollout to the next, they are running statistics.

    Attributes:
        count: of numbers, in their dtype (float32 counts to 16 million).
        mean: of them; 0 where there are none.
        squares: their summed squared deviations from the mean.
    """

    count: jax.Array
    mean: jax.Array
    squares: jax.Array

    @property
    def variance(self) -> jax.Array:
        """Squared deviations divided by the count (not by one less)."""
        return self.squares / jnp.maximum(self.count, 1)

    @property
    def standard_deviation(self) -> jax.Array:
        """The root of the variance; 0 where it is no more than the rounding of the mean."""
        deviation = jnp.sqrt(self.variance)
        rounding = _ROUNDING * jnp.finfo(deviation.dtype).eps * jnp.abs(self.mean)
        return jnp.where(deviation <= rounding, 0, deviation)


def no_moments(dtype: DTypeLike = jnp.float32) -> Moments:
    """Returns the moments of no numbers, to start running statistics from."""
    # Arrays of their own, as an update may take over the memory of each.
    return Moments(jnp.zeros((), dtype), jnp.zeros((), dtype), jnp.zeros((), dtype))


def moments(values: jax.Array, mask: jax.Array) -> Moments:
    """Computes the moments of masked values; under `jax.jit`, of the whole global array.

    In two passes, first the mean, then deviations from it.
    """
    values = masked(values, mask)
    count = mask.sum().astype(values.dtype)
    mean = mean_of(values, mask)
    return Moments(count, mean, jnp.square(masked(values - mean, mask)).sum())


def mean_of(values: jax.Array, mask: jax.Array, *, axis: int | None = None) -> jax.Array:
    """Returns the mean of the values in a mask of the same shape, exact where they are all equal.

    The sum of n equal numbers, divided by n, is rounded, and what is left when that is taken off
    them is not 0. So the deviations from one of them are averaged, and once more from that mean,
    for its last digits where one of them lies far away.

    Args:
        values: any numbers.
        mask: which of them count.
        axis: one mean for each slice along it, which is kept with length 1; None for a scalar.

    Returns:
        The mean in at least float32, 0 where nothing is in the mask.
    """
    values = masked(values, mask)
    keepdims = axis is not None
    count = jnp.maximum(mask.sum(axis=axis, keepdims=keepdims), 1).astype(values.dtype)
    one = jnp.where(mask, values, -jnp.inf).max(axis=axis, keepdims=keepdims)
    mean = jnp.where(mask.any(axis=axis, keepdims=keepdims), one, 0)
    for _ in range(2):
        mean += masked(values - mean, mask).sum(axis=axis, keepdims=keepdims) / count
    return mean


def combine(left: Moments, right: Moments) -> Moments:
    """Combines the moments of two sets (Chan, Golub and LeVeque 1979, equation 2.1)."""
    count = left.count + right.count
    right_share = right.count / jnp.maximum(count, 1)
    difference = right.mean - left.mean
    # In this order nothing is 0 times infinity where one side is empty and the other one large.
    between = (difference * left.count) * (difference * right_share)
    squares = left.squares + right.squares + between
    return Moments(count, left.mean + difference * right_share, squares)


def whiten(
    values_BT: jax.Array,
    mask_BT: jax.Array,
    statistics: Moments,
    *,
    shift_mean: bool = True,
    epsilon: float = _EPSILON,
) -> jax.Array:
    """Brings the values in the mask to variance 1 and, if wanted, mean 0; zero elsewhere.

    Values without a spread, which nothing can bring to variance 1, become 0.

    Args:
        values_BT: advantages; or rewards, with `shift_mean` False: a reward of 0 stays 0, and no
            sign changes. The code of arXiv 1909.08593 has another rule for rewards: it takes the
            mean off, divides, and adds the mean back, so that every token, those of reward 0 too,
            is moved by mean * (1 - 1 / deviation), and a long answer by more than a short one.
        mask_BT: the answers' tokens.
        statistics: of the whole global batch.
        shift_mean: take the mean off; without it the mean is divided like the values.
        epsilon: added to the variance.
    """
    values_BT = masked(values_BT, mask_BT)
    shifted_BT = values_BT - statistics.mean if shift_mean else values_BT
    # Asked so that a spread that is no number stays one.
    has_none = statistics.standard_deviation == 0
    scaled_BT = shifted_BT * jax.lax.rsqrt(statistics.variance + epsilon)
    return masked(jnp.where(has_none, 0, scaled_BT), mask_BT)


class Estimates(NamedTuple):
    """Advantages and value targets; zero outside of the mask.

    Attributes:
        advantages_BT: not whitened.
        returns_BT: those advantages plus the values: the critic's targets.
    """

    advantages_BT: jax.Array
    returns_BT: jax.Array


def gae(
    rewards_BT: jax.Array,
    values_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    gamma: float,
    lambda_: float,
    values_after_B: jax.Array | None = None,
) -> Estimates:
    """Computes generalised advantage estimates (arXiv 1506.02438, equations 11 and 16).

    A_t = sum over k of (gamma * lambda)^k d_(t+k), with d_t = r_t + gamma * V_(t+1) - V_t, and 0
    for the value after the last token: the answer is over there. With lambda 1 the policy gradient
    is right whatever the critic says; below 1 only with a critic that is right.

    Args:
        rewards_BT: from `rewards.token_rewards`.
        values_BT: the critic's, before each token.
        mask_BT: the answers' tokens.
        gamma: discount of the next token's value; 1 for the objective of
            `rewards.token_rewards`, in which every token's penalty counts the same.
        lambda_: 0 trusts the critic, 1 the rewards.
        values_after_B: the critic's values after the last token, to bootstrap from where an answer
            was cut off; must be 0 where it ended.

    Returns:
        Advantages and returns; nothing is differentiated through them.
    """
    values_BT = masked(values_BT, mask_BT)
    next_values_BT = next_tokens(values_BT)
    if values_after_B is not None:
        after_B1 = wide(values_after_B)[:, None]
        next_values_BT = jnp.where(last_tokens(mask_BT), after_B1, next_values_BT)
    deltas_BT = masked(masked(rewards_BT, mask_BT) + gamma * next_values_BT - values_BT, mask_BT)

    def step(after_B: jax.Array, token: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        delta_B, mask_B = token
        advantage_B = jnp.where(mask_B, delta_B + gamma * lambda_ * after_B, 0)
        return advantage_B, advantage_B

    # One token after the other: a parallel scan would be rounded differently for another padding.
    start_B = jnp.zeros_like(deltas_BT[:, 0])
    _, advantages_TB = jax.lax.scan(step, start_B, (deltas_BT.T, mask_BT.T), reverse=True)
    advantages_BT = advantages_TB.T
    return jax.lax.stop_gradient(Estimates(advantages_BT, advantages_BT + values_BT))


def reinforce_advantages(
    rewards_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    gamma: float,
    baselines_B: jax.Array | None = None,
) -> jax.Array:
    """Returns what is still to come at each token, less a baseline (REINFORCE++).

    arXiv 2501.03262, which whitens the result over all tokens of the rollout and has no baseline
    (equation 8), or the mean of the prompt's group (REINFORCE++-baseline).

    Args:
        rewards_BT: from `rewards.token_rewards`.
        mask_BT: the answers' tokens.
        gamma: discount of the next token's return.
        baselines_B: of each answer, the same at all of its tokens; None for 0.
    """
    zeros_BT = jnp.zeros_like(wide(rewards_BT))
    returns_BT = gae(rewards_BT, zeros_BT, mask_BT, gamma=gamma, lambda_=1.0).returns_BT
    if baselines_B is None:
        return returns_BT
    return returns_BT - over_tokens(jax.lax.stop_gradient(baselines_B), mask_BT)


def group_means(rewards_BG: jax.Array, *, applies_BG: jax.Array) -> jax.Array:
    """Returns each group's mean over the answers that have a reward, `[B, 1]`; 0 without any."""
    return mean_of(jax.lax.stop_gradient(wide(rewards_BG)), applies_BG, axis=1)


def have_variance(rewards_BG: jax.Array, *, applies_BG: jax.Array) -> jax.Array:
    """Marks groups with two answers whose rewards differ, bool `[B]`; others teach nothing."""
    low_B = jnp.where(applies_BG, rewards_BG, jnp.inf).min(axis=1)
    high_B = jnp.where(applies_BG, rewards_BG, -jnp.inf).max(axis=1)
    return high_B > low_B


def importance_weights(
    old_log_probs_BT: jax.Array,
    sampler_log_probs_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    cap: float,
) -> jax.Array:
    """Computes min(policy / sampler, cap) of each token, zero outside of the mask.

    The sampler computes the same weights in another way (another dtype, kernel or cache), so that
    its tokens are not quite from the policy that is trained. Times this weight their advantages
    are, but for the truncation, which bounds the variance (https://fengyao.notion.site/off-policy-rl,
    truncated importance sampling; cap 2 there).

    Args:
        old_log_probs_BT: of the policy that sampled, recomputed by the training graph.
        sampler_log_probs_BT: as the sampler computed them.
        mask_BT: the answers' tokens.
        cap: above 0.
    """
    ratios_BT = masked(wide(old_log_probs_BT) - wide(sampler_log_probs_BT), mask_BT)
    # Bounded before the exponential, which has a range.
    return masked(jnp.exp(jnp.minimum(ratios_BT, jnp.log(cap))), mask_BT)


def rloo_advantages(rewards_BG: jax.Array, *, applies_BG: jax.Array | None = None) -> jax.Array:
    """Takes the mean reward of a prompt's other answers off each (arXiv 2402.14740, eq. 8).

    Unbiased, as no answer is in its own baseline. `training.losses.over_tokens`
    lays them on tokens.

    Args:
        rewards_BG: of whole answers, one prompt a row: the sum of `rewards.token_rewards`, KL
            penalty included.
        applies_BG: the answers that have a reward; the others are in no mean and at 0, and so is
            one that is alone. None for all.

    Raises:
        ValueError: there is one answer a prompt.
    """
    advantages_BG, applies_BG = _from_mean(rewards_BG, applies_BG)
    count_B1 = applies_BG.sum(axis=1, keepdims=True).astype(advantages_BG.dtype)
    return advantages_BG * (count_B1 / jnp.maximum(count_B1 - 1, 1))


def grpo_advantages(
    rewards_BG: jax.Array,
    *,
    divide_by_deviation: bool,
    epsilon: float = 1e-4,
    applies_BG: jax.Array | None = None,
) -> jax.Array:
    """Returns each answer's reward less the mean of all to its prompt, itself included.

    With the deviation: arXiv 2402.03300, section 4.1.2, which weighs prompts by how alike their
    answers' rewards are and so has another optimum; its loss is the mean over answers of each one's
    mean, see `training.losses.count_terms`. Without: arXiv 2503.20783, equation 5, whose gradient
    is (G - 1) / G times that of RLOO.

    Args:
        rewards_BG: of whole answers, one prompt a row.
        divide_by_deviation: by the root of the mean squared deviation (over G, not G - 1, a
            constant factor) plus epsilon.
        epsilon: bounds how far a small deviation is enlarged; a group whose rewards are all equal
            is at 0 exactly.
        applies_BG: the answers that have a reward; the others are in no mean and no deviation,
            and at 0. None for all.

    Raises:
        ValueError: there is one answer a prompt.
    """
    advantages_BG, applies_BG = _from_mean(rewards_BG, applies_BG)
    if not divide_by_deviation:
        return advantages_BG
    count_B1 = jnp.maximum(applies_BG.sum(axis=1, keepdims=True), 1).astype(advantages_BG.dtype)
    squares_B1 = jnp.square(advantages_BG).sum(axis=1, keepdims=True)
    return advantages_BG / (jnp.sqrt(squares_B1 / count_B1) + epsilon)


def _from_mean(rewards_BG: jax.Array, applies_BG: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The rewards less their group's mean, 0 where there is none, and where there is one."""
    num_answers = rewards_BG.shape[1]
    if num_answers < 2:
        raise ValueError(f"{num_answers} answer to a prompt must be at least 2 to be compared")
    if applies_BG is None:
        applies_BG = jnp.ones_like(rewards_BG, bool)
    rewards_BG = masked(jax.lax.stop_gradient(wide(rewards_BG)), applies_BG)
    return masked(rewards_BG - mean_of(rewards_BG, applies_BG, axis=1), applies_BG), applies_BG
