"""What a DPO policy is trained on: rows of answers, and pairs of answers of one row."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.dpo.policy import both
from huatuo_jax.rl.masks import (
    masked,
    wide,
)
from huatuo_jax.scoring import answer_log_probs
from huatuo_jax.training.metrics import Sums, ratio
from huatuo_jax.training.state import Variables
from huatuo_jax.training.update import Batch, LossSums


def row_loss(
    model: Transformer, variables: Variables, batch: Batch, *, beta: float, chunk: int = 128
) -> LossSums:
    """The summed loss of a batch's pairs; each answer goes through policy and reference once.

    Args:
        model: the policy's.
        variables: the policy's, with the reference among them, see `policy.both`.
        batch: rows of answers (`token_ids`, `segment_ids`, `positions`, `trained_mask`, each
            `[B, T]`) and pairs: `chosen_at` and `rejected_at` (where in the row their last tokens
            stand), `p_chosen` and `pair_weight`, each `[B, P]`. A weight of 0 is no pair.
        beta: see `rl.losses.dpo_loss`.
        chunk: positions of each row whose logits are held at once.

    Returns:
        Sums over pairs. Beside those of `dpo_loss`: `objective` (the loss), `chosen_log_prob` and
        `rejected_log_prob` of the policy, summed over whole answers; `tokens` without padding,
        `answer_tokens`; `attended_pairs` of query and key.
    """
    is_pair_BP = batch["pair_weight"] > 0

    def pairs(variables: Variables) -> tuple[jax.Array, jax.Array]:
        log_probs_BT = answer_log_probs(model, variables, batch, chunk=chunk)

        def at(ends_BP: jax.Array) -> jax.Array:
            return _of_answers(log_probs_BT, batch["segment_ids"], ends_BP).reshape(-1)

        return at(batch["chosen_at"]), at(batch["rejected_at"])

    policy, reference = both(variables)
    chosen_N, rejected_N = pairs(policy)
    is_pair_N = is_pair_BP.reshape(-1)
    sums = dpo_loss(
        chosen_N,
        rejected_N,
        *jax.lax.stop_gradient(pairs(jax.lax.stop_gradient(reference))),
        batch["p_chosen"].reshape(-1),
        is_pair_N,
        beta=beta,
    )
    is_token_BT = batch["segment_ids"] > 0
    seen_BT = batch["positions"] + 1
    if model.cfg.sliding_window is not None:
        seen_BT = seen_BT.clip(max=model.cfg.sliding_window)
    others = {
        "objective": sums.loss,
        "chosen_log_prob": jnp.where(is_pair_N, chosen_N, 0).sum(),
        "rejected_log_prob": jnp.where(is_pair_N, rejected_N, 0).sum(),
        "tokens": is_token_BT.sum(),
        "answer_tokens": batch["trained_mask"].sum(),
        "attended_pairs": (seen_BT * is_token_BT).astype(jnp.float32).sum(),
    }
    return sums._replace(others=sums.others | jax.lax.stop_gradient(others))


def _of_answers(values_BT: jax.Array, segment_ids_BT: jax.Array, ends_BP: jax.Array) -> jax.Array:
    """Sums of the values over the segments that end there, `[B, P]`."""
    segments_BP = jnp.take_along_axis(segment_ids_BT, ends_BP, axis=1)
    is_in_BPT = segment_ids_BT[:, None, :] == segments_BP[:, :, None]
    return jnp.where(is_in_BPT, values_BT[:, None, :], 0).sum(axis=2)


# Units in the last place.
_ROUNDING = 8


def dpo_loss(
    chosen_log_probs_B: jax.Array,
    rejected_log_probs_B: jax.Array,
    reference_chosen_log_probs_B: jax.Array,
    reference_rejected_log_probs_B: jax.Array,
    p_chosen_B: jax.Array,
    mask_B: jax.Array,
    *,
    beta: float,
) -> LossSums:
    """The DPO loss (arXiv 2305.18290, equation 7), with soft labels.

    The cross-entropy of sigmoid(beta * margin), the margin being how much more the policy prefers
    the chosen answer than the reference does, against the probability that it is the better one.
    At its least, with exact labels of Bradley-Terry rewards, the policy is in proportion to
    reference * exp(reward / beta), which is PPO's optimum with `kl_coef=beta`.

    Args:
        chosen_log_probs_B: of whole answers (`masks.sum_by_answer`); differentiated, as are the
            rejected ones.
        rejected_log_probs_B: of the others.
        reference_chosen_log_probs_B: of the reference, at the same temperature.
        reference_rejected_log_probs_B: of the reference.
        p_chosen_B: 1 for a plain label, 0.5 for a tie.
        mask_B: bool, rows that hold a pair.
        beta: how strongly the reference holds.

    Returns:
        Sums over pairs; `others` are `gauges.preference_sums`.

    Raises:
        ValueError: `beta` is not above 0.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta!r} must be above 0")
    reference_chosen_B, reference_rejected_B, p_chosen_B = jax.lax.stop_gradient(
        (wide(reference_chosen_log_probs_B), wide(reference_rejected_log_probs_B), p_chosen_B)
    )
    chosen_B = masked(wide(chosen_log_probs_B) - reference_chosen_B, mask_B)
    rejected_B = masked(wide(rejected_log_probs_B) - reference_rejected_B, mask_B)
    p_chosen_B = masked(p_chosen_B, mask_B)
    logits_B = beta * (chosen_B - rejected_B)
    likelihood_B = p_chosen_B * jax.nn.log_sigmoid(logits_B)
    likelihood_B += (1 - p_chosen_B) * jax.nn.log_sigmoid(-logits_B)
    return LossSums(
        loss=-masked(likelihood_B, mask_B).sum(),
        num_terms=mask_B.sum(),
        others=preference_sums(
            *jax.lax.stop_gradient((beta * chosen_B, beta * rejected_B)),
            p_chosen_B,
            mask_B,
            rounding_B=beta * _rounding(chosen_log_probs_B, rejected_log_probs_B, mask_B),
        ),
    )


def _rounding(chosen_B: jax.Array, rejected_B: jax.Array, mask_B: jax.Array) -> jax.Array:
    """By how much the log-probabilities of two programs may differ for the same weights, `[B]`."""
    size_B = jnp.abs(masked(wide(chosen_B), mask_B)) + jnp.abs(masked(wide(rejected_B), mask_B))
    return jax.lax.stop_gradient(_ROUNDING * jnp.finfo(size_B.dtype).eps * size_B)


def preference_sums(
    chosen_B: jax.Array,
    rejected_B: jax.Array,
    p_chosen_B: jax.Array,
    mask_B: jax.Array,
    *,
    rounding_B: jax.Array | float = 0.0,
) -> Sums:
    """What DPO's implicit rewards say of the pairs.

    Args:
        chosen_B: beta times the log-ratio of the chosen answer, zero outside of the mask.
        rejected_B: of the rejected one.
        p_chosen_B: the labels.
        mask_B: bool, rows that hold a pair.
        rounding_B: rewards that differ by no more are a tie, as they are before the first step.

    Returns:
        `pairs`, and sums over them of `chosen_reward`, `rejected_reward`, and `agreed`: 1 where
        the rewards order the pair as its label does, 0.5 where either sees a tie.
    """
    margin_B = chosen_B - rejected_B
    margin_B = jnp.where(jnp.abs(margin_B) <= rounding_B, 0, margin_B)
    order_B = jnp.sign(margin_B) * jnp.sign(p_chosen_B - 0.5)
    return {
        "pairs": mask_B.sum(),
        "chosen_reward": chosen_B.sum(),
        "rejected_reward": rejected_B.sum(),
        "agreed": masked((1 + order_B) / 2, mask_B).sum(),
    }


def preference_numbers(sums: Mapping[str, Any], *, prefix: str) -> dict[str, float]:
    """Means over pairs.

    Args:
        sums: of `preference_sums`.
        prefix: of the names.
    """
    pairs = float(sums["pairs"])
    chosen, rejected = (ratio(sums[f"{side}_reward"], pairs) for side in ("chosen", "rejected"))
    return {
        f"{prefix}/chosen_reward": chosen,
        f"{prefix}/rejected_reward": rejected,
        f"{prefix}/margin": chosen - rejected,
        f"{prefix}/accuracy": ratio(sums["agreed"], pairs),
    }
