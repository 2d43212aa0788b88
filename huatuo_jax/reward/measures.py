"""What a reward model is worth on labelled pairs, as pure functions of numbers.

Agreement with a label: 1 where the answer with the higher score is the preferred one, 0 where it is
the other, 1/2 for equal scores; a tie (`p_chosen` of 1/2) has no agreement. Intervals are those of
`feedback.intervals`, over cases.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from huatuo_jax.feedback.intervals import Floats, Ints, Share, bootstrap_mean

NUM_BINS = 10
_MARGIN_GROUPS = 4


@dataclasses.dataclass(frozen=True)
class ScoredPairs:
    """Pairs with what a model and the label say of them, each of shape `[N]`.

    Attributes:
        difference: score of the chosen answer less that of the rejected one.
        p_chosen: the label.
        margin: of the label; NaN where there is none.
        cases: the case of each pair, from 0.
        sources: names.
        num_turns: doctor's turns of the longer dialogue.
        length_difference: characters of the chosen answer less those of the rejected one.
    """

    difference: Floats
    p_chosen: Floats
    margin: Floats
    cases: Ints
    sources: npt.NDArray[np.str_]
    num_turns: Ints
    length_difference: Floats

    def __len__(self) -> int:
        """How many pairs."""
        return len(self.difference)

    def only(self, wanted: npt.NDArray[np.bool_]) -> "ScoredPairs":
        """Some of the pairs."""
        fields = (field.name for field in dataclasses.fields(self))
        return ScoredPairs(**{name: getattr(self, name)[wanted] for name in fields})

    @property
    def labelled(self) -> npt.NDArray[np.bool_]:
        """Which pairs are no tie."""
        return self.p_chosen != 0.5


class Bin(NamedTuple):
    """Pairs of like confidence: how sure the model is on average, and how often it is right."""

    low: float
    high: float
    num_pairs: int
    confidence: float
    agreement: float


def agreement(difference: Floats, p_chosen: Floats) -> Floats:
    """1, 1/2 or 0 for each pair; the pairs are no ties."""
    return (np.sign(difference) * np.sign(p_chosen - 0.5) + 1) / 2


def accuracy(pairs: ScoredPairs, *, seed: int = 0) -> Share | None:
    """The mean agreement over all pairs that are no tie; None where there is none."""
    pairs = pairs.only(pairs.labelled)
    if not len(pairs):
        return None
    return bootstrap_mean(agreement(pairs.difference, pairs.p_chosen), pairs.cases, seed=seed)


def accuracy_gain(pairs: ScoredPairs, other: Floats, *, seed: int = 0) -> Share | None:
    """How much higher the agreement is than with another difference, over the same resamples."""
    labelled = pairs.labelled
    pairs, other = pairs.only(labelled), other[labelled]
    if not len(pairs):
        return None
    gains = agreement(pairs.difference, pairs.p_chosen) - agreement(other, pairs.p_chosen)
    return bootstrap_mean(gains, pairs.cases, seed=seed)


def reliability(
    difference: Floats, p_chosen: Floats, *, num_bins: int = NUM_BINS
) -> tuple[Bin, ...]:
    """The reliability table: bins of equal width over confidences from 1/2 to 1; no empty ones.

    The confidence of a pair is the probability of the answer the model prefers, sigmoid of the
    scores' difference; the agreement is the label's probability of that answer (1/2 where the
    scores are equal). Ties count.
    """
    probability = sigmoid(difference)
    confidence = np.maximum(probability, 1 - probability)
    agreed = np.where(difference > 0, p_chosen, 1 - p_chosen)
    agreed = np.where(difference == 0, 0.5, agreed)
    edges = np.linspace(0.5, 1, num_bins + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, num_bins - 1)
    table = []
    for number in range(num_bins):
        inside = index == number
        if inside.any():
            table.append(
                Bin(
                    float(edges[number]),
                    float(edges[number + 1]),
                    int(inside.sum()),
                    float(confidence[inside].mean()),
                    float(agreed[inside].mean()),
                )
            )
    return tuple(table)


def calibration_error(table: tuple[Bin, ...]) -> float:
    """The expected calibration error (arXiv 1706.04599, equation 3): |confidence - agreement|."""
    total = sum(one.num_pairs for one in table)
    return sum(one.num_pairs * abs(one.confidence - one.agreement) for one in table) / total


def cross_entropy(difference: Floats, p_chosen: Floats) -> float:
    """The mean loss of the pairs, without margin."""
    won, lost = np.logaddexp(-difference, 0), np.logaddexp(difference, 0)
    return float((p_chosen * won + (1 - p_chosen) * lost).mean())


def fit_slope(feature: Floats, p_chosen: Floats, *, num_steps: int = 50) -> float:
    """The slope of a logistic regression on one difference, without intercept, by Newton's method.

    A length-only reward model is this: the sign says whether longer or shorter answers win. Where
    the labels can be told apart entirely, the slope is only large.
    """
    scale = float(np.sqrt(np.mean(np.square(feature)))) if len(feature) else 0.0
    if not scale:
        return 0.0
    scaled, slope = feature / scale, 0.0
    for _ in range(num_steps):
        probability = sigmoid(slope * scaled)
        gradient = float(((p_chosen - probability) * scaled).sum())
        curvature = float((probability * (1 - probability) * np.square(scaled)).sum())
        # A tiny prior keeps the slope finite; a step of at most 1 keeps Newton's method from
        # overshooting.
        step = (gradient - 1e-6 * slope) / (curvature + 1e-6)
        slope += float(np.clip(step, -1, 1))
        if abs(step) < 1e-12:
            break
    return slope / scale


def correlation(left: npt.ArrayLike, right: npt.ArrayLike) -> float | None:
    """Pearson's; None where either does not vary."""
    one, other = np.asarray(left, np.float64), np.asarray(right, np.float64)
    # Not by their deviation: that of equal numbers is the rounding of their mean.
    if len(one) < 2 or not np.ptp(one) > 0 or not np.ptp(other) > 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])


def within_groups(values: npt.ArrayLike, groups: Ints) -> Floats:
    """Values less the mean of their group; exactly 0 where a group's are all equal."""
    array = np.asarray(values, np.float64)
    if not len(array):
        return array
    largest = np.full(int(groups.max()) + 1, -np.inf)
    np.maximum.at(largest, groups, array)
    array = array - largest[groups]
    counts = np.maximum(np.bincount(groups), 1)
    return array - (np.bincount(groups, array) / counts)[groups]


def margin_ranges(margin: Floats) -> list[tuple[float, float]]:
    """Up to four ranges of margins `[low, high]`, of about as many pairs each."""
    known = np.abs(margin[np.isfinite(margin)])
    if not len(known):
        return []
    inner = np.quantile(known, np.linspace(0, 1, _MARGIN_GROUPS + 1)[1:-1], method="lower")
    uppers = np.unique([*inner, known.max()])
    lows = [float(known.min()), *(float(known[known > upper].min()) for upper in uppers[:-1])]
    return list(zip(lows, uppers.tolist(), strict=True))


def sigmoid(values: Floats) -> Floats:
    """1 / (1 + exp(-values)), without overflow."""
    return np.exp(-np.logaddexp(0, -values))
