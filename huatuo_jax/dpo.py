"""The DPO stage: an SFT model and comparisons in, a policy out; no reward model, no sampling.

Direct preference optimisation (arXiv 2305.18290) and its relatives: IPO, smoothed labels,
log-ratios of a mean token, and the loss of fine-tuning beside it. Each row holds answers and pairs
of them. Policy and reference lie side by side in one state: the reference takes the place of what
is trained, in a collection of its own among the frozen variables, so a checkpoint holds it and a
run that resumes has the very same.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from huatuo_jax.backbone.matmul import store_as_computed
from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.preferences.rows import (
    Denominator,
    PreferenceConfig,
    PreferenceStage,
    RowsConfig,
    check_fits,
)
from huatuo_jax.training.initial_model import InitialModel, open_model
from huatuo_jax.training.loop import StepReport, step_numbers
from huatuo_jax.training.losses import masked, row_sizes, wide
from huatuo_jax.training.metrics import ModelFlops, Sums, ratio
from huatuo_jax.training.optimizer import Optimizer
from huatuo_jax.training.scoring import answer_log_probs
from huatuo_jax.training.stage import run_stage, stage_step
from huatuo_jax.training.update import (
    Batch,
    LossSums,
    Step,
    TrainState,
    Variables,
    abstract,
    make_sharded,
)

STAGE = "dpo"

Form = Literal["sigmoid", "square"]

REFERENCE = "reference"
"""The collection with what the reference has in the place of what is trained."""

# Units in the last place.
_ROUNDING = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoConfig(PreferenceConfig):
    """A run of direct preference optimisation (arXiv 2305.18290).

    Attributes:
        model: the policy to start from, which is the reference too, mostly an SFT model's directory
            (`{workdir}/sft/model` is that of this run). With `lora` policy and reference share the
            frozen weights, the reference being the model without its adapters.
        data: the comparisons, those that a reward model would be trained on.
        beta: how strongly the reference holds; PPO's `kl_coef` for the same optimum.
        form: the loss of a pair, see `dpo_loss`: `sigmoid` of DPO, or the `square` of IPO (arXiv
            2310.12036), which does not drive certain labels apart without bound.
        label_smoothing: the share of the labels that are taken for wrong: a probability p becomes
            p + label_smoothing * (1 - 2 p).
        per_token: compare log-ratios of a mean token in place of those of whole answers, so that a
            longer answer does not weigh more.
        sft_coef: weight of the loss of fine-tuning on the better answer of a pair, in nats of a
            mean token (arXiv 2404.19733); the other one counts as far as the label prefers it.
        denominator: what a step's loss is divided by: its `pairs`, or its `prompts`, where all
            pairs of a prompt together weigh as much as the one pair of another.
        seed: of fresh adapters and of the order of the data.
    """

    beta: float = 0.1
    form: Form = "sigmoid"
    label_smoothing: float = 0.0
    per_token: bool = False
    sft_coef: float = 0.0
    denominator: Denominator = "pairs"
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Raises ValueError for a number that is out of its range."""
        super().__post_init__()
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta={self.beta!r} must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing={self.label_smoothing!r} must be 0 or more and below .5"
            )
        if not 0 <= self.sft_coef < float("inf"):
            raise ValueError(f"sft_coef={self.sft_coef!r} must be 0 or more")

    def rows(self, *, shuffled: bool, denominator: Denominator | None = None) -> RowsConfig:
        """Returns how comparisons become rows, to train on or to evaluate."""
        return super().rows(shuffled=shuffled, denominator=denominator or self.denominator)


class DpoStage(PreferenceStage[DpoConfig]):
    """One run of direct preference optimisation."""

    name = STAGE

    @staticmethod
    def open_model(cfg: DpoConfig) -> InitialModel:
        """Finds the policy and checks that the comparisons suit it."""
        model = open_model(cfg.model, cfg.compute.compute_config())
        check_fits(cfg.data, model.cfg, stage=STAGE)
        return model

    def make_step(self, cfg: DpoConfig, *, num_steps: int) -> Step:
        """Makes the optimizer step of a run of so many steps."""
        return dpo_step(cfg, self.model, self.mesh, num_steps=num_steps)

    def make_state(self, step: Step) -> TrainState:
        """Makes the state before the first step, in its shards."""
        key = jax.random.key(self.cfg.seed)
        return make_state(self.model, key, step.optimizer, self.mesh)

    def report(self, metrics: Mapping[str, np.ndarray]) -> StepReport:
        """Returns the numbers of an optimizer step."""
        return report_step(metrics, flops=self.model.flops)

    def evaluation_numbers(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns the numbers of held-out data."""
        loss = ratio(sums["objective"], float(sums["weights"]))
        return {"eval/loss": loss} | numbers(sums, prefix="eval")


def run_dpo(
    config: DpoConfig,
    workdir: str | os.PathLike[str],
    *,
    after_evaluation: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Runs the stage, resuming from its newest checkpoint; returns the saved result if it is done.

    Args:
        config: of the stage; `{workdir}` in a path stands for the run's folder.
        workdir: the run's folder.
        after_evaluation: called after each evaluation, in the first process alone.

    Returns:
        The last step and its evaluation. The policy is in `WORKDIR/dpo/model`, an Orbax directory
        with the tokenizer, adapters merged.

    Raises:
        ValueError: an invalid config, file, model or mesh; before anything is compiled.
        FileNotFoundError: there is no such model.
        Interrupted: the run was stopped and saved.
        Diverged: too many steps in a row were not finite.
        OSError: something cannot be read or written.
    """
    return run_stage(DpoStage, DpoConfig, config, workdir, after_evaluation=after_evaluation)


def dpo_step(cfg: DpoConfig, model: InitialModel, mesh: Mesh, *, num_steps: int) -> Step:
    """Makes the optimizer step of a run of so many steps."""
    loss = functools.partial(
        row_loss,
        model.transformer,
        beta=cfg.beta,
        form=cfg.form,
        label_smoothing=cfg.label_smoothing,
        per_token=cfg.per_token,
        sft_coef=cfg.sft_coef,
        chunk=cfg.compute.loss_chunk,
    )
    of_model = functools.partial(abstract_state, model, mesh=mesh)
    return stage_step(cfg, loss, of_model, mesh, num_steps=num_steps)


def make_state(
    policy: InitialModel, key: jax.Array, optimizer: Optimizer, mesh: Mesh
) -> TrainState:
    """Makes the state before the first step, in its shards.

    Raises:
        ValueError: as `InitialModel.make_state`.
        OSError: the weights cannot be read.
    """
    state = policy.make_state(key, optimizer, mesh)
    # Under jit, so that no array is both the policy's and the reference's.
    reference = make_sharded(lambda trained: _reference(policy, trained), mesh, state.trained)
    return dataclasses.replace(state, frozen=state.frozen | {REFERENCE: reference})


def abstract_state(policy: InitialModel, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """Returns that state's shapes and shardings."""
    state = policy.abstract_state(optimizer, mesh)
    reference = abstract(lambda trained: _reference(policy, trained), mesh, state.trained)
    return dataclasses.replace(state, frozen=state.frozen | {REFERENCE: reference})


def both(variables: Variables) -> tuple[Variables, Variables]:
    """Returns the variables of the policy, and those of its reference."""
    own = {name: part for name, part in variables.items() if name != REFERENCE}
    return own, _overlaid(own, variables[REFERENCE])


def _reference(policy: InitialModel, trained: Variables) -> Variables:
    """Makes adapters of zeros, which add 0, or the weights as the forward pass casts them."""
    if policy.section.lora is not None:
        return jax.tree.map(jnp.zeros_like, trained)
    return dict(
        store_as_computed(trained, policy.compute.compute_dtype, keep_lm_head=policy.cfg.norm_head)
    )


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> Variables:
    """Replaces leaves of a nested dict by those of another."""
    return dict(below) | {
        name: _overlaid(below[name], part) if isinstance(part, Mapping) else part
        for name, part in above.items()
    }


def row_loss(
    model: Transformer,
    variables: Variables,
    batch: Batch,
    *,
    beta: float,
    form: Form = "sigmoid",
    label_smoothing: float = 0.0,
    per_token: bool = False,
    sft_coef: float = 0.0,
    chunk: int = 128,
) -> LossSums:
    """Sums the loss of a batch's pairs; each answer goes through policy and reference once.

    Args:
        model: the policy's.
        variables: the policy's, with the reference among them, see `both`.
        batch: rows of answers (`token_ids`, `segment_ids`, `positions`, `trained_mask`, each
            `[B, T]`) and pairs: `chosen_at` and `rejected_at` (where in the row their last tokens
            stand), `p_chosen` and `pair_weight`, each `[B, P]`. A weight of 0 is no pair.
        beta: see `dpo_loss`.
        form: see `dpo_loss`.
        label_smoothing: see `dpo_loss`.
        per_token: see `DpoConfig`.
        sft_coef: see `DpoConfig`.
        chunk: positions of each row whose logits are held at once.

    Returns:
        Sums over pairs. Beside those of `dpo_loss`: `objective` (the loss), `sft_loss` where it is
        part of that, `weights` of the pairs, `chosen_log_prob` and `rejected_log_prob` of the
        policy, summed over whole answers; `tokens` without padding, `answer_tokens`;
        `attended_pairs` of query and key.
    """
    weight_N = batch["pair_weight"].reshape(-1)
    is_pair_N, p_chosen_N = weight_N > 0, batch["p_chosen"].reshape(-1)

    def of_pairs(values_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen_BP, rejected_BP = (
            _of_answers(values_BT, batch["segment_ids"], batch[f"{side}_at"])
            for side in ("chosen", "rejected")
        )
        return chosen_BP.reshape(-1), rejected_BP.reshape(-1)

    def log_probs(variables: Variables) -> tuple[jax.Array, jax.Array]:
        return of_pairs(answer_log_probs(model, variables, batch, chunk=chunk))

    lengths = of_pairs(batch["trained_mask"].astype(jnp.float32))
    chosen_length_N, rejected_length_N = (jnp.maximum(one, 1) for one in lengths)
    policy, reference = both(variables)
    chosen_N, rejected_N = log_probs(policy)
    known_N, other_known_N = log_probs(jax.lax.stop_gradient(reference))
    per_chosen_N = chosen_length_N if per_token else jnp.ones_like(chosen_length_N)
    per_rejected_N = rejected_length_N if per_token else jnp.ones_like(rejected_length_N)
    sums = dpo_loss(
        chosen_N / per_chosen_N,
        rejected_N / per_rejected_N,
        known_N / per_chosen_N,
        other_known_N / per_rejected_N,
        p_chosen_N,
        is_pair_N,
        beta=beta,
        form=form,
        label_smoothing=label_smoothing,
        weight_B=weight_N,
    )
    others: dict[str, jax.Array] = {}
    if sft_coef:
        losses_N = p_chosen_N * masked(chosen_N, is_pair_N) / chosen_length_N
        losses_N += (1 - p_chosen_N) * masked(rejected_N, is_pair_N) / rejected_length_N
        sft_loss = -(weight_N * losses_N).sum()
        sums = sums._replace(loss=sums.loss + sft_coef * sft_loss)
        others["sft_loss"] = sft_loss
    others |= {
        "objective": sums.loss,
        "weights": weight_N.sum(),
        "chosen_log_prob": jnp.where(is_pair_N, chosen_N, 0).sum(),
        "rejected_log_prob": jnp.where(is_pair_N, rejected_N, 0).sum(),
        "answer_tokens": batch["trained_mask"].sum(),
        **row_sizes(batch, model.cfg.sliding_window),
    }
    return sums._replace(others=sums.others | jax.lax.stop_gradient(others))


def _of_answers(values_BT: jax.Array, segment_ids_BT: jax.Array, ends_BP: jax.Array) -> jax.Array:
    """Sums the values over the segments that end there, `[B, P]`."""
    segments_BP = jnp.take_along_axis(segment_ids_BT, ends_BP, axis=1)
    is_in_BPT = segment_ids_BT[:, None, :] == segments_BP[:, :, None]
    return jnp.where(is_in_BPT, values_BT[:, None, :], 0).sum(axis=2)


def dpo_loss(
    chosen_log_probs_B: jax.Array,
    rejected_log_probs_B: jax.Array,
    reference_chosen_log_probs_B: jax.Array,
    reference_rejected_log_probs_B: jax.Array,
    p_chosen_B: jax.Array,
    mask_B: jax.Array,
    *,
    beta: float,
    form: Form = "sigmoid",
    label_smoothing: float = 0.0,
    weight_B: jax.Array | None = None,
) -> LossSums:
    """Computes the loss of pairs, with soft labels.

    The margin is how much more the policy prefers the chosen answer than the reference does.

    `sigmoid` is DPO's (arXiv 2305.18290, equation 7): the cross-entropy of sigmoid(beta * margin)
    against the probability that the chosen answer is the better one. At its least, with exact
    labels of Bradley-Terry rewards, the policy is in proportion to reference * exp(reward / beta),
    which is PPO's optimum with `kl_coef=beta`.

    `square` is IPO's (arXiv 2310.12036, equation 17): the squared distance of the margin from
    1 / (2 beta), or from -1 / (2 beta) where the label is the other one. At its least the margin is
    (2 p - 1) / (2 beta), finite also where p is 1.

    Args:
        chosen_log_probs_B: of whole answers (`training.losses.sum_by_answer`); differentiated, as
            are the rejected ones.
        rejected_log_probs_B: of the others.
        reference_chosen_log_probs_B: of the reference, at the same temperature.
        reference_rejected_log_probs_B: of the reference.
        p_chosen_B: 1 for a plain label, 0.5 for a tie.
        mask_B: bool, rows that hold a pair.
        beta: how strongly the reference holds.
        form: `sigmoid` or `square`.
        label_smoothing: the share of the labels that are taken for wrong (in DPO: cDPO).
        weight_B: of each pair; None for 1 each.

    Returns:
        Sums over pairs, the loss and the number of terms by their weights; `others` are
        `preference_sums`.

    Raises:
        ValueError: `beta` is not above 0, or an unknown form.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta!r} must be above 0")
    weight_B = masked(jnp.ones_like(p_chosen_B) if weight_B is None else weight_B, mask_B)
    reference_chosen_B, reference_rejected_B, p_chosen_B = jax.lax.stop_gradient(
        (wide(reference_chosen_log_probs_B), wide(reference_rejected_log_probs_B), p_chosen_B)
    )
    chosen_B = masked(wide(chosen_log_probs_B) - reference_chosen_B, mask_B)
    rejected_B = masked(wide(rejected_log_probs_B) - reference_rejected_B, mask_B)
    p_chosen_B = masked(p_chosen_B, mask_B)
    margin_B = chosen_B - rejected_B
    smooth_B = p_chosen_B + label_smoothing * (1 - 2 * p_chosen_B)
    if form == "sigmoid":
        losses_B = -smooth_B * jax.nn.log_sigmoid(beta * margin_B)
        losses_B -= (1 - smooth_B) * jax.nn.log_sigmoid(-beta * margin_B)
    elif form == "square":
        losses_B = smooth_B * jnp.square(margin_B - 1 / (2 * beta))
        losses_B += (1 - smooth_B) * jnp.square(margin_B + 1 / (2 * beta))
    else:
        raise ValueError(f"form={form!r} must be 'sigmoid' or 'square'")
    return LossSums(
        loss=(weight_B * masked(losses_B, mask_B)).sum(),
        num_terms=weight_B.sum(),
        others=preference_sums(
            *jax.lax.stop_gradient((beta * chosen_B, beta * rejected_B)),
            p_chosen_B,
            mask_B,
            rounding_B=beta * _rounding(chosen_log_probs_B, rejected_log_probs_B, mask_B),
        ),
    )


def _rounding(chosen_B: jax.Array, rejected_B: jax.Array, mask_B: jax.Array) -> jax.Array:
    """Bounds the difference of two programs' log-probabilities for the same weights, `[B]`."""
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
    """Sums DPO's implicit rewards over pairs.

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
    """Computes means over pairs.

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


def numbers(sums: Mapping[str, np.ndarray], *, prefix: str) -> dict[str, float]:
    """Computes means over pairs, out of the sums of `row_loss`.

    Args:
        sums: of a step, or of all held-out data.
        prefix: `dpo` or `eval`.
    """
    pairs = float(sums["pairs"])
    found = {f"{prefix}/pairs": pairs}
    if pairs > 0:
        found |= preference_numbers(sums, prefix=prefix)
        for name in ("chosen_log_prob", "rejected_log_prob"):
            found[f"{prefix}/{name}"] = float(sums[name]) / pairs
        if "sft_loss" in sums:
            found[f"{prefix}/sft_loss"] = ratio(sums["sft_loss"], float(sums["weights"]))
    return found


def report_step(metrics: Mapping[str, np.ndarray], *, flops: ModelFlops) -> StepReport:
    """Returns the numbers of an optimizer step."""
    tokens, answered = float(metrics["tokens"]), float(metrics["answer_tokens"])
    fields = numbers(metrics, prefix=STAGE) | step_numbers(metrics)
    if (weights := float(metrics["weights"])) > 0:
        fields["train/loss"] = float(metrics["objective"]) / weights
    total = step_flops(
        flops,
        tokens=tokens,
        scored_tokens=answered,
        attended_pairs=float(metrics["attended_pairs"]),
    )
    return StepReport(fields, tokens, answered, total)


def step_flops(flops: ModelFlops, **sizes: float) -> float:
    """Counts the policy's training pass and the reference's forward pass: `ModelFlops.of_step`."""
    return flops.of_step(**sizes) + flops.of_forward(**sizes)
