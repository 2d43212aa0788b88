"""The recipe's section of data that are made before anything is trained."""

import dataclasses
from typing import Literal

from huatuo_jax.core.config import WORKDIR_MARK
from huatuo_jax.data.records import Kind
from huatuo_jax.evaluation.suite_settings import check_once
from huatuo_jax.judge.config import JudgeConfig
from huatuo_jax.synthesis.run import CLINIC, SERVER_PREFIX, SynthesisSettings
from huatuo_jax.training.dialogue_data import SourceConfig

SYNTHESIS_FOLDER = "synthesis"
SYNTHESIS_FLAG = "--config.synthesis."
"""Before the names of the section's fields in messages."""

JUDGE: Literal["judge"] = "judge"
"""The value of `teacher` that stands for the run's judge."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynthesisConfig(SynthesisSettings):
    """Training data made before fine-tuning, as by `huatuo synthesize`; none without a kind.

    The rows of each kind, `{workdir}/synthesis/KIND.jsonl`, are a source of fine-tuning beside
    `sft.data.sources`. Limits of money and calls hold for each kind by itself.

    Attributes:
        kinds: of the data.
        teacher: judge for the run's judge, at its server and its rates, and for the clinic where
            the run has a clinic and no server; else as of the command.
    """

    kinds: tuple[Kind, ...] = ()
    teacher: str = JUDGE

    def file(self, kind: Kind) -> str:
        """Returns the file of a kind's rows."""
        return f"{WORKDIR_MARK}/{SYNTHESIS_FOLDER}/{kind}.jsonl"

    def sources(self) -> tuple[SourceConfig, ...]:
        """Returns the rows of each kind as a source of fine-tuning."""
        return tuple(
            SourceConfig(name=f"{SYNTHESIS_FOLDER}_{kind}", paths=(self.file(kind),), kind=kind)
            for kind in self.kinds
        )

    def check(self, judge: JudgeConfig, *, has_clinic: bool) -> None:
        """Validates that the kinds have a teacher, and that its spending has a limit of its own.

        Args:
            judge: the run's.
            has_clinic: the run's data are the clinic's.

        Raises:
            ValueError: names the field.
        """
        check_once(self.kinds, name="synthesis.kinds")
        if not self.kinds or self.teacher != JUDGE:
            return
        if judge.base_url is None and not has_clinic:
            raise ValueError(
                f"synthesis.teacher={JUDGE!r} needs judge.base_url, as an offline judge makes no"
                " data; or name another teacher"
            )
        for name in ("max_cost", "max_requests"):
            if getattr(judge, name) is not None and getattr(self, name) is None:
                raise ValueError(
                    f"synthesis.{name} must be given, as judge.{name}={getattr(judge, name)} is"
                    " for the judge's calls alone: the teacher has an account for each kind"
                )

    def taught_by(self, judge: JudgeConfig, model: str | None) -> SynthesisSettings:
        """Returns the settings with the run's judge in the place of `judge`.

        Args:
            judge: the run's.
            model: its name on its server; None for an offline one.
        """
        if self.teacher != JUDGE:
            return self
        if model is None:
            return dataclasses.replace(self, teacher=CLINIC)
        own = {
            name: getattr(judge, name)
            for name in ("base_url", "requests_per_minute", "tokens_per_minute", "prices")
            if getattr(self, name) is None
        }
        return dataclasses.replace(self, teacher=f"{SERVER_PREFIX}{model}", **own)
