import json
import math
import random

import pytest
from scipy import stats

from huatuo_jax.evaluation.exam_questions import Question
from huatuo_jax.evaluation.exam_scores import choose_by_likelihood, macro_mean, score_exam, wilson


def question(number, answer="A", *, category="", subject="", kind="single"):
    return Question(
        id=str(number),
        exam="cmb",
        category=category,
        subject=subject,
        question=f"第{number}题",
        options={letter: f"项{letter}" for letter in "ABCD"},
        answer=frozenset(answer),
        kind=kind,
    )


def given(letters):
    return frozenset(letters) if letters else None


def test_wilson_intervals_equal_scipys():
    for num in (1, 7, 40, 1000):
        for hits in {0, 1, num // 3, num}:
            ours = wilson(hits, num)
            theirs = stats.binomtest(hits, num).proportion_ci(method="wilson")
            assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
            assert ours.value == hits / num and ours.num == num


@pytest.mark.parametrize(("hits", "num"), [(0, 0), (3, 2), (-1, 4)])
def test_a_share_of_nothing_is_refused(hits, num):
    with pytest.raises(ValueError, match="part of at least one"):
        wilson(hits, num)


def test_cmbs_figure_is_the_unweighted_mean_of_classes():
    questions, answers = [], []
    for subject, num, right in (("大", 90, 90), ("中", 9, 3), ("小", 1, 0)):
        for number in range(num):
            questions.append(question(f"{subject}{number}", category="医师", subject=subject))
            answers.append(given("A" if number < right else "B"))
    questions.append(question("护", category="护理", subject="护师"))
    answers.append(None)
    scores = score_exam(questions, answers)
    assert scores.accuracy.value == pytest.approx(93 / 101)
    assert scores.by_category["医师"].value == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert scores.by_category["护理"].value == 0
    assert scores.macro.value == pytest.approx((1 + 1 / 3) / 3 / 2)
    assert scores.by_subject["医师", "中"].value == pytest.approx(1 / 3)
    assert list(scores.by_subject) == [
        *(("医师", "大"), ("医师", "中"), ("医师", "小"), ("护理", "护师")),
    ]
    assert scores.by_category["医师"].num_groups == 3
    assert json.loads(json.dumps(scores.to_json()))["by_subject"][1]["subject"] == "中"


def test_an_unparsed_reply_is_wrong_and_counted():
    scores = score_exam([question(1), question(2), question(3)], [given("A"), None, None])
    assert scores.accuracy.value == pytest.approx(1 / 3)
    assert scores.unparsed.value == pytest.approx(2 / 3)
    none = score_exam([question(1)], [None])
    assert none.by_option["A"].given is None and none.by_option["A"].recall == 0


def test_several_answers_are_right_as_a_set():
    questions = [question(number, "BD", kind="multiple") for number in range(4)]
    answers = [frozenset("DB"), frozenset("B"), frozenset("BCD"), None]
    scores = score_exam([*questions, question(9)], [*answers, frozenset("A")])
    assert scores.by_kind["multiple"].value == 0.25 and scores.by_kind["single"].value == 1


def test_a_model_that_always_says_c_is_seen_to():
    questions = [question(number, "ABCD"[number % 4]) for number in range(40)]
    scores = score_exam(questions, [frozenset("C")] * 40)
    assert scores.accuracy.value == 0.25
    assert scores.by_option["C"].given == 1 and scores.by_option["C"].key == 0.25
    assert scores.by_option["C"].recall == 1 and scores.by_option["A"].recall == 0
    assert scores.by_option["A"].given == 0 and scores.by_option["A"].key == 0.25


def test_intervals_of_macro_means_cover_the_truth_about_as_often_as_they_say():
    draw = random.Random(0)
    truths, sizes = (0.3, 0.6, 0.9, 0.97), (400, 100, 50, 30)
    covered = 0
    for _ in range(1000):
        shares = [
            wilson(sum(draw.random() < truth for _ in range(size)), size)
            for truth, size in zip(truths, sizes, strict=True)
        ]
        mean = macro_mean(shares)
        covered += mean.low <= sum(truths) / 4 <= mean.high
    assert 930 <= covered <= 975
    alone = wilson(3, 10)
    assert macro_mean([alone])[:3] == pytest.approx(alone[:3])
    assert macro_mean([wilson(0, 10), wilson(0, 10)]).high > 0


@pytest.mark.parametrize("num", [0, 2])
def test_every_question_needs_an_answer(num):
    with pytest.raises(ValueError, match=f"answers: {num} to 1 questions"):
        score_exam([question(1)], [None] * num)
    with pytest.raises(ValueError, match="at least one question"):
        score_exam([], [])


LETTERS = [frozenset("A"), frozenset("B"), frozenset("C")]


def test_the_likeliest_answer_is_chosen_with_and_without_length():
    log_probs = [-4.0, -6.0, -9.0]
    choice = choose_by_likelihood(log_probs, LETTERS)
    assert choice.answer == {"A"} and choice.gap == 2.0
    choice = choose_by_likelihood(log_probs, LETTERS, lengths=[2, 4, 3])
    assert choice.answer == {"B"} and choice.gap == pytest.approx(0.5)


def test_answers_that_are_equally_likely_are_no_choice():
    assert choose_by_likelihood([-1.0, -1.0, -2.0], LETTERS).answer is None
    assert choose_by_likelihood([-math.inf] * 3, LETTERS).answer is None
    assert choose_by_likelihood([-math.inf, -3.0, -math.inf], LETTERS).answer == {"B"}


@pytest.mark.parametrize(
    ("log_probs", "lengths", "said"),
    [
        ([-1.0, -2.0], None, "2 for 3 answers"),
        ([-1.0, -2.0, math.nan], None, "should be numbers"),
        ([-1.0, -2.0, -3.0], [1, 0, 1], "0 should be positive"),
        ([-1.0, -2.0, -3.0], [1, 1], "and 2 lengths"),
    ],
)
def test_likelihoods_that_decide_nothing_are_refused(log_probs, lengths, said):
    with pytest.raises(ValueError, match=said):
        choose_by_likelihood(log_probs, LETTERS, lengths=lengths)
