"""Supervised fine-tuning: the stage that turns a base model into one that answers like a doctor."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.clinic import files as clinic_files
from huatuo_jax.clinic.files import ClinicConfig, prepare_clinic
from huatuo_jax.core import distributed
from huatuo_jax.core.config import operational
from huatuo_jax.core.files import as_path
from huatuo_jax.core.progress import progress_bar
from huatuo_jax.data.batches import pack_row
from huatuo_jax.data.readers import HeldOutBy
from huatuo_jax.data.records import KINDS, Kind
from huatuo_jax.data.tokenizing import ALL_KINDS
from huatuo_jax.generation.samples import Samples, SamplesConfig, sample_prompt
from huatuo_jax.training.dialogue_data import DataConfig, DialogueData, SourceConfig, open_dialogues
from huatuo_jax.training.initial_model import InitialModel, open_model
from huatuo_jax.training.loop import (
    StepReport,
    step_numbers,
)
from huatuo_jax.training.losses import next_tokens, row_sizes, sum_log_probs, sums_by_kind
from huatuo_jax.training.metrics import ModelFlops
from huatuo_jax.training.run_directory import StageDirectory, is_begun
from huatuo_jax.training.stage import TrainingConfig, UpdateStage, on_devices, run_stage, stage_step
from huatuo_jax.training.update import (
    Batch,
    LossSums,
    Step,
    TrainState,
    Variables,
    abstract_batch,
)

STAGE = "sft"
CLINIC_FOLDER = "clinic"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig(TrainingConfig):
    """A run of supervised fine-tuning. `{workdir}` in a path stands for the run's folder.

    Attributes:
        data: on what.
        clinic: which clinic is written to `{workdir}/clinic` before anything is read there, see
            `clinic_sources`; None for none.
        num_epochs: passes over the mixture.
        seed: of fresh weights, of the mixture and of its order.
        samples: what is written anew at each evaluation, to `sft/samples.jsonl`.
    """

    data: DataConfig
    clinic: ClinicConfig | None = operational(None)  # The content of its files decides.
    num_epochs: int = 3
    batch_size: int = 128
    samples: SamplesConfig = operational(SamplesConfig())


class SftStage(UpdateStage[SftConfig]):
    """One run of supervised fine-tuning."""

    name = STAGE
    data: DialogueData

    @staticmethod
    def open_model(cfg: SftConfig) -> InitialModel:
        """Finds the model and checks that the rows suit it."""
        model = open_model(cfg.model, cfg.compute.compute_config())
        check_lengths(cfg.data, model.cfg)
        return model

    def open_data(self) -> dict[str, Any]:
        """Tokenises the dialogues, those of the run's clinic too."""
        write_clinic_of(self.workdir, self.cfg.clinic)
        with (
            distributed.first_then_others("tokenising"),
            progress_bar(f"{STAGE}: tokenising", "dialogues") as on_progress,
        ):
            data = open_dialogues(
                self.cfg.data,
                self.tokenizer,
                seed=self.cfg.seed,
                default_cache=self.workdir / "data",
                progress=lambda done: on_progress(done.num_done, done.num_dialogues),
            )
        self.use(data)
        return {"dialogues": data.identity}

    def use(self, data: DialogueData) -> None:
        """Takes dialogues to train on."""
        self.data, self.account = data, data.account
        self.train_rows, self.held_out_rows = data.train, data.held_out
        self.prefetch = data.prefetch

    def make_step(self, cfg: SftConfig, *, num_steps: int) -> Step:
        """Makes the optimizer step of a run of so many steps."""
        return sft_step(cfg, self.model, self.mesh, num_steps=num_steps)

    def report(self, metrics: Mapping[str, np.ndarray]) -> StepReport:
        """Returns the numbers of an optimizer step."""
        return report_step(metrics, flops=self.model.flops)

    def evaluation_numbers(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Computes the numbers of held-out data, with perplexity, the exponential of the loss."""
        return evaluation_numbers(sums)

    def evaluator(
        self, step: Step, directory: StageDirectory
    ) -> Callable[[TrainState], dict[str, float]] | None:
        """Makes the function that evaluates a state and writes samples of it."""
        measure, samples = super().evaluator(step, directory), self._samples(directory)
        if measure is None or samples is None:
            return measure

        def evaluate(state: TrainState) -> dict[str, float]:
            samples.write(int(state.step), state.variables)
            return measure(state)

        return evaluate

    def _samples(self, directory: StageDirectory) -> Samples | None:
        """Makes the writer of samples, where any are wanted and something is held out."""
        held_out, wanted = self.data.prepared.held_out, self.cfg.samples.num_prompts
        if held_out is None or not wanted:
            return None
        wanted = min(wanted, len(held_out))
        examples = [held_out[number * len(held_out) // wanted] for number in range(wanted)]
        return Samples(
            self.model.transformer,
            [sample_prompt(example, self.template, self.tokenizer) for example in examples],
            self.tokenizer,
            stop_token_ids=self.model.stop_token_ids(self.template, self.tokenizer),
            max_new_tokens=self.cfg.samples.max_new_tokens,
            mesh=self.mesh,
            path=directory.folder / "samples.jsonl",
        )


def run_sft(
    config: SftConfig,
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
        The last step and its evaluation. The model is in `WORKDIR/sft/model`, an Orbax directory
        with the tokenizer, adapters merged.

    Raises:
        ValueError: an invalid config, file, model or mesh; before anything is compiled.
        FileNotFoundError: there is no such model.
        Interrupted: the run was stopped and saved.
        Diverged: too many steps in a row were not finite.
        OSError: something cannot be read or written.
    """
    return run_stage(SftStage, SftConfig, config, workdir, after_evaluation=after_evaluation)


def clinic_sources(kinds: tuple[Kind, ...] = KINDS) -> tuple[SourceConfig, ...]:
    """Lists the clinic's dialogues that a run writes: a source per kind, and held-out ones."""
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
        ValueError: another clinic is there, and a stage was trained on it.
        OSError: it cannot be written.
    """
    if cfg is None:
        return
    distributed.check_joined()
    distributed.check_shared(as_path(workdir))
    distributed.by_first(
        CLINIC_FOLDER,
        lambda: prepare_clinic(as_path(workdir) / CLINIC_FOLDER, cfg, in_use=is_begun(workdir)),
    )


def sft_step(cfg: SftConfig, model: InitialModel, mesh: Mesh, *, num_steps: int) -> Step:
    """Makes the optimizer step of a run of so many steps."""
    loss = functools.partial(token_loss, model.transformer, chunk=cfg.compute.loss_chunk)
    abstract_state = functools.partial(model.abstract_state, mesh=mesh)
    return stage_step(cfg, loss, abstract_state, mesh, num_steps=num_steps)


def settled_config(
    cfg: SftConfig, model: InitialModel, data: DialogueData, mesh: Mesh, workdir: pathlib.Path
) -> SftConfig:
    """Returns the settings of a run with a number for `micro_batch_size`."""
    cfg, _ = on_devices(cfg, mesh, name=SftStage.name, workdir=workdir)
    stage = SftStage(cfg, mesh=mesh, workdir=workdir, model=model)
    stage.use(data)
    stage.settle()
    return stage.cfg


def abstract_rows(cfg: SftConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the rows of a step as shapes on a mesh."""
    row = pack_row([], row_length=cfg.data.row_length, pad_token_id=0)
    return abstract_batch(row, cfg.batch_size, mesh)


def token_loss(
    model: Transformer, variables: Variables, batch: Batch, *, chunk: int = 128
) -> LossSums:
    """Sums the cross-entropy of the trained tokens, each predicted from those before it.

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
    total, scores = sum_log_probs(model, variables, batch, batch["trained_mask"], chunk=chunk)
    by_kind = functools.partial(
        sums_by_kind, kind_ids_BT=next_tokens(batch["kind_ids"]), num_kinds=len(ALL_KINDS)
    )
    return LossSums(
        loss=-total,
        num_terms=wanted_BT.sum(),
        others={
            "loss_by_kind": by_kind(-scores.log_probs_BT),
            "tokens_by_kind": by_kind(wanted_BT.astype(np.float32)),
            "correct_by_kind": by_kind(scores.correct_BT.astype(np.float32)),
            **row_sizes(batch, model.cfg.sliding_window),
        },
    )


def token_numbers(sums: Mapping[str, np.ndarray], *, prefix: str) -> dict[str, float]:
    """Computes loss and token accuracy, overall and for each kind of data in the batch.

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
    """Computes the numbers of held-out data, with perplexity, the exponential of the loss."""
    numbers = token_numbers(sums, prefix="eval")
    perplexities = {
        name.replace("/loss", "/perplexity"): float(np.exp(value))
        for name, value in numbers.items()
        if name.startswith("eval/loss")
    }
    return numbers | perplexities


def check_lengths(data: DataConfig, backbone: BackboneConfig) -> None:
    """Raises ValueError where rows do not suit the backbone."""
    if data.row_length > backbone.max_positions:
        raise ValueError(
            f"config.{STAGE}.data.row_length={data.row_length} must be at most the model's "
            f"{backbone.max_positions} positions"
        )
    if data.packed:
        backbone.require_fixed_angles(data.row_length, purpose="packing")


def report_step(metrics: Mapping[str, np.ndarray], *, flops: ModelFlops) -> StepReport:
    """Returns the numbers of an optimizer step of token losses."""
    tokens, trained = float(metrics["tokens"]), float(metrics["num_terms"])
    fields = token_numbers(metrics, prefix="train") | step_numbers(metrics)
    pairs = float(metrics["attended_pairs"])
    step_flops = flops.of_step(tokens=tokens, scored_tokens=trained, attended_pairs=pairs)
    return StepReport(fields, tokens, trained, step_flops)
