"""The held-out report of a reward model: one JSON file, and its reliability plot beside it."""

import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from huatuo_jax.atomic import write_file
from huatuo_jax.comparisons.data import Answer, Group
from huatuo_jax.feedback.intervals import NUM_RESAMPLES
from huatuo_jax.reward import measures
from huatuo_jax.reward.config import ProbeConfig
from huatuo_jax.reward.measures import ScoredPairs
from huatuo_jax.scoring import GivenAnswer

REPORT_FILE = "reward_report.json"
PLOT_FILE = "reward_reliability.png"

_TURN_RANGES = ((1, 1), (2, 3), (4, 6), (7, None))


def given(answer: Answer) -> GivenAnswer:
    """The answer as the scorer takes it; where its prompt ends makes no difference to a score."""
    return GivenAnswer(answer.token_ids, 0)


def all_answers(groups: Sequence[Group]) -> list[Answer]:
    """The answers of all groups, in order."""
    return [answer for group in groups for answer in group.answers]


def scored_pairs(groups: Sequence[Group], scores: npt.ArrayLike) -> ScoredPairs:
    """The pairs of all groups, with the scores of `all_answers` in their order."""
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
    """The length-only reward model of the training pairs: log-odds a character."""
    pairs = scored_pairs(train, np.zeros(len(all_answers(train))))
    return measures.fit_slope(pairs.length_difference, pairs.p_chosen)


def make_report(
    held_out: Sequence[Group], scores: npt.ArrayLike, *, slope: float, seed: int = 0
) -> dict[str, Any]:
    """The report of raw scores on held-out groups.

    Args:
        held_out: at least one group.
        scores: of `all_answers(held_out)`, in their order.
        slope: of the length-only model, from `length_slope`.
        seed: of the bootstrap.

    Returns:
        JSON values. Shares stand with the 95 % interval of a bootstrap over cases.
    """
    pairs = scored_pairs(held_out, scores)
    by_length = slope * pairs.length_difference
    return {
        "num_pairs": len(pairs),
        "num_ties": int((~pairs.labelled).sum()),
        "num_cases": len(np.unique(pairs.cases)),
        "bootstrap": {"resampled": "cases", "num": NUM_RESAMPLES, "seed": seed},
        "accuracy": _share(measures.accuracy(pairs, seed=seed)),
        "loss": measures.cross_entropy(pairs.difference, pairs.p_chosen),
        "calibration": _calibration(pairs.difference, pairs),
        "length_baseline": {
            "log_odds_per_character": slope,
            "accuracy": _share(measures.accuracy(_with(pairs, by_length), seed=seed)),
            "loss": measures.cross_entropy(by_length, pairs.p_chosen),
            "calibration": _calibration(by_length, pairs),
        },
        "accuracy_above_length_baseline": _share(
            measures.accuracy_gain(pairs, by_length, seed=seed)
        ),
        "score_length_correlation": _length_correlation(held_out, scores),
        "accuracy_by_source": {
            str(name): _share(measures.accuracy(pairs.only(pairs.sources == name), seed=seed))
            for name in np.unique(pairs.sources)
        },
        "accuracy_by_turns": _by_turns(pairs, seed),
        "accuracy_by_margin": [
            {"margin_low": low, "margin_high": high}
            | (_share(measures.accuracy(pairs.only(_between(pairs, low, high)), seed=seed)) or {})
            for low, high in measures.margin_ranges(pairs.margin)
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
    """How often the `chosen` side of a probe's pairs gets the higher of two raw scores.

    Args:
        groups: of `comparisons.probes.open_probe`, at least one.
        scores: of `all_answers(groups)`, in their order.
        probe: what it measures.
        slope: of the length-only model, from `length_slope`.
        seed: of the bootstrap.

    Returns:
        JSON values; equal scores count as one half, and shares stand with their 95 % interval.
    """
    pairs = scored_pairs(groups, scores)
    by_length = _with(pairs, slope * pairs.length_difference)
    return {
        "name": probe.name,
        "chosen": probe.chosen,
        "neutral": probe.neutral,
        "accuracy": _share(measures.accuracy(pairs, seed=seed)),
        "length_accuracy": _share(measures.accuracy(by_length, seed=seed)),
    }


def write_report(folder: pathlib.Path, report: dict[str, Any]) -> None:
    """Writes the report and its plot, each whole or not at all."""
    text = json.dumps(report, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    write_file(folder / REPORT_FILE, text)
    write_file(folder / PLOT_FILE, reliability_plot(report))


def reliability_plot(report: dict[str, Any]) -> bytes:
    """The reliability plot of a report, as a PNG."""
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


def _calibration(difference: measures.Floats, pairs: ScoredPairs) -> dict[str, Any]:
    table = measures.reliability(difference, pairs.p_chosen)
    return {
        "expected_calibration_error": measures.calibration_error(table),
        "bins": [one._asdict() for one in table],
    }


def _length_correlation(groups: Sequence[Group], scores: npt.ArrayLike) -> dict[str, Any]:
    """Of score and characters, over all answers, and within prompts (less each prompt's means)."""
    lengths = np.array([answer.num_characters for answer in all_answers(groups)], np.float64)
    group_of = np.repeat(np.arange(len(groups)), [len(group.answers) for group in groups])
    return {
        "all_answers": measures.correlation(scores, lengths),
        "within_prompts": measures.correlation(
            measures.within_groups(scores, group_of), measures.within_groups(lengths, group_of)
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
            shares[name] = _share(measures.accuracy(pairs.only(inside), seed=seed))
    return shares


def _between(pairs: ScoredPairs, low: float, high: float) -> npt.NDArray[np.bool_]:
    margin = np.abs(pairs.margin)
    return (margin >= low) & (margin <= high)


def _with(pairs: ScoredPairs, difference: measures.Floats) -> ScoredPairs:
    return ScoredPairs(
        difference,
        pairs.p_chosen,
        pairs.margin,
        pairs.cases,
        pairs.sources,
        pairs.num_turns,
        pairs.length_difference,
    )


def _share(share: measures.Share | None) -> dict[str, float | int] | None:
    return None if share is None else share.to_json()
