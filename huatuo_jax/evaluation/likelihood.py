"""What models say of given text: the loss on held-out dialogues, and how far two models differ."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.checkpoint import models
from huatuo_jax.feedback.intervals import Values
from huatuo_jax.scoring import GivenAnswer, Scorer
from huatuo_jax.sft import evaluation_numbers, token_loss
from huatuo_jax.training.dialogue_data import DialogueData
from huatuo_jax.training.evaluation import make_measure


def held_out_loss(
    info: models.ModelInfo,
    data: DialogueData,
    *,
    compute: ComputeConfig,
    mesh: Mesh,
    rows_at_once: int,
    chunk: int,
) -> dict[str, float]:
    """Loss, perplexity and token accuracy on the held-out dialogues, as fine-tuning reports them.

    Args:
        info: the model.
        data: with held-out rows.
        compute: how it is computed.
        mesh: where.
        rows_at_once: rows of a batch.
        chunk: positions of each row whose logits are held at once.
    """
    module = Transformer(info.cfg, compute)
    variables = {"params": models.load_params(info, mesh=mesh)}
    measure = make_measure(
        lambda variables, batch: token_loss(module, variables, batch, chunk=chunk).others,
        lambda: data.evaluation_batches(rows_at_once, mesh),
        evaluation_numbers,
        mesh,
    )
    return measure(variables)


def sequence_kl(
    policy: models.ModelInfo,
    reference: models.ModelInfo,
    answers: Mapping[str, Sequence[GivenAnswer]],
    *,
    compute: ComputeConfig,
    mesh: Mesh,
    rows_at_once: int,
    temperature: float,
) -> tuple[Values, int]:
    """The log-ratio of policy to reference of each of the policy's own answers, by prompt.

    Its mean estimates the KL divergence per answer without bias; a single one may be negative.

    Args:
        policy: whose answers they are.
        reference: what it is compared with.
        answers: as sampled, by prompt.
        compute: how both are computed.
        mesh: where.
        rows_at_once: rows of a batch.
        temperature: they were sampled at.

    Returns:
        The log-ratios, and the tokens of all answers.
    """
    flat = [one for found in answers.values() for one in found]

    def log_probs(info: models.ModelInfo) -> list[np.ndarray]:
        scorer = Scorer(
            Transformer(info.cfg, compute),
            {"params": models.load_params(info, mesh=mesh)},
            mesh=mesh,
            rows_at_once=rows_at_once,
        )
        return scorer.log_probs(flat, temperature=temperature)

    ratios = iter(_ratios(log_probs, policy, reference))
    num_tokens = sum(len(one.token_ids) - one.prompt_length for one in flat)
    return {name: [next(ratios) for _ in found] for name, found in answers.items()}, num_tokens


def _ratios(
    log_probs: Callable[[models.ModelInfo], list[np.ndarray]],
    policy: models.ModelInfo,
    reference: models.ModelInfo,
) -> list[float]:
    return [
        float(np.asarray(one, np.float64).sum() - np.asarray(other, np.float64).sum())
        for one, other in zip(log_probs(policy), log_probs(reference), strict=True)
    ]
