"""What a DPO policy is trained on: rows of answers, and pairs of answers of one row."""

import jax
import jax.numpy as jnp

from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.dpo.policy import both
from huatuo_jax.rl.losses import dpo_loss
from huatuo_jax.scoring import answer_log_probs
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
