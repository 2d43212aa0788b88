"""The loss of a reward model, as pure functions of scores.

Bradley and Terry (1952): the answer with score r is preferred over the one with score s with
probability sigmoid(r - s); as a loss of a language model, InstructGPT (arXiv 2203.02155, equation
1). Labels may be soft: `p_chosen` is the probability that the judge prefers the chosen answer.
"""

import jax
import jax.numpy as jnp

from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.scoring import head_scores
from huatuo_jax.training.state import Variables
from huatuo_jax.training.update import Batch, LossSums


def pair_losses(
    chosen: jax.Array,
    rejected: jax.Array,
    *,
    p_chosen: jax.Array,
    margin: jax.Array | float = 0.0,
    centring: float = 0.0,
) -> jax.Array:
    """The cross-entropy of each pair, and a penalty on scores that drift away from 0 together.

    Args:
        chosen: scores.
        rejected: scores, of the same shape.
        p_chosen: how likely the chosen answer is the better one, 0 to 1; 0.5 is a tie.
        margin: how far apart the scores have to be beyond what the label asks for (arXiv
            2307.09288, equation 2), chosen minus rejected: swapping the answers of a pair turns its
            sign. The loss of a tie is least where the scores differ by it; a negative one asks
            less of the chosen answer.
        centring: factor of the squared sum of both scores (arXiv 2312.09244, section 2), which
            fixes the level that comparisons leave free.

    Returns:
        One loss a pair, in the dtype of the scores.
    """
    difference = chosen - rejected - margin
    won = jnp.logaddexp(-difference, 0.0)
    lost = jnp.logaddexp(difference, 0.0)
    losses = p_chosen * won + (1 - p_chosen) * lost
    return losses + centring * jnp.square(chosen + rejected) if centring else losses


def reward_loss(
    model: Transformer,
    variables: Variables,
    batch: Batch,
    *,
    margin_scale: float = 0.0,
    centring: float = 0.0,
) -> LossSums:
    """The summed loss of a batch's pairs; each answer goes through the model once.

    Args:
        model: a backbone with a score head.
        variables: its own.
        batch: rows of answers (`token_ids`, `segment_ids`, `positions`, each `[B, T]`) and pairs
            of answers of one row: `chosen_at` and `rejected_at` (where in the row their last
            tokens stand), `p_chosen`, `margin` and `pair_weight`, each `[B, P]`. A weight of 0 is
            no pair.
        margin_scale: factor of the margins.
        centring: see `pair_losses`.

    Returns:
        `num_terms` is the sum of the weights. Beside the loss: `pairs`; `cross_entropy` without
        margin and centring, weighted as the loss; `labelled` pairs, those that are no tie, and
        `correct` ones among them (equal scores count half); `difference` of scores, turned so that
        the preferred answer comes first; `tokens` without padding; `attended_pairs` of query and
        key.
    """
    scores_BT = head_scores(model, variables, batch)
    weight_BP, p_chosen_BP = batch["pair_weight"], batch["p_chosen"]
    is_pair_BP = weight_BP > 0

    def at(places_BP: jax.Array) -> jax.Array:
        # What stands at padding means nothing, and must not reach a sum even times 0.
        return jnp.where(is_pair_BP, jnp.take_along_axis(scores_BT, places_BP, axis=1), 0)

    chosen_BP, rejected_BP = at(batch["chosen_at"]), at(batch["rejected_at"])
    losses_BP = pair_losses(
        chosen_BP,
        rejected_BP,
        p_chosen=p_chosen_BP,
        margin=margin_scale * batch["margin"],
        centring=centring,
    )
    plain_BP = pair_losses(chosen_BP, rejected_BP, p_chosen=p_chosen_BP)
    side_BP = jnp.sign(p_chosen_BP - 0.5) * is_pair_BP
    difference_BP = side_BP * (chosen_BP - rejected_BP)
    is_token_BT = batch["segment_ids"] > 0
    seen_BT = batch["positions"] + 1
    if model.cfg.sliding_window is not None:
        seen_BT = seen_BT.clip(max=model.cfg.sliding_window)
    return LossSums(
        loss=(weight_BP * losses_BP).sum(),
        num_terms=weight_BP.sum(),
        others={
            "pairs": is_pair_BP.sum(),
            "weights": weight_BP.sum(),
            "objective": (weight_BP * losses_BP).sum(),
            "cross_entropy": (weight_BP * plain_BP).sum(),
            "labelled": jnp.abs(side_BP).sum(),
            "correct": (jnp.abs(side_BP) * (jnp.sign(difference_BP) + 1) / 2).sum(),
            "difference": difference_BP.sum(),
            "tokens": is_token_BT.sum(),
            "attended_pairs": (seen_BT * is_token_BT).astype(jnp.float32).sum(),
        },
    )
