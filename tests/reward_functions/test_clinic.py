"""Rewards from the clinic's truth: the right diagnosis, and a rubric of signed points."""

import pytest

from huatuo_jax.clinic.dialogues import prompts
from huatuo_jax.clinic.findings import find, truth_of
from huatuo_jax.clinic.judge import ClinicJudge
from huatuo_jax.data.records import messages_to_json
from huatuo_jax.reward_functions.clinic import clinic_rubric, right_diagnosis

PROMPTS = list(prompts(60, seed=0))
CLEAR = [one for one in PROMPTS if not find(one, "").should_ask]
UNCLEAR = [one for one in PROMPTS if find(one, "").should_ask]


def asked(prompt, *responses):
    return [messages_to_json(prompt.messages)] * len(responses), list(responses)


def of(function, prompt, *responses, **settings):
    truth = [prompt.diagnosis] * len(responses)
    return function(*asked(prompt, *responses), diagnosis=truth, **settings)


def test_the_right_disease_is_rewarded_and_another_or_none_is_not():
    prompt = CLEAR[0]
    disease = truth_of(prompt).name
    other = next(truth_of(one).name for one in CLEAR if truth_of(one).name != disease)
    given = (f"您得的是{disease}。", f"您得的是{other}。", "多喝水。", "")
    assert of(right_diagnosis, prompt, *given) == [1.0, 0.0, 0.0, 0.0]
    assert of(right_diagnosis, prompt, *given[:2], correct=2.0, wrong=-1.0) == [2.0, -1.0]


def test_thinking_names_no_disease():
    prompt = CLEAR[0]
    named = f"您得的是{truth_of(prompt).name}。"
    assert of(right_diagnosis, prompt, f"<think>{named}</think>多喝水。") == [0.0]
    assert of(right_diagnosis, prompt, f"<think>多喝水。</think>{named}") == [1.0]


def test_a_prompt_that_has_no_truth_or_tells_too_little_has_no_diagnosis_to_reward():
    assert of(right_diagnosis, UNCLEAR[0], "您得的是感冒。") == [None]
    assert right_diagnosis(*asked(CLEAR[0], "x"), diagnosis=[None]) == [None]
    assert clinic_rubric(*asked(CLEAR[0], "x"), diagnosis=[None]) == [None]


def test_the_doctors_own_answer_has_nearly_all_points_and_silence_has_none():
    scores = [of(clinic_rubric, one, one.reference, "", "是。") for one in PROMPTS if one.reference]
    assert scores
    own = [found[0] for found in scores]
    assert sum(own) / len(own) > 0.6
    assert all(found[1:] == [0.0, 0.0] for found in scores)


def test_what_a_patient_must_not_have_costs_more_than_a_right_disease_brings():
    judge = ClinicJudge()
    found = 0
    for prompt in CLEAR:
        named = f"您得的是{truth_of(prompt).name}。"
        for drug in ("布洛芬", "阿司匹林", "氨溴索", "阿莫西林"):
            answer = f"{named}建议服用{drug}。"
            facts = judge.findings(prompt, answer)
            if facts.contraindicated and not facts.emergency:
                harmful, plain = of(clinic_rubric, prompt, answer, named)
                assert harmful == 0.0 < plain
                found += 1
    assert found, "no prompt of these forbids one of the drugs"


def test_a_diagnosis_that_the_clinic_does_not_know_is_refused():
    with pytest.raises(ValueError, match="diagnosis is '怪病'"):
        right_diagnosis(*asked(CLEAR[0], "x"), diagnosis=["怪病"])
