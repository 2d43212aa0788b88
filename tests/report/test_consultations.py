"""Which consultations a report shows, and what it says of their answers."""

import dataclasses

import pytest

from huatuo_jax.clinic.dialogues import SITUATIONS, prompts, situation
from huatuo_jax.clinic.planted import FAULTS, planted_answers
from huatuo_jax.clinic.symptoms import CONDITIONS
from huatuo_jax.report import sections
from huatuo_jax.report.sections import choose, remarks

# What a report has to say of a planted fault; the others are told with the diagnosis.
WORDS = {
    "empty": "says nothing",
    "broken_characters": "broken characters",
    "repetitive": "says the same again",
    "unfinished": "breaks off",
    "disordered": "out of order",
    "no_diagnosis": "names no disease",
    "wrong_diagnosis": "; it is ",
    "wrong_test": "orders what belongs to other diseases",
    "wrong_department": "orders what belongs to other diseases",
    "wrong_drug": "orders what belongs to other diseases",
    "contraindicated": "orders ",
    "red_flag_missed": "does not send to emergency care",
    "false_alarm": "emergency care without need",
    "not_asked": "should have asked first",
}


@pytest.fixture(scope="module")
def planted():
    return list(planted_answers(10 * len(FAULTS), seed=3, held_out=True))


def test_every_planted_fault_is_told_and_a_faultless_answer_has_no_bad_line(planted):
    for one in planted:
        told = remarks(one.prompt, one.text)
        bad = " ".join(remark.told for remark in told if not remark.good)
        if not one.faults:
            assert not bad and told, (one.text, told)
        for fault in one.faults & set(WORDS):
            if "empty" not in one.faults:
                assert WORDS[fault] in bad, (fault, one.text, told)


def test_a_forbidden_order_names_what_stands_against_it(planted):
    told = [
        remark.told
        for one in planted
        if "contraindicated" in one.faults
        for remark in remarks(one.prompt, one.text)
    ]
    assert any("in spite of the " in line for line in told)
    assert set(sections._CONDITIONS) == set(CONDITIONS)


def test_one_prompt_of_each_situation_is_chosen_by_its_place_alone():
    many = list(prompts(60, seed=0, held_out=True))
    chosen = choose(many)
    assert set(chosen) == set(SITUATIONS)
    spoken = {
        kind: sum(turn.role == "assistant" for turn in one.messages) for kind, one in chosen.items()
    }
    assert spoken["clear"] == spoken["danger"] == 1
    first = next(one for one in many if situation(one) == "clear" and len(one.messages) == 3)
    assert chosen["clear"] == first and choose(many + many[::-1]) == chosen


def test_prompts_of_someone_else_are_not_chosen():
    foreign = [
        dataclasses.replace(one, source="mine") for one in prompts(10, seed=0, held_out=True)
    ]
    assert choose(foreign) == {}
