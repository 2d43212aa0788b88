"""Every planted fault is found, and none is invented."""

from collections import Counter

import pytest

from huatuo_jax.clinic.findings import find
from huatuo_jax.clinic.judge import ClinicJudge
from huatuo_jax.clinic.planted import FAULTS, pairs_that_differ, planted_answers
from huatuo_jax.data.records import Prompt


def prompt_of(pair):
    return Prompt(
        id=pair.id,
        messages=pair.messages,
        source=pair.source,
        diagnosis=pair.extra["diagnosis"],
    )


@pytest.mark.parametrize(
    ("held_out", "number"),
    [
        (False, 2_000),
        *(pytest.param(one, 5_000, marks=pytest.mark.slow) for one in (False, True)),
    ],
)
def test_each_planted_fault_is_found_and_none_is_invented(held_out, number):
    answers = list(planted_answers(number, seed=1, held_out=held_out))
    planted = Counter(fault for one in answers for fault in one.faults)
    assert set(planted) == set(FAULTS) - {"none"} and min(planted.values()) >= number / 25
    assert {one.manner for one in answers} == {"real", "distilled"}
    for one in answers:
        assert set(find(one.prompt, one.text).faults) == one.faults, (one.text, one.prompt.messages)


def test_a_planted_fault_costs_points():
    judge = ClinicJudge()
    answers = list(planted_answers(1_800, seed=2))
    means = {
        fault: [judge.scores(a.prompt, a.text)["overall"] for a in answers[place :: len(FAULTS)]]
        for place, fault in enumerate(FAULTS)
    }
    means = {fault: sum(scores) / len(scores) for fault, scores in means.items()}
    assert all(means["none"] > mean + 0.1 for fault, mean in means.items() if fault != "none"), (
        means
    )
    harmful = ("contraindicated", "red_flag_missed", "wrong_diagnosis", "empty")
    assert all(means["none"] > means[fault] + 1.0 for fault in harmful), means


def test_pairs_that_differ_in_truth_differ_in_the_disease_alone():
    judge = ClinicJudge()
    for pair in pairs_that_differ("truth", 100, seed=0):
        chosen, rejected = pair.chosen[0].content, pair.rejected[0].content
        one, other = (find(prompt_of(pair), text) for text in (chosen, rejected))
        assert one.diagnosis == "right" and other.diagnosis in ("wrong", "plausible")
        assert one.items == other.items and one.friendly == other.friendly
        assert judge.p_first(prompt_of(pair), chosen, rejected) > 0.5


def test_pairs_that_differ_in_manner_say_the_same():
    for pair in pairs_that_differ("manner", 100, seed=0):
        one, other = (
            find(prompt_of(pair), side[0].content) for side in (pair.chosen, pair.rejected)
        )
        assert (one.named, set(one.items)) == (other.named, set(other.items))
        assert len(one.friendly) > len(other.friendly)


def test_pairs_that_differ_in_length_are_equal_to_an_exact_judge():
    for pair in pairs_that_differ("length", 100, seed=0):
        chosen, rejected = pair.chosen[0].content, pair.rejected[0].content
        assert len(chosen) > len(rejected) and pair.p_chosen == 0.5
        assert ClinicJudge().p_first(prompt_of(pair), chosen, rejected) == 0.5


def test_an_unknown_difference_is_refused():
    with pytest.raises(ValueError, match="difference is 'taste'; it should be in truth, manner"):
        next(pairs_that_differ("taste", 1, seed=0))
