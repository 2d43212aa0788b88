"""Faults of simulated patients: planted ones are found, and none in clean dialogues."""

import csv
import itertools
import json
import pathlib

import pytest

from huatuo_jax.data.readers import read_dialogues
from huatuo_jax.data.records import Message
from huatuo_jax.evaluation.patient_faults import (
    FaultRules,
    find_faults,
    in_a_loop,
    speaks_as_doctor,
)


def talk(*texts):
    roles = itertools.cycle(("user", "assistant"))
    return [Message(role, text) for role, text in zip(roles, texts, strict=False)]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("我建议您先去医院查个血常规。", "advice"),
        ("建议尽快就医，完善胃镜检查。", "advice"),
        ("您需要多喝水，注意休息。", "advice"),
        ("请您按时服药。", "advice"),
        ("阿莫西林口服，每次一粒，一日三次。", "prescription"),
        ("我给您开点药吧。", "prescription"),
        ("您可能患有胃炎。", "diagnosis"),
        ("根据您的描述，考虑上呼吸道感染。", "diagnosis"),
        ("您的症状是从什么时候开始的？", "diagnosis"),
        ("您最近有没有发热？", "question"),
        ("请问有没有其他症状？", "question"),
        ("您今年多大了？", "question"),
        ("祝您早日康复！", "courtesy"),
        ("不客气。", "courtesy"),
        ("如果您还有其他问题，请随时向我咨询。", "courtesy"),
        ("我作为一名医生，理解这种担心。", "identity"),
        ("我是一名医生，很高兴为您服务。", "identity"),
        ("抱歉，我是ＡＩ语言模型，无法看病。", "identity"),
        ("I’d recommend a blood test first.", "advice"),
        ("You should drink plenty of water.", "advice"),
        ("Take amoxicillin three times a day.", "prescription"),
        ("I will prescribe something for the pain.", "prescription"),
        ("You may have gastritis.", "diagnosis"),
        ("Your symptoms began a week ago, right?", "diagnosis"),
        ("Have you noticed any fever or chills?", "question"),
        ("How long have you had this cough?", "question"),
        ("I hope you feel better soon.", "courtesy"),
        ("You’re welcome, feel free to ask.", "courtesy"),
        ("As your doctor, I understand.", "identity"),
    ],
)
def test_what_a_doctor_says_is_known(text, kind):
    found = speaks_as_doctor(text)
    assert found is not None and found[0] == kind


@pytest.mark.parametrize(
    "text",
    [
        "谢谢您的建议，我会按时吃药的。",
        "医生建议我先查血，您看呢？",
        "您建议我先手术还是先吃药？",
        "请问您有什么好的建议吗？",
        "我有没有咳嗽加重的可能？",
        "这个病会传染吗？需要住院吗？",
        "好的，请告诉我怎么做才对。",
        "如果我还有其他问题，可以继续向您咨询吗？",
        "除了药物，还有没有其他控制过敏的方法呢？",
        "我把化验单发给您的助手了，祝您工作顺利，再见！",
        "我自己吃了两天布洛芬，没有用。",
        "麻烦您给我开点药。",
        "我每次口服一粒，一天三次，吃了一周了。",
        "上次那位医生让我服用奥美拉唑，每日2次。",
        "I take ibuprofen twice a day, and my doctor told me to use it once daily.",
        "Do you think you need to take some blood?",
        "Should I see a specialist? What would you recommend?",
        "Have you ever seen anything like this?",
        "I have no fever, and I don't smoke. Thank you for your time, doctor.",
    ],
)
def test_what_patients_say_to_doctors_is_no_role_flip(text):
    assert speaks_as_doctor(text) is None


def test_a_latin_name_counts_as_a_whole_word():
    uti = [("urinary tract infection", "UTI")]
    said = find_faults(talk("Is it a uti?", "How long?"), diagnoses=uti)
    assert [(one.kind, one.evidence) for one in said] == [("leak", "UTI")]
    assert find_faults(talk("My routine is beautiful.", "How long?"), diagnoses=uti) == ()


def test_short_turns_may_come_again_in_english_too():
    often = talk(
        "It hurts", "a?", "No, not really.", "b?", "No, not really.", "c?", "No, not really."
    )
    assert find_faults(often) == ()


def test_a_role_flip_is_the_patients_and_told_once_with_its_turn():
    found = find_faults(talk("头疼", "多久了？", "建议您多休息。", "好", "祝您早日康复", "好"))
    assert [(one.kind, one.speaker, one.turn) for one in found] == [("role_flip", "user", 2)]
    assert found[0].evidence == "advice: 建议您"
    assert find_faults(talk("头疼", "建议您多休息，祝您早日康复。")) == ()


def test_a_diagnosis_is_leaked_where_the_patient_says_it_before_the_doctor():
    gastritis = [("慢性胃炎", "胃炎")]
    leak = find_faults(talk("胃疼", "多久了？", "会不会是胃炎啊", "是的"), diagnoses=gastritis)
    assert [(one.kind, one.turn, one.evidence) for one in leak] == [("leak", 2, "胃炎")]
    said = talk("胃疼", "考虑慢性胃炎", "慢性胃炎要吃药吗", "要")
    assert find_faults(said, diagnoses=gastritis) == ()
    short = talk("胃疼", "可能是胃炎", "慢性胃炎吗", "是")
    assert find_faults(short, diagnoses=gastritis) == (), "another wording of what was said"
    other = find_faults(said + talk("是不是癌"), diagnoses=[*gastritis, ("胃癌", "癌")])
    assert [(one.kind, one.turn) for one in other] == [("leak", 4)]


LONG = "医生我还是很担心，到底该怎么办才好"


def test_turns_that_come_again_and_again_are_a_loop():
    found = find_faults(talk(LONG, "休息", f"{LONG}？", "喝水", f"{LONG}！！", "吃药"))
    assert [(one.kind, one.speaker, one.turn) for one in found] == [("loop", "user", 4)]
    once = talk(LONG, "休息", LONG, "喝水", "那我试试吧，谢谢医生")
    assert find_faults(once) == ()
    assert [one.turn for one in find_faults(once, rules=FaultRules(repeats=1))] == [2]


def test_two_turns_by_turns_are_a_loop_and_so_is_a_doctor_who_repeats_himself():
    other = "那这个药要吃多久呢，饭前还是饭后"
    found = find_faults(talk(LONG, "一", other, "二", LONG, "三", other, "四"))
    assert [(one.kind, one.turn) for one in found] == [("loop", 6)]
    stuck = "很抱歉，作为智能助手，我无法为您提供具体的医疗建议。"
    doctor = find_faults(talk("头疼", stuck, "脚疼", stuck, "手疼", stuck))
    assert [(one.kind, one.speaker, one.turn) for one in doctor] == [("loop", "assistant", 5)]


def test_short_answers_come_again_without_a_loop_but_thanks_without_end_are_one():
    answers = talk("头疼", "发烧吗？", "没有", "咳嗽吗？", "没有", "恶心吗？", "没有", "考虑感冒")
    assert find_faults(answers) == ()
    thanks = talk("谢谢", "不客气", "谢谢", "不客气", "谢谢", "不客气", "谢谢", "不客气")
    assert {(one.kind, one.speaker) for one in find_faults(thanks)} >= {("loop", "user")}
    assert any(in_a_loop(thanks[:end], FaultRules()) for end in range(len(thanks)))
    # The first turn answers nothing, so its first repetition is none.
    assert {one.speaker for one in find_faults(thanks[:6])} == {"assistant"}


def test_empty_turns_are_found_on_either_side():
    found = find_faults(talk("头疼", " ", "\u200b", "好"))
    assert [(one.kind, one.speaker, one.turn) for one in found] == [
        ("empty", "assistant", 1),
        ("empty", "user", 2),
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"similarity": 0.0}, "similarity is 0.0"),
        ({"similarity": 1.1}, "similarity is 1.1"),
        ({"repeats": 0}, "repeats is 0"),
    ],
)
def test_rules_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        FaultRules(**fields)


def dialogues(folder: pathlib.Path):
    """Real consultations, and those with GPT-3.5 as the patient, by their source."""
    real = ("CMtMedQA_test.json", "disc_test_examples.jsonl")
    found = {name: read_dialogues(folder / "2_sft_multi_real" / name) for name in real}
    tagged = folder / "2_sft_multi_real" / "remedi_dev_human_annotation.txt"
    found["remedi"] = read_dialogues(tagged, adapter="remedi")
    whole = {name: [one.messages for one in reading] for name, reading in found.items()}
    whole = {name: [m for m in talks if len(m) > 2] for name, talks in whole.items()}
    roles = {"patient": "user", "doctor": "assistant"}
    for file in sorted((folder / "3_distilled" / "disc_dialogues").glob("*.json")):
        for row in json.loads(file.read_text(encoding="utf-8")):
            messages = [Message(roles[t["role"]], t["content"]) for t in row["conversation"]]
            whole.setdefault("disc", []).append(messages)
    return whole


def test_clean_dialogues_have_next_to_no_faults_and_doctors_in_the_patients_place_are_seen(
    shared_data,
):
    clean = flipped = num = num_doctors = seen = 0
    for name, talks in dialogues(shared_data).items():
        for messages in talks:
            faults = [one for one in find_faults(messages) if one.speaker == "user"]
            num += 1
            clean += not faults
            flipped += any(one.kind == "role_flip" for one in faults)
            if name != "remedi":  # Real doctors who write in half sentences.
                doctor = [one.content for one in messages if one.role == "assistant"]
                num_doctors += 1
                seen += any(speaks_as_doctor(text) is not None for text in doctor)
    assert num > 1800
    assert flipped == 0
    assert num - clean <= 3, "some dialogues do repeat a whole turn"
    assert seen / num_doctors > 0.9


def test_questions_of_real_patients_are_no_role_flips(shared_data):
    rows = json.loads((shared_data / "5_gen_benchmark" / "huatuo26M_test.json").read_text())
    texts = [row["instruction"][0] for row in rows]
    table = shared_data / "1_sft_single_real" / "toyhom_internal_medicine.csv"
    with table.open(encoding="gb18030", newline="") as file:
        texts += [row["ask"] for row in csv.DictReader(file)]
    flips = [text for text in texts if speaks_as_doctor(text) is not None]
    assert len(texts) == 7600
    assert len(flips) <= 2, "one quotes a friend, one asks for help"
