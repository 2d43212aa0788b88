"""Pairwise judging of two models' responses in both orders: wins by intent, and position bias.

A contest is one prompt with a response of each model. A judge is asked twice, with either response
shown first; a contest whose orders contradict each other is a tie, one without a readable verdict
in both is counted as failed and is in no other figure. Verdicts are the records of the labels file,
failed ones too, so that every raw reply is kept, paid for once and resumed by the labelling.
"""

import pathlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from huatuo_jax.core.statistics import Share, bootstrap_mean, mean_and_half_difference
from huatuo_jax.data.files import RowError, read_rows
from huatuo_jax.data.records import Message, Prompt, shown
from huatuo_jax.evaluation.reference_answers import Path
from huatuo_jax.judge.judgements import Judgement, JudgementFailed, Reply, current, question_key
from huatuo_jax.judge.openai import JudgePrompt, read_judge_prompt
from huatuo_jax.judge.questions import (
    Answered,
    Question,
    Verdict,
    differ,
    matching,
    one_judge,
    verdicts_of,
    win_rates,
)
from huatuo_jax.judge.replies import BadReply, check_ending, parse_verdict

ContestOutcome = Literal["win", "tie", "loss"]

ORDERS = ((0, 1), (1, 0))
"""Which response is shown first and second: that of `Contest.one` is 0."""
_OUTCOMES: Mapping[float, ContestOutcome] = {1.0: "win", 0.5: "tie", 0.0: "loss"}


@dataclass(frozen=True, kw_only=True)
class IntentQuestion:
    """A question of KUAKE-QIC.

    Attributes:
        id: in the set.
        intent: one of ten, as 治疗方案.
        question: the patient's text.
    """

    id: str
    intent: str
    question: str

    @property
    def prompt(self) -> Prompt:
        """The question as it is put to a model."""
        return Prompt(self.id, (Message("user", self.question),), source="KUAKE-QIC")


def read_kuake_qic(path: Path) -> list[IntentQuestion]:
    """The questions of HuatuoGPT's single-turn evaluation, `{"id", "label", "query"}` a row.

    Raises:
        ValueError: no such file, a row without these as text, or an id that is used twice.
    """
    found: dict[str, tuple[str, IntentQuestion]] = {}
    for row in read_rows(path):
        if isinstance(row, RowError):
            raise ValueError(str(row))
        place, value = f"{row.file}:{row.line}", row.value
        for name in ("id", "label", "query"):
            text = value.get(name) if isinstance(value, dict) else None
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{place}: {name} is {shown(repr(text))}; it should be text")
        question = IntentQuestion(id=value["id"], intent=value["label"], question=value["query"])
        if question.id in found:
            earlier = found[question.id][0]
            raise ValueError(f"{place}: the id {shown(question.id)!r} is already used at {earlier}")
        found[question.id] = (place, question)
    if not found:
        raise ValueError(f"{path}: there are no rows")
    return [question for _, question in found.values()]


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Two models' responses to one prompt.

    Attributes:
        prompt: with its reference or diagnosis, where there is one for the judge to lean on.
        group: what the figures are split by: an intent, a department.
        one: the response of the model whose wins are counted.
        other: the response of the model that it is compared with.
    """

    prompt: Prompt
    group: str
    one: str
    other: str

    @property
    def id(self) -> str:
        """The prompt's id."""
        return self.prompt.id

    @property
    def answered(self) -> Answered:
        """The contest as labelling takes it, for which `one` is answer 0 and `other` answer 1."""
        return Answered(self.prompt, (self.one, self.other))

    @property
    def same(self) -> bool:
        """True if the responses are equal, or both empty: a tie that no judge is asked about."""
        return not differ(self.one, self.other)


@dataclass(frozen=True, kw_only=True)
class Ballot:
    """A contest in one order, as it is put to a judge.

    Attributes:
        question: the texts in that order, with the key that a paid verdict is found by.
        messages: as sent.
    """

    question: Question
    messages: tuple[Mapping[str, str], ...]

    def judgement(self, raw: str, *, finish_reason: str | None = None) -> Judgement:
        """The record of a judge's reply.

        Without a verdict in the form that was asked for, `p_first` is None and `error` says why.

        Args:
            raw: the reply as it came.
            finish_reason: of the reply, where the judge's server tells it.
        """
        try:
            check_ending(finish_reason)
            verdict = parse_verdict(raw)
        except BadReply as error:
            # How many tokens the reply was allowed is not known here, so it is not "truncated".
            failure = "unreadable" if error.failure == "truncated" else error.failure
            failed = JudgementFailed(str(error), raw=raw, failure=failure)
            return self.question.judgement(failed, paid=True)
        reply = Reply(p_first=verdict.p_first, reason=verdict.reason, raw=raw)
        return self.question.judgement(reply, paid=True)


def ballots(
    contests: Iterable[Contest],
    *,
    judge: str,
    settings: Mapping[str, Any],
    template: JudgePrompt | None = None,
) -> Iterator[Ballot]:
    """Both orders of each contest whose responses differ.

    Args:
        contests: with ids of their own.
        judge: the judge's name, for the record.
        settings: plain values that decide its verdicts, as temperature; part of the key.
        template: of the judge's prompt; None for the one that is shipped for single responses.
    """
    template = template or read_judge_prompt("pairwise")
    for contest in contests:
        for order in ORDERS if not contest.same else ():
            texts = tuple(contest.answered.answers[index] for index in order)
            messages = template.render(
                contest.prompt, texts, low=1, high=10, require_reference=False
            )
            key = question_key(
                settings=settings,
                protocol="pairwise",
                template=template.hash,
                prompt=contest.prompt,
                texts=texts,
            )
            yield Ballot(
                question=Question(
                    prompt=contest.prompt,
                    protocol="pairwise",
                    answers=order,
                    texts=texts,
                    key=key,
                    judge=judge,
                    template=template.hash,
                ),
                messages=tuple(messages),
            )


def conversation_template() -> JudgePrompt:
    """The judge's prompt for whole conversations, which `ballots` takes."""
    path = pathlib.Path(__file__).with_name("prompts") / "conversations.txt"
    return read_judge_prompt("pairwise", path)


@dataclass(frozen=True, kw_only=True)
class GroupFigures:
    """Figures over some contests, for the first model.

    Attributes:
        wins: contests that it wins in both orders, or wins in one and ties in the other.
        ties: contests with as many points for each, contradicting orders among them.
        losses: the others that have a verdict.
        failed: contests without a readable verdict in one of the orders.
        share: share of wins, a tie counting a half, with its 95 % interval; None without verdicts.
        points: sum over both orders of 1 for each order won and 1/2 for each tied.
        other_points: the same of the other model.
        score_ratio: points over other_points; None where the other model has none.
    """

    wins: int
    ties: int
    losses: int
    failed: int
    share: Mapping[str, float | int] | None
    points: float
    other_points: float
    score_ratio: float | None


_SHARES = ("position_bias", "longer_share", "length_bias", "length_balanced_share")


@dataclass(frozen=True, kw_only=True)
class PairwiseFigures:
    """The figures of one judge on two models.

    Attributes:
        judge: the judge's name; None where all responses were equal, and none was asked.
        template: hash of its prompt's template; None likewise.
        overall: over all contests.
        groups: by intent or department, in the order of the contests.
        orders_disagree: contests in which each order prefers another response.
        position_bias: the share of points that the response shown first gets, less one half: 0
            without bias, 0.5 where the first always wins; with its 95 % interval over contests.
        longer_share: the share of points that the longer response gets, of responses of different
            lengths, with its interval: 0.5 where length does not matter, and the better model's
            responses are no longer than the other's.
        length_bias: the share of points that the longer response gets, less one half, if each
            model's were the longer one equally often: half the difference between the first model's
            shares where its response is the longer and the shorter one. 0 without bias; None where
            one model's responses are always the longer ones.
        length_balanced_share: the first model's share of points likewise: the mean of these two.
        same: contests with equal responses, ties that no judge was asked about.
        unparsed: orders of contests without a readable verdict, by which response is shown first.
        failures: judgements without a verdict by kind, those that a later one supersedes too.
        set_aside: judgements of other texts than the contests', by reason.
    """

    judge: str | None
    template: str | None
    overall: GroupFigures
    groups: Mapping[str, GroupFigures]
    orders_disagree: int
    position_bias: Share | None
    longer_share: Share | None
    length_bias: Share | None
    length_balanced_share: Share | None
    same: int
    unparsed: Mapping[str, int]
    failures: Mapping[str, int]
    set_aside: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        found = asdict(self)
        for name in _SHARES:
            share: Share | None = getattr(self, name)
            found[name] = None if share is None else share.to_json()
        return found


def contest_verdicts(
    contests: Sequence[Contest], judgements: Iterable[Judgement]
) -> dict[str, Verdict | None]:
    """The verdict on each contest in both orders, by id; None where one order has none.

    Raises:
        ValueError: two contests have one id.
    """
    _check_ids(contests)
    found = verdicts_of(current(judgements), one=0, other=1)
    tie = Verdict(0.5, 0.5)
    return {one.id: tie if one.same else found.get(one.id) for one in contests}


def outcomes(
    contests: Sequence[Contest], judgements: Iterable[Judgement]
) -> dict[str, ContestOutcome | None]:
    """Win, tie or loss of the first model in each contest, by id; None where there is no verdict.

    Raises:
        ValueError: two contests have one id.
    """
    return {
        name: None if verdict is None else _OUTCOMES[verdict.points]
        for name, verdict in contest_verdicts(contests, judgements).items()
    }


def pairwise_figures(
    contests: Sequence[Contest], judgements: Iterable[Judgement], *, seed: int = 0
) -> PairwiseFigures:
    """The figures of one judge's verdicts on the contests.

    Args:
        contests: with ids of their own.
        judgements: lines of a labels file, failed and superseded ones too; those of other texts
            than the contests' are set aside and counted.
        seed: of the bootstrap.

    Raises:
        ValueError: there are no contests, two have one id, or the judgements are those of no judge
            or of several judges or templates.
    """
    if not contests:
        raise ValueError("contests: there are none")
    every = list(judgements)
    if every or not all(one.same for one in contests):
        every = one_judge(every, protocol="pairwise")
    fitting, others = matching(every, {one.id: one.answered for one in contests})
    verdicts = contest_verdicts(contests, fitting)
    judged = [one for one in contests if not one.same]
    standing = {(one.id, one.answers) for one in fitting if not one.failed}
    known = [(one, found) for one in judged if (found := verdicts[one.id]) is not None]
    groups = dict.fromkeys(one.group for one in contests)
    where_longer = [sum(found) / 2 for one, found in known if len(one.one) > len(one.other)]
    where_shorter = [sum(found) / 2 for one, found in known if len(one.one) < len(one.other)]
    balanced, length_bias = _balanced(where_longer, where_shorter, seed)
    return PairwiseFigures(
        judge=every[0].judge if every else None,
        template=every[0].template if every else None,
        overall=_group(contests, verdicts, seed),
        groups={
            name: _group([one for one in contests if one.group == name], verdicts, seed)
            for name in groups
        },
        orders_disagree=sum(set(found) == {0.0, 1.0} for _, found in known),
        # The first response's points where it is shown first, and the other's where that one is.
        position_bias=_mean([(found[0] - found[1]) / 2 for _, found in known], seed),
        longer_share=_mean(where_longer + [1.0 - one for one in where_shorter], seed),
        length_bias=length_bias,
        length_balanced_share=balanced,
        same=len(contests) - len(judged),
        unparsed={
            name: sum((one.id, order) not in standing for one in judged)
            for name, order in zip(("one_first", "other_first"), ORDERS, strict=True)
        },
        failures=dict(Counter(one.failure or "unknown" for one in fitting if one.failed)),
        set_aside=dict(Counter(reason for _, reason in others)),
    )


def _group(
    contests: Sequence[Contest], verdicts: Mapping[str, Verdict | None], seed: int
) -> GroupFigures:
    found = [verdicts[one.id] for one in contests]
    rates = win_rates({one.id: [verdicts[one.id]] for one in contests}, seed=seed)
    known = [one for one in found if one is not None]
    points = sum(sum(one) for one in known)
    other_points = 2 * len(known) - points
    return GroupFigures(
        **{name: rates[name] for name in ("wins", "ties", "losses", "failed", "share")},
        points=points,
        other_points=other_points,
        score_ratio=points / other_points if other_points else None,
    )


def _mean(values: Sequence[float], seed: int) -> Share | None:
    if not values:
        return None
    return bootstrap_mean(np.asarray(values, np.float64), np.arange(len(values)), seed=seed)


def _balanced(
    where_longer: Sequence[float], where_shorter: Sequence[float], seed: int
) -> tuple[Share | None, Share | None]:
    if not where_longer or not where_shorter:
        return None, None
    return mean_and_half_difference(
        np.asarray(where_longer, np.float64), np.asarray(where_shorter, np.float64), seed=seed
    )


def _check_ids(contests: Sequence[Contest]) -> None:
    for name, count in Counter(one.id for one in contests).items():
        if count > 1:
            raise ValueError(f"contests: {count} have the id {name!r}; each should have its own")
