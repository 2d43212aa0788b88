"""The table is sound, and the posterior is Bayes' rule over what patients come to say."""

import itertools
import math

import pytest

from huatuo_jax.clinic import symptoms
from huatuo_jax.clinic.diseases import AGE_BANDS, DISEASES, DURATIONS
from huatuo_jax.clinic.reading import TERMS, normal
from huatuo_jax.clinic.symptoms import SYMPTOMS
from huatuo_jax.clinic.world import (
    LEAST_SYMPTOMS,
    Case,
    Draws,
    Observation,
    best_accuracy,
    draw_case,
    near_misses,
    posterior,
    told_in_order,
)

CASES = [draw_case(Draws("test", number), str(number)) for number in range(2_000)]


def told(case, count, *, person):
    """What a patient has told who names so many symptoms."""
    order = told_in_order(Draws("told", case.id), case)
    about = {"age": case.age, "sex": case.sex, "lasts": case.lasts} if person else {}
    return Observation(opening=order[0], volunteered=frozenset(order[1:count]), **about)


# The table


def test_every_name_in_a_row_stands_in_its_table():
    for disease in DISEASES.values():
        assert set(disease.symptoms) <= set(SYMPTOMS)
        assert set(disease.tests) <= set(symptoms.TESTS) and disease.tests
        assert set(disease.advice) <= set(symptoms.ADVICE) and len(disease.advice) >= 2
        assert set(disease.drugs) <= set(symptoms.DRUGS)
        assert disease.department in symptoms.DEPARTMENTS
        assert len(set(disease.lasts)) > 1 and any(disease.ages)
        assert disease.emergency == (disease.department == symptoms.EMERGENCY)
        assert not (disease.emergency and disease.drugs), "no drug at home in an emergency"
        assert not disease.emergency or set(disease.advice) & set(symptoms.ON_THE_WAY)
        assert len(set(disease.advice) - set(symptoms.ADULT_ADVICE)) >= 2 or not disease.ages[0]
        assert disease.no_pregnancy or any(
            not symptoms.forbidden_test(test, frozenset({"怀孕"})) for test in disease.tests
        )


def test_everything_in_the_tables_is_used_by_a_row():
    rows = DISEASES.values()
    assert {name for row in rows for name in row.symptoms} == set(SYMPTOMS)
    assert {name for row in rows for name in row.tests} == set(symptoms.TESTS)
    assert {name for row in rows for name in row.advice} == set(symptoms.ADVICE)
    assert {name for row in rows for name in row.drugs} == set(symptoms.DRUGS)
    assert {row.department for row in rows} == set(symptoms.DEPARTMENTS)


def test_no_word_means_two_things():
    words = [normal(word) for table in TERMS.values() for names in table.values() for word in names]
    assert len(set(words)) == len(words)


def test_there_are_some_forty_diseases_each_with_a_near_miss():
    assert len(DISEASES) == 40
    for name, disease in DISEASES.items():
        nearest = DISEASES[near_misses(name)[0]]
        assert len(set(disease.symptoms) & set(nearest.symptoms)) >= 2


def test_no_symptom_that_opens_a_consultation_tells_the_disease():
    for name, symptom in SYMPTOMS.items():
        if symptom.opens:
            assert sum(name in row.symptoms for row in DISEASES.values()) >= 2, name


def test_near_misses_are_told_apart_by_a_question():
    for name, disease in DISEASES.items():
        nearest = DISEASES[near_misses(name)[0]]
        apart = max(
            abs(disease.symptoms.get(symptom, 0.0) - nearest.symptoms.get(symptom, 0.0))
            for symptom in SYMPTOMS
        )
        assert apart >= 0.6, (name, nearest.name)


def test_every_condition_forbids_a_drug_that_someone_is_given():
    for condition in symptoms.CONDITIONS:
        forbidden = {name for name, drug in symptoms.DRUGS.items() if condition in drug.not_with}
        assert any(forbidden & set(row.drugs) for row in DISEASES.values()), condition


# Cases


def test_cases_fit_their_row():
    for case in CASES:
        disease = case.truth
        assert set(case.symptoms) <= set(disease.symptoms) and len(case.symptoms) >= LEAST_SYMPTOMS
        assert any(SYMPTOMS[name].opens for name in case.symptoms)
        assert case.sex == "女" or disease.male > 0
        assert case.sex == "男" or disease.male < 1
        band = [low <= case.age <= high for low, high in AGE_BANDS.values()].index(True)
        assert disease.ages[band] > 0 and disease.lasts[DURATIONS.index(case.lasts)] > 0


def test_only_women_of_the_age_are_pregnant_and_not_with_every_disease():
    pregnant = [case for case in CASES if "怀孕" in case.conditions]
    assert len(pregnant) > 20
    for case in pregnant:
        assert case.sex == "女" and 18 <= case.age <= 45 and not case.truth.no_pregnancy


def test_a_case_comes_back_from_its_json():
    assert all(Case.from_json(case.to_json()) == case for case in CASES[:50])


@pytest.mark.parametrize(
    "change, says",
    [
        ({"disease": "相思病"}, "the clinic has no '相思病'"),
        ({"symptoms": ["心痛"]}, "the clinic has no '心痛'"),
        ({"more": 1}, "a case has the fields"),
    ],
)
def test_a_case_that_is_none_is_refused_in_one_line(change, says):
    with pytest.raises(ValueError, match=says):
        Case.from_json({**CASES[0].to_json(), **change})


# The posterior


def by_enumeration(disease, observation):
    """The probability that a case of a disease is told so, over all sets of its symptoms."""
    names = list(disease.symptoms)
    total = told_so = 0.0
    for there in itertools.product((False, True), repeat=len(names)):
        present = {name for name, has in zip(names, there, strict=True) if has}
        chance = math.prod(
            disease.symptoms[name] if has else 1 - disease.symptoms[name]
            for name, has in zip(names, there, strict=True)
        )
        openers = [name for name in present if SYMPTOMS[name].opens]
        if len(present) < LEAST_SYMPTOMS or not openers:
            continue
        total += chance
        if observation.present <= present and not observation.denied & present:
            others = math.comb(len(present) - 1, len(observation.volunteered))
            told_so += chance / len(openers) / others
    return told_so / total


@pytest.mark.parametrize(
    "observation",
    [
        Observation(opening="咳嗽"),
        Observation(opening="头痛", volunteered=frozenset({"恶心"})),
        Observation(opening="上腹痛", denied=frozenset({"饭后疼"}), confirmed=frozenset({"反酸"})),
        Observation(opening="皮肤痒", sex="女", age=30, lasts="days"),
    ],
)
def test_the_posterior_is_the_one_of_all_cases_enumerated(observation):
    weights = {}
    for name, disease in DISEASES.items():
        weight = disease.weight * by_enumeration(disease, observation)
        if observation.sex is not None:
            weight *= 1 - disease.male if observation.sex == "女" else disease.male
        if observation.age is not None:
            band = [low <= observation.age <= high for low, high in AGE_BANDS.values()].index(True)
            weight *= disease.ages[band] / sum(disease.ages)
        if observation.lasts is not None:
            place = DURATIONS.index(observation.lasts)
            weight *= disease.lasts[place] / sum(disease.lasts)
        weights[name] = weight
    total = sum(weights.values())
    found = posterior(observation).probabilities
    for name, weight in weights.items():
        assert found.get(name, 0.0) == pytest.approx(weight / total, abs=1e-12)


@pytest.mark.parametrize("count, person", [(1, False), (2, False), (2, True), (3, True)])
def test_the_best_diagnosis_is_right_as_often_as_its_probability_says(count, person):
    observations = [told(case, count, person=person) for case in CASES]
    pairs = zip(observations, CASES, strict=True)
    hits = [posterior(observation).best == case.disease for observation, case in pairs]
    promised = best_accuracy(observations)
    error = math.sqrt(promised * (1 - promised) / len(CASES))
    assert sum(hits) / len(hits) == pytest.approx(promised, abs=4 * error)


def test_one_symptom_is_ambiguous_and_asking_helps():
    shares = [
        sum(posterior(told(case, count, person=person)).ambiguous for case in CASES) / len(CASES)
        for count, person in ((1, False), (2, False), (3, True))
    ]
    assert shares[0] > 0.7 and shares[1] < 0.3 and shares[2] < 0.05
    accuracy = [best_accuracy(told(case, n, person=False) for case in CASES) for n in (1, 2, 3)]
    assert accuracy[0] < 0.5 and accuracy[1] > 0.75 and accuracy[2] > 0.9


def test_the_most_gainful_question_tells_two_near_misses_apart():
    belief = posterior(Observation(opening="上腹痛", volunteered=frozenset({"反酸"})))
    assert set(belief.plausible) >= {"胃溃疡", "十二指肠溃疡"}
    assert next(iter(belief.gains())) in ("空腹疼", "饭后疼")
    certain = posterior(Observation(opening="上腹痛", volunteered=frozenset({"反酸", "饭后疼"})))
    assert certain.best == "胃溃疡" and not certain.ambiguous


def test_a_red_flag_or_a_probable_emergency_needs_emergency_care():
    assert posterior(Observation(opening="上腹痛", volunteered=frozenset({"黑便"}))).emergency
    assert posterior(Observation(opening="小腹痛", volunteered=frozenset({"停经"}))).emergency
    assert not posterior(Observation(opening="流鼻涕")).emergency


def test_what_fits_no_disease_still_has_a_posterior():
    belief = posterior(Observation(opening="流鼻涕", volunteered=frozenset({"腿麻", "血尿"})))
    assert math.fsum(belief.probabilities.values()) == pytest.approx(1.0)
    assert belief.ambiguous
