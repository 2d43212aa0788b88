"""The loop of all training stages: advance, report, evaluate, save, until it is done.

A run that was stopped or killed resumes from its newest checkpoint and gives, bit for bit, what an
unbroken one would have given (on the same mesh). SIGTERM and Ctrl-C end a run after its current
step, with a checkpoint.
"""

import abc
import contextlib
import dataclasses
import signal
import threading
import time
import types
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, NoReturn, Protocol, Self, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from huatuo_jax.checkpoint.store import CheckpointStore, Restored
from huatuo_jax.core import distributed, sharding
from huatuo_jax.data.batches import HostShare
from huatuo_jax.training.metrics import (
    EVALUATION_PREFIX,
    TIME_PREFIX,
    MetricsLog,
    ProgressReport,
    Silent,
    make_progress,
    mesh_peak_flops,
)
from huatuo_jax.training.run_directory import StageDirectory
from huatuo_jax.training.trackers import TrackerName, open_trackers
from huatuo_jax.training.update import Batch, TrainState, Update, Variables
from huatuo_jax.training.wall_time import StepClock, TimeSpent

INTERRUPTED_EXIT_CODE = 75
"""Exit code of a run that was stopped and can resume (EX_TEMPFAIL of sysexits.h)."""

BEST_METRIC = f"{EVALUATION_PREFIX}loss"
LocalBatch = Mapping[str, np.ndarray]
Sums = Mapping[str, np.ndarray]
_STEPS_IN_FLIGHT = 2  # Enough to keep the devices busy.
_ROWS_NAMED = 8


class Interrupted(Exception):
    """A run was asked to stop and has saved; running the same command resumes it."""


class Diverged(Exception):
    """Too many losses or gradients in a row were not finite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseLoopConfig:
    """The loop of every stage, apart from training; no field decides the parameters.

    Attributes:
        checkpoint_every: steps between two checkpoints (iterations in PPO); there is always one at
            the end.
        keep_checkpoints: how many of the newest are kept, beside the best.
        log_every: steps (iterations) between two lines where there is no terminal.
        max_not_finite_in_a_row: so many skipped optimizer steps in a row stop the run.
        tensorboard: whether to write TensorBoard events.
        trackers: where else to send metrics: `wandb`, `mlflow`; see `huatuo_jax.training.trackers`.
    """

    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10
    max_not_finite_in_a_row: int = 5
    tensorboard: bool = True
    trackers: tuple[TrackerName, ...] = ()

    _MAY_BE_ZERO: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for a number that is too small."""
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), int(field.name not in self._MAY_BE_ZERO)
            if field.type is int and value < least:
                name = f"{type(self).__name__}.{field.name}"
                raise ValueError(f"{name}={value!r} must be at least {least}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig(BaseLoopConfig):
    """The loop of a stage that trains on batches; no field decides the parameters.

    Attributes:
        evaluate_every: steps between two evaluations; there is always one at the end.
        checkpoint_every: steps between two checkpoints; there is always one at the end.
        log_every: steps between two lines where there is no terminal.
    """

    evaluate_every: int = 500


class StopSignals:
    """Notes SIGTERM and Ctrl-C while it is entered; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        """Notes nothing yet."""
        self._requested = False
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def requested(self) -> bool:
        """Tells whether any process of the run was asked to stop.

        All of them must call this together; all get the same answer.
        """
        if jax.process_count() == 1:
            return self._requested
        return distributed.stop_together(self._requested)

    @property
    def noted(self) -> bool:
        """Tells whether this process was asked to stop, whatever the others were."""
        return self._requested

    def __enter__(self) -> Self:
        """Takes the signals over; only a process's main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, _: types.FrameType | None) -> None:
        if number == signal.SIGINT and self._requested:
            raise KeyboardInterrupt
        self._requested = True


class BatchIterator(Protocol):
    """This process's rows of the global batches, in an order given by a position."""

    def __next__(self) -> LocalBatch:
        """Returns the next batch."""

    def get_state(self) -> dict[str, Any]:
        """Returns the position of the next batch, as JSON values."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position from `get_state`."""


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One step in numbers.

    Attributes:
        fields: for its row of metrics, as `train/loss`.
        tokens: those of its rows, without padding.
        trained_tokens: those a loss was taken of.
        flops: of the model, by the formula of `throughput`.
    """

    fields: dict[str, float]
    tokens: float
    trained_tokens: float
    flops: float


State = TypeVar("State")
Cfg = TypeVar("Cfg", bound=BaseLoopConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseJob(abc.ABC, Generic[State, Cfg]):
    """A stage as the loop sees it.

    Attributes:
        directory: where its files are.
        decisive: the settings that decide results; stored in each checkpoint.
        num_steps: steps in all (iterations in PPO).
        mesh: where the state lies.
        make_state: makes the state before the first step; not called on resume.
        abstract_state: that state's shapes and shardings.
        after_evaluation: called after each evaluation or judging, in the first process alone.
    """

    directory: StageDirectory
    decisive: Mapping[str, Any]
    num_steps: int
    mesh: Mesh
    make_state: Callable[[], State]
    abstract_state: State
    after_evaluation: Callable[[], None] | None = None

    best_metric: ClassVar[str | None] = None
    """The metric whose best checkpoint is kept; None keeps the newest alone."""

    @abc.abstractmethod
    def session(self, cfg: Cfg, store: CheckpointStore, stop: StopSignals) -> "Session[State, Cfg]":
        """Opens the run of this job, resumed from its newest checkpoint if it has one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(BaseJob[TrainState, LoopConfig]):
    """A stage whose steps each consume a batch, beside the attributes of `BaseJob`.

    Attributes:
        update: compiled.
        batches: global batches of the same rows on every mesh and host.
        report: names the numbers of an update's metrics.
        evaluate: `eval/` numbers of a state, among them `eval/loss`; None without held-out data.
        row_names: ids of the data in the batch at a position, to name the data of a bad step.
    """

    update: Update
    batches: BatchIterator
    report: Callable[[Mapping[str, np.ndarray]], StepReport]
    evaluate: Callable[[TrainState], dict[str, float]] | None
    row_names: Callable[[dict[str, Any]], Sequence[str]]

    best_metric: ClassVar[str | None] = BEST_METRIC

    def session(
        self, cfg: LoopConfig, store: CheckpointStore, stop: StopSignals
    ) -> "Session[TrainState, LoopConfig]":
        """Opens the run of this job, resumed from its newest checkpoint if it has one."""
        return _Updates(self, cfg, store, stop)


def train(job: BaseJob[State, Cfg], cfg: Cfg) -> tuple[State, dict[str, float]]:
    """Runs a stage to its end, from its newest checkpoint if it has one.

    Returns:
        The last state, whose checkpoint is on disk, and its evaluation; in PPO, which has none, the
        numbers of the last iteration.

    Raises:
        Interrupted: SIGTERM or Ctrl-C came; the state is saved.
        Diverged: too many steps in a row were not finite.
        OSError: a checkpoint could not be written or read.
        ValueError: the newest checkpoint does not fit the job.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignals())
        store = stack.enter_context(
            CheckpointStore(
                job.directory.checkpoints,
                keep_newest=cfg.keep_checkpoints,
                best_metric=job.best_metric,
            )
        )
        session = stack.enter_context(job.session(cfg, store, stop))
        return session.run()


def step_numbers(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns the numbers that every stage reports of an update, whatever its loss."""
    return {
        "train/grad_norm": float(metrics["grad_norm"]),
        "train/learning_rate": float(metrics["learning_rate"]),
        "train/tokens": float(metrics["tokens"]),
        "train/updates": int(metrics["num_updates"]),
        "train/steps_not_finite": int(metrics["num_not_finite"]),
        "train/steps_empty": int(metrics["num_empty"]),
    }


def host_share(mesh: Mesh) -> HostShare:
    """Returns the part of each global batch that this process reads: its devices' rows."""
    share, num_shares = sharding.batch_share(mesh)
    return HostShare(host=share, num_hosts=num_shares)


def put_on_mesh(batch: LocalBatch, mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays, rows divided over the mesh, of which each process gives its rows."""
    place = sharding.batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(place, np.asarray(rows))
        for name, rows in batch.items()
    }


def make_measure(
    sums: Callable[[Variables, Batch], dict[str, jax.Array]],
    batches: Callable[[], Iterable[LocalBatch]],
    report: Callable[[Sums], dict[str, float]],
    mesh: Mesh,
) -> Callable[[Variables], dict[str, float]]:
    """Makes the function that evaluates a model's variables.

    Args:
        sums: pure; sums over a batch.
        batches: all of the held-out data, once, from its beginning.
        report: makes numbers of the sums over all batches, which are taken in float64.
        mesh: where variables and batches lie.
    """
    compiled = jax.jit(sums, out_shardings=jax.NamedSharding(mesh, jax.P()))

    def measure(variables: Variables) -> dict[str, float]:
        totals: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((), np.float64))
        with jax.set_mesh(mesh):
            for batch in batches():
                on_devices = compiled(variables, put_on_mesh(batch, mesh))
                for name, value in on_devices.items():
                    totals[name] = totals[name] + np.asarray(value, np.float64)
        return report(totals)

    return measure


def check_rows(rows: int, *, name: str, mesh: Mesh) -> None:
    """Raises ValueError unless the mesh divides so many rows evenly."""
    shards = sharding.batch_shards(mesh)
    if rows < 1 or rows % shards:
        axes = " x ".join(sharding.BATCH_AXES)
        wanted = f"a multiple of the {shards} shards of the mesh ({axes})"
        raise ValueError(f"{name}={rows} rows must be {wanted}; mesh.fsdp=1 takes one device")


def check_in_a_row(number: int, cfg: BaseLoopConfig, *, what: str) -> None:
    """Raises Diverged where so many skipped steps in a row stop a run.

    Args:
        number: optimizer steps in a row that were not finite.
        cfg: of the loop.
        what: the last one, in words.
    """
    if number >= cfg.max_not_finite_in_a_row:
        raise Diverged(
            f"{what}; {number} steps in a row were skipped for this "
            "(loop.max_not_finite_in_a_row), the run stops"
        )


class Session(contextlib.AbstractContextManager["Session[State, Cfg]", None], Generic[State, Cfg]):
    """One process's run of the loop: what all stages do alike.

    A stage's own part is `advance`, and where it has something to do there the hooks around a
    checkpoint.

    Attributes:
        step: steps done.
        state: after them.
        numbers: what `train` returns.
        evaluated: whether they are the state's evaluation, which is saved with it.
        time: what it is spent on.
        log: of metrics; None in all processes but the first.
        progress: of the run; silent in all processes but the first.
    """

    unit: ClassVar[str] = "step"
    """The word for one of `num_steps` in messages."""

    def __init__(
        self, job: BaseJob[State, Cfg], cfg: Cfg, store: CheckpointStore, stop: StopSignals
    ) -> None:
        """Restores the newest checkpoint, or makes the first state, and opens the reports."""
        self.cfg, self.store, self._base, self._stop = cfg, store, job, stop
        self.numbers: dict[str, float] = {}
        self.evaluated = False
        self.time = TimeSpent()
        newest = store.latest_step()
        distributed.check_same("the newest checkpoint", newest)
        if newest is None:
            self.step, self.state = 0, job.make_state()
        else:
            found = store.restore(newest, abstract_state=job.abstract_state, config=job.decisive)
            self.step, self.state = found.step, found.state
            self.restore(found)
        self.log: MetricsLog | None = None
        self.progress: ProgressReport = Silent()
        if distributed.is_first():
            self.open_reports(newest)

    @abc.abstractmethod
    def restore(self, found: Restored) -> None:
        """Takes over what `extra` saved beside the state."""

    @abc.abstractmethod
    def advance(self) -> None:
        """Makes the next step."""

    @abc.abstractmethod
    def extra(self) -> dict[str, Any]:
        """Returns what a checkpoint holds beside the state, as JSON values."""

    def before_save(self) -> None:
        """Does what has to be done after a step and before its checkpoint; not where it stops."""

    def must_save(self) -> bool:
        """Tells whether this step is saved even where no checkpoint is due."""
        return False

    def flush(self) -> None:
        """Puts all reports on disk, before a checkpoint refers to them."""
        if self.log is not None:
            self.log.flush()

    def after_save(self) -> bool:
        """Does what needs the step's checkpoint on disk; returns whether the run ends here."""
        return False

    def open_reports(self, restored: int | None) -> None:
        """Opens metrics and progress, cut back to the restored checkpoint."""
        job, cfg = self._base, self.cfg
        self.log = MetricsLog(
            job.directory.metrics,
            stage=job.directory.name,
            after_step=restored,
            evaluated=self.evaluated,
            tensorboard=job.directory.tensorboard if cfg.tensorboard else None,
            trackers=open_trackers(
                cfg.trackers,
                job.directory.folder,
                settings=job.decisive,
                resumed=restored is not None,
            ),
            began_s=job.directory.began_s(),
        )
        self.progress = make_progress(
            job.directory.name, job.num_steps, start=self.step, every=cfg.log_every
        )
        if restored is not None:
            self.progress.say(f"resumes from the checkpoint of {self.unit} {restored}")

    def report_evaluation(self) -> None:
        """Calls what follows an evaluation, in the first process; its rows are on disk by then."""
        if self.log is not None and self._base.after_evaluation is not None:
            with self.time.on("reporting"):
                self.log.flush()
                self._base.after_evaluation()

    def __exit__(self, *_: object) -> None:
        """Closes the reports."""
        self.time.__exit__()
        self.progress.close()
        if self.log is not None:
            self.log.close()

    def run(self) -> tuple[State, dict[str, float]]:
        """Advances to the last step, with checkpoints on the way."""
        self.before_save()
        ended = self.after_save()
        while self.step < self._base.num_steps and not ended:
            self.advance()
            stopping = self._stop.requested()
            # An evaluation may take long; the next start makes up for it.
            if not stopping:
                self.before_save()
            if stopping or self.must_save() or self.is_due(self.cfg.checkpoint_every):
                self.save()
            if stopping:
                self.interrupt()
            ended = self.after_save()
        self.store.wait()
        return self.state, self.numbers

    def is_due(self, every: int) -> bool:
        """Tells whether something that is done every so many steps, and at the end, is due."""
        return self.step % every == 0 or self.step == self._base.num_steps

    def stop_if_requested(self) -> None:
        """Raises Interrupted where any process of the run was asked to stop."""
        if self._stop.requested():
            self.interrupt()

    def interrupt(self) -> NoReturn:
        """Raises Interrupted, once the checkpoint is on disk."""
        self.store.wait()
        raise Interrupted(
            f"stopped after {self.unit} {self.step} of {self._base.num_steps} and saved; run the "
            "same command again to resume"
        )

    def save(self) -> None:
        """Starts a checkpoint; the rows up to it are on disk before it can be."""
        self.flush()
        with self.time.on("saving"):
            self.store.save(
                self.step,
                self.state,
                config=self._base.decisive,
                metrics=self.numbers if self.evaluated else {},
                extra=self.extra(),
            )


class _Updates(Session[TrainState, LoopConfig]):
    """The loop of `Job`: batches, updates whose metrics are awaited later, evaluations."""

    def __init__(
        self, job: Job, cfg: LoopConfig, store: CheckpointStore, stop: StopSignals
    ) -> None:
        """Restores the newest checkpoint, or makes the first state."""
        self._job = job
        self._pending: deque[tuple[int, dict[str, jax.Array], dict[str, Any]]] = deque()
        super().__init__(job, cfg, store, stop)
        self._clock = StepClock()

    def restore(self, found: Restored) -> None:
        """Takes the position of the data and the evaluation from a checkpoint."""
        self.evaluated = found.extra["evaluated"]
        self.numbers = found.metrics
        self._job.batches.set_state(found.extra["data"])

    def extra(self) -> dict[str, Any]:
        """Returns the position of the data, and whether the state was evaluated."""
        return {"data": self._job.batches.get_state(), "evaluated": self.evaluated}

    def advance(self) -> None:
        """Starts one step on the devices, without waiting for it."""
        position = self._job.batches.get_state()
        began = time.perf_counter()
        batch = put_on_mesh(next(self._job.batches), self._job.mesh)
        self._clock.add_wait(time.perf_counter() - began)
        self.state, metrics = self._job.update(self.state, batch)
        self.step += 1
        self.evaluated = False
        self._pending.append((self.step, metrics, position))
        while len(self._pending) > self._steps_in_flight:
            self._settle_oldest()

    @property
    def _steps_in_flight(self) -> int:
        """Number of steps that may run ahead of their metrics.

        None on virtual devices: their collectives share a few cores, and jax aborts the process
        when steps that wait for each other pile up.
        """
        mesh = self._job.mesh
        is_virtual = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
        return 0 if is_virtual else _STEPS_IN_FLIGHT

    def _settle_oldest(self) -> None:
        """Waits for a step's metrics and writes their row."""
        step, on_devices, position = self._pending.popleft()
        metrics = {name: np.asarray(value) for name, value in on_devices.items()}
        report, peak = self._job.report(metrics), mesh_peak_flops(self._job.mesh)
        took_s, waited_s = self._clock.step()
        speed = {
            "step_s": took_s,
            "data_wait_s": waited_s,
            "compute_s": took_s - waited_s,
            "tokens_per_s": report.tokens / took_s,
            "trained_tokens_per_s": report.trained_tokens / took_s,
        }
        if peak is not None:
            speed["model_flops_utilisation"] = report.flops / (took_s * peak)
        if self.log is not None:
            named = {TIME_PREFIX + name: value for name, value in speed.items()}
            named |= self.time.of_step(took_s, waited_s=waited_s)
            self.log.write(step, report.fields | named)
        loss = report.fields.get("train/loss")
        self.progress.step(step, loss=loss, tokens_per_s=speed["tokens_per_s"])
        self._check_finite(step, int(metrics["not_finite_in_a_row"]), position)

    def _check_finite(self, step: int, in_a_row: int, position: dict[str, Any]) -> None:
        if not in_a_row:
            return
        names = list(self._job.row_names(position))
        shown = ", ".join(names[:_ROWS_NAMED]) + (", ..." if len(names) > _ROWS_NAMED else "")
        what = f"step {step}: loss or gradient is not finite on the batch of {shown}"
        check_in_a_row(in_a_row, self.cfg, what=what)
        self.progress.say(f"{what}; skipped")

    def before_save(self) -> None:
        """Evaluates the state, if that is due."""
        job = self._job
        due = self.step > 0 and self.is_due(self.cfg.evaluate_every)
        if job.evaluate is None or self.evaluated or not due:
            return
        self._settle_all()
        with self.time.on("evaluation"):
            self.numbers = job.evaluate(self.state)
        self.evaluated = True
        if self.log is not None:
            self.log.write(self.step, self.numbers | self.time.take())
        self.progress.say(f"step {self.step}: held-out loss {self.numbers[BEST_METRIC]:.4f}")
        self.report_evaluation()
        self._clock.restart()

    def flush(self) -> None:
        """Writes the rows of all steps so far and puts them on disk."""
        self._settle_all()
        super().flush()

    def save(self) -> None:
        """Starts a checkpoint, and leaves its time out of the next step's."""
        super().save()
        self._clock.restart()

    def _settle_all(self) -> None:
        while self._pending:
            self._settle_oldest()
