"""The loop of a stage: next batch, update, metrics, evaluation, checkpoint, until it is done.

A run that is stopped or killed goes on where its newest checkpoint stands and gives, bit for bit,
what an unbroken one would have given (on the same mesh).

Stopping a run from outside: SIGTERM and Ctrl-C ask it to finish its step and save.

Held-out data through a model: sums over all of it, then numbers.
"""

import contextlib
import dataclasses
import signal
import threading
import time
import types
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, Self

import jax
import numpy as np
from jax.sharding import Mesh

from huatuo_jax.checkpoint.store import CheckpointStore
from huatuo_jax.core import distributed, sharding
from huatuo_jax.data.batches import HostShare
from huatuo_jax.training.metrics import (
    EVALUATION_PREFIX,
    TIME_PREFIX,
    MetricsLog,
    ProgressReport,
    Silent,
    StepClock,
    make_progress,
    peak_flops,
)
from huatuo_jax.training.run_directory import StageDirectory
from huatuo_jax.training.update import Batch, TrainState, Update, Variables

INTERRUPTED_EXIT_CODE = 75
"""Exit code of a run that was asked to stop and can go on (EX_TEMPFAIL of sysexits.h)."""


class Interrupted(Exception):
    """A run was asked to stop and has saved; running the same command goes on."""


class StopSignals:
    """Notes SIGTERM and Ctrl-C while it is entered; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        """Notes nothing yet."""
        self._requested = False
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def requested(self) -> bool:
        """Whether to stop, since any process of the run was asked to.

        All of them must call this together, and have the same answer.
        """
        if jax.process_count() == 1:
            return self._requested
        return distributed.stop_together(self._requested)

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


LocalBatch = Mapping[str, np.ndarray]
BEST_METRIC = f"{EVALUATION_PREFIX}loss"

_STEPS_IN_FLIGHT = 2  # Enough to keep the devices busy.
_ROWS_NAMED = 8


class Diverged(Exception):
    """Too many losses or gradients in a row were not finite."""


class BatchIterator(Protocol):
    """This process's rows of the global batches, in an order that a position tells."""

    def __next__(self) -> LocalBatch:
        """The next batch."""

    def get_state(self) -> dict[str, Any]:
        """The position of the next batch, in JSON values."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` gave."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What the loop does beside updating; none of it decides the parameters.

    Attributes:
        evaluate_every: steps between two evaluations; there is always one at the end.
        checkpoint_every: steps between two checkpoints; there is always one at the end.
        keep_checkpoints: how many of the newest are kept, beside the best.
        log_every: steps between two lines where there is no terminal.
        max_not_finite_in_a_row: so many skipped steps stop the run.
        tensorboard: whether to write TensorBoard events.
    """

    evaluate_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10
    max_not_finite_in_a_row: int = 5
    tensorboard: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for a number below 1."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"LoopConfig.{field.name}={value!r} must be at least 1")


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A stage as the loop sees it.

    Attributes:
        directory: where its files are.
        decisive: the settings that decide results; stored in each checkpoint.
        num_steps: batches in all.
        mesh: where state and batches lie.
        make_state: makes the state before the first step; not called on resume.
        abstract_state: that state's shapes and shardings.
        update: compiled.
        batches: global batches of the same rows on every mesh and host.
        report: names the numbers of an update's metrics.
        evaluate: `eval/` numbers of a state, among them `eval/loss`; None without held-out data.
        row_names: what stands in the batch at a position, to name the data of a bad step.
    """

    directory: StageDirectory
    decisive: Mapping[str, Any]
    num_steps: int
    mesh: Mesh
    make_state: Callable[[], TrainState]
    abstract_state: TrainState
    update: Update
    batches: BatchIterator
    report: Callable[[Mapping[str, np.ndarray]], StepReport]
    evaluate: Callable[[TrainState], dict[str, float]] | None
    row_names: Callable[[dict[str, Any]], Sequence[str]]


def train(job: Job, cfg: LoopConfig) -> tuple[TrainState, dict[str, float]]:
    """Runs a stage to its end, from its newest checkpoint if it has one.

    Returns:
        The last state, whose checkpoint is on disk, and its evaluation.

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
                best_metric=BEST_METRIC,
            )
        )
        session = _Session(job, cfg, store, stop)
        stack.enter_context(session)
        return session.run()


def step_numbers(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What every stage reports of an update, whatever its loss."""
    return {
        "train/grad_norm": float(metrics["grad_norm"]),
        "train/learning_rate": float(metrics["learning_rate"]),
        "train/tokens": float(metrics["tokens"]),
        "train/updates": int(metrics["num_updates"]),
        "train/steps_not_finite": int(metrics["num_not_finite"]),
        "train/steps_empty": int(metrics["num_empty"]),
    }


def host_share(mesh: Mesh) -> HostShare:
    """Which rows of each global batch this process reads: those that its devices hold."""
    share, num_shares = sharding.batch_share(mesh)
    return HostShare(host=share, num_hosts=num_shares)


def put_on_mesh(batch: LocalBatch, mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows as part of global arrays, rows divided over the mesh."""
    place = sharding.batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(place, np.asarray(rows))
        for name, rows in batch.items()
    }


class _Session(contextlib.AbstractContextManager["_Session", None]):
    """One process's run of the loop."""

    def __init__(
        self, job: Job, cfg: LoopConfig, store: CheckpointStore, stop: StopSignals
    ) -> None:
        """Restores the newest checkpoint, or makes the first state."""
        self._job, self._cfg, self._store, self._stop = job, cfg, store, stop
        self._pending: deque[tuple[int, dict[str, jax.Array], dict[str, Any]]] = deque()
        self._evaluation: dict[str, float] = {}
        newest = store.latest_step()
        distributed.check_same("the newest checkpoint", newest)
        self._evaluated = False
        if newest is None:
            self._step, self._state = 0, job.make_state()
        else:
            restored = store.restore(newest, abstract_state=job.abstract_state, config=job.decisive)
            self._step, self._state = restored.step, restored.state
            self._evaluated = restored.extra["evaluated"]
            self._evaluation = restored.metrics
            job.batches.set_state(restored.extra["data"])
        self._log: MetricsLog | None = None
        self._progress: ProgressReport = Silent()
        if jax.process_index() == 0:
            self._open_reports(newest)
        self._clock = StepClock()

    def _open_reports(self, restored: int | None) -> None:
        job, cfg = self._job, self._cfg
        self._log = MetricsLog(
            job.directory.metrics,
            stage=job.directory.name,
            after_step=restored,
            evaluated=self._evaluated,
            tensorboard=job.directory.tensorboard if cfg.tensorboard else None,
        )
        self._progress = make_progress(
            job.directory.name, job.num_steps, start=self._step, every=cfg.log_every
        )
        if restored is not None:
            self._progress.say(f"goes on from the checkpoint of step {restored}")

    def __exit__(self, *_: object) -> None:
        """Closes the reports."""
        self._progress.close()
        if self._log is not None:
            self._log.close()

    def run(self) -> tuple[TrainState, dict[str, float]]:
        """The loop itself."""
        job = self._job
        self._evaluate_if_due()
        while self._step < job.num_steps:
            self._advance()
            stopping = self._stop.requested()
            # An evaluation may take long; the next start makes up for it.
            if not stopping:
                self._evaluate_if_due()
            if stopping or self._is_due(self._cfg.checkpoint_every):
                self._save()
            if stopping:
                self._store.wait()
                raise Interrupted(
                    f"stopped after step {self._step} of {job.num_steps} and saved; run the same "
                    "command again to go on"
                )
        self._store.wait()
        return self._state, self._evaluation

    def _advance(self) -> None:
        """One step: asked of the devices, not waited for."""
        position = self._job.batches.get_state()
        began = time.perf_counter()
        batch = put_on_mesh(next(self._job.batches), self._job.mesh)
        self._clock.add_wait(time.perf_counter() - began)
        self._state, metrics = self._job.update(self._state, batch)
        self._step += 1
        self._evaluated = False
        self._pending.append((self._step, metrics, position))
        while len(self._pending) > self._steps_in_flight:
            self._settle_oldest()

    @property
    def _steps_in_flight(self) -> int:
        """How many steps may run ahead of their metrics.

        None on virtual devices: their collectives share a few cores, and jax aborts the process
        when steps that wait for each other pile up.
        """
        mesh = self._job.mesh
        is_virtual = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
        return 0 if is_virtual else _STEPS_IN_FLIGHT

    def _is_due(self, every: int) -> bool:
        return self._step % every == 0 or self._step == self._job.num_steps

    def _settle_oldest(self) -> None:
        """Waits for a step's metrics and writes their row."""
        step, on_devices, position = self._pending.popleft()
        metrics = {name: np.asarray(value) for name, value in on_devices.items()}
        report = self._job.report(metrics)
        took_s, waited_s = self._clock.step()
        speed = {
            "step_s": took_s,
            "data_wait_s": waited_s,
            "compute_s": took_s - waited_s,
            "tokens_per_s": report.tokens / took_s,
            "trained_tokens_per_s": report.trained_tokens / took_s,
        }
        devices = self._job.mesh.devices.flatten()
        peak = peak_flops(devices[0])
        if peak is not None:
            speed["model_flops_utilisation"] = report.flops / (took_s * peak * len(devices))
        if self._log is not None:
            named = {TIME_PREFIX + name: value for name, value in speed.items()}
            self._log.write(step, report.fields | named)
        loss = report.fields.get("train/loss")
        self._progress.step(step, loss=loss, tokens_per_s=report.tokens / took_s)
        self._check_finite(step, int(metrics["not_finite_in_a_row"]), position)

    def _check_finite(self, step: int, in_a_row: int, position: dict[str, Any]) -> None:
        if not in_a_row:
            return
        names = list(self._job.row_names(position))
        shown = ", ".join(names[:_ROWS_NAMED]) + (", ..." if len(names) > _ROWS_NAMED else "")
        what = f"step {step}: loss or gradient is not finite on the batch of {shown}"
        if in_a_row >= self._cfg.max_not_finite_in_a_row:
            raise Diverged(
                f"{what}; {in_a_row} steps in a row were skipped for this "
                f"(loop.max_not_finite_in_a_row), the run stops"
            )
        self._progress.say(f"{what}; skipped")

    def _settle_all(self) -> None:
        while self._pending:
            self._settle_oldest()

    def _evaluate_if_due(self) -> None:
        job = self._job
        due = self._step > 0 and self._is_due(self._cfg.evaluate_every)
        if job.evaluate is None or self._evaluated or not due:
            return
        self._settle_all()
        self._evaluation = job.evaluate(self._state)
        self._evaluated = True
        if self._log is not None:
            self._log.write(self._step, self._evaluation)
        shown = f"{self._evaluation[BEST_METRIC]:.4f}"
        self._progress.say(f"step {self._step}: held-out loss {shown}")
        self._clock.restart()

    def _save(self) -> None:
        """Starts a checkpoint; the rows up to it are on disk before it can be."""
        self._settle_all()
        if self._log is not None:
            self._log.flush()
        self._store.save(
            self._step,
            self._state,
            config=self._job.decisive,
            metrics=self._evaluation if self._evaluated else {},
            extra={"data": self._job.batches.get_state(), "evaluated": self._evaluated},
        )
        self._clock.restart()


Sums = Mapping[str, np.ndarray]


def make_evaluate(
    sums: Callable[[Variables, Batch], dict[str, jax.Array]],
    batches: Callable[[], Iterable[LocalBatch]],
    report: Callable[[Sums], dict[str, float]],
    mesh: Mesh,
) -> Callable[[TrainState], dict[str, float]]:
    """The function that evaluates a state; see `make_measure`."""
    measure = make_measure(sums, batches, report, mesh)
    return lambda state: measure(state.variables)


def make_measure(
    sums: Callable[[Variables, Batch], dict[str, jax.Array]],
    batches: Callable[[], Iterable[LocalBatch]],
    report: Callable[[Sums], dict[str, float]],
    mesh: Mesh,
) -> Callable[[Variables], dict[str, float]]:
    """The function that evaluates a model's variables.

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
    """Raise ValueError unless the mesh can divide so many rows evenly."""
    shards = sharding.batch_shards(mesh)
    if rows < 1 or rows % shards:
        axes = " x ".join(sharding.BATCH_AXES)
        raise ValueError(
            f"{name}={rows} rows must be a multiple of the {shards} shards of the mesh ({axes})"
        )
