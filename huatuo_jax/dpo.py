"""The DPO stage: an SFT model and comparisons in, a policy out; no reward model, no sampling.

The settings of a DPO stage.

What a DPO policy is trained on: rows of answers, and pairs of answers of one row.

The policy of a DPO run and its reference, which lie side by side in one state.

The reference takes the place of what is trained, in a collection of its own among the frozen
variables, so a checkpoint holds it and a run that goes on has the very same.

Direct preference optimisation: comparisons in, a policy out, without a reward model.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from huatuo_jax.backbone.matmul import store_as_computed
from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.core.config import all_fields, checked, identity, operational, placed_in
from huatuo_jax.core.progress import progress_bar
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.preferences.data import Comparisons, ComparisonsConfig, open_comparisons
from huatuo_jax.preferences.rows import ComparisonBatches, ComparisonRows, RowsConfig, empty_row
from huatuo_jax.training.initial_model import ComputeSection, InitialModel, ModelConfig, open_model
from huatuo_jax.training.loop import (
    Job,
    LoopConfig,
    StepReport,
    check_rows,
    host_share,
    make_evaluate,
    step_numbers,
    train,
)
from huatuo_jax.training.losses import masked, wide
from huatuo_jax.training.metrics import ModelFlops, Sums, ratio
from huatuo_jax.training.micro_batch import (
    MicroBatchSize,
    check_micro_batch_size,
    most_rows_at_once,
    settle,
)
from huatuo_jax.training.optimizer import Optimizer, OptimizerConfig, make_optimizer
from huatuo_jax.training.run_directory import StageDirectory, begin_stage, report_data
from huatuo_jax.training.scoring import answer_log_probs
from huatuo_jax.training.update import (
    Batch,
    LossSums,
    Step,
    TrainState,
    Variables,
    abstract,
    abstract_batch,
    make_sharded,
    make_step,
    update_program,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """A run of direct preference optimisation (arXiv 2305.18290).

    Attributes:
        model: the policy to start from, which is the reference too, mostly an SFT model's directory
            (`{workdir}/sft/model` is that of this run). With `lora` policy and reference share the
            frozen weights, the reference being the model without its adapters.
        data: the comparisons, those that a reward model would be trained on.
        optimizer: how.
        beta: how strongly the reference holds; PPO's `kl_coef` for the same optimum.
        num_epochs: passes over the comparisons.
        num_steps: optimizer steps instead, where given.
        batch_size: rows of an optimizer step, on all devices together.
        micro_batch_size: rows that go through the model at once, on all devices together; `auto`
            for as many as fit the devices' memory (all of them on CPU), None for all of them.
        seed: of fresh adapters and of the order of the data.
        compute: how a step is computed.
        mesh: how the devices are divided.
        loop: evaluation, checkpoints, logging.
    """

    model: ModelConfig
    data: ComparisonsConfig
    optimizer: OptimizerConfig
    beta: float = 0.1
    num_epochs: int = 1
    num_steps: int | None = None
    batch_size: int = 32
    micro_batch_size: MicroBatchSize = operational("auto")
    seed: int = 0
    compute: ComputeSection = ComputeSection()
    mesh: MeshConfig = operational(MeshConfig())
    loop: LoopConfig = operational(LoopConfig())

    def __post_init__(self) -> None:
        """Raise ValueError for a number that cannot be."""
        for name in ("num_epochs", "num_steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r} must be at least 1")
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta={self.beta!r} must be above 0")
        check_micro_batch_size(
            self.micro_batch_size, self.batch_size, name=f"batch_size={self.batch_size}"
        )

    @property
    def rows_at_once(self) -> int:
        """Rows that go through the model together; at most, where `auto` is not settled yet."""
        return most_rows_at_once(self.micro_batch_size, self.batch_size)

    def rows(self, *, shuffled: bool) -> RowsConfig:
        """How comparisons become rows, to train on or to evaluate."""
        return RowsConfig(
            row_length=self.data.row_length,
            packed=self.data.packed,
            window=self.data.window,
            shuffled=shuffled,
            seed=self.seed,
        )


REFERENCE = "reference"
"""The collection with what the reference has in the place of what is trained."""


def make_state(
    policy: InitialModel, key: jax.Array, optimizer: Optimizer, mesh: Mesh
) -> TrainState:
    """The state before the first step, in its shards.

    Raises:
        ValueError: as `InitialModel.make_state`.
        OSError: the weights cannot be read.
    """
    state = policy.make_state(key, optimizer, mesh)
    # Under jit, so that no array is both the policy's and the reference's.
    reference = make_sharded(lambda trained: _reference(policy, trained), mesh, state.trained)
    return dataclasses.replace(state, frozen=state.frozen | {REFERENCE: reference})


def abstract_state(policy: InitialModel, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """That state's shapes and shardings."""
    state = policy.abstract_state(optimizer, mesh)
    reference = abstract(lambda trained: _reference(policy, trained), mesh, state.trained)
    return dataclasses.replace(state, frozen=state.frozen | {REFERENCE: reference})


def both(variables: Variables) -> tuple[Variables, Variables]:
    """The variables of the policy, and those of its reference."""
    own = {name: part for name, part in variables.items() if name != REFERENCE}
    return own, _overlaid(own, variables[REFERENCE])


def _reference(policy: InitialModel, trained: Variables) -> Variables:
    """Adapters of zeros, which add 0; or the weights, stored as the forward pass casts them."""
    if policy.section.lora is not None:
        return jax.tree.map(jnp.zeros_like, trained)
    return dict(
        store_as_computed(trained, policy.compute.compute_dtype, keep_lm_head=policy.cfg.norm_head)
    )


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> Variables:
    """A nested dict with the leaves of the upper one in place of those below."""
    return dict(below) | {
        name: _overlaid(below[name], part) if isinstance(part, Mapping) else part
        for name, part in above.items()
    }


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
        beta: see `ppo.losses.dpo_loss`.
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


STAGE = "dpo"
MODEL_FOLDER = "model"


def run_dpo(config: DpoConfig, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Runs the stage in a run's folder, or goes on with it, or finds it done.

    Args:
        config: of the stage; `{workdir}` in a path stands for the run's folder.
        workdir: the run's folder.

    Returns:
        The last step and its evaluation. The policy is in `WORKDIR/dpo/model`, an Orbax directory
        with the tokenizer, adapters merged.

    Raises:
        ValueError: a config, a file, a model or a mesh that cannot be; before anything is compiled.
        FileNotFoundError: there is no such model.
        Interrupted: the run was stopped and saved.
        Diverged: too many steps in a row were not finite.
        OSError: something cannot be read or written.
    """
    cfg = placed_in(checked(config, DpoConfig, path=f"config.{STAGE}"), workdir)
    mesh = cfg.mesh.make()
    check_rows(cfg.rows_at_once, name="micro_batch_size", mesh=mesh)
    model = open_model(cfg.model, cfg.compute.compute_config())
    _check_model(cfg.data, model)
    template = cfg.data.chat_template
    tokenizer = model.load_tokenizer(STAGE, template)
    with progress_bar(f"{STAGE}: tokenising", "answers") as on_progress:
        comparisons = open_comparisons(cfg.data, tokenizer, on_progress)
    decisive = identity(cfg) | {
        "initial_model": model.identity,
        "comparisons": comparisons.identity,
    }
    directory = begin_stage(workdir, STAGE, settings=all_fields(cfg), decisive=decisive)
    if (result := directory.result()) is not None:
        return result
    report_data(directory, comparisons.account)
    job = make_job(cfg, model, comparisons, directory, decisive, mesh)
    state, evaluation = train(job, cfg.loop)
    place = directory.folder / MODEL_FOLDER
    model.save(state.variables, place, template=template, tokenizer=tokenizer)
    result = {"step": int(state.step), **evaluation}
    directory.finish(result)
    return result


def numbers(sums: Mapping[str, np.ndarray], *, prefix: str) -> dict[str, float]:
    """Means over pairs, out of the sums of `loss.row_loss`.

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
    return found


def report_step(metrics: Mapping[str, np.ndarray], *, flops: ModelFlops) -> StepReport:
    """The numbers of an optimizer step."""
    tokens, answered = float(metrics["tokens"]), float(metrics["answer_tokens"])
    fields = numbers(metrics, prefix=STAGE) | step_numbers(metrics)
    if (pairs := float(metrics["pairs"])) > 0:
        fields["train/loss"] = float(metrics["objective"]) / pairs
    total = step_flops(
        flops,
        tokens=tokens,
        scored_tokens=answered,
        attended_pairs=float(metrics["attended_pairs"]),
    )
    return StepReport(fields, tokens, answered, total)


def dpo_step(cfg: DpoConfig, model: InitialModel, mesh: Mesh, *, num_steps: int) -> Step:
    """The optimizer step of a run of so many steps."""
    optimizer = make_optimizer(cfg.optimizer, num_steps=num_steps)
    return make_step(
        functools.partial(row_loss, model.transformer, beta=cfg.beta, chunk=cfg.compute.loss_chunk),
        optimizer,
        abstract_state(model, optimizer, mesh),
        mesh,
        num_micro_batches=cfg.batch_size // cfg.rows_at_once,
    )


def abstract_rows(cfg: DpoConfig, mesh: Mesh, *, num_pairs: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The rows of a step as shapes on a mesh, with places for so many pairs each."""
    row = empty_row(cfg.rows(shuffled=False), num_pairs=num_pairs)
    return abstract_batch(row, cfg.batch_size, mesh)


def step_flops(flops: ModelFlops, **sizes: float) -> float:
    """Of the policy's training pass, and the reference's forward pass; see `ModelFlops.of_step`."""
    return flops.of_step(**sizes) + flops.of_forward(**sizes)


def make_job(
    cfg: DpoConfig,
    model: InitialModel,
    comparisons: Comparisons,
    directory: StageDirectory,
    decisive: dict[str, Any],
    mesh: Mesh,
) -> Job:
    """The job of a run; no weights are read before the loop asks for them."""
    rows = ComparisonRows(comparisons.train, cfg.rows(shuffled=True))
    num_steps = cfg.num_steps or -(-rows.first_row(cfg.num_epochs) // cfg.batch_size)
    num_pairs = rows.most_pairs(num_steps * cfg.batch_size)
    batch = abstract_rows(cfg, mesh, num_pairs=num_pairs)
    cfg, step = settle(
        cfg,
        stage=STAGE,
        rows=cfg.batch_size,
        mesh=mesh,
        make=functools.partial(dpo_step, model=model, mesh=mesh, num_steps=num_steps),
        programs=lambda step: [update_program(STAGE, step, batch, mesh)],
    )
    evaluate = None
    if comparisons.held_out:
        held_out = ComparisonRows(comparisons.held_out, cfg.rows(shuffled=False))
        end_row = held_out.first_row(1)
        evaluate = make_evaluate(
            lambda variables, batch: step.loss(variables, batch).others,
            lambda: ComparisonBatches(
                held_out,
                batch_size=cfg.rows_at_once,
                num_pairs=held_out.most_pairs(end_row),
                share=host_share(mesh),
                end_row=end_row,
            ),
            _evaluation_numbers,
            mesh,
        )
    flops = ModelFlops.of(model.cfg, adapters_only=cfg.model.lora is not None)
    return Job(
        directory=directory,
        decisive=decisive,
        num_steps=num_steps,
        mesh=mesh,
        make_state=lambda: make_state(model, jax.random.key(cfg.seed), step.optimizer, mesh),
        abstract_state=step.state,
        update=step.update,
        batches=ComparisonBatches(
            rows,
            batch_size=cfg.batch_size,
            num_pairs=num_pairs,
            share=host_share(mesh),
        ),
        report=functools.partial(report_step, flops=flops),
        evaluate=evaluate,
        row_names=lambda position: [
            part.id
            for row in range(position["next_row"], position["next_row"] + cfg.batch_size)
            for part in rows.parts_in(row)
        ],
    )


def _evaluation_numbers(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    loss = float(sums["objective"]) / max(float(sums["pairs"]), 1.0)
    return {"eval/loss": loss} | numbers(sums, prefix="eval")


def _check_model(data: ComparisonsConfig, model: InitialModel) -> None:
    backbone = model.cfg
    if data.max_length > backbone.max_positions:
        raise ValueError(
            f"config.{STAGE}.data.max_length={data.max_length} must be at most the model's "
            f"{backbone.max_positions} positions"
        )
    # Also where prompts are not packed: the answers of one share a row.
    backbone.require_fixed_angles(data.max_length, purpose="comparing answers in one row")
