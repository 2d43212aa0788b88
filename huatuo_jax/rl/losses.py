"""Losses of the policy, the critic and the preference stage, as sums for one optimizer step.

Each returns `LossSums`, so `training.update.make_update` takes a function that calls one of them
and divides by the terms of the whole step: micro-batches, padding and mesh change only rounding.
The policy's loss grows by `add_entropy_bonus` and `add_kl_loss`; all have the same denominator, the
critic's too. What was known before the step (old and reference log-probabilities, advantages, old
values, returns, labels) is not differentiated.
"""

import math

import jax
import jax.numpy as jnp

from huatuo_jax.rl.gauges import policy_sums, value_sums
from huatuo_jax.rl.kl import KlLoss, kl_losses, log_ratios
from huatuo_jax.rl.masks import Answers, count_terms, masked, per_token
from huatuo_jax.training.update import LossSums


def policy_loss(
    log_probs_BT: jax.Array,
    old_log_probs_BT: jax.Array,
    advantages_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    tokens_allowed: int | None = None,
    mean_per_answer: bool = False,
) -> LossSums:
    """The clipped surrogate (arXiv 1707.06347, equation 7), bounded on the log scale.

    min(ratio * A, clip(ratio) * A) is A times the exponential of a log-ratio bounded from above
    where A > 0 and from below where A < 0. Bounded before the exponential, a ratio past all range
    cannot turn the gradient of a clipped token into 0 * infinity; nor that of a token with A = 0,
    which has loss 0 and gradient 0 at any ratio.

    Args:
        log_probs_BT: of the policy that is trained.
        old_log_probs_BT: of the policy that sampled, recomputed by the training graph.
        advantages_BT: whitened or not.
        mask_BT: the answers' tokens.
        clip_low: ratios below 1 - clip_low are not lowered further.
        clip_high: ratios above 1 + clip_high are not raised further; a larger one than `clip_low`
            leaves room for unlikely tokens (arXiv 2503.14476, section 3.1).
        dual_clip: bounds the ratio of tokens with A < 0 to this (arXiv 1912.09729, equation 5),
            None for no bound.
        tokens_allowed: see `masks.count_terms`.
        mean_per_answer: see there.

    Returns:
        Sums of the loss; `others` are `gauges.policy_sums`.

    Raises:
        ValueError: a clip that cannot be.
    """
    if not 0 < clip_low < 1:
        raise ValueError(f"clip_low={clip_low!r} must be above 0 and below 1")
    if not clip_high > 0:
        raise ValueError(f"clip_high={clip_high!r} must be above 0")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip!r} must be above 1, or None")
    ratios_BT = log_ratios(log_probs_BT, jax.lax.stop_gradient(old_log_probs_BT), mask_BT)
    advantages_BT = masked(jax.lax.stop_gradient(advantages_BT), mask_BT)
    lowest, highest = math.log1p(-clip_low), math.log1p(clip_high)
    raised_BT = jnp.minimum(ratios_BT, highest)
    lowered_BT = jnp.maximum(ratios_BT, lowest)
    if dual_clip is not None:
        lowered_BT = jnp.minimum(lowered_BT, math.log(dual_clip))
    bounded_BT = jnp.where(advantages_BT > 0, raised_BT, lowered_BT)
    # From both sides, which leaves a ratio that is no number as it is.
    within_BT = jnp.minimum(lowered_BT, highest)
    bounded_BT = jnp.where(advantages_BT == 0, within_BT, bounded_BT)
    gauges = policy_sums(
        jax.lax.stop_gradient(ratios_BT),
        mask_BT,
        clipped_low_BT=(advantages_BT < 0) & (ratios_BT < lowest),
        clipped_high_BT=(advantages_BT > 0) & (ratios_BT > highest),
    )
    gains_BT = advantages_BT * jnp.exp(bounded_BT)
    return LossSums(
        loss=-per_token(gains_BT, mask_BT, mean_per_answer=mean_per_answer).sum(),
        num_terms=count_terms(
            mask_BT, tokens_allowed=tokens_allowed, mean_per_answer=mean_per_answer
        ),
        others=gauges,
    )


def add_entropy_bonus(
    sums: LossSums,
    entropies_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    entropy_coef: float,
    mean_per_answer: bool = False,
) -> LossSums:
    """The loss less entropy_coef times the entropy at each token (arXiv 1707.06347, equation 9).

    Args:
        sums: of `policy_loss`.
        entropies_BT: of the whole distribution that each token was drawn from, in nats;
            differentiated. Minus the log-probability of the sampled token will not do: the
            gradient of its mean is 0.
        mask_BT: the answers' tokens.
        entropy_coef: at least 0.
        mean_per_answer: as the policy's loss was told.

    Returns:
        The sums, with `entropy` (of all tokens alike) among the others.
    """
    bonus = per_token(entropies_BT, mask_BT, mean_per_answer=mean_per_answer).sum()
    entropy = masked(jax.lax.stop_gradient(entropies_BT), mask_BT).sum()
    others = sums.others | {"entropy": entropy}
    return LossSums(sums.loss - entropy_coef * bonus, sums.num_terms, others)


def add_kl_loss(
    sums: LossSums,
    log_probs_BT: jax.Array,
    reference_log_probs_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    kl_coef: float | jax.Array,
    kind: KlLoss,
    answers: Answers | None = None,
    mean_per_answer: bool = False,
) -> LossSums:
    """The loss with the KL penalty in it, for rewards that hold none (`kl_coef=0` there).

    Args:
        sums: of `policy_loss`.
        log_probs_BT: of the policy that is trained.
        reference_log_probs_BT: of the reference.
        mask_BT: the answers' tokens.
        kl_coef: its weight.
        kind: see `kl.kl_losses`; `k3` has another optimum than the penalty in the reward.
        answers: None for one a row.
        mean_per_answer: as the policy's loss was told.

    Returns:
        The sums, with `kl_loss` (unweighted, of all tokens alike) among the others.

    Raises:
        ValueError: an unknown kind.
    """

    def penalty(log_probs_BT: jax.Array, *, mean_per_answer: bool) -> jax.Array:
        return kl_losses(
            log_probs_BT,
            reference_log_probs_BT,
            mask_BT,
            kind=kind,
            answers=answers,
            mean_per_answer=mean_per_answer,
        ).sum()

    # A penalty past all range, or its gradient, times a weight of 0 would be no number.
    weighed_BT = jnp.where(jnp.asarray(kl_coef) == 0, reference_log_probs_BT, log_probs_BT)
    weighed = kl_coef * penalty(weighed_BT, mean_per_answer=mean_per_answer)
    plain = penalty(jax.lax.stop_gradient(log_probs_BT), mean_per_answer=False)
    return LossSums(sums.loss + weighed, sums.num_terms, sums.others | {"kl_loss": plain})


def value_loss(
    values_BT: jax.Array,
    old_values_BT: jax.Array,
    returns_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    clip: float | None,
    tokens_allowed: int | None = None,
    mean_per_answer: bool = False,
) -> LossSums:
    """Half the squared error of the critic, that of the value held near the old one if larger.

    The clipped form is that of the PPO code behind arXiv 1909.08593 (see arXiv 2005.12729,
    section 2, on what the paper leaves out).

    Args:
        values_BT: of the critic that is trained.
        old_values_BT: at the rollout, the ones that `advantages.gae` was given.
        returns_BT: from `advantages.gae`.
        mask_BT: the answers' tokens.
        clip: how far from the old value counts; None for the plain squared error.
        tokens_allowed: see `masks.count_terms`; the policy's.
        mean_per_answer: see there; the policy's.

    Returns:
        Sums of the loss; `others` are `gauges.value_sums`.

    Raises:
        ValueError: the clip is not above 0.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip!r} must be above 0, or None")
    values_BT = masked(values_BT, mask_BT)
    old_values_BT = masked(jax.lax.stop_gradient(old_values_BT), mask_BT)
    returns_BT = masked(jax.lax.stop_gradient(returns_BT), mask_BT)
    squares_BT = jnp.square(values_BT - returns_BT)
    is_clipped_BT = jnp.zeros_like(mask_BT)
    if clip is not None:
        near_BT = old_values_BT + jnp.clip(values_BT - old_values_BT, -clip, clip)
        near_squares_BT = jnp.square(near_BT - returns_BT)
        is_past_BT = jnp.abs(values_BT - old_values_BT) > clip
        is_clipped_BT = is_past_BT & (near_squares_BT > squares_BT)
        # Within the clip both are the same up to rounding, which is not to choose the gradient.
        squares_BT = jnp.where(is_clipped_BT, near_squares_BT, squares_BT)
    gauges = value_sums(
        jax.lax.stop_gradient(values_BT), returns_BT, mask_BT, clipped_BT=is_clipped_BT
    )
    return LossSums(
        loss=per_token(squares_BT, mask_BT, mean_per_answer=mean_per_answer).sum() / 2,
        num_terms=count_terms(
            mask_BT, tokens_allowed=tokens_allowed, mean_per_answer=mean_per_answer
        ),
        others=gauges,
    )
