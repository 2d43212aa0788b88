"""Figures over prompts, against loops and closed forms."""

import numpy as np
import pytest

from huatuo_jax.core.statistics import (
    distinct,
    mean_difference,
    mean_over_prompts,
    prompt_means,
    slope_within_prompts,
)


def test_the_mean_is_that_of_the_prompts_means_and_not_of_all_answers():
    values = {"a": [1.0, 1.0, 1.0], "b": [4.0]}
    found = mean_over_prompts(values)
    assert found.value == 2.5 and found.num_prompts == 2


def test_answers_without_a_value_are_left_out_and_so_are_prompts_without_any():
    values = {"a": [1.0, None], "b": [None, None], "c": [3.0, 5.0]}
    assert prompt_means(values) == {"a": 1.0, "c": 4.0}
    assert mean_over_prompts({"b": [None]}) is None


def test_a_difference_is_taken_prompt_by_prompt_over_those_that_both_have():
    one = {"a": [2.0, 4.0], "b": [10.0], "c": [None]}
    other = {"a": [1.0], "b": [7.0, 9.0], "c": [5.0]}
    found = mean_difference(one, other)
    assert found.value == pytest.approx(((3.0 - 1.0) + (10.0 - 8.0)) / 2)
    assert found.num_prompts == 2


def test_the_interval_is_that_of_a_plain_bootstrap_over_prompts():
    draw = np.random.default_rng(3)
    values = {f"p{i}": list(draw.normal(i % 3, 1.0, size=4)) for i in range(60)}
    found = mean_over_prompts(values, seed=1)
    means = np.array([np.mean(one) for one in values.values()])
    plain = [means[draw.integers(0, 60, size=60)].mean() for _ in range(4000)]
    low, high = np.quantile(plain, (0.025, 0.975))
    width = high - low
    assert abs(found.low - low) < 0.06 * width and abs(found.high - high) < 0.06 * width


def test_pairing_takes_out_what_prompts_have_in_common():
    draw = np.random.default_rng(0)
    hard = draw.normal(0, 10, size=80)
    one = {f"p{i}": [hard[i] + 1 + 0.1 * draw.normal()] for i in range(80)}
    other = {f"p{i}": [hard[i] + 0.1 * draw.normal()] for i in range(80)}
    found = mean_difference(one, other)
    assert found.low > 0 and found.high - found.low < 0.1
    unpaired = mean_over_prompts(one)
    assert unpaired.high - unpaired.low > 2


def test_the_slope_is_that_of_least_squares_with_an_intercept_a_prompt():
    draw = np.random.default_rng(5)
    lengths = {f"p{i}": list(map(float, draw.integers(1, 90, size=3))) for i in range(7)}
    values = {
        name: [0.3 * length + 5 * i + draw.normal() for length in found]
        for i, (name, found) in enumerate(lengths.items())
    }
    rows, targets = [], []
    for index, name in enumerate(lengths):
        for length, value in zip(lengths[name], values[name], strict=True):
            rows.append([length, *(float(index == other) for other in range(7))])
            targets.append(value)
    expected = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0][0]
    assert slope_within_prompts(values, lengths) == pytest.approx(expected)


def test_answers_of_one_length_have_no_slope():
    assert slope_within_prompts({"a": [1.0, 2.0]}, {"a": [7.0, 7.0]}) == 0.0


def test_distinct_is_the_mean_share_of_different_ngrams():
    # "aab": aa, ab of 2 differ; "xxx": xx, xx.
    assert distinct(["aab", "xxx"], 2) == pytest.approx((1.0 + 0.5) / 2)
    assert distinct(["a b", "xx"], 1) == pytest.approx((1.0 + 0.5) / 2)
    assert distinct(["a"], 2) is None
