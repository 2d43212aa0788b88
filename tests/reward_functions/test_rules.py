"""Lengths and rubrics by the published rules, against sums that can be checked by eye."""

import pytest

from huatuo_jax.reward_functions.lengths import over_free_tokens, overlong
from huatuo_jax.reward_functions.rubrics import (
    HEALTHBENCH,
    HUATUOGPT_3,
    OPEN_INSTRUCT,
    RUBRICS_AS_REWARDS,
    Importance,
    RubricRule,
)


@pytest.mark.parametrize(
    ("tokens", "penalty"),
    [(0, 0), (200, 0), (201, -0.5 / 4000), (2200, -0.25), (4200, -0.5), (90_000, -0.5)],
)
def test_the_penalty_of_onepo_grows_from_200_to_4200_tokens_of_the_final_answer(tokens, penalty):
    assert over_free_tokens([None], [""], num_final_tokens=[tokens]) == [pytest.approx(penalty)]


@pytest.mark.parametrize(
    ("tokens", "penalty"),
    [(0, 0), (16_384, 0), (16_385, -1 / 4096), (18_432, -0.5), (20_480, -1), (30_000, -1)],
)
def test_the_penalty_of_dapo_grows_over_its_buffer(tokens, penalty):
    assert overlong([None], [""], num_tokens=[tokens]) == [pytest.approx(penalty)]


@pytest.mark.parametrize(
    ("rule", "tokens", "settings", "message"),
    [
        (over_free_tokens, "num_final_tokens", {"factor": -1.0}, "factor=-1.0 must be 0 or more"),
        (over_free_tokens, "num_final_tokens", {"free_tokens": -1}, "free_tokens=-1 must be"),
        (over_free_tokens, "num_final_tokens", {"span": 0}, "span=0 must be at least 1"),
        (overlong, "num_tokens", {"buffer": 0}, "buffer=0 must be at least 1"),
        (overlong, "num_tokens", {"max_tokens": 9, "buffer": 10}, "at most max_tokens=9"),
    ],
)
def test_a_penalty_out_of_its_range_is_refused(rule, tokens, settings, message):
    with pytest.raises(ValueError, match=message):
        rule([None], [""], **{tokens: [1]}, **settings)


POINTS = [5.0, 3.0, -4.0]


@pytest.mark.parametrize(
    ("rule", "met", "score"),
    [
        (HEALTHBENCH, [True, True, False], 1.0),
        (HEALTHBENCH, [True, False, True], 1 / 8),
        (HEALTHBENCH, [False, False, True], -4 / 8),  # Not bounded, response by response.
        (HEALTHBENCH, [None, True, True], -1 / 3),
        (HEALTHBENCH, [None, None, True], None),
        (HUATUOGPT_3, [True, False, True], 1 / 8),
        (HUATUOGPT_3, [False, False, True], 0.0),
        (HUATUOGPT_3, [True, True, None], None),  # Never 0 for a verdict that is missing.
        (RUBRICS_AS_REWARDS, [True, False, False], 5 / 4),  # All points come to 4.
        (OPEN_INSTRUCT, [False, False, True], -4 / 12),
        (OPEN_INSTRUCT, [True, None, False], 5 / 12),
        (OPEN_INSTRUCT, [0.5, 0.0, 0.0], 2.5 / 12),
    ],
)
def test_a_rubric_scores_as_published(rule, met, score):
    found = rule.score(POINTS, met)
    assert found is None if score is None else found == pytest.approx(score, abs=1e-15)


def test_weights_of_classes_are_summed_over_those_that_are_met():
    points = Importance().points(["Essential", "important", "OPTIONAL", "Pitfall"])
    assert points == [1.0, 0.7, 0.3, 0.9]
    found = RUBRICS_AS_REWARDS.score(points, [True, False, True, True])
    assert found == pytest.approx(2.2 / 2.9)
    with pytest.raises(ValueError, match="importance 'vital' must be one of"):
        Importance().points(["vital"])


@pytest.mark.parametrize(
    ("rule", "criteria", "points", "message"),
    [
        (HEALTHBENCH, ["a", "b"], [-1.0, 0.0], "must come to more than 0"),
        (RUBRICS_AS_REWARDS, ["a", "b"], [1.0, -1.0], "must come to more than 0"),
        (HUATUOGPT_3, ["a", "a"], [1.0, 1.0], "criterion 'a' must stand in the rubric once"),
        (HUATUOGPT_3, ["a"], [1.0, 1.0], "must be as many"),
        (HUATUOGPT_3, ["a"], [float("nan")], "must be numbers"),
        (HUATUOGPT_3, [], [], "must come to more than 0"),
    ],
)
def test_a_rubric_that_cannot_score_is_refused_before_anybody_is_asked(
    rule, criteria, points, message
):
    with pytest.raises(ValueError, match=message):
        rule.check(criteria, points)


def test_a_list_of_verdicts_of_another_length_is_refused():
    with pytest.raises(ValueError, match="2 verdicts must be 3"):
        HUATUOGPT_3.score(POINTS, [True, True])
    with pytest.raises(ValueError, match=r"verdict 2.0 must be from 0 to 1"):
        HUATUOGPT_3.score(POINTS, [2, True, True])


def test_bounds_must_leave_something_between_them():
    with pytest.raises(ValueError, match=r"low=1.0 must be below high=0.0"):
        RubricRule(low=1.0, high=0.0)
