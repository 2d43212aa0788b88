"""A report of a labels file: what the judge did, to be checked before training on it.

`label_report` gives a part for each judge, protocol and template in the file, and the agreement of
every two of them, each figure with its standard error. `to_json` is for programs, `text` for
readers.

**Position bias.** A judge that answers with log-odds `d + b` for the answer it is shown first,
where `d` is how much better that answer is and `b` is the same for all pairs, has position bias
`b`. In the other order the log-odds for the answer shown first are `-d + b`. So with probabilities

    b = (log-odds of one order + log-odds of the other) / 2,

averaged over pairs. For a certain verdict (0 or 1, or nearer to them than its judge's rounding, see
`questions.SMALLEST_PROBABILITY`) only a bound of the log-odds is known, so its pair has no b, and
the bound must not stand in for one. Nor may noise in the log-odds choose which pairs have one:
those whose noise is against b would remain. So the mean is over the pairs with

    |log-odds of one order - log-odds of the other| / 2 <= LARGEST_LOG_ODDS / 2,

which estimates |d|, and whose noise is independent of that of b where both orders have normal noise
of one variance. Unless |b| is more than the same bound, 6.9, none of them is certain. The other
pairs are counted as `left_out`; b is the same for all.

Votes are 1 with probability s(d + b) and s(-d + b), where s is the logistic
function. Of the pairs whose orders contradict each other, those with the first answer preferred
twice (FF) and those with the second preferred twice (SS) have odds

    s(d + b) s(-d + b) : s(-d - b) s(d - b) = exp(2 b) : 1,

whatever d is, so that b = log(FF / SS) / 2 needs no model of the answers; it is the conditional
maximum likelihood estimate. Half a pair is added to both counts (Haldane 1956), which removes its
first-order error in small samples and keeps it finite. It describes judges that draw their votes;
one that always votes alike on a question has no such odds, and for it `first_excess` is the figure:
the share of votes (or the mean probability) for the answer shown first, less a half. In closed form

    first_excess = mean over pairs of (s(d + b) + s(-d + b)) / 2 - 1/2,
    flip rate of votes = mean of s(d + b) s(-d + b) + s(-d - b) s(d - b).
"""

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from huatuo_jax.core.statistics import (
    LEAST_GROUPS,
    Figure,
    chance_agreement,
    cohen_kappa,
    mean_figure,
)
from huatuo_jax.judge import offline
from huatuo_jax.judge.judgements import CRITERIA, Judgement, Protocol, current
from huatuo_jax.judge.questions import (
    LARGEST_LOG_ODDS,
    Answered,
    PairKey,
    Verdicts,
    answer_scores,
    matching,
    pair_verdicts,
    pairs_of,
)

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_ERRORS_SHOWN = 5
_ERROR_CHARS = 100


class PositionBias(NamedTuple):
    """The effect of the order shown on verdicts, over pairs that were judged in both orders.

    Attributes:
        log_odds: b, as this module defines it.
        from_votes: b is estimated from votes: every verdict is certain or a tie.
        left_out: pairs of verdicts too near to 0 and 1 to count in `log_odds`; none where it is
            from votes.
        first_excess: the mean verdict for the answer shown first, less a half.
        flip_rate: the share of pairs whose orders prefer different answers, of those where neither
            order is a tie.
        undecided: pairs with a tie in at least one order.
    """

    log_odds: Figure
    from_votes: bool
    left_out: int
    first_excess: Figure
    flip_rate: Figure
    undecided: int


class Agreement(NamedTuple):
    """The agreement of two judges on the pairs that both have judged.

    Attributes:
        same: share of pairs with the same verdict: one better, the other better, or a tie.
        same_of_decided: the same among the pairs on which neither judge has a tie.
        kappa: Cohen's kappa of the three verdicts (Cohen 1960, doi:10.1177/001316446002000104).
    """

    same: Figure
    same_of_decided: Figure
    kappa: Figure


def position_bias(verdicts: Mapping[PairKey, Verdicts]) -> PositionBias:
    """Estimates a judge's position bias and flip rate, by the method at this module's top."""
    both = {key: found for key, found in verdicts.items() if found.both_orders}
    prompts = [key.id for key in both]
    leanings = [found.leanings() for found in both.values()]
    from_votes = bool(both) and all(found.voted for found in both.values())
    excess = [
        math.fsum(math.fsum(shown) / len(shown) for shown in found) / 2 - 0.5
        for found in both.values()
    ]
    decided = [place for place, (one, other) in enumerate(leanings) if one and other]
    flips = [float(leanings[place][0] * leanings[place][1] > 0) for place in decided]
    left_out = 0
    if from_votes:
        log_odds = _bias_of_votes(leanings, prompts)
    else:
        log_odds = _bias_of_probabilities(both, leanings)
        left_out = len(both) - log_odds.num_items
    return PositionBias(
        log_odds=log_odds,
        from_votes=from_votes,
        left_out=left_out,
        first_excess=mean_figure(excess, prompts),
        flip_rate=mean_figure(flips, [prompts[place] for place in decided]),
        undecided=len(both) - len(decided),
    )


def agreement(one: Mapping[PairKey, float], other: Mapping[PairKey, float]) -> Agreement:
    """Measures the agreement of two judges.

    The order of a pair's answers in the file is arbitrary, so chance agreement is counted over both
    orders: with shares of ties t and u it is
    `t u + (1 - t)(1 - u) / 2`. The standard error of kappa is that of the agreement over 1 minus
    the chance agreement, which is taken as known.

    Args:
        one: for each pair the probability that its first answer is better; 0.5 is a tie.
        other: the same for another judge.
    """
    common = sorted(one.keys() & other.keys())
    verdicts = [(_side(one[key]), _side(other[key])) for key in common]
    prompts = [key.id for key in common]
    same = mean_figure([float(first == second) for first, second in verdicts], prompts)
    decided = [place for place, sides in enumerate(verdicts) if 0 not in sides]
    same_of_decided = mean_figure(
        [float(verdicts[place][0] == verdicts[place][1]) for place in decided],
        [prompts[place] for place in decided],
    )
    return Agreement(same, same_of_decided, _kappa(same, verdicts))


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of all lines of a judge, superseded ones too.

    Attributes:
        money: in the unit of the price table, of the lines whose cost is known.
        unknown: lines without a known cost.
        usage: tokens by kind, as the server counted them.
        latency_s: median and 95 % quantile; None where none is known.
    """

    money: float
    unknown: int
    usage: Mapping[str, float]
    latency_s: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class JudgePart:
    """One judge under one protocol with one template.

    Attributes:
        judge: its name.
        protocol: "score" or "pairwise".
        template: hash of the prompt template.
        note: a caveat about this judge; None for none.
        lines: lines of the labels file.
        judgements: current ones, failed ones too. `other_texts` of them are of texts that the
            answers file does not hold; all that follows is without those.
        prompts: number of their prompts.
        failure_rate: of the current judgements.
        errors: the most frequent errors of current failures.
        scores: by criterion the mean score; score protocol only.
        position: pairwise protocol only.
        pairs: pairs of answers with a verdict.
        ties: share of pairs with a tie, or with votes of both orders that contradict each other.
        longer_wins: share of pairs of different length that the longer answer wins.
        margins: quantiles of the difference of scores (points), or of the winner's probability.
        cost: cost of all lines.
    """

    judge: str
    protocol: Protocol
    template: str
    note: str | None
    lines: int
    judgements: int
    other_texts: int
    prompts: int
    failure_rate: Figure
    errors: Mapping[str, int]
    scores: Mapping[str, Figure]
    position: PositionBias | None
    pairs: int
    ties: Figure
    longer_wins: Figure
    margins: Mapping[str, float]
    cost: Cost

    @property
    def name(self) -> str:
        """Returns judge, protocol and the start of the template's hash."""
        return f"{self.judge} ({self.protocol}, template {self.template[:8]})"


@dataclass(frozen=True, kw_only=True)
class LabelReport:
    """The parts, and the agreement of every two of them by their names."""

    parts: tuple[JudgePart, ...]
    agreements: Mapping[tuple[str, str], Agreement]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values; a figure is its value, standard error and number."""
        agreements = [
            {"judges": list(names), **_plain(found)} for names, found in self.agreements.items()
        ]
        return {"judges": [_plain(part) for part in self.parts], "agreements": agreements}

    def text(self) -> str:
        """Returns the report as text; `±` is one standard error."""
        lines = [line for part in self.parts for line in _part_lines(part)]
        for (one, other), found in self.agreements.items():
            lines += [
                f"agreement of {one} with {other}",
                f"  same verdict: {found.same}",
                f"  same where neither ties: {found.same_of_decided}",
                f"  Cohen's kappa: {found.kappa}",
            ]
        return "\n".join(lines)


def label_report(
    judgements: Iterable[Judgement],
    answered: Iterable[Answered],
    *,
    criterion: str = "overall",
) -> LabelReport:
    """Makes the report of all lines of one labels file or several.

    Standard errors allow for correlation within a prompt where there are at least 20 prompts.

    Args:
        judgements: all lines, superseded ones too, in any order.
        answered: the prompts and answers.
        criterion: the score that decides pairs under the score protocol.

    Raises:
        ValueError: there is no judgement, or the criterion is unknown.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion is {criterion!r}; it should be one of {', '.join(CRITERIA)}")
    by_id = {item.prompt.id: item for item in answered}
    by_judge: dict[tuple[str, Protocol, str], list[Judgement]] = {}
    for one in judgements:
        by_judge.setdefault((one.judge, one.protocol, one.template), []).append(one)
    if not by_judge:
        raise ValueError("the labels hold no judgement")
    parts, preferences = [], {}
    for kind in sorted(by_judge):
        part, found = _part(by_judge[kind], by_id, criterion)
        parts.append(part)
        preferences[part.name] = found
    agreements = {
        (one, other): agreement(preferences[one], preferences[other])
        for one, other in itertools.combinations(preferences, 2)
        if preferences[one].keys() & preferences[other].keys()
    }
    return LabelReport(parts=tuple(parts), agreements=agreements)


def _kappa(same: Figure, verdicts: Sequence[tuple[int, int]]) -> Figure:
    # In both orders of each pair's answers.
    ones, others = (
        [sign * sides[judge] for sign in (1, -1) for sides in verdicts] for judge in (0, 1)
    )
    kappa = cohen_kappa(ones, others)
    if kappa is None or same.standard_error is None:
        return Figure(kappa, None, same.num_items)
    error = same.standard_error / float(1 - chance_agreement(ones, others))
    return Figure(kappa, error, same.num_items)


def _bias_of_probabilities(
    both: Mapping[PairKey, Verdicts], leanings: Sequence[tuple[float, float]]
) -> Figure:
    biases, prompts = [], []
    for (key, found), (one, other) in zip(both.items(), leanings, strict=True):
        # A pair of votes among probabilities (a tie, say) has no log-odds either.
        known = not found.certain and not found.voted
        if known and abs(one - other) <= LARGEST_LOG_ODDS:
            biases.append((one + other) / 2)
            prompts.append(key.id)
    return mean_figure(biases, prompts)


def _bias_of_votes(leanings: Sequence[tuple[float, float]], prompts: Sequence[str]) -> Figure:
    """Estimates half the log of FF over SS, each with half a pair added.

    Its error is `sqrt(1 / FF + 1 / SS) / 2`, or the one that allows for correlation within prompts
    where that is larger.
    """
    flips = [
        (1.0 if one > 0 else -1.0, prompt)
        for (one, other), prompt in zip(leanings, prompts, strict=True)
        if one * other > 0
    ]
    if not flips:
        return Figure(None, None, 0)
    firsts = math.fsum(side > 0 for side, _ in flips) + 0.5
    seconds = math.fsum(side < 0 for side, _ in flips) + 0.5
    share = mean_figure([float(side > 0) for side, _ in flips], [prompt for _, prompt in flips])
    # b = log(q / (1 - q)) / 2 of the share q of FF, so that db = dq / (2 q (1 - q)).
    q = firsts / (firsts + seconds)
    grouped = (share.standard_error or 0.0) / (2 * q * (1 - q))
    error = max(math.sqrt(1 / firsts + 1 / seconds) / 2, grouped)
    return Figure(math.log(firsts / seconds) / 2, error, len(flips))


def _side(p_one: float) -> int:
    return int(p_one > 0.5) - int(p_one < 0.5)


def _part(
    lines: Sequence[Judgement], answered: Mapping[str, Answered], criterion: str
) -> tuple[JudgePart, dict[PairKey, float]]:
    """Returns the part of one judge, and its verdict on each pair."""
    standing = current(lines)
    fitting, others = matching(standing, answered)
    judge, protocol, template = lines[0].judge, lines[0].protocol, lines[0].template
    by_scores = protocol == "score"
    verdicts = {} if by_scores else pair_verdicts(fitting)
    differences = _differences(fitting, answered, criterion) if by_scores else {}
    preferences = {
        key: (value > 0) / 2 - (value < 0) / 2 + 0.5 for key, value in differences.items()
    }
    preferences |= {
        key: found.combined().p_one for key, found in verdicts.items() if found.both_orders
    }
    margins = (
        [abs(value) for value in differences.values()]
        if by_scores
        else [max(p, 1 - p) for p in preferences.values()]
    )
    part = JudgePart(
        judge=judge,
        protocol=protocol,
        template=template,
        note=offline.CAVEAT if judge == offline.RUBRIC_NAME else None,
        lines=len(lines),
        judgements=len(standing),
        other_texts=len(others),
        prompts=len({one.id for one in fitting}),
        failure_rate=mean_figure([float(one.failed) for one in fitting], _ids(fitting)),
        errors=_errors(fitting),
        scores=_mean_scores(fitting) if by_scores else {},
        position=None if by_scores else position_bias(verdicts),
        pairs=len(preferences),
        ties=mean_figure(
            [float(p == 0.5) for p in preferences.values()], [key.id for key in preferences]
        ),
        longer_wins=_longer_wins(preferences, answered),
        margins=_quantiles(margins),
        cost=_cost(lines),
    )
    return part, preferences


def _differences(
    judgements: Sequence[Judgement], answered: Mapping[str, Answered], criterion: str
) -> dict[PairKey, float]:
    """Returns the first score less the second of each pair that has both."""
    scores = answer_scores(judgements, criterion=criterion)
    return {
        key: scores[key.id, key.one] - scores[key.id, key.other]
        for prompt_id in sorted({one.id for one in judgements})
        for key in pairs_of(prompt_id, len(answered[prompt_id].answers))
        if (key.id, key.one) in scores and (key.id, key.other) in scores
    }


def _longer_wins(preferences: Mapping[PairKey, float], answered: Mapping[str, Answered]) -> Figure:
    """Returns the share of decided pairs of different length that the longer answer wins."""
    wins, prompts = [], []
    for key, p_one in preferences.items():
        texts = answered[key.id].answers
        surplus = len(texts[key.one]) - len(texts[key.other])
        if surplus and p_one != 0.5:
            wins.append(float((surplus > 0) == (p_one > 0.5)))
            prompts.append(key.id)
    return mean_figure(wins, prompts)


def _mean_scores(judgements: Sequence[Judgement]) -> dict[str, Figure]:
    scored = [one for one in judgements if one.scores is not None]
    return {
        criterion: mean_figure(
            [one.scores[criterion] for one in scored if one.scores], _ids(scored)
        )
        for criterion in CRITERIA
    }


def _errors(judgements: Sequence[Judgement]) -> dict[str, int]:
    found = Counter(one.error[:_ERROR_CHARS] for one in judgements if one.error is not None)
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return dict(ordered[:_ERRORS_SHOWN])


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    found = np.quantile(np.asarray(values, np.float64), QUANTILES)
    return {f"{q:g}": float(value) for q, value in zip(QUANTILES, found, strict=True)}


def _cost(lines: Sequence[Judgement]) -> Cost:
    usage: dict[str, float] = defaultdict(float)
    for one in lines:
        for name, value in (one.usage or {}).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                usage[name] += value
    latencies = [one.latency_s for one in lines if one.latency_s is not None]
    middle, late = np.quantile(latencies, (0.5, 0.95)) if latencies else (0.0, 0.0)
    return Cost(
        money=math.fsum(one.cost for one in lines if one.cost is not None),
        unknown=sum(one.cost is None for one in lines),
        usage=dict(usage),
        latency_s=(float(middle), float(late)) if latencies else None,
    )


def _part_lines(part: JudgePart) -> list[str]:
    grouped = "allow for" if part.prompts >= LEAST_GROUPS else "ignore"
    lines = [f"{part.name}{f': {part.note}' if part.note else ''}"]
    lines.append(
        f"  {part.judgements} judgements of {part.prompts} prompts in {part.lines} lines;"
        f" of other texts: {part.other_texts}; failed: {part.failure_rate}"
    )
    lines += [f"    {count} times: {error}" for error, count in part.errors.items()]
    lines += [f"  {criterion}: {figure}" for criterion, figure in part.scores.items()]
    if part.position is not None:
        source = "votes" if part.position.from_votes else "probabilities"
        lines += [
            f"  order flips: {part.position.flip_rate}; undecided {part.position.undecided}",
            f"  position bias, log-odds for the first shown: {part.position.log_odds}"
            f" (from {source}; left out as too certain: {part.position.left_out})",
            f"  verdicts for the first shown, over a half: {part.position.first_excess}",
        ]
    shown = ", ".join(f"{float(q):.0%} {value:.3f}" for q, value in part.margins.items())
    unit = "score margins" if part.protocol == "score" else "winner's probability"
    lines += [
        f"  pairs with a verdict: {part.pairs}; ties: {part.ties}",
        f"  the longer answer wins: {part.longer_wins}",
        f"  {unit}, quantiles: {shown or 'none'}",
        _cost_line(part.cost),
        f"  (± is one standard error; they {grouped} correlation within a prompt)",
    ]
    return lines


def _cost_line(cost: Cost) -> str:
    usage = ", ".join(f"{name} {value:g}" for name, value in cost.usage.items()) or "unknown"
    unknown = f" and {cost.unknown} lines of unknown cost" if cost.unknown else ""
    latency = (
        ""
        if cost.latency_s is None
        else f"; latency: median {cost.latency_s[0]:.2f} s, 95 % {cost.latency_s[1]:.2f} s"
    )
    return f"  cost: {cost.money:.6g}{unknown}; tokens: {usage}{latency}"


def _ids(judgements: Iterable[Judgement]) -> list[str]:
    return [one.id for one in judgements]


def _plain(value: Any) -> Any:
    """Returns named tuples and dataclasses as dicts, and tuples as lists, recursively."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    elif dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value
