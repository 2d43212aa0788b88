"""PPO's part of the training loop: iterations, their metrics and samples, and judgings.

`huatuo_jax.training.loop` saves, resumes and stops; a step there is an iteration here.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

from huatuo_jax.checkpoint.store import CheckpointStore, Restored
from huatuo_jax.core.files import AppendedFile
from huatuo_jax.ppo.config import PpoLoopConfig
from huatuo_jax.ppo.held_out_rewards import HeldOutCheck
from huatuo_jax.ppo.report import PREFIX, Decode, IterationFlops, IterationReport
from huatuo_jax.ppo.trainer import PpoState, Trainer
from huatuo_jax.training.loop import BaseJob, Session, StopSignals, check_in_a_row
from huatuo_jax.training.metrics import TIME_PREFIX, mesh_peak_flops

SAMPLES_FILE = "samples.jsonl"
TOTAL_KL = f"{PREFIX}/kl_per_sequence"
"""The mean KL of the answers of an iteration from the reference, in nats of a whole answer."""

_PROMPTS_NAMED = 8
_SHOWN = (
    ("score", "score", ".3f"),
    ("KL", "kl_per_sequence", ".3f"),
    ("length", "response_length", ".1f"),
    ("entropy", "entropy", ".3f"),
    ("ended", "eos_rate", ".0%"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PpoJob(BaseJob[PpoState, PpoLoopConfig]):
    """A run of PPO, beside the attributes of `BaseJob`.

    Attributes:
        make_trainer: makes what iterates, once the state is there.
        flops: of the models.
        decode: from tokens to text; None for tokens in `samples.jsonl`.
        judging: of held-out answers; it keeps the best policy and may end the run early.
        stop_at_total_kl: the run ends after an iteration of this KL or more; None for no budget.
    """

    make_trainer: Callable[[], Trainer]
    flops: IterationFlops
    decode: Decode | None
    judging: HeldOutCheck | None = None
    stop_at_total_kl: float | None = None

    def session(
        self, cfg: PpoLoopConfig, store: CheckpointStore, stop: StopSignals
    ) -> Session[PpoState, PpoLoopConfig]:
        """Opens the run of this job, resumed from its newest checkpoint if it has one."""
        return _Iterations(self, cfg, store, stop)


class _Iterations(Session[PpoState, PpoLoopConfig]):
    """The loop of `PpoJob`: iterations, and judgings once their checkpoint is on disk."""

    unit: ClassVar[str] = "iteration"

    def __init__(
        self, job: PpoJob, cfg: PpoLoopConfig, store: CheckpointStore, stop: StopSignals
    ) -> None:
        """Restores the newest checkpoint, or makes the first state."""
        self._job = job
        self._samples: AppendedFile | None = None
        self._peak = mesh_peak_flops(job.mesh)
        self._judged_before: list[dict[str, Any]] = []
        super().__init__(job, cfg, store, stop)
        if job.judging is not None:
            job.judging.open(self._judged_before, restored=self.step or None)

    @cached_property
    def _trainer(self) -> Trainer:
        """The trainer; made when it is first needed, as it holds models."""
        return self._job.make_trainer()

    def restore(self, found: Restored) -> None:
        """Takes the numbers of the last iteration and the judgings from a checkpoint."""
        self.numbers = found.extra["fields"]
        self._judged_before = found.extra.get("judging", [])

    def extra(self) -> dict[str, Any]:
        """Returns the numbers of the last iteration and the judgings so far."""
        judging = self._job.judging
        judged = {} if judging is None else {"judging": judging.to_json()}
        return {"fields": self.numbers} | judged

    def open_reports(self, restored: int | None) -> None:
        """Opens metrics, progress and samples, cut back to the restored checkpoint."""
        super().open_reports(restored)
        path = self._job.directory.folder / SAMPLES_FILE
        self._samples = AppendedFile(path, locked=False)
        self._samples.keep_while(lambda row: restored is not None and row["step"] <= restored)

    def __exit__(self, *_: object) -> None:
        """Closes the reports, and waits for what is paid for."""
        super().__exit__()
        if "_trainer" in self.__dict__:  # It may never have been needed.
            self._trainer.rewards.close()
        if self._samples is not None:
            self._samples.close()

    def flush(self) -> None:
        """Puts metrics and samples on disk."""
        super().flush()
        if self._samples is not None:
            self._samples.sync()

    def advance(self) -> None:
        """Makes an iteration and reports it."""
        self.state, report = self._trainer.iterate(self.state)
        self.step = report.iteration
        fields = report.fields()
        self.numbers = {name: value for name, value in fields.items() if math.isfinite(value)}
        self._write(report)
        names = ", ".join(prompt.id for prompt in report.rollout.prompts[:_PROMPTS_NAMED])
        check_in_a_row(
            report.not_finite_in_a_row,
            self.cfg,
            what=f"iteration {self.step}: loss or gradient is not finite on the answers to {names}",
        )

    def must_save(self) -> bool:
        """Tells whether the policy is judged next, or the run ends: no kill may take it away."""
        return self._is_judging_due() or self._is_spent

    def after_save(self) -> bool:
        """Judges the policy, if that is due; returns whether the run ends here."""
        judging = self._job.judging
        if judging is None or not self._is_judging_due():
            return self._is_spent
        with self.time.on("saving"):
            self.store.wait()
        with self.time.on("judging"):
            judged = judging.judge(self.state, self._trainer)
        if self.log is not None:
            self.log.write(judged.iteration, judged.fields() | self.time.take())
            self.progress.say(str(judged))
        self.report_evaluation()
        if self.step and not judging.turned:  # Its checkpoint is there, and so is the outcome.
            self.stop_if_requested()
        return judging.turned or self._is_spent

    def _is_judging_due(self) -> bool:
        judging = self._job.judging
        return judging is not None and judging.is_due(self.step, is_last=self._is_spent)

    @property
    def _is_spent(self) -> bool:
        """Tells whether the last iteration's KL from the reference has reached its budget."""
        kl, budget = self.numbers.get(TOTAL_KL), self._job.stop_at_total_kl
        return bool(self.step) and kl is not None and budget is not None and kl >= budget

    def _write(self, report: IterationReport) -> None:
        """Adds an iteration to the reports."""
        if self.log is None or self._samples is None:
            return
        speed = report.speed(self._job.flops, peak_flops=self._peak)
        spent = self.time.of_step(speed[f"{TIME_PREFIX}step_s"])
        self.log.write(self.step, {**self.numbers, **speed, **spent})
        self._samples.append(report.samples(self.cfg.samples_per_iteration, self._job.decode))
        self.progress.step(
            self.step,
            loss=self.numbers.get(f"{PREFIX}/policy_loss"),
            tokens_per_s=speed["throughput/tokens_per_s"],
        )
        if self.step % self.cfg.log_every == 0:
            self.progress.say(
                ", ".join(
                    f"{word} {self.numbers[f'{PREFIX}/{name}']:{form}}"
                    for word, name, form in _SHOWN
                    if f"{PREFIX}/{name}" in self.numbers
                )
            )
        if skipped := report.not_finite_in_a_row:
            self.progress.say(f"the last {skipped} steps were not finite and were skipped")
