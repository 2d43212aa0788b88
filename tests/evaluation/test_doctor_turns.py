"""Questions, judgement and advice of doctors: planted, and real ones labelled by hand."""

import hashlib
import json
import re

import pytest

from huatuo_jax.evaluation.diagnosis_names import diagnoses_of, names_one
from huatuo_jax.evaluation.doctor_turns import questions_before_concluding

# The first eight hexadecimal digits of the SHA-256 of sentences of real doctors, which judge or
# advise, or do neither. Sentences that could be called either way are not among them.
CONCLUDING = """
12f69722 4b19089d dc2453d2 3d5e3c3c d1d02a93 a4cb565f 481ae85a 220cff7f c9980a0c b7855fdc
ce6385d0 b2dc9a06 bcbca271 fdff4238 70f45988 99b17520 ad7c0c7f a4a27d00 ba073b4e cbc9aae7
897bce91 d871118f 58163a60 7f2eccb5 0ce3e899 7fa8fc21 821571d5 95f4043f 577bae42 6b94747e
1e4e366f e16ad803 39dc6279 15ce2c1e 2f67d8ef 568419af d0519a15 fc7d6f7e c8a6f522 e8e9fcf5
27a51a60 0ce4b178 8228ef7f 314c718f 8176a28a 9e6cbb18 0e245dbd 846e3216 bf6063f6 db843195
5e2609ef 1d46ea5a 2719fb88 019fee9a 0d118f63 ab2ad864 2a9c532d b6e61641 e167822a 1fad1239
077bc321 ce1ed1a7 63ae2de3 952310f2 90b25f4e 4a84254e 1b3ba74f 6c076292 2e29d656 60590ac4
5dc4b2d8 3f13a9c4 0a5c05f9 f5dfe58a eac85eca afb61de9 7ad7c281 00fb40c5 a1a14093 a811e711
4fa8ce05 31b1480f 5d9ed8bf dec0c3a3 92a766eb 443bdd19 e7f0e7fb 38f00a83 f1ce7111 7d9721d7
d3022408 b8bf9874 926cabeb e2ec3f2a e006690b
""".split()
OTHERS = """
89cfb66c 89507298 1173d3fe 2f99d0fd da5d92b3 e1466874 cf2f78f2 1c2089dd d30db42c ac01944f
6a899ad6 70661aa0 80b5395d 8f1779f4 81c33341 8379248a 7eed7034 084aefb1 5d4573f5 9590af5e
6afda504 83a3138c 0ab7d473 bbd6dc39 a78504f9 1728900f 3a091886
""".split()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("考虑急性胃炎。", True),
        ("可能是胃炎，也可能是溃疡", True),
        ("不排除胃炎", True),
        ("可以排除胃炎。", False),
        ("不是胃炎，是肠炎", False),
        ("胃炎的可能性不大", False),
        ("先排除心梗，再考虑胃炎", True),
        ("您是胃疼", False),
        ("This is most likely Gastritis.", True),
        ("We can't rule out gastritis.", True),
        ("I would like to rule out gastritis first.", False),
        ("It isn't gastritis, but an ulcer.", False),
        ("Gastritis is unlikely.", False),
        ("Your gastritises", True),
        ("perigastritis", False),
    ],
)
def test_a_diagnosis_that_is_ruled_out_is_not_named(text, named):
    assert names_one(text, ["急性胃炎", "胃炎", "gastritis"]) is named


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["疼了几天？\n发烧吗？"], (2, False)),
        (["为了明确诊断，我需要了解一些情况。1. 疼在哪里？2. 多久了？"], (2, False)),
        (["请描述一下疼痛的部位。", "考虑胃炎。还有什么问题吗？"], (1, True)),
        (["考虑胃炎。疼了几天？"], (0, True)),
        (["您好，请问有什么可以帮您？", "可能是吃坏了吗？"], (1, False)),
        (["建议去医院。", "疼了几天？"], (0, True)),
        (["多半是胃炎，别担心。疼了几天？"], (0, True)),
        (["尽快就诊。疼了几天？"], (0, True)),
        (["为了排除胃炎，建议您做个胃镜。疼了几天？"], (0, True)),
        (["为了给您更准确的建议，我想问几个问题。疼了几天？"], (1, False)),
        (["您好，请问疼了几天", "吃了什么药", "少吃辛辣，清淡饮食"], (2, True)),
        (["I need to ask some questions to advise you. 1. Where? 2. Since when?"], (2, False)),
        (["Please describe the pain.", "It's likely 2.5 cm. How old are you?"], (1, True)),
        (["You should see a doctor soon. How old are you?"], (0, True)),
        (["What brings you in? Do you have any other questions?"], (0, False)),
        ([""], (0, False)),
        ([], (0, False)),
    ],
)
def test_questions_count_up_to_the_first_judgement_or_advice(answers, expected):
    assert questions_before_concluding(answers) == expected


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("病情摘要及初步印象：\n急性肠炎\n总结建议：\n预防脱水症", {"急性肠炎", "肠炎", "肠胃炎"}),
        ("疾病诊断： \n外痔；结肠炎\n药品： \n栓剂，预防出血", {"外痔", "结肠炎"}),
        ("鼻窦炎引起嗅觉障碍", {"鼻窦炎", "嗅觉障碍"}),
        ("心悸待查焦虑障碍可能", {"焦虑障碍", "焦虑症"}),
        ("43岁月经失调", {"月经失调", "月经不调", "月经紊乱"}),
        ("符合扁平疣特点，考虑甲减", {"扁平疣", "甲减", "甲状腺功能减退"}),
        ("背部有2个脂肪瘤", {"脂肪瘤"}),
        ("痛风，痛经", {"痛风", "痛经"}),
        ("支气管哮喘", {"支气管哮喘", "哮喘"}),
        ("疾病诊断：\n十二指肠球部溃疡伴幽门梗阻", {"十二指肠球部溃疡", "幽门梗阻"}),
        ("考虑房间隔缺损，先兆子痫，左髋关节后脱位", {"房间隔缺损", "先兆子痫", "左髋关节后脱位"}),
        ("急性粟粒性肺结核；急性菌痢", {"粟粒性肺结核", "菌痢"}),
        ("腰椎间盘突出，脂肪肝，癫痫", {"腰椎间盘突出", "脂肪肝", "癫痫"}),
        ("甲状腺功能减退；脑卒中；阑尾周围脓肿", {"甲减", "脑卒中", "阑尾周围脓肿"}),
        ("胎盘早剥。前列腺肥大。股癣", {"胎盘早剥", "前列腺肥大", "股癣"}),
        ("病情摘要及初步印象：\n无\n总结建议：\n炎症消退后复查", set()),
        ("1. Acute myocardial infarction", {"myocardial infarction", "heart attack"}),
        ("Gastroesophageal reflux disease (GERD)", {"gastroesophageal reflux disease", "GERD"}),
        ("Type 2 diabetes mellitus with hypertension", {"diabetes", "high blood pressure"}),
        ("Community-acquired pneumonia, severe", {"pneumonia"}),
        ("Hand, foot and mouth disease", {"mouth disease"}),
        ("Follow up in a week", set()),
        ("孕8周", set()),
        ("咨询", set()),
        ("", set()),
    ],
)
def test_the_names_in_a_doctors_diagnosis_are_found(text, names):
    found = {name for wordings in diagnoses_of(text) for name in wordings}
    assert names <= found and (names or not found)


def test_aliases_of_the_users_count_too():
    found = diagnoses_of("营养不良性贫血", aliases={"营养不良性贫血": ("贫血",)})
    assert found == (("营养不良性贫血", "贫血"),)


def real_sentences(shared_data):
    """Sentences of the doctors of two sets of real consultations, by their digests."""
    folder, turns = shared_data / "2_sft_multi_real", []
    text = (folder / "remedi_dev_human_annotation.txt").read_text(encoding="utf-8")
    turns += re.findall(r"<\|response\|>(.*?)<\|endofresponse\|>", text)
    for row in json.loads((folder / "CMtMedQA_test.json").read_text(encoding="utf-8")):
        if row.get("history"):
            turns += [doctor for _, doctor in row["history"]] + [row["output"]]
    found = (
        one.strip()
        for turn in turns
        for one in re.findall(r"[^。！？!?；;\n]+[。！？!?；;]*", turn)
    )
    return {hashlib.sha256(one.encode()).hexdigest()[:8]: one for one in found}


def test_judgement_and_advice_of_real_doctors_are_found(shared_data):
    sentences = real_sentences(shared_data)
    found, wrong = (
        sum(questions_before_concluding([sentences[one]])[1] for one in ones)
        for ones in (CONCLUDING, OTHERS)
    )
    print(f"precision {found / (found + wrong):.3f}, recall {found / len(CONCLUDING):.3f}")
    assert found / (found + wrong) >= 0.94 and found / len(CONCLUDING) >= 0.77
