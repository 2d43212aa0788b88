"""The held-out report of a reward model: its measures, one JSON file and a reliability plot.

Agreement with a label: 1 where the answer with the higher score is the preferred one, 0 where it is
the other, 1/2 for equal scores; a tie (`p_chosen` of 1/2) has no agreement. Intervals are those of
`core.statistics`, over cases.
"""

import dataclasses
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from huatuo_jax.core.files import write_file
from huatuo_jax.core.statistics import NUM_RESAMPLES, Floats, Ints, Share, bootstrap_mean
from huatuo_jax.preferences.data import Answer, Group
from huatuo_jax.reward.config import ProbeConfig
from huatuo_jax.training.scoring import GivenAnswer

NUM_BINS = 10
REPORT_FILE = "reward_report.json"
PLOT_FILE = "reward_reliability.png"
_MARGIN_GROUPS = 4
_TURN_RANGES = ((1, 1), (2, 3), (4, 6), (7, None))


@dataclasses.dataclass(frozen=True)
class ScoredPairs:
    """Pairs with a model's scores and their labels, each of shape `[N]`.

    Attributes:
        difference: score of the chosen answer less that of the rejected one.
        p_chosen: the label.
        margin: of the label; NaN where there is none.
        cases: the case of each pair, from 0.
        sources: names.
        num_turns: assistant's turns of the longer dialogue.
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
        """Returns the number of pairs."""
        return len(self.difference)

    def only(self, wanted: npt.NDArray[np.bool_]) -> "ScoredPairs":
        """Returns some of the pairs."""
        fields = (field.name for field in dataclasses.fields(self))
        return ScoredPairs(**{name: getattr(self, name)[wanted] for name in fields})

    @property
    def labelled(self) -> npt.NDArray[np.bool_]:
        """Mask of the pairs that are no tie."""
        return self.p_chosen != 0.5


class Bin(NamedTuple):
    """Pairs of like confidence: how sure the model is on average, and how often it is right."""

    low: float
    high: float
    num_pairs: int
    confidence: float
    agreement: float


def make_report(
    held_out: Sequence[Group], scores: npt.ArrayLike, *, slope: float, seed: int = 0
) -> dict[str, Any]:
    """Makes the report of raw scores on held-out groups.

    Args:
        held_out: at least one group.
        scores: of `all_answers(held_out)`, in their order.
        slope: of the length-only model, from `length_slope`.
        seed: of the bootstrap.

    Returns:
        JSON values. Shares come with the 95 % interval of a bootstrap over cases.
    """
    pairs = scored_pairs(held_out, scores)
    by_length = slope * pairs.length_difference
    return {
        "num_pairs": len(pairs),
        "num_ties": int((~pairs.labelled).sum()),
        "num_cases": len(np.unique(pairs.cases)),
        "bootstrap": {"resampled": "cases", "num": NUM_RESAMPLES, "seed": seed},
        "accuracy": _share(accuracy(pairs, seed=seed)),
        "loss": cross_entropy(pairs.difference, pairs.p_chosen),
        "calibration": _calibration(pairs.difference, pairs),
        "length_baseline": {
            "log_odds_per_character": slope,
            "accuracy": _share(accuracy(_with(pairs, by_length), seed=seed)),
            "loss": cross_entropy(by_length, pairs.p_chosen),
            "calibration": _calibration(by_length, pairs),
        },
        "accuracy_above_length_baseline": _share(accuracy_gain(pairs, by_length, seed=seed)),
        "score_length_correlation": _length_correlation(held_out, scores),
        "accuracy_by_source": {
            str(name): _share(accuracy(pairs.only(pairs.sources == name), seed=seed))
            for name in np.unique(pairs.sources)
        },
        "accuracy_by_turns": _by_turns(pairs, seed),
        "accuracy_by_margin": [
            {"margin_low": low, "margin_high": high}
            | (_share(accuracy(pairs.only(_between(pairs, low, high)), seed=seed)) or {})
            for low, high in margin_ranges(pairs.margin)
        ],
    }


def probe_report(
    groups: Sequence[Group],
    scores: npt.ArrayLike,
    *,
    probe: ProbeConfig,
    slope: float,
    seed: int = 0,
) -> dict[str, Any]:
    """Reports how often the `chosen` side of a probe's pairs gets the higher of two raw scores.

    Args:
        groups: of `preferences.rows.open_probe`, at least one.
        scores: of `all_answers(groups)`, in their order.
        probe: what it measures.
        slope: of the length-only model, from `length_slope`.
        seed: of the bootstrap.

    Returns:
        JSON values; equal scores count as one half, and shares come with their 95 % interval.
    """
    pairs = scored_pairs(groups, scores)
    by_length = _with(pairs, slope * pairs.length_difference)
    return {
        "name": probe.name,
        "chosen": probe.chosen,
        "neutral": probe.neutral,
        "accuracy": _share(accuracy(pairs, seed=seed)),
        "length_accuracy": _share(accuracy(by_length, seed=seed)),
    }


def write_report(folder: pathlib.Path, report: dict[str, Any]) -> None:
    """Writes the report and its plot, each whole or not at all."""
    text = json.dumps(report, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    write_file(folder / REPORT_FILE, text)
    write_file(folder / PLOT_FILE, reliability_plot(report))


def reliability_plot(report: dict[str, Any]) -> bytes:
    """Draws the reliability plot of a report, as a PNG."""
    # Imported here: it is slow to, and only this needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([0.5, 1], [0.5, 1], color="0.7", linestyle="--", label="calibrated")
    for name, calibration in (
        ("reward model", report["calibration"]),
        ("length only", report["length_baseline"]["calibration"]),
    ):
        table = calibration["bins"]
        error = calibration["expected_calibration_error"]
        axes.plot(
            [one["confidence"] for one in table],
            [one["agreement"] for one in table],
            marker="o",
            label=f"{name} (ECE {error:.3f})",
        )
    axes.set(
        xlabel="confidence in the preferred answer",
        ylabel="share of labels that agree",
        title=f"{report['num_pairs']} held-out pairs",
        xlim=(0.5, 1.0),
        ylim=(0.0, 1.02),
    )
    axes.legend(loc="lower right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def given(answer: Answer) -> GivenAnswer:
    """Returns the answer for the scorer, whose scores do not depend on where the prompt ends."""
    return GivenAnswer(answer.token_ids, 0)


def all_answers(groups: Sequence[Group]) -> list[Answer]:
    """Returns the answers of all groups, in order."""
    return [answer for group in groups for answer in group.answers]


def scored_pairs(groups: Sequence[Group], scores: npt.ArrayLike) -> ScoredPairs:
    """Returns the pairs of all groups, with the scores of `all_answers` in their order."""
    scores_N = np.asarray(scores, np.float64)
    numbers = {case: index for index, case in enumerate(dict.fromkeys(g.case for g in groups))}
    columns: list[tuple[Any, ...]] = []
    first = 0
    for group in groups:
        for pair in group.pairs:
            chosen, rejected = group.answers[pair.chosen], group.answers[pair.rejected]
            columns.append(
                (
                    scores_N[first + pair.chosen] - scores_N[first + pair.rejected],
                    pair.p_chosen,
                    np.nan if pair.margin is None else pair.margin,
                    numbers[group.case],
                    pair.source,
                    max(chosen.num_turns, rejected.num_turns),
                    chosen.num_characters - rejected.num_characters,
                )
            )
        first += len(group.answers)
    assert first == len(scores_N), (first, len(scores_N))
    difference, p_chosen, margin, cases, sources, turns, lengths = zip(*columns, strict=True)
    return ScoredPairs(
        np.array(difference, np.float64),
        np.array(p_chosen, np.float64),
        np.array(margin, np.float64),
        np.array(cases, np.int64),
        np.array(sources, np.str_),
        np.array(turns, np.int64),
        np.array(lengths, np.float64),
    )


def length_slope(train: Sequence[Group]) -> float:
    """Fits the length-only reward model of the training pairs: log-odds a character."""
    pairs = scored_pairs(train, np.zeros(len(all_answers(train))))
    return fit_slope(pairs.length_difference, pairs.p_chosen)


def agreement(difference: Floats, p_chosen: Floats) -> Floats:
    """Scores each pair 1, 1/2 or 0; the pairs are no ties."""
    return (np.sign(difference) * np.sign(p_chosen - 0.5) + 1) / 2


def accuracy(pairs: ScoredPairs, *, seed: int = 0) -> Share | None:
    """Returns the mean agreement over all pairs that are no tie; None where there is none."""
    pairs = pairs.only(pairs.labelled)
    if not len(pairs):
        return None
    return bootstrap_mean(agreement(pairs.difference, pairs.p_chosen), pairs.cases, seed=seed)


def accuracy_gain(pairs: ScoredPairs, other: Floats, *, seed: int = 0) -> Share | None:
    """Returns by how much the agreement exceeds another difference's, over the same resamples."""
    labelled = pairs.labelled
    pairs, other = pairs.only(labelled), other[labelled]
    if not len(pairs):
        return None
    gains = agreement(pairs.difference, pairs.p_chosen) - agreement(other, pairs.p_chosen)
    return bootstrap_mean(gains, pairs.cases, seed=seed)


def reliability(
    difference: Floats, p_chosen: Floats, *, num_bins: int = NUM_BINS
) -> tuple[Bin, ...]:
    """Makes the reliability table: bins of equal width over confidences from 1/2 to 1, none empty.

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
    """Computes the expected calibration error (arXiv 1706.04599, equation 3).

    It is the mean of |confidence - agreement| over pairs.
    """
    total = sum(one.num_pairs for one in table)
    return sum(one.num_pairs * abs(one.confidence - one.agreement) for one in table) / total


def cross_entropy(difference: Floats, p_chosen: Floats) -> float:
    """Returns the mean loss of the pairs, without margin."""
    won, lost = np.logaddexp(-difference, 0), np.logaddexp(difference, 0)
    return float((p_chosen * won + (1 - p_chosen) * lost).mean())


def fit_slope(feature: Floats, p_chosen: Floats, *, num_steps: int = 50) -> float:
    """Fits a logistic regression on one difference, without intercept, by Newton's method.

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
    """Computes Pearson's correlation; None where either does not vary."""
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
    """Returns up to four ranges of margins `[low, high]`, of about as many pairs each."""
    known = np.abs(margin[np.isfinite(margin)])
    if not len(known):
        return []
    inner = np.quantile(known, np.linspace(0, 1, _MARGIN_GROUPS + 1)[1:-1], method="lower")
    uppers = np.unique([*inner, known.max()])
    lows = [float(known.min()), *(float(known[known > upper].min()) for upper in uppers[:-1])]
    return list(zip(lows, uppers.tolist(), strict=True))


def sigmoid(values: Floats) -> Floats:
    """Computes 1 / (1 + exp(-values)), without overflow."""
    return np.exp(-np.logaddexp(0, -values))


def _calibration(difference: Floats, pairs: ScoredPairs) -> dict[str, Any]:
    table = reliability(difference, pairs.p_chosen)
    return {
        "expected_calibration_error": calibration_error(table),
        "bins": [one._asdict() for one in table],
    }


def _length_correlation(groups: Sequence[Group], scores: npt.ArrayLike) -> dict[str, Any]:
    """Correlates score and characters, over all answers, and within prompts (less their means)."""
    lengths = np.array([answer.num_characters for answer in all_answers(groups)], np.float64)
    group_of = np.repeat(np.arange(len(groups)), [len(group.answers) for group in groups])
    return {
        "all_answers": correlation(scores, lengths),
        "within_prompts": correlation(
            within_groups(scores, group_of), within_groups(lengths, group_of)
        ),
        "num_answers": len(lengths),
    }


def _by_turns(pairs: ScoredPairs, seed: int) -> dict[str, Any]:
    shares = {}
    for low, high in _TURN_RANGES:
        inside = pairs.num_turns >= low
        name = f"{low} or more"
        if high is not None:
            inside &= pairs.num_turns <= high
            name = str(low) if low == high else f"{low} to {high}"
        if inside.any():
            shares[name] = _share(accuracy(pairs.only(inside), seed=seed))
    return shares


def _between(pairs: ScoredPairs, low: float, high: float) -> npt.NDArray[np.bool_]:
    margin = np.abs(pairs.margin)
    return (margin >= low) & (margin <= high)


def _with(pairs: ScoredPairs, difference: Floats) -> ScoredPairs:
    return ScoredPairs(
        difference,
        pairs.p_chosen,
        pairs.margin,
        pairs.cases,
        pairs.sources,
        pairs.num_turns,
        pairs.length_difference,
    )


def _share(share: Share | None) -> dict[str, float | int] | None:
    return None if share is None else share.to_json()
