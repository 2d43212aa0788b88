"""The loop of PPO: iterate, report, save, until it is done or told to stop.

A run that is stopped or killed goes on where its newest checkpoint stands and gives, bit for bit,
what an unbroken one would have given (on the same mesh).
"""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from huatuo_jax.checkpoint.store import CheckpointStore
from huatuo_jax.core import distributed
from huatuo_jax.core.files import AppendedFile
from huatuo_jax.ppo.config import Judged, PpoLoopConfig
from huatuo_jax.ppo.held_out import HeldOutJudging
from huatuo_jax.ppo.report import PREFIX, Decode, IterationFlops, IterationReport
from huatuo_jax.ppo.trainer import PpoState, Trainer
from huatuo_jax.training.loop import Diverged, Interrupted, StopSignals
from huatuo_jax.training.metrics import (
    MetricsLog,
    ProgressReport,
    Silent,
    make_progress,
    peak_flops,
)
from huatuo_jax.training.run_directory import StageDirectory

SAMPLES_FILE = "samples.jsonl"

_TOLD = (
    ("score", "score", ".3f"),
    ("KL", "kl_per_sequence", ".3f"),
    ("length", "response_length", ".1f"),
    ("entropy", "entropy", ".3f"),
    ("ended", "eos_rate", ".0%"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PpoJob:
    """A stage as the loop sees it.

    Attributes:
        directory: where its files are.
        decisive: the settings that decide results; stored in each checkpoint.
        num_iterations: in all.
        mesh: where the state lies.
        make_state: makes the state before the first iteration; not called on resume.
        abstract_state: that state's shapes and shardings.
        make_trainer: makes what iterates, once the state is there.
        flops: of the models.
        decode: from tokens to text; None for tokens in `samples.jsonl`.
        judging: of held-out answers; it keeps the best policy and may end the run early.
    """

    directory: StageDirectory
    decisive: Mapping[str, Any]
    num_iterations: int
    mesh: Mesh
    make_state: Callable[[], PpoState]
    abstract_state: PpoState
    make_trainer: Callable[[], Trainer]
    flops: IterationFlops
    decode: Decode | None
    judging: HeldOutJudging | None = None


def train(job: PpoJob, cfg: PpoLoopConfig) -> tuple[PpoState, dict[str, float]]:
    """Runs a stage to its end, from its newest checkpoint if it has one.

    Returns:
        The last state, whose checkpoint is on disk, and the numbers of its iteration. The policy
        to keep is another one where the job has judgings.

    Raises:
        Interrupted: SIGTERM or Ctrl-C came; the state is saved.
        Diverged: too many steps in a row were not finite.
        OSError: a checkpoint could not be written or read.
        ValueError: the newest checkpoint does not fit the job.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignals())
        store = stack.enter_context(
            CheckpointStore(job.directory.checkpoints, keep_newest=cfg.keep_checkpoints)
        )
        newest = store.latest_step()
        distributed.check_same("the newest checkpoint", newest)
        step, fields = newest or 0, {}
        extra: dict[str, Any] = {}
        if newest is None:
            state = job.make_state()
        else:
            found = store.restore(newest, abstract_state=job.abstract_state, config=job.decisive)
            state, extra = found.state, found.extra
            fields = extra["fields"]
        report = stack.enter_context(_Reports(job, cfg, newest))
        judging = job.judging
        if judging is not None:
            judging.open(extra["judging"] if newest is not None else [], restored=newest)
        elif step == job.num_iterations:
            return state, fields
        trainer = job.make_trainer()
        while True:
            if judging is not None and judging.is_due(step):
                report.write_judged(judging.judge(state, trainer))
                if judging.turned:
                    break
                if step and stop.requested():  # Its checkpoint is there, and so is the outcome.
                    raise _interrupted(step, job)
            if step == job.num_iterations:
                break
            state, iteration = trainer.iterate(state)
            step = iteration.iteration
            fields = report.write(iteration)
            _check_finite(iteration, cfg)
            stopping = stop.requested()
            is_due = judging is not None and judging.is_due(step)
            is_last = step == job.num_iterations
            if stopping or is_due or is_last or step % cfg.checkpoint_every == 0:
                report.flush()
                extra = {"fields": fields}
                if judging is not None:
                    extra["judging"] = judging.to_json()
                store.save(step, state, config=job.decisive, extra=extra)
            if is_due:  # Nothing is asked about a policy that a kill could take away.
                store.wait()
            if stopping:
                store.wait()
                raise _interrupted(step, job)
        store.wait()
        return state, fields


def _interrupted(step: int, job: PpoJob) -> Interrupted:
    return Interrupted(
        f"stopped after iteration {step} of {job.num_iterations} and saved; run the same command "
        "again to go on"
    )


def _check_finite(iteration: IterationReport, cfg: PpoLoopConfig) -> None:
    in_a_row = iteration.not_finite_in_a_row
    if in_a_row >= cfg.max_not_finite_in_a_row:
        names = ", ".join(prompt.id for prompt in iteration.rollout.prompts[:8])
        raise Diverged(
            f"iteration {iteration.iteration}: loss or gradient is not finite on the answers to "
            f"{names}; {in_a_row} steps in a row were skipped for this "
            "(loop.max_not_finite_in_a_row), the run stops"
        )


class _Reports(contextlib.AbstractContextManager["_Reports", None]):
    """Metrics, samples and progress of a run, told by the first of its processes."""

    def __init__(self, job: PpoJob, cfg: PpoLoopConfig, restored: int | None) -> None:
        """Opens the files, and cuts what a run left there past its last checkpoint."""
        self._job, self._cfg = job, cfg
        self._log: MetricsLog | None = None
        self._progress: ProgressReport = Silent()
        self._samples: AppendedFile | None = None
        if distributed.is_first():
            self._open(restored)

    def _open(self, restored: int | None) -> None:
        job, cfg = self._job, self._cfg
        directory = job.directory
        self._log = MetricsLog(
            directory.metrics,
            stage=directory.name,
            after_step=restored,
            evaluated=False,
            tensorboard=directory.tensorboard if cfg.tensorboard else None,
        )
        self._samples = open_samples(directory.folder / SAMPLES_FILE, after_step=restored)
        self._progress = make_progress(
            directory.name, job.num_iterations, start=restored or 0, every=cfg.log_every
        )
        if restored is not None:
            self._progress.say(f"goes on from the checkpoint of iteration {restored}")
        peak = peak_flops(job.mesh.devices.flat[0])
        self._peak = None if peak is None else peak * job.mesh.size

    def __exit__(self, *_: object) -> None:
        """Closes them."""
        self._progress.close()
        if self._log is not None:
            self._log.close()
        if self._samples is not None:
            self._samples.close()

    def write(self, iteration: IterationReport) -> dict[str, float]:
        """Adds an iteration; its numbers, those of the clock left aside."""
        fields = {name: value for name, value in iteration.fields().items() if math.isfinite(value)}
        if self._log is not None and self._samples is not None:
            self._tell(self._log, self._samples, iteration, fields)
        return fields

    def _tell(
        self,
        log: MetricsLog,
        samples: AppendedFile,
        iteration: IterationReport,
        fields: Mapping[str, float],
    ) -> None:
        speed = iteration.speed(self._job.flops, peak_flops=self._peak)
        log.write(iteration.iteration, {**fields, **speed})
        samples.append(iteration.samples(self._cfg.samples_per_iteration, self._job.decode))
        self._progress.step(
            iteration.iteration,
            loss=fields.get(f"{PREFIX}/policy_loss"),
            tokens_per_s=speed["throughput/tokens_per_s"],
        )
        if iteration.iteration % self._cfg.log_every == 0:
            self._progress.say(
                ", ".join(
                    f"{word} {fields[f'{PREFIX}/{name}']:{form}}"
                    for word, name, form in _TOLD
                    if f"{PREFIX}/{name}" in fields
                )
            )
        skipped = iteration.not_finite_in_a_row
        if skipped:
            self._progress.say(f"the last {skipped} steps were not finite and were skipped")

    def write_judged(self, judged: Judged) -> None:
        """Adds a judging."""
        if self._log is not None:
            self._log.write(judged.iteration, judged.fields())
            self._progress.say(str(judged))

    def flush(self) -> None:
        """Puts all on disk, before a checkpoint says that it is there."""
        if self._log is not None and self._samples is not None:
            self._log.flush()
            self._samples.sync()


def open_samples(path: pathlib.Path, *, after_step: int | None) -> AppendedFile:
    """Opens a file of samples without those written after a checkpoint; None removes all."""
    file = AppendedFile(path, locked=False)
    try:
        file.keep_while(lambda row: after_step is not None and row["step"] <= after_step)
    except BaseException:
        file.close()
        raise
    return file
