"""A patient who begins vaguely, answers from the case, and goes when there is advice."""

import pytest

from huatuo_jax.clinic.dialogues import DistilledDoctor, RealDoctor
from huatuo_jax.clinic.patient import Patient, consult
from huatuo_jax.clinic.reading import heard
from huatuo_jax.clinic.world import Case, Draws, draw_case
from huatuo_jax.clinic.writing import Writer

CASES = [draw_case(Draws("consultation", number), f"case {number}") for number in range(150)]
ULCER = Case(
    id="ulcer",
    disease="胃溃疡",
    age=45,
    sex="男",
    since="3周",
    lasts="weeks",
    symptoms=("上腹痛", "反酸", "饭后疼"),
    conditions=("青霉素过敏",),
)


def real(case):
    doctor = RealDoctor(Writer(Draws("doctor", case.id), held_out=False), case)
    return lambda messages: doctor.answer(heard(messages))


def distilled(case):
    doctor = DistilledDoctor(Writer(Draws("doctor", case.id), held_out=False), case)
    return lambda messages: doctor.answer(heard(messages))


def test_the_patient_begins_with_one_symptom():
    for case in CASES:
        told = heard([("user", Patient(case).open())])
        assert told.opening in case.symptoms and not told.volunteered
        assert (told.age, told.lasts) == (None, None)


def test_the_patient_answers_what_is_asked_from_the_case():
    patient = Patient(ULCER)
    messages = [("user", patient.open())]
    for question in ("有没有反酸？黑便有没有？多久了？", "多大年纪？男的女的？"):
        messages.append(("assistant", question))
        messages.append(("user", patient.reply(question)))
    told = heard(messages)
    assert "反酸" in told.present and told.denied == {"黑便"}
    assert (told.lasts, told.age, told.sex) == ("weeks", 45, "男")
    assert told.conditions == {"青霉素过敏"} and not patient.done


def test_an_open_question_brings_one_more_symptom_until_there_is_none():
    patient = Patient(ULCER)
    messages = [("user", patient.open())]
    counts = []
    for _ in range(4):
        messages.append(("assistant", "还有什么不舒服？"))
        messages.append(("user", patient.reply("还有什么不舒服？")))
        counts.append(len(heard(messages).present))
    assert counts == [2, 3, 3, 3] and "没有" in messages[-1][1]


@pytest.mark.parametrize(
    "advice", ["考虑胃溃疡。", "去查个胃镜。", "多喝水。", "马上去医院。", "可以用奥美拉唑。"]
)
def test_the_patient_says_goodbye_when_there_is_advice(advice):
    patient = Patient(ULCER)
    patient.open()
    assert "再见" in patient.reply(advice) and patient.done


@pytest.mark.parametrize("nothing", ["", "您好。", "嗯嗯嗯", "\ufffd\ufffd", "祝您早日康复！"])
def test_an_answer_without_advice_or_question_keeps_the_patient_waiting(nothing):
    patient = Patient(ULCER)
    patient.open()
    assert "再见" not in patient.reply(nothing) and not patient.done


def test_a_real_doctor_is_always_right_and_misses_nothing():
    outcomes = [consult(case, real(case)).outcome for case in CASES]
    assert all(outcome.right and outcome.ended for outcome in outcomes)
    assert not any(outcome.red_flag_missed or outcome.contraindicated for outcome in outcomes)
    assert sum(outcome.num_questions for outcome in outcomes) > 2 * len(outcomes)
    assert 1.5 < sum(outcome.num_turns for outcome in outcomes) / len(outcomes) < 4


def test_a_distilled_doctor_concludes_at_once_and_is_often_wrong():
    outcomes = [consult(case, distilled(case)).outcome for case in CASES]
    assert all(outcome.num_turns == 1 and outcome.ended for outcome in outcomes)
    assert 0.5 < sum(outcome.right for outcome in outcomes) / len(outcomes) < 0.8
    assert all(outcome.num_questions == 0 for outcome in outcomes)


def test_a_doctor_who_says_nothing_runs_out_of_turns():
    outcome = consult(ULCER, lambda messages: "您好。", max_turns=3).outcome
    assert (outcome.num_turns, outcome.ended, outcome.diagnosis) == (3, False, "absent")


def test_a_missed_red_flag_and_a_forbidden_drug_are_told():
    stroke = Case(
        id="stroke",
        disease="脑卒中",
        age=70,
        sex="女",
        since="2小时",
        lasts="hours",
        symptoms=("头晕", "一侧手脚无力", "说话不清"),
        conditions=("胃出血史",),
    )
    replies = iter(("有没有一侧手脚无力？", "考虑偏头痛。可以用布洛芬。"))
    outcome = consult(stroke, lambda messages: next(replies)).outcome
    assert outcome.red_flag_missed and outcome.contraindicated == ("布洛芬",)
    assert outcome.diagnosis == "wrong" and outcome.best_possible > 0.9


def test_the_same_seed_gives_the_same_consultation():
    one, two = (consult(ULCER, real(ULCER), seed=3).messages for _ in range(2))
    assert one == two
    assert any(consult(ULCER, real(ULCER), seed=n).messages[0] != one[0] for n in range(9))
