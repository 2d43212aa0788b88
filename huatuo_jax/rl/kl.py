"""How far the policy is from its reference: estimates, and the coefficient that weighs them.

All are taken at tokens that the policy sampled, from L = log policy - log reference. Names follow
http://joschu.net/blog/kl-approx.html: k1 = L is unbiased and may be negative; k3 = exp(-L) - 1 + L
is unbiased, never negative and, near the reference, of lower variance. How good an estimate is
says nothing about its gradient (arXiv 2506.09477):

- k1 in the reward (`rewards.token_rewards`) is the penalty of arXiv 1909.08593, equation 2: its
  policy gradient is that of the objective E[score] - kl_coef * KL(policy, reference).
- the half square of L summed over the answer, as a loss, has that same gradient where the samples
  are the policy's own: L times the gradient of the answer's log-probability. The sum is squared
  and not each token's L, whose square would miss what a token does to the states after it.
- k3 as a loss (arXiv 2402.03300, equation 4) has the gradient of KL(reference, policy) at each
  state, and none through which states are visited: it has an optimum of its own, at which
  policy = kl_coef * reference / (c - Q) in each state, Q being the expected score after a token
  and c such that the sum is 1.
- k1 as a loss has a gradient of mean zero, and k2 or k3 in the reward is refused (`in_reward`).
"""

from typing import Literal

import jax
import jax.numpy as jnp

from huatuo_jax.rl.masks import Answers, masked, sum_by_answer, wide

KlLoss = Literal["sequence_square", "k3"]

# Of one update of the coefficient: arXiv 1909.08593, section 2.2.
_LARGEST_ERROR = 0.2


def log_ratios(left_BT: jax.Array, right_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Left minus right in at least float32, zero outside of the mask."""
    return masked(wide(left_BT) - wide(right_BT), mask_BT)


def k3(log_ratios_BT: jax.Array) -> jax.Array:
    """exp(-L) - 1 + L, exact also where L is small."""
    return jnp.expm1(-log_ratios_BT) + log_ratios_BT


def in_reward(estimator: str, log_ratios_BT: jax.Array) -> jax.Array:
    """The estimate that a reward may hold, which is k1.

    Raises:
        ValueError: any other estimator, and why.
    """
    if estimator == "k1":
        return log_ratios_BT
    if estimator in ("k2", "k3"):
        raise ValueError(
            f"estimator={estimator!r} in the reward must be 'k1': {estimator} starts with the "
            "square of the log-ratio, so its policy gradient vanishes to leading order near the "
            "reference, and it punishes a token that has become less likely like one that has "
            "become more likely, which pushes it further down; k3 is for the loss"
        )
    raise ValueError(f"estimator={estimator!r} must be 'k1'")


def kl_losses(
    log_probs_BT: jax.Array,
    reference_log_probs_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    kind: KlLoss,
    answers: Answers | None = None,
    mean_per_answer: bool = False,
) -> jax.Array:
    """The penalty as a loss, of each answer, to be summed and divided as the policy's is.

    Its gradient is the one named above at samples of the policy itself; in later epochs, whose
    samples are the old policy's, it is off by what the policy has moved.

    Args:
        log_probs_BT: of the policy that is trained; differentiated.
        reference_log_probs_BT: of the reference, at the same temperature.
        mask_BT: the answers' tokens.
        kind: `sequence_square` or `k3`.
        answers: None for one a row.
        mean_per_answer: divide each answer's by its number of tokens, as `masks.per_token` does.

    Raises:
        ValueError: an unknown kind.
    """
    ratios_BT = log_ratios(log_probs_BT, jax.lax.stop_gradient(reference_log_probs_BT), mask_BT)
    if kind == "sequence_square":
        losses = jnp.square(sum_by_answer(ratios_BT, mask_BT, answers)) / 2
    elif kind == "k3":
        losses = sum_by_answer(k3(ratios_BT), mask_BT, answers)
    else:
        raise ValueError(f"kind={kind!r} must be 'sequence_square' or 'k3'")
    if not mean_per_answer:
        return losses
    return losses / jnp.maximum(sum_by_answer(jnp.ones_like(ratios_BT), mask_BT, answers), 1)


def next_kl_coef(
    kl_coef: jax.Array,
    kl_per_sequence: jax.Array,
    *,
    target_kl_per_sequence: float | None,
    gain: float = 0.1,
) -> jax.Array:
    """The coefficient for the next rollout: a proportional controller (arXiv 1909.08593, 2.2).

    It is multiplied by 1 + gain * error, the error being how far the KL is above its target, in
    parts of the target, clipped to +-0.2.

    Args:
        kl_coef: the present one.
        kl_per_sequence: k1 summed over an answer's tokens, in nats, mean of the rollout's answers
            (`gauges.rollout_numbers`); not the mean of a token.
        target_kl_per_sequence: in the same unit; None leaves the coefficient fixed.
        gain: of the paper; 0.1 there.

    Raises:
        ValueError: the target or the gain is not above 0.
    """
    kl_coef = wide(kl_coef)
    if target_kl_per_sequence is None:
        return kl_coef
    if not target_kl_per_sequence > 0:
        raise ValueError(
            f"target_kl_per_sequence={target_kl_per_sequence!r} must be above 0, or None"
        )
    if not 0 < gain < 1 / _LARGEST_ERROR:
        raise ValueError(f"gain={gain!r} must be above 0 and below {1 / _LARGEST_ERROR:g}")
    error = wide(kl_per_sequence) / target_kl_per_sequence - 1
    return kl_coef * (1 + gain * jnp.clip(error, -_LARGEST_ERROR, _LARGEST_ERROR))
