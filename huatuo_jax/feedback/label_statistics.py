"""The figures of a labels report, each with its standard error.

**Position bias.** A judge that answers with log-odds `d + b` for the answer it is shown first,
where `d` is by how much that answer is better and `b` the same for all pairs, has position bias
`b`. In the other order the log-odds for the answer shown first are `-d + b`. So with probabilities

    b = (log-odds of one order + log-odds of the other) / 2,

averaged over pairs. Of a certain verdict (0 or 1, or nearer to them than its judge's rounding, see
`verdicts.SMALLEST_PROBABILITY`) only a bound of the log-odds is known, so its pair has no b and
must not be given one by the bound. Nor may noise in the log-odds choose which pairs have one: those
whose noise is against b would remain. So the mean is over the pairs with

    |log-odds of one order - log-odds of the other| / 2 <= LARGEST_LOG_ODDS / 2,

which estimates |d|, and whose noise is independent of that of b where both orders have normal noise
of one variance. Unless |b| is more than the same bound, 6.9, none of them is certain. The other
pairs are counted as `left_out`; b is the same for all.

Votes are 1 with probability s(d + b) and s(-d + b), where s is the logistic
function. Of the pairs whose orders contradict each other, those with the first answer preferred
twice (FF) and those with the second preferred twice (SS) have odds

    s(d + b) s(-d + b) : s(-d - b) s(d - b) = exp(2 b) : 1,

whatever d is, so that b = log(FF / SS) / 2 needs no model of the answers; it is the conditional
maximum likelihood estimate. Half a pair is added to both counts (Haldane 1956), which takes out its
first-order error in small samples and keeps it finite. It describes judges that draw their votes;
one that always votes alike on a question has no such odds, and for it `first_excess` is the figure:
the share of votes (or the mean probability) for the answer shown first, less a half. In closed form

    first_excess = mean over pairs of (s(d + b) + s(-d + b)) / 2 - 1/2,
    flip rate of votes = mean of s(d + b) s(-d + b) + s(-d - b) s(d - b).
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from huatuo_jax.feedback.verdicts import LARGEST_LOG_ODDS, PairKey, Verdicts

# Standard errors over fewer groups than this are themselves too uncertain.
LEAST_GROUPS = 20


class Figure(NamedTuple):
    """A mean with its standard error, over so many items; None where there are too few."""

    value: float | None
    standard_error: float | None
    num_items: int

    def __str__(self) -> str:
        """As `0.123 ± 0.004 (of 900)`."""
        if self.value is None:
            return "none to count"
        error = "" if self.standard_error is None else f" ± {self.standard_error:.4f}"
        return f"{self.value:.4f}{error} (of {self.num_items})"


class PositionBias(NamedTuple):
    """What the order shown does to the verdicts; only pairs that were judged in both orders.

    Attributes:
        log_odds: b, as this module defines it.
        from_votes: whether it was estimated from votes: there is no pair of probabilities, each
            verdict being certain or a tie.
        left_out: pairs of verdicts too near to 0 and 1 to count in `log_odds`; none where it is
            from votes.
        first_excess: the mean verdict for the answer shown first, less a half.
        flip_rate: the share of pairs whose orders prefer different answers, of those where neither
            order is a tie.
        undecided: pairs with a tie in one order at least.
    """

    log_odds: Figure
    from_votes: bool
    left_out: int
    first_excess: Figure
    flip_rate: Figure
    undecided: int


class Agreement(NamedTuple):
    """How far two judges agree on the pairs that both have a verdict on.

    Attributes:
        same: share of pairs with the same verdict: one better, the other better, or a tie.
        same_of_decided: the same among the pairs that neither judge has a tie on.
        kappa: Cohen's kappa of the three verdicts (Cohen 1960, doi:10.1177/001316446002000104).
    """

    same: Figure
    same_of_decided: Figure
    kappa: Figure


def mean_figure(values: Sequence[float], groups: Sequence[str]) -> Figure:
    """A mean, with a standard error that allows for likeness within each group.

    The error is `sqrt(C / (C - 1) * sum over groups of (sum of deviations)^2) / n` over C groups,
    which is the usual one where every value is its own group; with fewer than `LEAST_GROUPS` groups
    every value is taken as that.

    Args:
        values: any numbers; a share is the mean of zeros and ones.
        groups: of each value, the id of its prompt.
    """
    count = len(values)
    if not count:
        return Figure(None, None, 0)
    mean = math.fsum(values) / count
    deviations: dict[object, list[float]] = defaultdict(list)
    grouped = len(set(groups)) >= LEAST_GROUPS
    for place, (value, group) in enumerate(zip(values, groups, strict=True)):
        deviations[group if grouped else place].append(value - mean)
    if len(deviations) < 2:
        return Figure(mean, None, count)
    squares = math.fsum(math.fsum(found) ** 2 for found in deviations.values())
    correction = len(deviations) / (len(deviations) - 1)
    return Figure(mean, math.sqrt(correction * squares) / count, count)


def position_bias(verdicts: Mapping[PairKey, Verdicts]) -> PositionBias:
    """The bias and the flip rate of a judge, see this module's top."""
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
    """The agreement of two judges.

    Which answer of a pair stands first in the file means nothing, so chance agreement is counted
    over both ways to write each pair down: with shares of ties t and u it is
    `t u + (1 - t)(1 - u) / 2`. The standard error of kappa is that of the agreement over 1 minus
    the chance agreement, which is taken as known.

    Args:
        one: of each pair the probability that its first answer is better; 0.5 is a tie.
        other: the same of another judge.
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


def _kappa(same: Figure, verdicts: Sequence[tuple[int, int]]) -> Figure:
    if same.value is None:
        return Figure(None, None, 0)
    ties = [math.fsum(sides[judge] == 0 for sides in verdicts) / len(verdicts) for judge in (0, 1)]
    chance = ties[0] * ties[1] + (1 - ties[0]) * (1 - ties[1]) / 2
    if chance == 1:  # Both say "tie" and nothing else: there is nothing to agree on.
        return Figure(None, None, same.num_items)
    error = None if same.standard_error is None else same.standard_error / (1 - chance)
    return Figure((same.value - chance) / (1 - chance), error, same.num_items)


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
    """Half the log of FF over SS, each with half a pair added.

    Its error is `sqrt(1 / FF + 1 / SS) / 2`, or the one that allows for likeness within prompts
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
