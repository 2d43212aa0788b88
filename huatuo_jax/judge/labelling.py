"""Asks a judge about a file of answers, in a run that can be killed and started again.

A call that is under way when a run is killed is asked again, and counts twice in the spending
file; its judgement stands in the labels file once. Judgements come in the order in which they
arrive; what is made of them later is ordered by id.
"""

import asyncio
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

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
)
from huatuo_jax.judge.questions import Answered, Question, pairwise_questions, score_questions

Protocols = Literal["score", "pairwise", "both"]

# Refusals of a question, each in a run of its own, before it is left alone: a filter that refuses
# twice refuses always.
_MOST_REFUSALS = 2

Identity = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """What to ask about each prompt's answers.

    Attributes:
        protocol: "score" for each answer by itself, "pairwise" for every two in both orders.
        max_pairs: of a prompt at most; None for all.
        concurrency: questions under way at once.
    """

    protocol: Protocols = "score"
    max_pairs: int | None = None
    concurrency: int = 8

    def __post_init__(self) -> None:
        """Raise ValueError for a field that cannot be."""
        if self.protocol not in ("score", "pairwise", "both"):
            raise ValueError(f"protocol is {self.protocol!r}; it should be score, pairwise or both")
        for name in ("max_pairs", "concurrency"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be asked, and what need not be.

    Attributes:
        questions: all that the answers file and the settings make.
        done: of them those with a verdict in the labels file.
        copies: those of which an equal question has a verdict there, with that verdict.
        refused: failed judgements of questions that were refused in two runs; not asked again.
        truncated: failed judgements whose reply ended at its limit of tokens, where the limit is
            no higher now; not asked again.
        groups: the others; equal questions are together and asked once. Those that have not failed
            yet come first.
        others: judgements in the file that belong to none of the questions.
        estimate: what the calls may take, where none fails.
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
        """Counts and cost, for the user to see before anything is spent."""
        estimate = self.estimate
        lines = [
            f"{len(self.questions)} judgements: {self.done} done, {len(self.copies)} copied from"
            f" equal questions, {_num_asked(self.groups)} to get by {len(self.groups)} questions"
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
                else f"cost: about {estimate.cost:.6g} if every reply is as long as it may be, at"
                f" most {estimate.max_cost:.6g} if no call fails"
            )
        lines += _not_asked_again(self.refused, self.truncated)
        if self.others:
            lines.append(f"{self.others} judgements of other questions are in the file, and stay")
        return "\n".join(lines)


@dataclass
class Labels:
    """What stands after a run.

    Attributes:
        judgements: of all questions of the plan that were asked, by id and answers.
        asked: questions of this run.
        failed: judgements without a verdict.
        refused: of the failed ones, those that are not asked again, as the question was refused in
            two runs.
        truncated: of the failed ones, those that are asked again with more tokens alone.
        missing: questions that were not asked.
        error: what ended the run early.
    """

    judgements: list[Judgement] = field(default_factory=list)
    asked: int = 0
    failed: int = 0
    refused: int = 0
    truncated: int = 0
    missing: int = 0
    error: Exception | None = None

    @property
    def verdicts(self) -> int:
        """Judgements that did not fail."""
        return len(self.judgements) - self.failed

    def __str__(self) -> str:
        """One line."""
        to_ask = self.failed + self.missing - self.refused - self.truncated
        again = f"; run again to ask for {to_ask} anew" if to_ask else ""
        kept = "".join(f"; {one}" for one in _not_asked_again(self.refused, self.truncated))
        return (
            f"{self.verdicts} verdicts, {self.failed} failed judgements, {self.missing} not asked"
            f" ({self.asked} questions asked in this run){again}{kept}"
        )


def questions_of(cfg: LabelConfig, answered: Sequence[Answered], judge: Judge) -> list[Question]:
    """All questions, each once."""
    questions: list[Question] = []
    if cfg.protocol in ("score", "both"):
        questions += score_questions(answered, judge)
    if cfg.protocol in ("pairwise", "both"):
        questions += pairwise_questions(answered, judge, max_pairs=cfg.max_pairs)
    return questions


def make_plan(questions: Sequence[Question], found: Iterable[Judgement], judge: Judge) -> Plan:
    """What the judgements that are there leave to be asked.

    Raises:
        ValueError: a prompt that cannot be judged.
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
) -> Labels:
    """Asks all questions that have no verdict yet, and appends what comes to the labels file.

    Args:
        questions: of `questions_of`.
        judge: is closed at the end.
        output: the labels file, made with its first judgement.
        concurrency: questions under way at once.
        on_progress: is called with the judgements done and those in all.

    Returns:
        What stands. Where the judge could not go on, `error` says why, and all that had arrived by
        then is in the file.

    Raises:
        ValueError: a prompt that cannot be judged, or a labels file that cannot be.
        OSError: the file cannot be read.
    """

    async def run() -> Labels:
        try:
            with LabelsFile(output) as file:
                plan = make_plan(questions, file.found, judge)
                return await _Run(plan, judge, file, on_progress).run(concurrency)
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
        # Whether any question has a verdict, and replies that say none may have one.
        self._has_verdict, self._num_in_vain = bool(plan.done or plan.copies), 0
        # Whether the judge answers at all, and refusals that wait for that to be known.
        self._answers = self._has_verdict
        self._held: list[tuple[Sequence[Question], JudgementFailed]] = []
        self._new: list[Judgement] = []
        self._asked = 0
        self._error: Exception | None = None

    async def run(self, concurrency: int) -> Labels:
        for question, judgement in self._plan.copies:
            self._append([question.copy_of(judgement)])
        groups = iter(self._plan.groups)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(concurrency, len(self._plan.groups))):
                tasks.create_task(self._work(groups))
        if self._error is None:
            self._release()
        return self._labels()

    async def _work(self, groups: Iterator[Sequence[Question]]) -> None:
        """Asks until nothing is left, or until the judge cannot go on."""
        for group in groups:
            if self._error is not None:
                return
            outcome: Reply | JudgementFailed
            self._asked += 1
            try:
                try:
                    outcome = await group[0].ask(self._judge)
                except JudgementFailed as failure:
                    outcome = failure
                self._record(group, outcome)
            except Exception as error:
                # The others finish what is under way, as it is paid for.
                self._error = self._error or error
                return

    def _record(self, group: Sequence[Question], outcome: Reply | JudgementFailed) -> None:
        """Append a group's judgements, or hold back a refusal that may be every question's matter.

        Raises:
            JudgeUnusable: so many questions had this outcome, and none a verdict, that it is.
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
        """Append the refusals that were held back."""
        held, self._held = self._held, []
        for group, outcome in held:
            if not self._answers:  # Nobody knows whether the questions are the matter.
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
        )


def _judgements(group: Sequence[Question], outcome: Reply | JudgementFailed) -> list[Judgement]:
    """Of equal questions, of which the first one carries what the reply took."""
    return [question.judgement(outcome, paid=index == 0) for index, question in enumerate(group)]


def _refusals(found: Iterable[Judgement]) -> Counter[Identity]:
    """How often each question was refused."""
    return Counter(one.identity for one in found if one.failure == "refused")


def _is_refused(judgement: Judgement, refusals: Mapping[Identity, int]) -> bool:
    return judgement.failure == "refused" and refusals[judgement.identity] >= _MOST_REFUSALS


def _settled(
    question: Question, there: Judgement, refusals: Mapping[Identity, int], judge: Judge
) -> Failure | None:
    """Why a failed judgement is not asked for again; None where it is."""
    if _is_refused(there, refusals):
        return "refused"
    if there.max_tokens is not None:
        allowed = judge.estimate(question.prompt, question.texts).max_output_tokens
        if allowed <= there.max_tokens:
            return "truncated"
    return None


def _not_asked_again(refused: int, truncated: int) -> list[str]:
    """What is left alone, and what the user can do about it."""
    told = []
    if refused:
        told.append(f"{refused} were refused in two runs and are not asked again")
    if truncated:
        told.append(f"{truncated} have a truncated reply: ask again with more --max_tokens")
    return told


def _num_asked(groups: Iterable[Sequence[Question]]) -> int:
    return sum(map(len, groups))


def _sum(estimates: Sequence[Estimate]) -> Estimate:
    costs = [estimate.cost for estimate in estimates if estimate.cost is not None]
    max_costs = [estimate.max_cost for estimate in estimates if estimate.max_cost is not None]
    return Estimate(
        calls=sum(estimate.calls for estimate in estimates),
        input_tokens=sum(estimate.input_tokens for estimate in estimates),
        max_input_tokens=sum(estimate.max_input_tokens for estimate in estimates),
        max_output_tokens=sum(estimate.max_output_tokens for estimate in estimates),
        cost=math.fsum(costs) if len(costs) == len(estimates) else None,
        max_cost=math.fsum(max_costs) if len(max_costs) == len(estimates) else None,
    )
