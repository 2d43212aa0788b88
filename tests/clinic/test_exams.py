"""Exam questions and written cases agree with the table."""

from collections import Counter

from huatuo_jax.clinic import symptoms as care
from huatuo_jax.clinic.diseases import DISEASES
from huatuo_jax.clinic.files import LETTERS, exam_questions, written_cases
from huatuo_jax.clinic.reading import find_terms, normal
from huatuo_jax.clinic.world import Case
from huatuo_jax.data import records

EXAMS = list(exam_questions(400, seed=2))
CASES = list(written_cases(100, seed=2))


def right(exam):
    return [exam.options[letter] for letter in exam.answer]


def of(subject):
    found = [exam for exam in EXAMS if exam.extra["subject"] == subject]
    assert len(found) >= 30
    return found


def disease_in(exam):
    return next(m.name for m in find_terms(normal(exam.question)) if m.kind == "disease")


def test_questions_are_records_with_five_different_options():
    for exam in EXAMS:
        assert records.ExamQuestion.from_json(exam.to_json()) == exam
        assert tuple(exam.options) == tuple(LETTERS)
        assert len(set(exam.options.values())) == 5 and 1 <= len(exam.answer) < 5
    assert len({(exam.question, *sorted(exam.options.values())) for exam in EXAMS}) == len(EXAMS)
    assert len({exam.id for exam in EXAMS}) == len(EXAMS)


def test_each_letter_is_right_equally_often():
    single = Counter(exam.answer for exam in EXAMS if len(exam.answer) == 1)
    assert min(single.values()) >= 0.8 * max(single.values()) and set(single) == set(LETTERS)


def test_the_answers_follow_from_the_table():
    for exam in of("检查"):
        tests = DISEASES[disease_in(exam)].tests
        assert [option for option in exam.options.values() if option in tests] == right(exam)
    for exam in of("科室"):
        assert right(exam) == [DISEASES[disease_in(exam)].department]
    for exam in of("用药"):
        drugs = DISEASES[disease_in(exam)].drugs
        assert [option for option in exam.options.values() if option in drugs] == right(exam)
    for exam in of("禁忌"):
        (condition,) = [name for name in care.CONDITIONS if name in exam.question]
        forbidden = [o for o in exam.options.values() if condition in care.DRUGS[o].not_with]
        assert forbidden == right(exam)
    for exam in of("症状"):
        symptoms = DISEASES[disease_in(exam)].symptoms
        assert [option for option in exam.options.values() if option in symptoms] == right(exam)
        assert all(symptoms[option] >= 0.5 for option in right(exam))
    for exam in of("鉴别"):
        one, other = (
            DISEASES[m.name] for m in find_terms(normal(exam.question)) if m.kind == "disease"
        )
        assert right(exam)[0] in one.symptoms and right(exam)[0] not in other.symptoms
        assert all(o in other.symptoms for o in exam.options.values() if o not in right(exam))


def test_written_cases_tell_the_case_and_not_the_diagnosis():
    for row in CASES:
        case = Case.from_json(row.extra["case"])
        assert records.Case.from_json(row.to_json()) == row
        assert (row.doctor_diagnosis, row.department) == (case.disease, case.truth.department)
        terms = find_terms(normal(row.medical_case))
        assert not [term for term in terms if term.kind == "disease"]
        told, _, without = row.medical_case.partition("。无")
        assert {m.name for m in find_terms(normal(told))} == set(case.symptoms)
        denied = {m.name for m in find_terms(normal(without)) if m.kind == "symptom"}
        assert denied and not denied & set(case.symptoms)
