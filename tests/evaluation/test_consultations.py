"""Consultations with scripted and with the clinic's patients: turns, ends, faults and outcomes."""

import itertools
import json

import pytest

from huatuo_jax.clinic.world import Draws, draw_case
from huatuo_jax.data.records import Message
from huatuo_jax.evaluation.consultations import (
    PATIENT_OPENINGS,
    ConsultationSettings,
    ConsultationState,
    PatientCase,
    clinic_case,
    clinic_turn,
    consultation_figures,
    consultation_outcome,
    conversation_contests,
    figures_by_department,
    read_med_dialog,
    says_goodbye,
)
from huatuo_jax.evaluation.pairwise import ballots, conversation_template

CASE = PatientCase(
    id="1",
    department="消化内科",
    description="疾病：\n胃部不适\n病情描述：\n聚餐之后一直隐隐作痛。",
    diagnosis="病情摘要及初步印象：\n急性胃炎\n总结建议：\n清淡饮食",
    diagnoses=(("急性胃炎", "胃炎"),),
)
DOCTOR = ("您好，疼了几天了？有没有发热？", "考虑急性胃炎，建议清淡饮食。", "不客气，注意休息。")


def consult(patient, doctor=DOCTOR, case=CASE, **settings):
    """A consultation of two scripts; the last line of each is said again and again."""
    found = ConsultationState(case=case, settings=ConsultationSettings(**settings))
    lines = {role: list(script) for role, script in (("user", patient), ("assistant", doctor))}
    while (speaker := found.speaker) is not None:
        script = lines[speaker]
        found = found.add(script.pop(0) if len(script) > 1 else script[0])
    return found


GOOD = ("胃有点疼", "三天，没有发热", "谢谢医生，再见！")


def test_a_consultation_ends_where_the_patient_says_goodbye():
    found = consult(GOOD)
    assert (found.end, found.exchanges, len(found.messages)) == ("goodbye", 2, 5)
    assert [one.role for one in found.messages] == ["user", "assistant"] * 2 + ["user"]
    with pytest.raises(ValueError, match=r"case 1 is over \(goodbye\)"):
        found.add("还在吗")


def test_a_patient_who_never_says_goodbye_is_stopped_at_the_cap():
    patient = [f"还有第{i}个问题，{word}怎么办" for i, word in enumerate("胃肠肝胆脾肺肾心脑骨")]
    doctor = [f"第{i}个回答：{word}没有大碍" for i, word in enumerate("甲乙丙丁戊己庚辛壬癸")]
    rules = {"stop_on_loop": False}
    found = consult(patient, doctor, max_exchanges=6, **rules)
    assert (found.end, found.exchanges, found.messages[-1].role) == ("cap", 6, "assistant")


def test_a_fixed_number_of_exchanges_takes_no_notice_of_goodbye():
    found = consult(("胃疼", "谢谢，再见", "那饮食呢"), ending="exchanges", max_exchanges=2)
    assert (found.end, found.exchanges, len(found.messages)) == ("exchanges", 2, 4)
    assert found.messages[2].content == "谢谢，再见"


def test_goodbye_before_the_doctor_has_said_anything_ends_nothing():
    found = consult(("胃疼，先说声再见", "三天", "再见"))
    assert (found.end, found.exchanges) == ("goodbye", 2)


@pytest.mark.parametrize(
    "text",
    [
        "再见",
        "好的，谢谢医生，再见！",
        "拜拜~",
        "医生再见。",
        "再见您",
        "Thanks, good-bye!",
        "Bye.",
    ],
)
def test_goodbyes_are_known(text):
    assert says_goodbye(text)


@pytest.mark.parametrize(
    "text",
    ["下次再见面时说", "再见一次主任", "谢谢医生", "没再见过血", "不再见好", "", "I was bypassed."],
)
def test_other_words_are_no_goodbye(text):
    assert not says_goodbye(text)


def test_the_model_that_plays_the_patient_sees_its_own_case_and_not_the_diagnosis():
    found = consult(GOOD)
    messages = found.patient_messages()
    assert [one["role"] for one in messages[:4]] == ["system", "user", "assistant", "user"]
    assert messages[1]["content"] == PATIENT_OPENINGS["zh"]
    assert messages[2]["content"] == "胃有点疼" and messages[3]["content"] == DOCTOR[0]
    system = messages[0]["content"]
    assert CASE.description in system and "胃炎" not in system and "说“再见”" in system
    fixed = consult(GOOD, ending="exchanges", max_exchanges=2).patient_messages()[0]["content"]
    assert "不要结束对话" in fixed and "说“再见”" not in fixed


def test_the_model_that_is_evaluated_sees_the_turns_alone():
    assert consult(GOOD).doctor_messages()[:2] == [
        {"role": "user", "content": "胃有点疼"},
        {"role": "assistant", "content": DOCTOR[0]},
    ]


def test_a_consultation_goes_on_from_its_record():
    whole = consult(GOOD)
    begun = ConsultationState(
        case=CASE, settings=ConsultationSettings(), messages=whole.messages[:3]
    )
    assert begun.speaker == "assistant"
    assert begun.add(whole.messages[3].content).add(whole.messages[4].content) == whole
    row = json.loads(json.dumps(whole.to_json()))
    assert row["end"] == "goodbye" and len(row["messages"]) == 5
    assert row["settings"]["rules"]["similarity"] == 0.9


def test_a_patient_that_flips_leaks_and_never_ends_is_caught_in_all_three():
    flips = consult(("胃疼", "建议您去医院查一下胃镜。", "祝您早日康复，再见"))
    leaks = consult(("胃疼，我是不是得了胃炎", "三天", "再见"))
    stuck = consult(("胃疼", "医生，我还是不放心，您能再说说吗"), max_exchanges=20)
    outcomes = {
        name: consultation_outcome(found)
        for name, found in (("flips", flips), ("leaks", leaks), ("stuck", stuck))
    }
    kinds = {name: {one.kind for one in found.faults} for name, found in outcomes.items()}
    assert kinds["flips"] == {"role_flip"} and kinds["leaks"] == {"leak"}
    assert "loop" in kinds["stuck"] and outcomes["stuck"].end == "loop"
    assert outcomes["stuck"].exchanges < 20
    assert [outcomes[name].spoiled for name in outcomes] == [True, True, False]
    assert consultation_outcome(consult(GOOD)).faults == ()


def test_an_outcome_tells_the_diagnosis_the_questions_and_the_turns():
    found = consultation_outcome(consult(GOOD))
    assert (found.diagnosis_named, found.named_at, found.exchanges) == (True, 2, 2)
    assert (found.questions, found.concluded) == (2, True)
    vague = consultation_outcome(consult(GOOD, ("疼多久了？", "去医院看看。")))
    assert (vague.diagnosis_named, vague.named_at) == (False, None)


def test_a_case_whose_patient_knows_the_diagnosis_has_none_to_find():
    known = PatientCase(
        id="2",
        department="内科",
        description="我有慢性咽炎",
        diagnosis="咽炎",
        diagnoses=(("慢性咽炎", "咽炎"),),
    )
    found = consultation_outcome(consult(("咽炎怎么治", "再见"), ("多喝水",), case=known))
    assert found.diagnosis_named is None and found.faults == ()


def clinic_consultation(case, doctor, **settings):
    found = ConsultationState(case=clinic_case(case), settings=ConsultationSettings(**settings))
    lines = itertools.chain(doctor, itertools.repeat(doctor[-1]))
    while (speaker := found.speaker) is not None:
        found = found.add(clinic_turn(case, found, seed=3) if speaker == "user" else next(lines))
    return found


def test_the_clinics_patients_are_clean_and_their_diagnosis_is_to_be_found():
    outcomes = []
    for number in range(60):
        case = draw_case(Draws("consultations", number), f"case-{number}")
        doctor = (
            "您好，多久了？有没有发热？",
            "还有别的症状吗？",
            f"考虑{case.disease}，建议休息。",
        )
        found = consultation_outcome(clinic_consultation(case, doctor))
        assert found.end == "goodbye" and found.exchanges == 3
        assert found.diagnosis_named is True and found.named_at == 3 and found.questions == 3
        outcomes.append(found)
    assert all(one.faults == () for one in outcomes)
    figures = consultation_figures(outcomes)
    assert figures.diagnosis_named.value == 1.0 and figures.ends == {"goodbye": 60}


def test_the_clinics_patient_says_the_same_whenever_it_is_asked_again():
    case = draw_case(Draws("again"), "case")
    whole = clinic_consultation(case, ("多久了？", "有没有发热？", "建议休息。"))
    for turn in range(0, len(whole.messages), 2):
        begun = ConsultationState(
            case=whole.case, settings=whole.settings, messages=whole.messages[:turn]
        )
        assert clinic_turn(case, begun, seed=3) == whole.messages[turn].content
    with pytest.raises(ValueError, match="not the patient's turn"):
        clinic_turn(case, whole)


def outcomes_of(*patients):
    found = []
    for number, patient in enumerate(patients):
        case = PatientCase(
            id=f"c{number}",
            department="内科" if number % 2 else "外科",
            description=CASE.description,
            diagnosis=CASE.diagnosis,
            diagnoses=CASE.diagnoses if number else (),
        )
        found.append(consultation_outcome(consult(patient, case=case)))
    return found


def test_figures_count_ends_and_faults_and_can_leave_spoiled_ones_out():
    leaking = ("胃疼，是不是胃炎", "三天", "再见")
    outcomes = outcomes_of(GOOD, GOOD, leaking, GOOD)
    found = consultation_figures(outcomes)
    assert (found.consultations, found.spoiled, found.without_diagnosis) == (4, 1, 1)
    assert found.faults == {"leak by user": 1} and found.ends == {"goodbye": 4}
    assert found.diagnosis_named.num_prompts == 3 and found.questions.value == 2.0
    clean = consultation_figures(outcomes, spoiled=False)
    assert (clean.consultations, clean.spoiled, clean.faults) == (3, 0, {})
    by_department = figures_by_department(outcomes)
    assert {name: one.consultations for name, one in by_department.items()} == {
        "外科": 2,
        "内科": 2,
    }
    assert json.loads(json.dumps(found.to_json()))["exchanges"]["value"] == 2.0
    with pytest.raises(ValueError, match="2 are of case 'c0'"):
        consultation_figures([outcomes[0], outcomes[0]])
    assert consultation_figures([]).questions is None


def test_whole_conversations_are_compared_as_contests_by_department():
    one, other = consult(GOOD), consult(GOOD, ("去医院。", "不清楚。"))
    contests = conversation_contests([one], [other])
    assert (contests[0].id, contests[0].group) == ("1", "消化内科")
    sent = next(ballots(contests, judge="j", settings={}, template=conversation_template()))
    text = sent.messages[-1]["content"]
    assert "医生：考虑急性胃炎" in text and "医生：不清楚。" in text
    assert CASE.description in text and "医生的诊断：" in text
    with pytest.raises(ValueError, match="only one model has case '1'"):
        conversation_contests([one], [])
    with pytest.raises(ValueError, match="a case is there twice"):
        conversation_contests([one, one], [other, other])


def test_med_dialogs_real_cases_are_read_in_twenty_departments(shared_data):
    found = read_med_dialog(shared_data / "5_gen_benchmark" / "huatuogpt_Med-dialog_100.json")
    assert len(found) == 67 and len({one.department for one in found}) == 20
    named = [one for one in found if one.diagnoses]
    assert len(named) > 45 and sum(bool(one.to_be_found) for one in found) > 30
    for case in found:
        begun = ConsultationState(case=case, settings=ConsultationSettings())
        system = begun.patient_messages()[0]["content"]
        for wordings in case.to_be_found:
            assert not any(name in system for name in wordings)
        patient = Message("user", case.description)
        whole = ConsultationState(case=case, settings=ConsultationSettings(), messages=(patient,))
        assert not [f for f in consultation_outcome(whole).faults if f.kind == "leak"]


def test_the_form_of_huatuogpt_ii_is_read_too(tmp_path):
    row = {
        "id": 7,
        "Description": "疾病：\n胃疼",
        "Doctor faculty": "内科",
        "Diagnosis and suggestions": "病情摘要及初步印象：\n胃炎",
    }
    (tmp_path / "cases.json").write_text(json.dumps([row]))
    (case,) = read_med_dialog(tmp_path / "cases.json")
    assert (case.id, case.department, case.diagnoses) == ("7", "内科", (("胃炎",),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 1}, r"cases\.json:\d+: the id '1' is already used at .*cases\.json:1"),
        ({"medical_case": None}, r"medical_case is None; it should be text"),
        ({"Department": " "}, r"Department is ' '; it should be text"),
        ({"doctor_diagnosis": ["x"]}, r"doctor_diagnosis is \['x'\]; it should be text"),
    ],
)
def test_a_case_that_does_not_fit_is_named(tmp_path, change, message):
    row = {"id": 1, "medical_case": "胃疼", "doctor_diagnosis": "胃炎", "Department": "内科"}
    (tmp_path / "cases.json").write_text(json.dumps([row, {**row, "id": 2, **change}]))
    with pytest.raises(ValueError, match=message):
        read_med_dialog(tmp_path / "cases.json")
    (tmp_path / "cases.json").write_text(json.dumps([{"id": 3, "question": "胃疼"}]))
    with pytest.raises(ValueError, match="neither medical_case nor Description"):
        read_med_dialog(tmp_path / "cases.json")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ending": "turns"}, "ending is 'turns'; it should be goodbye or exchanges"),
        ({"max_exchanges": 0}, "max_exchanges is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ConsultationSettings(**fields)
