"""The judge of the clinic, as the labels ask it: the world's own truth, no model and no network.

It judges prompts of `huatuo_jax.clinic` only, whose diagnosis is a name of that world's table. What
it finds in an answer, and how that becomes scores and verdicts, is in `huatuo_jax.clinic.judge`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from huatuo_jax.clinic.dialogues import SOURCE
from huatuo_jax.clinic.findings import truth_of
from huatuo_jax.clinic.judge import NAME, ClinicJudge
from huatuo_jax.data.records import Prompt
from huatuo_jax.feedback.judgements import Protocol, sha256
from huatuo_jax.feedback.judges import NOTHING, Estimate, Reply
from huatuo_jax.feedback.offline_judge import OfflineJudge

EXACT = ClinicJudge()
"""The judge without noise and biases, which knows the true disease."""

TRUTHS: Mapping[str, tuple[str, bool]] = {
    "diagnosis_right": ("names the right disease", True),
    "asks_when_needed": ("asks back where it is needed", True),
    "contraindicated": ("orders what the patient must not have", False),
    "red_flag_missed": ("misses an emergency", False),
}
"""What `truths` tells of an answer: in words, and whether more of it is better."""


def is_of_clinic(prompt: Prompt) -> bool:
    """Whether the clinic wrote a prompt: it says so, and its diagnosis is of that world's table."""
    return prompt.source == SOURCE and has_truth(prompt)


def has_truth(prompt: Prompt) -> bool:
    """Whether a prompt's diagnosis is of the clinic's table, so that its judge can judge it."""
    try:
        truth_of(prompt)
    except ValueError:
        return False
    return True


class TruthJudge:
    """Scores and compares answers by the clinic's table; equal questions get equal verdicts."""

    def __init__(self, judge: ClinicJudge = EXACT) -> None:
        """Takes a judge, which may have planted biases."""
        self._judge = judge

    @property
    def name(self) -> str:
        """`clinic-truth-v1`, and what makes it another judge than the exact one."""
        changes = ", ".join(self._judge.changes)
        return f"{NAME} ({changes})" if changes else NAME

    @property
    def settings(self) -> Mapping[str, Any]:
        """The judge's fields, and a hash of the world it judges by."""
        return self._judge.settings()

    def template_hash(self, protocol: Protocol) -> str:
        """Hash of the settings, which stand for a prompt template."""
        return sha256(f"{protocol} {sorted(self.settings.items())}")

    def estimate(self, prompt: Prompt, texts: Sequence[str]) -> Estimate:
        """Nothing: no request, no token, no money.

        Raises:
            ValueError: the prompt is none of the clinic's.
        """
        truth_of(prompt)
        return NOTHING

    async def score(self, prompt: Prompt, answer: str) -> Reply:
        """The answer's scores, 1 to 5, not rounded."""
        scores = self._judge.scores(prompt, answer)
        return Reply(scores=scores, reason=self._judge.reason(prompt, answer), cost=0.0)

    async def compare(self, prompt: Prompt, first: str, second: str) -> Reply:
        """The probability that the first is better."""
        reasons = [self._judge.reason(prompt, text) for text in (first, second)]
        return Reply(
            p_first=self._judge.p_first(prompt, first, second),
            reason=f"first: {reasons[0]}; second: {reasons[1]}",
            cost=0.0,
        )

    async def close(self) -> None:
        """There is nothing to let go of."""

    def truths(self, prompt: Prompt, answer: str) -> dict[str, float | None]:
        """What is true of an answer, by `TRUTHS`: 1 or 0, None where the question does not arise.

        `diagnosis_right` is of answers to prompts that tell enough for a diagnosis,
        `asks_when_needed` of the others, `red_flag_missed` of those that need emergency care.
        """
        found = self._judge.findings(prompt, answer)
        return {
            "diagnosis_right": None if found.should_ask else float(found.diagnosis == "right"),
            "asks_when_needed": float(found.asks_when_needed) if found.should_ask else None,
            "contraindicated": float(bool(found.contraindicated)),
            "red_flag_missed": float(found.red_flag_missed) if found.emergency else None,
        }


OfflineName = Literal["rubric", "clinic"]


OFFLINE: Mapping[str, OfflineName] = {"offline": "rubric", "clinic": "clinic"}


def open_offline(name: OfflineName, clinic_judge: ClinicJudge = EXACT) -> OfflineJudge | TruthJudge:
    """A judge that needs no server, by its name; the clinic's has these fields."""
    return OfflineJudge() if name == "rubric" else TruthJudge(clinic_judge)


def refuse_unused_judge(
    clinic_judge: ClinicJudge, *, offline: Literal["auto"] | OfflineName, by_server: bool
) -> None:
    """Raise ValueError where fields of the clinic's judge are given, and another one judges."""
    if clinic_judge == EXACT or (offline != "rubric" and not by_server):
        return
    told = ", ".join(f"clinic_judge.{change}" for change in clinic_judge.changes) or "clinic_judge"
    judge = "a model behind a server" if by_server else "the rubric"
    raise ValueError(f"{told} is for the clinic's judge alone, and {judge} judges: leave it out")
