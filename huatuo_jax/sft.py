"""Supervised fine-tuning: the stage that turns a base model into a doctor-like consultant."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import transformers
from jax.sharding import Mesh

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.clinic import files as clinic_files
from huatuo_jax.clinic.files import ClinicConfig, prepare_clinic
from huatuo_jax.core import distributed
from huatuo_jax.core.config import all_fields, checked, identity, operational, placed_in
from huatuo_jax.core.progress import progress_bar
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.data.batches import pack_row
from huatuo_jax.data.readers import HeldOutBy
from huatuo_jax.data.records import KINDS, Kind
from huatuo_jax.data.tokenizing import ALL_KINDS
from huatuo_jax.generation.samples import Samples, SamplesConfig, sample_prompt
from huatuo_jax.training.dialogue_data import DataConfig, DialogueData, SourceConfig, open_dialogues
from huatuo_jax.training.initial_model import ComputeSection, InitialModel, ModelConfig, open_model
from huatuo_jax.training.loop import (
    Job,
    LoopConfig,
    StepReport,
    check_rows,
    make_evaluate,
    step_numbers,
    train,
)
from huatuo_jax.training.losses import hidden_of, next_tokens, sums_by_kind, token_scores
from huatuo_jax.training.metrics import ModelFlops
from huatuo_jax.training.micro_batch import (
    MicroBatchSize,
    check_micro_batch_size,
    most_rows_at_once,
    settle,
)
from huatuo_jax.training.optimizer import OptimizerConfig, make_optimizer
from huatuo_jax.training.run_directory import StageDirectory, begin_stage, is_begun, report_data
from huatuo_jax.training.update import (
    Batch,
    LossSums,
    Step,
    TrainState,
    Variables,
    abstract_batch,
    make_step,
    update_program,
)

STAGE = "sft"
MODEL_FOLDER = "model"
CLINIC_FOLDER = "clinic"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig:
    """A run of supervised fine-tuning. `{workdir}` in a path stands for the run's folder.

    Attributes:
        model: what is trained.
        data: on what.
        clinic: which clinic is written to `{workdir}/clinic` before anything is read there, see
            `clinic_sources`; None for none.
        optimizer: how.
        num_epochs: passes over the mixture.
        num_steps: optimizer steps instead, where given.
        batch_size: rows of an optimizer step, on all devices together.
        micro_batch_size: rows that go through the model at once, on all devices together; `auto`
            for as many as fit the devices' memory (all of them on CPU), None for all of them.
        seed: of fresh weights, of the mixture and of its order.
        compute: how a step is computed.
        mesh: how the devices are divided.
        samples: what is written anew at each evaluation, to `sft/samples.jsonl`.
        loop: evaluation, checkpoints, logging.
    """

    model: ModelConfig
    data: DataConfig
    clinic: ClinicConfig | None = operational(None)  # The content of its files decides.
    optimizer: OptimizerConfig
    num_epochs: int = 3
    num_steps: int | None = None
    batch_size: int = 128
    micro_batch_size: MicroBatchSize = operational("auto")
    seed: int = 0
    compute: ComputeSection = ComputeSection()
    mesh: MeshConfig = operational(MeshConfig())
    samples: SamplesConfig = operational(SamplesConfig())
    loop: LoopConfig = operational(LoopConfig())

    def __post_init__(self) -> None:
        """Raise ValueError for a size that cannot be."""
        for name in ("num_epochs", "num_steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r} must be at least 1")
        check_micro_batch_size(
            self.micro_batch_size, self.batch_size, name=f"batch_size={self.batch_size}"
        )

    @property
    def rows_at_once(self) -> int:
        """Rows that go through the model together; at most, where `auto` is not settled yet."""
        return most_rows_at_once(self.micro_batch_size, self.batch_size)


def run_sft(config: SftConfig, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Runs the stage in a run's folder, or goes on with it, or finds it done.

    Args:
        config: of the stage; `{workdir}` in a path stands for the run's folder.
        workdir: the run's folder.

    Returns:
        The last step and its evaluation. The model is in `WORKDIR/sft/model`, an Orbax directory
        with the tokenizer, adapters merged.

    Raises:
        ValueError: a config, a file or a mesh that cannot be; before anything is compiled.
        FileNotFoundError: there is no such model.
        Interrupted: the run was stopped and saved.
        Diverged: too many steps in a row were not finite.
        OSError: something cannot be read or written.
    """
    cfg = placed_in(checked(config, SftConfig, path=f"config.{STAGE}"), workdir)
    mesh = cfg.mesh.make()
    check_rows(cfg.rows_at_once, name="micro_batch_size", mesh=mesh)
    model = open_model(cfg.model, cfg.compute.compute_config())
    check_lengths(cfg.data, model.cfg)
    template = cfg.data.chat_template
    tokenizer = model.load_tokenizer(STAGE, template)
    write_clinic_of(workdir, cfg.clinic)
    with (
        distributed.first_then_others("tokenising"),
        progress_bar(f"{STAGE}: tokenising", "dialogues") as on_progress,
    ):
        data = open_dialogues(
            cfg.data,
            tokenizer,
            seed=cfg.seed,
            default_cache=pathlib.Path(workdir) / "data",
            progress=lambda done: on_progress(done.num_done, done.num_dialogues),
        )
    decisive = identity(cfg) | {"initial_model": model.identity, "dialogues": data.identity}
    directory = begin_stage(workdir, STAGE, settings=all_fields(cfg), decisive=decisive)
    if (result := directory.result()) is not None:
        return result
    if data.account is not None:
        report_data(directory, data.account)
    cfg, step = settled_step(cfg, model, data, mesh)
    samples = _samples(cfg, model, data, tokenizer, mesh, directory)
    job = _job(cfg, step, model, data, directory, decisive, mesh, samples)
    state, evaluation = train(job, cfg.loop)
    place = directory.folder / MODEL_FOLDER
    model.save(state.variables, place, template=template, tokenizer=tokenizer)
    result = {"step": int(state.step), **evaluation}
    directory.finish(result)
    return result


def clinic_sources(kinds: tuple[Kind, ...] = KINDS) -> tuple[SourceConfig, ...]:
    """The dialogues of the clinic that a run writes: a source a kind, and its held-out ones."""
    sides: tuple[tuple[str, HeldOutBy], ...] = (("", "never"), (clinic_files.HELD_OUT, "always"))
    return tuple(
        SourceConfig(
            name=f"{prefix}{kind}",
            paths=(f"{{workdir}}/{CLINIC_FOLDER}/{prefix}{kind}.jsonl",),
            kind=kind,
            held_out_by=held_out_by,
        )
        for prefix, held_out_by in sides
        for kind in kinds
    )


def write_clinic_of(workdir: str | os.PathLike[str], cfg: ClinicConfig | None) -> None:
    """Writes a run's clinic, where it has one, by the first process; the others wait.

    Raises:
        ValueError: another clinic stands there, and a stage was trained.
        OSError: it cannot be written.
    """
    if cfg is None:
        return
    distributed.check_joined()
    distributed.check_shared(pathlib.Path(workdir))
    distributed.by_first(
        CLINIC_FOLDER,
        lambda: prepare_clinic(
            pathlib.Path(workdir) / CLINIC_FOLDER, cfg, in_use=is_begun(workdir)
        ),
    )


def sft_step(cfg: SftConfig, model: InitialModel, mesh: Mesh, *, num_steps: int) -> Step:
    """The optimizer step of a run of so many steps."""
    optimizer = make_optimizer(cfg.optimizer, num_steps=num_steps)
    return make_step(
        functools.partial(token_loss, model.transformer, chunk=cfg.compute.loss_chunk),
        optimizer,
        model.abstract_state(optimizer, mesh),
        mesh,
        num_micro_batches=cfg.batch_size // cfg.rows_at_once,
    )


def settled_step(
    cfg: SftConfig, model: InitialModel, data: DialogueData, mesh: Mesh
) -> tuple[SftConfig, Step]:
    """The settings of a run with a number for `micro_batch_size`, and its step; see `settle`."""
    num_steps = _num_steps(cfg, data)
    batch = abstract_rows(cfg, mesh)
    return settle(
        cfg,
        stage=STAGE,
        rows=cfg.batch_size,
        mesh=mesh,
        make=functools.partial(sft_step, model=model, mesh=mesh, num_steps=num_steps),
        programs=lambda step: [update_program(STAGE, step, batch, mesh)],
    )


def abstract_rows(cfg: SftConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The rows of a step as shapes on a mesh."""
    row = pack_row([], row_length=cfg.data.row_length, pad_token_id=0)
    return abstract_batch(row, cfg.batch_size, mesh)


def token_loss(
    model: Transformer, variables: Variables, batch: Batch, *, chunk: int = 128
) -> LossSums:
    """The summed cross-entropy of the trained tokens, each predicted from those before it.

    Args:
        model: the backbone.
        variables: its own.
        batch: `token_ids`, `segment_ids`, `positions`, `trained_mask`, `kind_ids`, each `[B, T]`,
            as `huatuo_jax.data.batches` describes them.
        chunk: positions of each row whose logits are held at once.

    Returns:
        The loss, and beside it `loss_by_kind`, `tokens_by_kind` (trained ones) and
        `correct_by_kind`, one for each of `ALL_KINDS`; `tokens` without padding;
        `attended_pairs` of query and key.
    """
    wanted_BT = next_tokens(batch["trained_mask"])
    scores = token_scores(
        functools.partial(model.apply, variables, method="logits"),
        hidden_of(model, variables, batch),
        next_tokens(batch["token_ids"]),
        wanted_BT,
        chunk=chunk,
    )
    by_kind = functools.partial(
        sums_by_kind, kind_ids_BT=next_tokens(batch["kind_ids"]), num_kinds=len(ALL_KINDS)
    )
    is_token_BT = batch["segment_ids"] > 0
    seen_BT = batch["positions"] + 1
    if model.cfg.sliding_window is not None:
        seen_BT = seen_BT.clip(max=model.cfg.sliding_window)
    return LossSums(
        loss=-scores.log_probs_BT.sum(),
        num_terms=wanted_BT.sum(),
        others={
            "loss_by_kind": by_kind(-scores.log_probs_BT),
            "tokens_by_kind": by_kind(wanted_BT.astype(np.float32)),
            "correct_by_kind": by_kind(scores.correct_BT.astype(np.float32)),
            "tokens": is_token_BT.sum(),
            "attended_pairs": (seen_BT * is_token_BT).astype(np.float32).sum(),
        },
    )


def token_numbers(sums: Mapping[str, np.ndarray], *, prefix: str) -> dict[str, float]:
    """Loss and token accuracy, overall and for each kind of data that was met.

    Args:
        sums: from `token_loss`.
        prefix: `train` or `eval`; names are `PREFIX/loss`, and `PREFIX/loss/KIND` for a kind.
    """
    columns = [sums[name] for name in ("loss_by_kind", "correct_by_kind", "tokens_by_kind")]
    loss_K, correct_K, tokens_K = (np.asarray(column, np.float64) for column in columns)
    parts = {"": (loss_K.sum(), correct_K.sum(), tokens_K.sum())}
    for index, kind in enumerate(ALL_KINDS):
        parts[f"/{kind}"] = (loss_K[index], correct_K[index], tokens_K[index])
    numbers = {f"{prefix}/trained_tokens": float(tokens_K.sum())}
    for kind, (loss, correct, tokens) in parts.items():
        if tokens > 0:
            numbers[f"{prefix}/loss{kind}"] = float(loss / tokens)
            numbers[f"{prefix}/token_accuracy{kind}"] = float(correct / tokens)
    return numbers


def evaluation_numbers(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Those of held-out data, with their perplexity, the exponential of the loss."""
    numbers = token_numbers(sums, prefix="eval")
    perplexities = {
        name.replace("/loss", "/perplexity"): float(np.exp(value))
        for name, value in numbers.items()
        if name.startswith("eval/loss")
    }
    return numbers | perplexities


def check_lengths(data: DataConfig, backbone: BackboneConfig) -> None:
    """Raise ValueError where rows do not suit the backbone."""
    if data.row_length > backbone.max_positions:
        raise ValueError(
            f"config.{STAGE}.data.row_length={data.row_length} must be at most the model's "
            f"{backbone.max_positions} positions"
        )
    if data.packed:
        backbone.require_fixed_angles(data.row_length, purpose="packing")


def _samples(
    cfg: SftConfig,
    model: InitialModel,
    data: DialogueData,
    tokenizer: transformers.PreTrainedTokenizerBase,
    mesh: Mesh,
    directory: StageDirectory,
) -> Samples | None:
    """Who writes samples, where any are wanted and something is held out."""
    held_out, wanted = data.prepared.held_out, cfg.samples.num_prompts
    if held_out is None or not wanted:
        return None
    template = cfg.data.chat_template
    wanted = min(wanted, len(held_out))
    examples = [held_out[number * len(held_out) // wanted] for number in range(wanted)]
    return Samples(
        model.transformer,
        [sample_prompt(example, template, tokenizer) for example in examples],
        tokenizer,
        stop_token_ids=model.stop_token_ids(template, tokenizer),
        max_new_tokens=cfg.samples.max_new_tokens,
        mesh=mesh,
        path=directory.folder / "samples.jsonl",
    )


def _num_steps(cfg: SftConfig, data: DialogueData) -> int:
    return cfg.num_steps or -(-data.train.first_row(cfg.num_epochs) // cfg.batch_size)


def _job(
    cfg: SftConfig,
    step: Step,
    model: InitialModel,
    data: DialogueData,
    directory: StageDirectory,
    decisive: dict[str, Any],
    mesh: Mesh,
    samples: Samples | None,
) -> Job:
    evaluate = None
    if data.held_out is not None:
        measure = make_evaluate(
            lambda variables, batch: step.loss(variables, batch).others,
            lambda: data.evaluation_batches(cfg.rows_at_once, mesh),
            evaluation_numbers,
            mesh,
        )
        evaluate = functools.partial(_evaluate, measure=measure, samples=samples)
    return Job(
        directory=directory,
        decisive=decisive,
        num_steps=_num_steps(cfg, data),
        mesh=mesh,
        make_state=lambda: model.make_state(jax.random.key(cfg.seed), step.optimizer, mesh),
        abstract_state=step.state,
        update=step.update,
        batches=data.batches(cfg.batch_size, mesh),
        report=functools.partial(
            report_step,
            flops=ModelFlops.of(model.cfg, adapters_only=cfg.model.lora is not None),
        ),
        evaluate=evaluate,
        row_names=lambda position: data.example_ids(position, cfg.batch_size),
    )


def _evaluate(
    state: TrainState,
    *,
    measure: Callable[[TrainState], dict[str, float]],
    samples: Samples | None,
) -> dict[str, float]:
    if samples is not None:
        samples.write(int(state.step), state.variables)
    return measure(state)


def report_step(metrics: Mapping[str, np.ndarray], *, flops: ModelFlops) -> StepReport:
    """The numbers of an optimizer step of token losses."""
    tokens, trained = float(metrics["tokens"]), float(metrics["num_terms"])
    fields = token_numbers(metrics, prefix="train") | step_numbers(metrics)
    pairs = float(metrics["attended_pairs"])
    step_flops = flops.of_step(tokens=tokens, scored_tokens=trained, attended_pairs=pairs)
    return StepReport(fields, tokens, trained, step_flops)
