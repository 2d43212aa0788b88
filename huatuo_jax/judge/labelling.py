"""Asks a judge about a file of answers, in a run that can be killed and resumed.

A call under way when a run is killed is asked again, and counts twice in the spending file; the
labels file holds its judgement once. Judgements are written in the order of arrival; later steps
order them by id.
"""

import asyncio
import dataclasses
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from huatuo_jax.judge.judgements import (
    Estimate,
    Failure,
    Judge,
    Judgement,
    JudgementFailed,
    JudgeUnusable,
    LabelsFile,
    Reply,
    current,
    for_each,
)
from huatuo_jax.judge.questions import Answered, Question, pairwise_questions, score_questions

Protocols = Literal["score", "pairwise", "both"]

# A question refused in so many runs is not asked again: a filter that refuses twice always refuses.
_MOST_REFUSALS = 2

Identity = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """The questions about each prompt's answers.

    Attributes:
        protocol: "score" for each answer by itself, "pairwise" for every two in both orders.
        max_pairs: pairs of a prompt at most; None for all.
        concurrency: questions under way at once.
    """

    protocol: Protocols = "score"
    max_pairs: int | None = None
    concurrency: int = 8

    def __post_init__(self) -> None:
        """Validates the fields."""
        if self.protocol not in ("score", "pairwise", "both"):
            raise ValueError(f"protocol is {self.protocol!r}; it should be score, pairwise or both")
        for name in ("max_pairs", "concurrency"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The questions still to ask, and those that need no asking.

    Attributes:
        questions: all questions of the answers file under the settings.
        done: number of questions with a verdict in the labels file.
        copies: questions equal to one with a verdict there, each with that verdict.
        refused: number of questions refused in two runs, which are not asked again.
        truncated: number of questions whose reply reached its token limit, where the limit is no
            higher now; not asked again.
        groups: the other questions; equal ones form a group and are asked once. Those that have
            not failed yet come first.
        others: number of judgements in the file that belong to none of the questions.
        estimate: cost of the calls if none fails.
    """

    questions: Sequence[Question]
    done: int
    copies: Sequence[tuple[Question, Judgement]]
    refused: int
    truncated: int
    groups: Sequence[Sequence[Question]]
    others: int
    estimate: Estimate

    def __str__(self) -> str:
        """Returns counts and cost, to be shown before anything is spent."""
        estimate = self.estimate
        lines = [
            f"{len(self.questions)} judgements: {self.done} done, {len(self.copies)} copied from"
            f" equal questions, {sum(map(len, self.groups))} to get by {len(self.groups)} questions"
        ]
        if estimate.calls:
            lines.append(
                f"calls: {estimate.calls}, more where some fail; tokens: about"
                f" {estimate.input_tokens} in (at most {estimate.max_input_tokens}), at most"
                f" {estimate.max_output_tokens} out"
            )
            lines.append(
                "cost: unknown, as the price table lacks this model"
                if estimate.cost is None
                else f"cost: about {estimate.cost:.6g} if every reply has the maximum length, at"
                f" most {estimate.max_cost:.6g} if no call fails"
            )
        lines += _not_asked_again(self.refused, self.truncated)
        if self.others:
            lines.append(f"{self.others} judgements of other questions stay in the file")
        return "\n".join(lines)


@dataclass
class Labels:
    """The judgements after a run.

    Attributes:
        judgements: current ones of the plan's questions, by id and answers.
        asked: number of questions of this run.
        failed: number of judgements without a verdict.
        refused: number of failed judgements whose question was refused in two runs, and is not
            asked again.
        truncated: number of failed judgements that need a higher token limit to be asked again.
        missing: number of questions that were not asked.
        error: the reason why the run ended early; None for none.
        stopped: the run was asked to stop before all questions were asked.
    """

    judgements: list[Judgement] = field(default_factory=list)
    asked: int = 0
    failed: int = 0
    refused: int = 0
    truncated: int = 0
    missing: int = 0
    error: Exception | None = None
    stopped: bool = False

    @property
    def verdicts(self) -> int:
        """Counts the judgements that did not fail."""
        return len(self.judgements) - self.failed

    def __str__(self) -> str:
        """Returns the counts in one line."""
        to_ask = self.failed + self.missing - self.refused - self.truncated
        again = f"; run again to ask for {to_ask} anew" if to_ask else ""
        kept = "".join(f"; {one}" for one in _not_asked_again(self.refused, self.truncated))
        return (
            f"{self.verdicts} verdicts, {self.failed} failed judgements, {self.missing} not asked"
            f" ({self.asked} questions asked in this run){again}{kept}"
        )


def questions_of(cfg: LabelConfig, answered: Sequence[Answered], judge: Judge) -> list[Question]:
    """Returns all questions, each once."""
    questions: list[Question] = []
    if cfg.protocol in ("score", "both"):
        questions += score_questions(answered, judge)
    if cfg.protocol in ("pairwise", "both"):
        questions += pairwise_questions(answered, judge, max_pairs=cfg.max_pairs)
    return questions


def make_plan(questions: Sequence[Question], found: Iterable[Judgement], judge: Judge) -> Plan:
    """Plans the questions that the existing judgements leave to ask.

    Raises:
        ValueError: a prompt that the judge does not take.
    """
    found = list(found)
    standing = {judgement.identity: judgement for judgement in current(found)}
    verdicts = {judgement.key: judgement for judgement in standing.values() if not judgement.failed}
    refusals = _refusals(found)
    done, copies, unasked = 0, [], Counter[str]()
    groups: dict[str, list[Question]] = {}
    for question in questions:
        there = standing.get(question.identity)
        if there is not None and not there.failed:
            done += 1
        elif question.key in verdicts:
            copies.append((question, verdicts[question.key]))
        elif there is not None and (kind := _settled(question, there, refusals, judge)):
            unasked[kind] += 1
        else:
            groups.setdefault(question.key, []).append(question)
    ordered = sorted(
        groups.values(), key=lambda group: any(one.identity in standing for one in group)
    )
    estimates = [judge.estimate(group[0].prompt, group[0].texts) for group in ordered]
    return Plan(
        questions=questions,
        done=done,
        copies=copies,
        refused=unasked["refused"],
        truncated=unasked["truncated"],
        groups=ordered,
        others=len(standing.keys() - {question.identity for question in questions}),
        estimate=_sum(estimates),
    )


def label(
    questions: Sequence[Question],
    judge: Judge,
    output: str | os.PathLike[str],
    *,
    concurrency: int,
    on_progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Labels:
    """Asks all questions without a verdict and appends the judgements to the labels file.

    Args:
        questions: from `questions_of`.
        judge: closed at the end.
        output: the labels file, created with its first judgement.
        concurrency: questions under way at once.
        on_progress: called with the number of judgements done and of all.
        stop: tells whether no more is to be asked; calls under way are waited for.

    Returns:
        The judgements. Where the judge failed, `error` holds the reason, and everything that had
        arrived is in the file.

    Raises:
        ValueError: a prompt that the judge does not take, or an invalid labels file.
        OSError: the file is not readable.
    """

    async def run() -> Labels:
        try:
            with LabelsFile(output) as file:
                plan = make_plan(questions, file.found, judge)
                return await _Run(plan, judge, file, on_progress).run(concurrency, stop)
        finally:
            await judge.close()

    return asyncio.run(run())


class _Run:
    """One run over a plan."""

    def __init__(
        self,
        plan: Plan,
        judge: Judge,
        file: LabelsFile,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self._plan, self._judge, self._file = plan, judge, file
        self._on_progress = on_progress
        self._done = plan.done + plan.refused + plan.truncated
        # True once any question has a verdict; number of replies that suggest none will.
        self._has_verdict, self._num_in_vain = bool(plan.done or plan.copies), 0
        # True once the judge answers at all; refusals are held back until that is known.
        self._answers = self._has_verdict
        self._held: list[tuple[Sequence[Question], JudgementFailed]] = []
        self._new: list[Judgement] = []
        self._asked = 0
        self._error: Exception | None = None

    async def run(self, concurrency: int, stop: Callable[[], bool]) -> Labels:
        for question, judgement in self._plan.copies:
            self._append([question.copy_of(judgement)])
        wanted = itertools.takewhile(lambda _: not stop(), self._plan.groups)
        self._error = await for_each(wanted, self._ask, concurrency=concurrency)
        if self._error is None:
            self._release()
        return self._labels()

    async def _ask(self, group: Sequence[Question]) -> None:
        outcome: Reply | JudgementFailed
        self._asked += 1
        try:
            outcome = await group[0].ask(self._judge)
        except JudgementFailed as failure:
            outcome = failure
        self._record(group, outcome)

    def _record(self, group: Sequence[Question], outcome: Reply | JudgementFailed) -> None:
        """Appends a group's judgements, or holds back a refusal that every question may meet.

        Raises:
            JudgeUnusable: enough questions had this outcome, and none a verdict.
        """
        ends_after = None
        if isinstance(outcome, Reply):
            self._has_verdict = True
        elif not self._has_verdict:
            ends_after = outcome.ends_after
        if isinstance(outcome, Reply) or outcome.raw is not None:
            self._answers = True
            self._release()
        elif ends_after is not None and not self._answers:
            self._held.append((group, outcome))
            if len(self._held) >= ends_after:
                raise JudgeUnusable(
                    f"{len(self._held)} questions were refused and none was answered: {outcome}"
                )
            return
        self._append(_judgements(group, outcome))
        if ends_after is not None and outcome.raw is not None:
            self._num_in_vain += 1
            if self._num_in_vain >= ends_after:
                raise JudgeUnusable(str(outcome))

    def _release(self) -> None:
        """Appends the refusals that were held back."""
        held, self._held = self._held, []
        for group, outcome in held:
            if not self._answers:  # The questions may not be the reason.
                outcome.failure = "unanswered"
            self._append(_judgements(group, outcome))

    def _append(self, judgements: Sequence[Judgement]) -> None:
        self._file.append(judgements)
        self._new += judgements
        self._done += len(judgements)
        if self._on_progress is not None:
            self._on_progress(self._done, len(self._plan.questions))

    def _labels(self) -> Labels:
        wanted = {question.identity for question in self._plan.questions}
        standing = [
            judgement
            for judgement in current([*self._file.found, *self._new])
            if judgement.identity in wanted
        ]
        failed = [judgement for judgement in standing if judgement.failed]
        refusals = _refusals([*self._file.found, *self._new])
        return Labels(
            judgements=standing,
            asked=self._asked,
            failed=len(failed),
            refused=sum(_is_refused(judgement, refusals) for judgement in failed),
            truncated=sum(judgement.failure == "truncated" for judgement in failed),
            missing=len(wanted) - len(standing),
            error=self._error,
            stopped=self._asked < len(self._plan.groups) and self._error is None,
        )


def _judgements(group: Sequence[Question], outcome: Reply | JudgementFailed) -> list[Judgement]:
    """Returns the judgements of equal questions, the first of which carries the reply's cost."""
    return [question.judgement(outcome, paid=index == 0) for index, question in enumerate(group)]


def _refusals(found: Iterable[Judgement]) -> Counter[Identity]:
    """Counts the refusals of each question."""
    return Counter(one.identity for one in found if one.failure == "refused")


def _is_refused(judgement: Judgement, refusals: Mapping[Identity, int]) -> bool:
    return judgement.failure == "refused" and refusals[judgement.identity] >= _MOST_REFUSALS


def _settled(
    question: Question, there: Judgement, refusals: Mapping[Identity, int], judge: Judge
) -> Failure | None:
    """Returns why a failed judgement is not asked for again, or None where it is."""
    if _is_refused(there, refusals):
        return "refused"
    if there.max_tokens is not None:
        allowed = judge.estimate(question.prompt, question.texts).max_output_tokens
        if allowed <= there.max_tokens:
            return "truncated"
    return None


def _not_asked_again(refused: int, truncated: int) -> list[str]:
    """Returns lines about the questions that are not asked again, with the remedy."""
    lines = []
    if refused:
        lines.append(f"{refused} were refused in two runs and are not asked again")
    if truncated:
        lines.append(f"{truncated} have a truncated reply: ask again with more --max_tokens")
    return lines


def _sum(estimates: Sequence[Estimate]) -> Estimate:
    """Sums estimates field by field; a cost is unknown where one of them is."""
    sums: dict[str, Any] = {}
    for name in (one.name for one in dataclasses.fields(Estimate)):
        values = [getattr(estimate, name) for estimate in estimates]
        if None in values:
            sums[name] = None
        else:
            sums[name] = math.fsum(values) if name in ("cost", "max_cost") else sum(values)
    return Estimate(**sums)
