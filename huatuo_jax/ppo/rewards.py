"""From a reward model's scores to the reward of each token.

How far the policy is from its reference: estimates, and the coefficient that weighs them.

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

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from huatuo_jax.training.losses import Answers, last_tokens, masked, sum_by_answer, wide

KlLoss = Literal["sequence_square", "k3"]

# Of one update of the coefficient: arXiv 1909.08593, section 2.2.
_LARGEST_ERROR = 0.2


def log_ratios(left_BT: jax.Array, right_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Returns left minus right in at least float32, zero outside of the mask."""
    return masked(wide(left_BT) - wide(right_BT), mask_BT)


def k3(log_ratios_BT: jax.Array) -> jax.Array:
    """Computes exp(-L) - 1 + L, exact also where L is small."""
    return jnp.expm1(-log_ratios_BT) + log_ratios_BT


def in_reward(estimator: str, log_ratios_BT: jax.Array) -> jax.Array:
    """Returns the estimate that a reward may hold, which is k1.

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
    """Computes each answer's KL penalty as a loss, to be summed and divided as the policy's is.

    Its gradient is the one named above at samples of the policy itself; in later epochs, whose
    samples are the old policy's, it is off by what the policy has moved.

    Args:
        log_probs_BT: of the policy that is trained; differentiated.
        reference_log_probs_BT: of the reference, at the same temperature.
        mask_BT: the answers' tokens.
        kind: `sequence_square` or `k3`.
        answers: None for one a row.
        mean_per_answer: divide each answer's by its number of tokens, as
            `training.losses.per_token` does.

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
    """Adapts the coefficient for the next rollout proportionally (arXiv 1909.08593, section 2.2).

    It is multiplied by 1 + gain * error, the error being how far the KL is above its target, in
    parts of the target, clipped to +-0.2.

    Args:
        kl_coef: the present one.
        kl_per_sequence: k1 summed over an answer's tokens, in nats, mean of the rollout's answers
            (`metrics.rollout_numbers`); not the mean of a token.
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


ScoreScale = Literal["stored", "running", "raw"]
TruncationPolicy = Literal["keep", "replace", "subtract", "bootstrap"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerScoreConfig:
    """The rule from scores to rewards: one for PPO, `score.py` and evaluation.

    Attributes:
        scale: `stored` takes the mean and deviation that are saved with the reward model, `running`
            those of all scores of the run so far, `raw` neither.
        clip: scaled scores are bounded to +-clip; None for no bound.
        on_truncation: what becomes of the score of an answer without a stop token, see
            `answer_scores`.
        penalty: for `replace` and `subtract`, in units of scaled scores.
    """

    scale: ScoreScale = "stored"
    clip: float | None = None
    on_truncation: TruncationPolicy = "subtract"
    penalty: float | None = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError for an invalid rule."""
        _check_rule(clip=self.clip, on_truncation=self.on_truncation, penalty=self.penalty)
        if self.penalty is not None and self.penalty == float("inf"):
            raise ValueError(f"penalty={self.penalty!r} must be finite")

    @property
    def outside_training(self) -> "AnswerScoreConfig":
        """The same rule where there is neither a critic nor a run whose scores have a mean.

        `bootstrap`, which needs the critic, keeps the score; `running` becomes `stored`.
        """
        has_critic = self.on_truncation == "bootstrap"
        return AnswerScoreConfig(
            scale="stored" if self.scale == "running" else self.scale,
            clip=self.clip,
            on_truncation="keep" if has_critic else self.on_truncation,
            penalty=self.penalty,
        )

    def rewards(self, scores_B: jax.Array, ended_B: jax.Array) -> jax.Array:
        """Applies `answer_scores` by this rule.

        Args:
            scores_B: scaled already.
            ended_B: from `have_ended`.
        """
        return answer_scores(
            scores_B,
            ended_B,
            on_truncation=self.on_truncation,
            penalty=self.penalty,
            clip=self.clip,
        )


def have_ended(
    token_ids_BT: jax.Array, mask_BT: jax.Array, *, stop_token_ids: Sequence[int]
) -> jax.Array:
    """Marks answers whose last token is a stop token, bool `[B]`; an empty row has not ended.

    Args:
        token_ids_BT: the sampled ids.
        mask_BT: the answers' tokens.
        stop_token_ids: those that generation stops at.

    Raises:
        ValueError: there is no stop token.
    """
    if not stop_token_ids:
        raise ValueError("stop_token_ids=() must name the tokens that generation stops at")
    is_stop_BT = (token_ids_BT[:, :, None] == jnp.asarray(stop_token_ids)[None, None, :]).any(-1)
    return (is_stop_BT & last_tokens(mask_BT)).any(axis=1)


def normalised_scores(
    scores_B: jax.Array, *, mean: float | jax.Array, standard_deviation: float | jax.Array
) -> jax.Array:
    """Scores in standard deviations from a mean: of the reward model's own file, or running.

    Args:
        scores_B: raw ones.
        mean: of raw scores.
        standard_deviation: of raw scores; above 0.
    """
    return (wide(scores_B) - mean) / standard_deviation


def answer_scores(
    scores_B: jax.Array,
    ended_B: jax.Array,
    *,
    on_truncation: TruncationPolicy,
    penalty: float | None = None,
    clip: float | None = None,
) -> jax.Array:
    """Scores as they enter the reward: clipped, then answers that were cut off are dealt with.

    The penalty comes after the clip, so that it is worth the same at every score.

    Args:
        scores_B: normalised.
        ended_B: from `have_ended`.
        on_truncation: `keep` leaves the score of an answer without an end; `replace` puts
            -penalty in its place (arXiv 1909.08593, section 2.1, has -1); `subtract` takes the
            penalty off it; `bootstrap` puts 0 in its place, and what would have come is the value
            of the state it was cut off in (`values_after_B` of `advantages.gae`;
            arXiv 1712.00378, section 3).
        penalty: at least 0, in units of normalised scores; for `replace` and `subtract` only.
        clip: scores are bounded to +-clip; None for no bound.

    Raises:
        ValueError: an unknown policy, a penalty that is missing, negative or has no use, or a
            clip that is not above 0.
    """
    _check_rule(clip=clip, on_truncation=on_truncation, penalty=penalty)
    scores_B = wide(scores_B)
    if clip is not None:
        scores_B = jnp.clip(scores_B, -clip, clip)
    if on_truncation == "keep":
        return scores_B
    kept_B = scores_B if on_truncation == "subtract" else jnp.zeros_like(scores_B)
    return jnp.where(ended_B, scores_B, kept_B - (penalty or 0.0))


def token_rewards(
    scores_B: jax.Array,
    old_log_probs_BT: jax.Array,
    reference_log_probs_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    kl_coef: float | jax.Array,
    estimator: str = "k1",
) -> jax.Array:
    """Computes token rewards: minus kl_coef times the log-ratio, and the score at the last token.

    arXiv 1909.08593, equation 2, taken token by token: the log-ratio of a whole answer is the sum
    of its tokens', and `gae` carries each into the return of the tokens before it. The last token
    is the end token where there is one; its own log-ratio counts as well.

    Args:
        scores_B: from `answer_scores`.
        old_log_probs_BT: of the policy that sampled, recomputed by the training graph.
        reference_log_probs_BT: of the reference, at the same temperature.
        mask_BT: the answers' tokens.
        kl_coef: 0 where the penalty is in the loss.
        estimator: `k1`; others are refused with the reason.

    Returns:
        `[B, T]`, zero outside of the mask.

    Raises:
        ValueError: another estimator.
    """
    ratios_BT = log_ratios(old_log_probs_BT, reference_log_probs_BT, mask_BT)
    penalties_BT = -kl_coef * in_reward(estimator, ratios_BT)
    return penalties_BT + jnp.where(last_tokens(mask_BT), wide(scores_B)[:, None], 0)


def _check_rule(
    *, clip: float | None, on_truncation: TruncationPolicy, penalty: float | None
) -> None:
    if on_truncation not in get_args(TruncationPolicy):
        raise ValueError(
            f"on_truncation={on_truncation!r} must be one of {list(get_args(TruncationPolicy))}"
        )
    is_penalised = on_truncation in ("replace", "subtract")
    if is_penalised and (penalty is None or not penalty >= 0):
        raise ValueError(f"penalty={penalty!r} must be 0 or more for {on_truncation!r}")
    if not is_penalised and penalty is not None:
        raise ValueError(f"penalty={penalty!r} must be None for {on_truncation!r}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip!r} must be above 0, or None")
