"""The DPO stage: an SFT model and comparisons in, a policy out; no reward model, no sampling."""

import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from huatuo_jax.comparisons.data import Comparisons, ComparisonsConfig, open_comparisons
from huatuo_jax.comparisons.rows import ComparisonBatches, ComparisonRows, empty_row
from huatuo_jax.config import all_fields, checked, identity, placed_in
from huatuo_jax.dpo.config import DpoConfig
from huatuo_jax.dpo.loss import preference_numbers, row_loss
from huatuo_jax.dpo.policy import abstract_state, make_state
from huatuo_jax.progress import progress_bar
from huatuo_jax.training.data_report import report_data
from huatuo_jax.training.evaluation import check_rows, make_evaluate
from huatuo_jax.training.initial_model import InitialModel, open_model
from huatuo_jax.training.loop import Job, StepReport, host_share, step_numbers, train
from huatuo_jax.training.micro_batch import settle
from huatuo_jax.training.optimizer import make_optimizer
from huatuo_jax.training.run_directory import StageDirectory, begin_stage
from huatuo_jax.training.step import Step, abstract_batch, make_step, update_program
from huatuo_jax.training.throughput import ModelFlops

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
