"""Training metrics of PPO: masked sums on the device that add up, then numbers on the host.

Functions named `_sums` run on the device and return sums over what they are given: those of
micro-batches, devices and processes are added. Functions named `_numbers` run on the host, in
float64, and divide the sums of a whole step or rollout. An undefined number (a correlation without
variance, a mean of nothing) is NaN; `metrics.jsonl` leaves it out.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from huatuo_jax.ppo.rewards import k3, log_ratios
from huatuo_jax.training.losses import count_answers, has_tokens, masked, wide
from huatuo_jax.training.metrics import Sums, ratio

# A variance below this share of the mean square is float32's rounding.
_LEAST_VARIANCE = 1e-6


def policy_sums(
    log_ratios_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    clipped_low_BT: jax.Array,
    clipped_high_BT: jax.Array,
    dual_clipped_BT: jax.Array | None = None,
) -> Sums:
    """Sums how far the policy has moved from the one that sampled.

    Args:
        log_ratios_BT: log policy - log old policy, zero outside of the mask.
        mask_BT: the answers' tokens.
        clipped_low_BT: bool, tokens whose gradient the lower clip stops.
        clipped_high_BT: those that the upper one stops.
        dual_clipped_BT: those that the bound for negative advantages stops; None for none.

    Returns:
        `answers`; `tokens`, and sums over them of `ratio`, `clipped_low`, `clipped_high`,
        `dual_clipped`, and of
        the estimates of KL(old policy, policy) from samples of the old one, `approximate_kl_k1`
        and `approximate_kl_k3`.
    """
    return {
        "answers": count_answers(mask_BT),
        "tokens": mask_BT.sum(),
        "ratio": masked(jnp.exp(log_ratios_BT), mask_BT).sum(),
        "clipped_low": clipped_low_BT.sum(),
        "clipped_high": clipped_high_BT.sum(),
        "dual_clipped": jnp.zeros((), jnp.int32)
        if dual_clipped_BT is None
        else dual_clipped_BT.sum(),
        "approximate_kl_k1": -log_ratios_BT.sum(),
        "approximate_kl_k3": k3(-log_ratios_BT).sum(),
    }


def policy_numbers(sums: Mapping[str, Any], *, prefix: str) -> dict[str, float]:
    """Computes means over a step's tokens, and the approximate KL of a whole answer.

    Args:
        sums: of `policy_sums`, and `entropy` and `kl_loss` where the loss holds them.
        prefix: of the names, as `ppo`.
    """
    tokens = float(sums["tokens"])
    names = {
        "ratio": "ratio",
        "clipped_low": "clipped_low",
        "clipped_high": "clipped_high",
        "dual_clipped": "dual_clipped",
        "approximate_kl_k1": "approximate_kl_k1_per_token",
        "approximate_kl_k3": "approximate_kl_k3_per_token",
    }
    names |= {name: name for name in ("entropy", "kl_loss") if name in sums}
    numbers = {f"{prefix}/{new}": ratio(sums[name], tokens) for name, new in names.items()}
    whole = ratio(sums["approximate_kl_k3"], float(sums["answers"]))
    return numbers | {f"{prefix}/approximate_kl_k3_per_sequence": whole}


def value_sums(
    values_BT: jax.Array, returns_BT: jax.Array, mask_BT: jax.Array, *, clipped_BT: jax.Array
) -> Sums:
    """Sums how well the critic predicts its targets.

    Args:
        values_BT: the critic's.
        returns_BT: its targets.
        mask_BT: the answers' tokens.
        clipped_BT: bool, tokens whose gradient the clip stops.

    Returns:
        `tokens`, and sums over them of `value`, `return` and `error` (return - value), of the
        squares of the last two, and of `value_clipped`.
    """
    returns_BT = masked(returns_BT, mask_BT)
    values_BT = masked(values_BT, mask_BT)
    errors_BT = returns_BT - values_BT
    return {
        "tokens": mask_BT.sum(),
        "value": values_BT.sum(),
        "return": returns_BT.sum(),
        "return_squared": jnp.square(returns_BT).sum(),
        "error": errors_BT.sum(),
        "error_squared": jnp.square(errors_BT).sum(),
        "value_clipped": (clipped_BT & mask_BT).sum(),
    }


def value_numbers(sums: Mapping[str, Any], *, prefix: str) -> dict[str, float]:
    """Computes means over tokens, and explained variance: 1 - Var(return - value) / Var(return).

    Args:
        sums: of `value_sums`.
        prefix: of the names.
    """
    tokens = float(sums["tokens"])
    of_returns = _variance(sums["return"], sums["return_squared"], tokens)
    error, squared = ratio(sums["error"], tokens), ratio(sums["error_squared"], tokens)
    return {
        f"{prefix}/value": ratio(sums["value"], tokens),
        f"{prefix}/return": ratio(sums["return"], tokens),
        f"{prefix}/value_error_squared": squared,
        f"{prefix}/value_clipped": ratio(sums["value_clipped"], tokens),
        f"{prefix}/explained_variance": 1 - ratio(squared - error**2, of_returns),
    }


def rollout_sums(
    old_log_probs_BT: jax.Array,
    reference_log_probs_BT: jax.Array,
    sampler_log_probs_BT: jax.Array,
    scores_B: jax.Array,
    ended_B: jax.Array,
    mask_BT: jax.Array,
    has_reward_B: jax.Array | None = None,
) -> Sums:
    """Sums what the policy sampled, before it is trained on.

    Args:
        old_log_probs_BT: of the policy that sampled, recomputed by the training graph.
        reference_log_probs_BT: of the reference.
        sampler_log_probs_BT: of the policy as the sampler computed them, at the same temperature.
        scores_B: of the reward model, without penalties.
        ended_B: bool, from `rewards.have_ended`.
        mask_BT: the answers' tokens.
        has_reward_B: bool, answers whose score is one; None for all.

    Returns:
        `tokens`; sums over them of `kl_k1`, `kl_k3`, `surprise` (minus the log-probability, whose
        mean estimates the entropy) and `mismatch`, exp|sampler - trainer|; `answers`; sums over
        them of `ended`, `length` and its square; `rewarded`, answers with a score; sums over them
        of `score`, `rewarded_length`, their squares and `score_times_length`.
    """
    is_answer_B = has_tokens(mask_BT)
    is_rewarded_B = is_answer_B if has_reward_B is None else is_answer_B & has_reward_B
    ratios_BT = log_ratios(old_log_probs_BT, reference_log_probs_BT, mask_BT)
    differences_BT = log_ratios(sampler_log_probs_BT, old_log_probs_BT, mask_BT)
    scores_B = masked(scores_B, is_rewarded_B)
    lengths_B = mask_BT.sum(axis=1).astype(scores_B.dtype)
    rewarded_lengths_B = masked(lengths_B, is_rewarded_B)
    return {
        "tokens": mask_BT.sum(),
        "kl_k1": ratios_BT.sum(),
        "kl_k3": k3(ratios_BT).sum(),
        "surprise": -masked(old_log_probs_BT, mask_BT).sum(),
        "mismatch": masked(jnp.exp(jnp.abs(differences_BT)), mask_BT).sum(),
        "answers": is_answer_B.sum(),
        "ended": (ended_B & is_answer_B).sum(),
        "length": lengths_B.sum(),
        "length_squared": jnp.square(lengths_B).sum(),
        "rewarded": is_rewarded_B.sum(),
        "rewarded_length": rewarded_lengths_B.sum(),
        "rewarded_length_squared": jnp.square(rewarded_lengths_B).sum(),
        "score": scores_B.sum(),
        "score_squared": jnp.square(scores_B).sum(),
        "score_times_length": (scores_B * lengths_B).sum(),
    }


def rollout_numbers(sums: Mapping[str, Any], *, prefix: str) -> dict[str, float]:
    """Computes means over tokens and answers, and the correlation of score and length (Pearson's).

    Args:
        sums: of `rollout_sums`.
        prefix: of the names. `kl_per_sequence` is what `kl.next_kl_coef` goes by.
    """
    tokens, answers = float(sums["tokens"]), float(sums["answers"])
    rewarded = float(sums["rewarded"])
    score, rewarded_length = (ratio(sums[n], rewarded) for n in ("score", "rewarded_length"))
    variances = [
        _variance(sums[name], sums[f"{name}_squared"], rewarded)
        for name in ("score", "rewarded_length")
    ]
    covariance = ratio(sums["score_times_length"], rewarded) - score * rewarded_length
    correlation = ratio(covariance, math.sqrt(math.prod(variances)))
    of_lengths = _variance(sums["length"], sums["length_squared"], answers)
    return {
        f"{prefix}/kl_per_sequence": ratio(sums["kl_k1"], answers),
        f"{prefix}/kl_per_token": ratio(sums["kl_k1"], tokens),
        f"{prefix}/kl_k3_per_sequence": ratio(sums["kl_k3"], answers),
        f"{prefix}/kl_k3_per_token": ratio(sums["kl_k3"], tokens),
        f"{prefix}/sampled_entropy": ratio(sums["surprise"], tokens),
        f"{prefix}/sampler_mismatch": ratio(sums["mismatch"], tokens),
        f"{prefix}/eos_rate": ratio(sums["ended"], answers),
        f"{prefix}/response_length": ratio(sums["length"], answers),
        f"{prefix}/response_length_deviation": math.sqrt(of_lengths),
        f"{prefix}/score": score,
        f"{prefix}/score_deviation": math.sqrt(variances[0]),
        f"{prefix}/score_length_correlation": float(np.clip(correlation, -1, 1)),
    }


def distinct_sums(token_ids_BT: jax.Array, mask_BT: jax.Array, *, n: int) -> Sums:
    """Sums distinct-n of each answer (arXiv 1510.03055, section 5.3), over its tokens.

    The share of its n-grams that differ, a mean of answers rather than of all their n-grams
    together, so that it does not fall with the size of the batch. Exact: n-grams are sorted.

    Args:
        token_ids_BT: the sampled ids.
        mask_BT: the answers' tokens.
        n: tokens of an n-gram.

    Returns:
        `distinct_N`, the sum of shares, and `distinct_N_answers`, those long enough to have one.

    Raises:
        ValueError: `n` is not between 1 and the number of slots.
    """
    num_slots = mask_BT.shape[1]
    if not 1 <= n <= num_slots:
        raise ValueError(f"n={n!r} must be between 1 and the {num_slots} slots")
    windows = [slice(start, num_slots - n + 1 + start) for start in range(n)]
    is_ngram_BS = jnp.stack([mask_BT[:, window] for window in windows]).all(axis=0)
    columns = [jnp.where(is_ngram_BS, token_ids_BT[:, window], 0) for window in windows]
    is_other_BS, *columns = jax.lax.sort(
        (~is_ngram_BS, *columns), dimension=1, num_keys=n + 1, is_stable=False
    )
    differs_BS = jnp.stack([column[:, 1:] != column[:, :-1] for column in columns]).any(axis=0)
    is_new_BS = jnp.pad(differs_BS, ((0, 0), (1, 0)), constant_values=True) & ~is_other_BS
    counts_B = is_ngram_BS.sum(axis=1)
    shares_B = wide(is_new_BS.sum(axis=1)) / jnp.maximum(counts_B, 1)
    return {f"distinct_{n}": shares_B.sum(), f"distinct_{n}_answers": (counts_B > 0).sum()}


def distinct_numbers(sums: Mapping[str, Any], *, n: int, prefix: str) -> dict[str, float]:
    """Computes means over answers.

    Args:
        sums: of `distinct_sums`.
        n: tokens of an n-gram.
        prefix: of the name.
    """
    share = ratio(sums[f"distinct_{n}"], float(sums[f"distinct_{n}_answers"]))
    return {f"{prefix}/distinct_{n}": share}


def _variance(total: Any, total_squared: Any, count: float) -> float:
    """Computes a variance; zero where it is only rounding, as nothing may be divided by that."""
    mean, square = ratio(total, count), ratio(total_squared, count)
    variance = square - mean**2
    return 0.0 if variance <= _LEAST_VARIANCE * square else variance
