"""A report of a labels file: what the judge did, for the user to see before training on it.

`label_report` gives a part for each judge, protocol and template in the file, and the agreement of
every two of them. `to_json` is for programs, `text` to read.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from huatuo_jax.feedback import offline_judge
from huatuo_jax.feedback.judgements import CRITERIA, Judgement, Protocol, current
from huatuo_jax.feedback.label_statistics import (
    LEAST_GROUPS,
    Agreement,
    Figure,
    PositionBias,
    agreement,
    mean_figure,
    position_bias,
)
from huatuo_jax.feedback.questions import Answered
from huatuo_jax.feedback.verdicts import (
    PairKey,
    answer_scores,
    matching,
    pair_verdicts,
    pairs_of,
)

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_ERRORS_SHOWN = 5
_ERROR_CHARS = 100


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What all lines of a judge took, superseded ones too.

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
        note: what a reader must know of this judge; None for nothing.
        lines: of the labels file.
        judgements: those that stand, failed ones too. `other_texts` of them are of texts that the
            answers file does not hold; what follows is without those.
        prompts: that they are of.
        failure_rate: of the standing judgements.
        errors: the commonest ones of standing failures.
        scores: by criterion the mean score, its error; score protocol only.
        position: pairwise protocol only.
        pairs: of answers that have a verdict.
        ties: share of them that are a tie, or votes of both orders that contradict each other.
        longer_wins: the share of pairs of different length that the longer answer wins.
        margins: quantiles of the difference of scores (points), or of the winner's probability.
        cost: of all lines.
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
        """Judge, protocol and the start of the template's hash."""
        return f"{self.judge} ({self.protocol}, template {self.template[:8]})"


@dataclass(frozen=True, kw_only=True)
class LabelReport:
    """The parts, and the agreement of every two of them by their names."""

    parts: tuple[JudgePart, ...]
    agreements: Mapping[tuple[str, str], Agreement]

    def to_json(self) -> dict[str, Any]:
        """Plain values; a figure is its value, standard error and number."""
        agreements = [
            {"judges": list(names), **_plain(found)} for names, found in self.agreements.items()
        ]
        return {"judges": [_plain(part) for part in self.parts], "agreements": agreements}

    def text(self) -> str:
        """The report to read; `±` is one standard error."""
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
    """The report of all lines of a labels file, or of several.

    Standard errors allow for likeness within a prompt where there are at least 20 prompts.

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


def _part(
    lines: Sequence[Judgement], answered: Mapping[str, Answered], criterion: str
) -> tuple[JudgePart, dict[PairKey, float]]:
    """The part of one judge, and its verdict on each pair."""
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
        note=offline_judge.CAVEAT if judge == offline_judge.NAME else None,
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
    """Of each pair that has both scores, the first one's less the second one's."""
    scores = answer_scores(judgements, criterion=criterion)
    return {
        key: scores[key.id, key.one] - scores[key.id, key.other]
        for prompt_id in sorted({one.id for one in judgements})
        for key in pairs_of(prompt_id, len(answered[prompt_id].answers))
        if (key.id, key.one) in scores and (key.id, key.other) in scores
    }


def _longer_wins(preferences: Mapping[PairKey, float], answered: Mapping[str, Answered]) -> Figure:
    """Over decided pairs of different length in characters."""
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
    grouped = "allow for likeness within a prompt" if part.prompts >= LEAST_GROUPS else "do not"
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
        f"  (standard errors behind ±; they {grouped})",
    ]
    return lines


def _cost_line(cost: Cost) -> str:
    usage = ", ".join(f"{name} {value:g}" for name, value in cost.usage.items()) or "none told"
    unknown = f" and {cost.unknown} lines of unknown cost" if cost.unknown else ""
    latency = (
        ""
        if cost.latency_s is None
        else f"; latency: median {cost.latency_s[0]:.2f} s, 95 % {cost.latency_s[1]:.2f} s"
    )
    return f"  cost: {cost.money:.6g}{unknown}; tokens: {usage}{latency}"


def _ids(judgements: Iterable[Judgement]) -> list[str]:
    return [one.id for one in judgements]


def _plain(part: JudgePart | Agreement) -> dict[str, Any]:
    """Named tuples and dataclasses as dicts, all the way down."""
    return {name: _plain_value(value) for name, value in _fields(part).items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, Figure | PositionBias | Cost):
        return {name: _plain_value(inner) for name, inner in _fields(value).items()}
    if isinstance(value, Mapping):
        return {name: _plain_value(inner) for name, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _fields(value: Any) -> dict[str, Any]:
    return value._asdict() if hasattr(value, "_asdict") else dict(vars(value))
