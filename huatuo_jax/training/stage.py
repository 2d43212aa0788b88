"""The shared course of the training stages: config fields, opening, resuming, job, saved result.

`run_stage` is the course of every stage. SFT, reward training and DPO are `UpdateStage`s, whose
steps each consume a batch of packed rows; PPO has a loop of its own kind and is a plain `Stage`.
"""

import abc
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from huatuo_jax.core import distributed
from huatuo_jax.core.config import all_fields, checked, identity, operational, placed_in
from huatuo_jax.core.files import as_path
from huatuo_jax.core.progress import tell
from huatuo_jax.core.sharding import BATCH_AXES, MeshConfig
from huatuo_jax.data.accounting import Account
from huatuo_jax.data.batches import BatchIterator, EpochRows, PrefetchConfig, evaluation_batches
from huatuo_jax.data.chat.template import ChatTemplate
from huatuo_jax.training.initial_model import ComputeSection, InitialModel, ModelConfig
from huatuo_jax.training.loop import (
    BaseJob,
    BaseLoopConfig,
    Job,
    LoopConfig,
    StepReport,
    check_rows,
    host_share,
    make_measure,
    train,
)
from huatuo_jax.training.micro_batch import (
    MicroBatchSize,
    check_micro_batch_size,
    most_rows_at_once,
    settle,
    size_on_other_devices,
)
from huatuo_jax.training.optimizer import Optimizer, OptimizerConfig, make_optimizer
from huatuo_jax.training.run_directory import (
    StageDirectory,
    begin_stage,
    earlier_starts,
    report_data,
    run_lock,
)
from huatuo_jax.training.trackers import check_trackers
from huatuo_jax.training.update import (
    LossFunction,
    Step,
    TrainState,
    Variables,
    abstract_batch,
    make_step,
    update_program,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_FOLDER = "model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig(abc.ABC):
    """The fields of every training stage.

    Attributes:
        model: what is trained.
        data: on what; each stage has a section of its own kind, with a `chat_template`.
        optimizer: how.
        micro_batch_size: rows that go through the model at once, on all devices together; `auto`
            for as many as fit the devices' memory (all of them on CPU), None for all of them.
        seed: of everything random.
        compute: how a step is computed.
        mesh: how the devices are divided.
        loop: evaluation, checkpoints, logging.
    """

    model: ModelConfig
    data: Any
    optimizer: OptimizerConfig
    micro_batch_size: MicroBatchSize = operational("auto")
    seed: int = 0
    compute: ComputeSection = ComputeSection()
    mesh: MeshConfig = operational(MeshConfig())
    loop: BaseLoopConfig = operational(BaseLoopConfig())

    @property
    @abc.abstractmethod
    def rows_of_update(self) -> int:
        """Rows of an optimizer step, on all devices together."""

    @property
    def rows_at_once(self) -> int:
        """Rows that go through the model together; at most, while `auto` is not settled."""
        return most_rows_at_once(self.micro_batch_size, self.rows_of_update)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(StageConfig):
    """The fields of SFT, reward training and DPO, beside those of `StageConfig`.

    Attributes:
        num_epochs: passes over the data.
        num_steps: optimizer steps instead, where given.
        batch_size: rows of an optimizer step, on all devices together.
    """

    num_epochs: int = 1
    num_steps: int | None = None
    batch_size: int = 64
    loop: LoopConfig = operational(LoopConfig())

    def __post_init__(self) -> None:
        """Raises ValueError for a size that is not positive or does not divide the batch."""
        for name in ("num_epochs", "num_steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r} must be at least 1")
        check_micro_batch_size(
            self.micro_batch_size, self.batch_size, name=f"batch_size={self.batch_size}"
        )

    @property
    def rows_of_update(self) -> int:
        """Rows of an optimizer step, on all devices together."""
        return self.batch_size


Config = TypeVar("Config", bound=StageConfig)
Trained = TypeVar("Trained", bound=TrainingConfig)


class Stage(abc.ABC, Generic[Config]):
    """One run of a stage: what differs between the stages; `run_stage` calls it in this order.

    Attributes:
        name: of the stage, as in a config.
        cfg: its settings; `micro_batch_size` becomes a number in `make_job`.
        mesh: where everything lies.
        workdir: the run's folder.
        model: what is trained.
        tokenizer: of the model, set before `open_data`.
        account: of the data that was read, to report; None for none.
    """

    name: ClassVar[str]
    tokenizer: "PreTrainedTokenizerBase"

    def __init__(
        self, cfg: Config, *, mesh: Mesh, workdir: str | os.PathLike[str], model: InitialModel
    ) -> None:
        """Reads nothing yet."""
        self.cfg, self.mesh, self.model = cfg, mesh, model
        self.workdir = as_path(workdir)
        self.account: Account | None = None

    @staticmethod
    @abc.abstractmethod
    def open_model(cfg: Any) -> InitialModel:
        """Finds the model to train and checks that it suits the stage; reads no weights."""

    @abc.abstractmethod
    def open_data(self) -> dict[str, Any]:
        """Reads what the stage needs beside its model; returns what identifies it."""

    @abc.abstractmethod
    def make_job(self, directory: StageDirectory, decisive: Mapping[str, Any]) -> BaseJob[Any, Any]:
        """Makes the job of the loop; no weights are read before the loop asks for them."""

    @abc.abstractmethod
    def finish(
        self, directory: StageDirectory, state: Any, numbers: Mapping[str, float]
    ) -> dict[str, Any]:
        """Saves what was trained and returns the stage's result.

        Args:
            directory: where to.
            state: the last one.
            numbers: that the loop returned.
        """

    @property
    def template(self) -> ChatTemplate:
        """The template of its dialogues."""
        template: ChatTemplate = self.cfg.data.chat_template
        return template

    def save_model(self, directory: StageDirectory, variables: Variables) -> None:
        """Writes the model, adapters merged, with its tokenizer and template."""
        place = directory.folder / MODEL_FOLDER
        self.model.save(variables, place, template=self.template, tokenizer=self.tokenizer)


class UpdateStage(Stage[Trained]):
    """A stage whose steps each consume a batch of packed rows.

    Attributes:
        train_rows: what is trained on, set by `open_data`.
        held_out_rows: what is evaluated; None for no evaluation.
        prefetch: how batches are made ahead.
    """

    train_rows: EpochRows
    held_out_rows: EpochRows | None = None
    prefetch = PrefetchConfig()

    @abc.abstractmethod
    def make_step(self, cfg: Trained, *, num_steps: int) -> Step:
        """Makes the optimizer step of a run of so many steps."""

    @abc.abstractmethod
    def report(self, metrics: Mapping[str, np.ndarray]) -> StepReport:
        """Returns the numbers of an optimizer step."""

    @abc.abstractmethod
    def evaluation_numbers(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns the `eval/` numbers, out of the loss's sums over all held-out data."""

    def make_state(self, step: Step) -> TrainState:
        """Makes the state before the first step."""
        return self.model.make_state(jax.random.key(self.cfg.seed), step.optimizer, self.mesh)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        cfg = self.cfg
        return cfg.num_steps or -(-self.train_rows.first_row(cfg.num_epochs) // cfg.batch_size)

    def settle(self) -> Step:
        """Puts a number in the place of `micro_batch_size='auto'` and makes the step."""
        num_steps, rows = self.num_steps, self.cfg.batch_size
        empty_row = self.train_rows.reading(num_steps * rows).read_batch(range(0), range(1))[0]
        batch = abstract_batch(empty_row, rows, self.mesh)
        self.cfg, step = settle(
            self.cfg,
            stage=self.name,
            rows=rows,
            mesh=self.mesh,
            make=functools.partial(self.make_step, num_steps=num_steps),
            programs=lambda step: [update_program(self.name, step, batch, self.mesh)],
        )
        return step

    def make_job(self, directory: StageDirectory, decisive: Mapping[str, Any]) -> Job:
        """Makes the job of the loop; no weights are read before the loop asks for them."""
        step, num_steps, rows = self.settle(), self.num_steps, self.train_rows
        batch_size = self.cfg.batch_size
        num_rows = num_steps * batch_size
        return Job(
            directory=directory,
            decisive=decisive,
            num_steps=num_steps,
            mesh=self.mesh,
            make_state=lambda: self.make_state(step),
            abstract_state=step.state,
            update=step.update,
            batches=BatchIterator(
                rows.reading(num_rows),
                batch_size=batch_size,
                share=host_share(self.mesh),
                prefetch=self.prefetch,
                end_row=num_rows,
            ),
            report=self.report,
            evaluate=self.evaluator(step, directory),
            row_names=lambda position: [
                name
                for row in range(position["next_row"], position["next_row"] + batch_size)
                for name in rows.ids_in(row)
            ],
        )

    def evaluator(
        self, step: Step, directory: StageDirectory
    ) -> Callable[[TrainState], dict[str, float]] | None:
        """Makes the function that evaluates a state; None where nothing is held out."""
        del directory
        held_out, rows_at_once = self.held_out_rows, self.cfg.rows_at_once
        if held_out is None:
            return None
        measure = make_measure(
            lambda variables, batch: step.loss(variables, batch).others,
            lambda: evaluation_batches(
                held_out,
                batch_size=rows_at_once,
                share=host_share(self.mesh),
                prefetch=self.prefetch,
            ),
            self.evaluation_numbers,
            self.mesh,
        )
        return lambda state: measure(state.variables)

    def finish(
        self, directory: StageDirectory, state: TrainState, numbers: Mapping[str, float]
    ) -> dict[str, Any]:
        """Saves the model; the result is the last step and its evaluation."""
        self.save_model(directory, state.variables)
        return {"step": int(state.step), **numbers}


def run_stage(
    kind: type[Stage[Config]],
    config_class: type[Config],
    config: Config,
    workdir: str | os.PathLike[str],
    *,
    after_evaluation: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Runs a stage, resuming from its newest checkpoint; returns the saved result if it is done.

    Args:
        kind: of stage.
        config_class: of its settings.
        config: of the stage; `{workdir}` in a path stands for the run's folder.
        workdir: the run's folder.
        after_evaluation: called after each evaluation, in the first process alone.

    Raises:
        ValueError: an invalid config, file, model or mesh; before anything is compiled.
        FileNotFoundError: there is no such model.
        Interrupted: the run was stopped and saved.
        Diverged: too many steps in a row were not finite.
        OSError: something cannot be read or written.
    """
    with run_lock(workdir):
        return _run_stage(kind, config_class, config, workdir, after_evaluation)


def _run_stage(
    kind: type[Stage[Config]],
    config_class: type[Config],
    config: Config,
    workdir: str | os.PathLike[str],
    after_evaluation: Callable[[], None] | None,
) -> dict[str, Any]:
    given = placed_in(checked(config, config_class, path=f"config.{kind.name}"), workdir)
    distributed.by_first("trackers", lambda: check_trackers(given.loop.trackers))
    mesh = given.mesh.make()
    cfg, told = on_devices(given, mesh, name=kind.name, workdir=workdir)
    check_rows(cfg.rows_at_once, name="micro_batch_size", mesh=mesh)
    stage = kind(cfg, mesh=mesh, workdir=workdir, model=kind.open_model(cfg))
    stage.tokenizer = stage.model.load_tokenizer(kind.name, stage.template)
    data = stage.open_data()
    decisive = identity(cfg) | {"initial_model": stage.model.identity} | data
    directory = begin_stage(
        workdir,
        kind.name,
        settings=all_fields(given),
        decisive=decisive,
        placed={"mesh": dict(mesh.shape), "micro_batch_size": given.micro_batch_size},
    )
    if (result := directory.result()) is not None:
        return result
    if told is not None:
        tell(told)
    if mesh.size < jax.device_count():
        tell(f"{kind.name}: on {mesh.size} of {jax.device_count()} devices, as its mesh says")
    if stage.account is not None:
        report_data(directory, stage.account)
    job = dataclasses.replace(
        stage.make_job(directory, decisive), after_evaluation=after_evaluation
    )
    state, numbers = train(job, cfg.loop)
    result = stage.finish(directory, state, numbers)
    directory.finish(result)
    return result


def on_devices(
    cfg: Config, mesh: Mesh, *, name: str, workdir: str | os.PathLike[str]
) -> tuple[Config, str | None]:
    """Returns a stage's settings for the devices that there are, where it began on others.

    Micro-batches keep the rows that each device holds (see `size_on_other_devices`), until
    `micro_batch_size` is set to another value: that one is taken as it is.

    Args:
        cfg: its settings, as they were given.
        mesh: of the devices that there are.
        name: of the stage.
        workdir: the run's folder.

    Returns:
        The settings, and the line that tells the change; None where the mesh is that of the start
        before.
    """
    starts = [start for start in earlier_starts(workdir, name) if "mesh" in start]
    if not starts:
        return cfg, None
    first = starts[-1]
    for start in reversed(starts):
        if start["micro_batch_size"] != cfg.micro_batch_size:
            break
        first = start
    if first["micro_batch_size"] == cfg.micro_batch_size:
        shards = math.prod(first["mesh"][axis] for axis in BATCH_AXES)
        size = size_on_other_devices(
            cfg.micro_batch_size, cfg.rows_of_update, mesh, shards_before=shards
        )
        if size != cfg.micro_batch_size:
            cfg = dataclasses.replace(cfg, micro_batch_size=size)
    before = starts[-1]["mesh"]
    if before == dict(mesh.shape):
        return cfg, None
    return cfg, (
        f"{name}: now on {_of_mesh(mesh.shape)}, before on {_of_mesh(before)}; an optimizer step "
        f"has {cfg.rows_of_update} rows as before, "
        f"{'all that fit' if cfg.micro_batch_size == 'auto' else cfg.rows_at_once} at once"
    )


def _of_mesh(sizes: Mapping[str, int]) -> str:
    shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    return f"{math.prod(sizes.values())} devices ({shown})"


def stage_step(
    cfg: TrainingConfig,
    loss: LossFunction,
    abstract_state: Callable[[Optimizer], TrainState],
    mesh: Mesh,
    *,
    num_steps: int,
) -> Step:
    """Makes the optimizer step of a run of so many steps.

    Args:
        cfg: the stage's settings.
        loss: that is minimised.
        abstract_state: from the optimizer to the shapes and shardings of the state.
        mesh: where everything lies.
        num_steps: of the run, for the schedule of the learning rate.
    """
    optimizer = make_optimizer(cfg.optimizer, num_steps=num_steps)
    return make_step(
        loss,
        optimizer,
        abstract_state(optimizer),
        mesh,
        num_micro_batches=cfg.batch_size // cfg.rows_at_once,
    )
