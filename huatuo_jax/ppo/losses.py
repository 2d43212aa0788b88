"""Losses of the policy and the critic, as sums for one optimizer step and as passes over rows.

Each returns `LossSums`, which are divided by the terms of the whole step: micro-batches, padding
and mesh change only rounding. The policy's loss grows by `add_entropy_bonus` and `add_kl_loss`; all
have the same denominator, the critic's too. What was known before the step (old and reference
log-probabilities, advantages, old values, returns) is not differentiated.

A row is made of segments, each a prompt and an answer end to end, and then padding. Numbers of a
token lie in its own slot; the critic's value there is that of the state before it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.ppo.config import Ratio
from huatuo_jax.ppo.metrics import policy_sums, value_sums
from huatuo_jax.ppo.rewards import KlLoss, kl_losses, log_ratios
from huatuo_jax.training.losses import (
    Answers,
    answer_lengths,
    at_tokens,
    count_terms,
    masked,
    per_token,
    score_tokens,
    sum_by_answer,
)
from huatuo_jax.training.scoring import head_scores
from huatuo_jax.training.update import Batch, LossSums, Outputs, Variables


def policy_loss(
    log_probs_BT: jax.Array,
    old_log_probs_BT: jax.Array,
    advantages_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    ratio: Ratio = "token",
    answers: Answers | None = None,
    tokens_allowed: int | None = None,
    mean_per_answer: bool = False,
) -> LossSums:
    """Computes the clipped surrogate (arXiv 1707.06347, equation 7), bounded on the log scale.

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
        ratio: of each `token`; or of the `sequence`, see `sequence_ratios`.
        answers: for ratios of sequences; None for one a row.
        tokens_allowed: see `training.losses.count_terms`.
        mean_per_answer: see there.

    Returns:
        Sums of the loss; `others` are `metrics.policy_sums`.

    Raises:
        ValueError: a clip out of its range.
    """
    if not 0 < clip_low < 1:
        raise ValueError(f"clip_low={clip_low!r} must be above 0 and below 1")
    if not clip_high > 0:
        raise ValueError(f"clip_high={clip_high!r} must be above 0")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip!r} must be above 1, or None")
    ratios_BT = log_ratios(log_probs_BT, jax.lax.stop_gradient(old_log_probs_BT), mask_BT)
    of_tokens_BT = ratios_BT
    if ratio == "sequence":
        ratios_BT = sequence_ratios(ratios_BT, mask_BT, answers)
    elif ratio != "token":
        raise ValueError(f"ratio={ratio!r} must be 'token' or 'sequence'")
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
    metrics = policy_sums(
        jax.lax.stop_gradient(of_tokens_BT),
        mask_BT,
        clipped_low_BT=(advantages_BT < 0) & (ratios_BT < lowest),
        clipped_high_BT=(advantages_BT > 0) & (ratios_BT > highest),
        dual_clipped_BT=(advantages_BT < 0) & (ratios_BT > math.log(dual_clip or math.inf)),
    )
    gains_BT = advantages_BT * jnp.exp(bounded_BT)
    return LossSums(
        loss=-per_token(gains_BT, mask_BT, mean_per_answer=mean_per_answer).sum(),
        num_terms=count_terms(
            mask_BT, tokens_allowed=tokens_allowed, mean_per_answer=mean_per_answer
        ),
        others=metrics,
    )


def sequence_ratios(ratios_BT: jax.Array, mask_BT: jax.Array, answers: Answers | None) -> jax.Array:
    """Lays the mean log-ratio of each answer on its tokens (GSPO, arXiv 2507.18071).

    The value is that of equation 7, log of the length-normalised ratio of the whole answer, so
    that all of its tokens are clipped or none; the gradient at each token is that token's own
    (GSPO-token, equation 14), which allows advantages that differ within an answer. Where they do
    not, and each answer's loss is the mean over its tokens, it is GSPO's gradient, equation 10.

    Args:
        ratios_BT: log-ratios, zero outside of the mask; differentiated.
        mask_BT: the answers' tokens.
        answers: None for one a row.
    """
    fixed_BT = jax.lax.stop_gradient(ratios_BT)
    sums = sum_by_answer(fixed_BT, mask_BT, answers)
    if answers is None:
        sums_BT = jnp.broadcast_to(sums[:, None], mask_BT.shape)
    else:
        sums_BT = sums[jnp.where(mask_BT, answers.of_tokens_BT, 0)]
    means_BT = sums_BT / jnp.maximum(answer_lengths(mask_BT), 1).astype(sums.dtype)
    return masked(means_BT, mask_BT) + ratios_BT - fixed_BT


def add_entropy_bonus(
    sums: LossSums,
    entropies_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    entropy_coef: float,
    mean_per_answer: bool = False,
) -> LossSums:
    """Takes entropy_coef times each token's entropy off the loss (arXiv 1707.06347, equation 9).

    Args:
        sums: of `policy_loss`.
        entropies_BT: of the whole distribution that each token was drawn from, in nats;
            differentiated. Minus the log-probability of the sampled token will not do: the
            gradient of its mean is 0.
        mask_BT: the answers' tokens.
        entropy_coef: at least 0.
        mean_per_answer: as for the policy's loss.

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
    """Adds the KL penalty to the loss, for rewards that hold none (`kl_coef=0` there).

    Args:
        sums: of `policy_loss`.
        log_probs_BT: of the policy that is trained.
        reference_log_probs_BT: of the reference.
        mask_BT: the answers' tokens.
        kl_coef: its weight.
        kind: see `rewards.kl_losses`; `k3` has another optimum than the penalty in the reward.
        answers: None for one a row.
        mean_per_answer: as for the policy's loss.

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
    """Computes half the critic's squared error, or that of the clipped value if larger.

    The clipped form is that of the PPO code behind arXiv 1909.08593 (see arXiv 2005.12729,
    section 2, on what the paper leaves out).

    Args:
        values_BT: of the critic that is trained.
        old_values_BT: at the rollout, the ones that `advantages.gae` was given.
        returns_BT: from `advantages.gae`.
        mask_BT: the answers' tokens.
        clip: how far from the old value counts; None for the plain squared error.
        tokens_allowed: see `training.losses.count_terms`; the policy's.
        mean_per_answer: see there; the policy's.

    Returns:
        Sums of the loss; `others` are `metrics.value_sums`.

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
    metrics = value_sums(
        jax.lax.stop_gradient(values_BT), returns_BT, mask_BT, clipped_BT=is_clipped_BT
    )
    return LossSums(
        loss=per_token(squares_BT, mask_BT, mean_per_answer=mean_per_answer).sum() / 2,
        num_terms=count_terms(
            mask_BT, tokens_allowed=tokens_allowed, mean_per_answer=mean_per_answer
        ),
        others=metrics,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """The parts of the policy's loss; the fields are those of `ppo.losses`.

    Attributes:
        temperature: of the sampler; divides the logits.
        clip_low: of the ratio, downwards.
        clip_high: of the ratio, upwards.
        dual_clip: see `policy_loss`.
        entropy_coef: weight of the entropy bonus.
        kl_loss: the penalty in the loss; None where the reward holds it.
        num_answers: of a minibatch at most.
        tokens_allowed: the fixed denominator; None for the tokens there are.
        chunk: positions of each row whose logits are held at once.
        mean_per_answer: the loss is the mean over answers of the mean over their tokens.
        ratio: of each token or of the sequence.
    """

    temperature: float
    clip_low: float
    clip_high: float
    dual_clip: float | None
    entropy_coef: float
    kl_loss: KlLoss | None
    num_answers: int
    tokens_allowed: int | None
    chunk: int
    mean_per_answer: bool = False
    ratio: Ratio = "token"


def policy_row_loss(
    model: Transformer, objective: PolicyObjective
) -> "functools.partial[tuple[LossSums, Outputs]]":
    """Makes the policy's loss for a pass; its outputs are `log_probs`, zero outside answers."""
    return functools.partial(_policy_row_loss, model, objective)


def _policy_row_loss(
    model: Transformer,
    objective: PolicyObjective,
    variables: Variables,
    batch: Batch,
    kl_coef: jax.Array,
) -> tuple[LossSums, Outputs]:
    mask_BT = batch["mask"]
    scores = score_tokens(
        model,
        variables,
        batch,
        mask_BT,
        temperature=objective.temperature,
        chunk=objective.chunk,
        entropy=True,
    )
    by_answer = objective.ratio == "sequence" or objective.kl_loss is not None
    answers = Answers(batch["answers"], objective.num_answers) if by_answer else None
    log_probs_BT, entropies_BT = at_tokens(scores.log_probs_BT), at_tokens(scores.entropies_BT)
    sums = policy_loss(
        log_probs_BT,
        batch["old_log_probs"],
        batch["advantages"],
        mask_BT,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        dual_clip=objective.dual_clip,
        ratio=objective.ratio,
        answers=answers,
        tokens_allowed=objective.tokens_allowed,
        mean_per_answer=objective.mean_per_answer,
    )
    sums = add_entropy_bonus(
        sums,
        entropies_BT,
        mask_BT,
        entropy_coef=objective.entropy_coef,
        mean_per_answer=objective.mean_per_answer,
    )
    if objective.kl_loss is not None:
        reference_BT = batch["reference_log_probs"]
        sums = add_kl_loss(
            sums,
            log_probs_BT,
            reference_BT,
            mask_BT,
            kl_coef=kl_coef,
            kind=objective.kl_loss,
            answers=answers,
            mean_per_answer=objective.mean_per_answer,
        )
    return sums, {"log_probs": jax.lax.stop_gradient(log_probs_BT)}


def value_row_loss(
    model: Transformer,
    *,
    clip: float | None,
    tokens_allowed: int | None,
    mean_per_answer: bool = False,
    offset: float = 0.0,
) -> "functools.partial[tuple[LossSums, Outputs]]":
    """Makes the critic's loss for a pass.

    Its outputs are `values`, those of the states before the tokens, and `values_after`, those of
    the states after them; both mean nothing outside of answers.

    Args:
        model: a backbone with a score head.
        clip: see `ppo.losses.value_loss`.
        tokens_allowed: see there.
        mean_per_answer: see there.
        offset: added to what the head gives.
    """
    return functools.partial(
        _value_row_loss,
        model,
        functools.partial(
            value_loss, clip=clip, tokens_allowed=tokens_allowed, mean_per_answer=mean_per_answer
        ),
        offset,
    )


def _value_row_loss(
    model: Transformer,
    loss: Callable[..., LossSums],
    offset: float,
    variables: Variables,
    batch: Batch,
    kl_coef: jax.Array,
) -> tuple[LossSums, Outputs]:
    del kl_coef
    after_BT = head_scores(model, variables, batch) + offset
    values_BT = at_tokens(after_BT)
    sums = loss(values_BT, batch["old_values"], batch["returns"], batch["mask"])
    outputs = {"values": values_BT, "values_after": after_BT}
    return sums, jax.lax.stop_gradient(outputs)
