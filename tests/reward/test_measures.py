"""The figures of a report, against plain loops and closed forms."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from huatuo_jax.core.statistics import bootstrap_mean
from huatuo_jax.reward import report as measures
from huatuo_jax.reward.report import ScoredPairs, make_report, reliability_plot, scored_pairs
from tests.preferences.tiny import token_groups


def _pairs(number, *, seed=0, num_cases=None):
    draw = np.random.default_rng(seed)
    return ScoredPairs(
        difference=np.round(draw.normal(size=number), 1),
        p_chosen=draw.choice([0.0, 0.25, 0.5, 0.9, 1.0], number),
        margin=np.where(
            draw.uniform(size=number) < 0.8, np.round(draw.exponential(size=number), 1), np.nan
        ),
        cases=draw.integers(0, num_cases or number, number),
        sources=draw.choice(["one", "two"], number),
        num_turns=draw.integers(1, 9, number),
        length_difference=draw.integers(-50, 50, number).astype(float),
    )


def test_accuracy_is_that_of_a_plain_loop_with_ties_apart_and_equal_scores_half():
    pairs = _pairs(200)
    right, count = 0.0, 0
    for difference, p_chosen in zip(pairs.difference, pairs.p_chosen, strict=True):
        if p_chosen == 0.5:
            continue
        count += 1
        if difference == 0:
            right += 0.5
        elif (difference > 0) == (p_chosen > 0.5):
            right += 1
    found = measures.accuracy(pairs)
    assert found.value == pytest.approx(right / count) and found.num_pairs == count
    assert measures.accuracy(pairs.only(pairs.p_chosen == 0.5)) is None


def test_the_interval_holds_the_truth_as_often_as_it_says():
    # Ten pairs a case that are all alike: an interval over pairs would be far too narrow.
    truth, inside = 0.7, 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        values = np.repeat((draw.uniform(size=60) < truth).astype(float), 10)
        share = bootstrap_mean(values, np.repeat(np.arange(60), 10), num_resamples=400)
        inside += share.low <= truth <= share.high
        assert share.num_cases == 60 and share.num_pairs == 600
    assert 0.89 <= inside / 200 <= 0.98


def test_the_interval_is_as_wide_as_the_central_limit_says():
    values = (np.random.default_rng(0).uniform(size=2000) < 0.6).astype(float)
    share = bootstrap_mean(values, np.arange(2000))
    half = 1.96 * values.std() / np.sqrt(2000)
    assert share.high - share.value == pytest.approx(half, rel=0.1)
    assert share.value - share.low == pytest.approx(half, rel=0.1)


def test_the_gain_over_another_score_is_zero_against_itself():
    pairs = _pairs(100, num_cases=30)
    gain = measures.accuracy_gain(pairs, 2 * pairs.difference)
    assert (gain.value, gain.low, gain.high) == (0, 0, 0)
    worst = measures.accuracy_gain(pairs, -pairs.difference)
    assert worst.value == pytest.approx(2 * measures.accuracy(pairs).value - 1)


def test_the_calibration_error_is_that_of_a_plain_loop():
    draw = np.random.default_rng(0)
    difference, p_chosen = draw.normal(size=500) * 2, draw.uniform(size=500)
    bins = {}
    for score, label in zip(difference, p_chosen, strict=True):
        probability = 1 / (1 + np.exp(-score))
        confidence, agreed = (probability, label) if score > 0 else (1 - probability, 1 - label)
        bins.setdefault(min(int((confidence - 0.5) / 0.05), 9), []).append((confidence, agreed))
    expected = (
        sum(abs(sum(c for c, _ in one) - sum(a for _, a in one)) for one in bins.values()) / 500
    )
    table = measures.reliability(difference, p_chosen)
    assert measures.calibration_error(table) == pytest.approx(expected)
    assert sum(one.num_pairs for one in table) == 500
    swapped = measures.reliability(-difference, 1 - p_chosen)
    assert measures.calibration_error(swapped) == pytest.approx(expected)


def test_true_probabilities_are_calibrated_and_doubled_scores_are_not():
    draw = np.random.default_rng(1)
    difference = draw.normal(size=40000) * 1.5
    won = (draw.uniform(size=40000) < 1 / (1 + np.exp(-difference))).astype(float)
    honest = measures.calibration_error(measures.reliability(difference, won))
    boastful = measures.calibration_error(measures.reliability(2 * difference, won))
    assert honest < 0.01 < 0.05 < boastful


def test_the_length_only_model_is_logistic_regression_on_the_length_difference():
    draw = np.random.default_rng(2)
    feature = draw.normal(size=300) * 40
    won = (draw.uniform(size=300) < 1 / (1 + np.exp(-0.02 * feature))).astype(float)
    theirs = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(
        feature[:, None] / 40, won
    )
    assert measures.fit_slope(feature, won) == pytest.approx(theirs.coef_[0, 0] / 40, rel=1e-4)
    assert measures.fit_slope(np.zeros(5), np.ones(5)) == 0
    assert measures.fit_slope(-feature, np.zeros(300) + (feature < 0)) > 0.1


def test_numbers_that_are_equal_within_their_groups_have_no_correlation_there():
    for size in range(2, 14):
        groups = np.repeat([0, 2, 3], size)
        values = np.repeat([0.1, -3.3, 1e5 / 7], size)
        within = measures.within_groups(values, groups)
        np.testing.assert_array_equal(within, 0)
        assert measures.correlation(within, np.arange(3 * size)) is None
        assert measures.correlation(np.full(size, 0.1), np.arange(size)) is None


def test_margins_fall_into_ranges_that_hold_each_pair_once():
    margin = _pairs(150).margin
    ranges = measures.margin_ranges(margin)
    known = margin[np.isfinite(margin)]
    for one in known:
        assert sum(low <= one <= high for low, high in ranges) == 1
    assert 2 <= len(ranges) <= 4
    assert measures.margin_ranges(np.array([np.nan])) == []
    assert measures.margin_ranges(np.array([1.0, 1.0])) == [(1.0, 1.0)]


def test_a_report_splits_the_pairs_and_its_plot_is_a_picture():
    groups = token_groups([2, 3, 2, 4, 2, 2, 3], soft=True)
    scores = np.random.default_rng(0).normal(size=sum(len(g.answers) for g in groups))
    report = make_report(groups, scores, slope=0.01)
    pairs = scored_pairs(groups, scores)
    first = 0
    expected = []
    for group in groups:
        for pair in group.pairs:
            expected.append(scores[first + pair.chosen] - scores[first + pair.rejected])
        first += len(group.answers)
    np.testing.assert_allclose(pairs.difference, expected)
    assert report["num_pairs"] == len(expected) and report["num_cases"] == 4
    for split in ("accuracy_by_source", "accuracy_by_turns"):
        assert sum(one["num_pairs"] for one in report[split].values()) == len(expected)
    with_margin = sum(pair.margin is not None for group in groups for pair in group.pairs)
    assert sum(one["num_pairs"] for one in report["accuracy_by_margin"]) == with_margin
    ranges = [(one["margin_low"], one["margin_high"]) for one in report["accuracy_by_margin"]]
    assert ranges == sorted(ranges) and all(low <= high for low, high in ranges)
    lengths = [answer.num_characters for group in groups for answer in group.answers]
    assert report["score_length_correlation"]["all_answers"] == pytest.approx(
        np.corrcoef(scores, lengths)[0, 1]
    )
    assert reliability_plot(report).startswith(b"\x89PNG")
