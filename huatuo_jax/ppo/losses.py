"""What the policy and the critic are trained on, from their variables and a minibatch of rows.

A row is made of segments, each a prompt and an answer end to end, and then padding (`layout`).
Numbers of a token lie in its own slot; the critic's value there is that of the state before it.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax

from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.ppo.update import Outputs
from huatuo_jax.rl.kl import KlLoss
from huatuo_jax.rl.losses import add_entropy_bonus, add_kl_loss, policy_loss, value_loss
from huatuo_jax.rl.masks import Answers
from huatuo_jax.scoring import head_scores
from huatuo_jax.training.losses import at_tokens, hidden_of, next_tokens, token_scores
from huatuo_jax.training.state import Variables
from huatuo_jax.training.update import Batch, LossSums


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """How the policy's loss is made up; the fields are those of `rl.losses`.

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


def policy_row_loss(
    model: Transformer, objective: PolicyObjective
) -> "functools.partial[tuple[LossSums, Outputs]]":
    """The policy's loss as a pass takes it; its outputs are `log_probs`, zero outside answers."""
    return functools.partial(_policy_row_loss, model, objective)


def _policy_row_loss(
    model: Transformer,
    objective: PolicyObjective,
    variables: Variables,
    batch: Batch,
    kl_coef: jax.Array,
) -> tuple[LossSums, Outputs]:
    mask_BT = batch["mask"]
    scores = token_scores(
        functools.partial(model.apply, variables, method="logits"),
        hidden_of(model, variables, batch),
        next_tokens(batch["token_ids"]),
        next_tokens(mask_BT),
        temperature=objective.temperature,
        chunk=objective.chunk,
        entropy=True,
    )
    log_probs_BT, entropies_BT = at_tokens(scores.log_probs_BT), at_tokens(scores.entropies_BT)
    sums = policy_loss(
        log_probs_BT,
        batch["old_log_probs"],
        batch["advantages"],
        mask_BT,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        dual_clip=objective.dual_clip,
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
            answers=Answers(batch["answers"], objective.num_answers),
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
    """The critic's loss as a pass takes it.

    Its outputs are `values`, those of the states before the tokens, and `values_after`, those of
    the states after them; both mean nothing outside of answers.

    Args:
        model: a backbone with a score head.
        clip: see `rl.losses.value_loss`.
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
