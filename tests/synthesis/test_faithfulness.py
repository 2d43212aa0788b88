"""A polished text that says something else than the original is found, and only then."""

import random

import pytest

from huatuo_jax.data.readers import read_dialogues
from huatuo_jax.synthesis.faithfulness import diagnoses, differences, drugs, quantities
from tests.synthesis.scripted_polisher import altered_dose, faithful

SAME = {
    "Chinese numbers as Arabic ones": ("一次两片，一日三次。", "每次2片，每日3次。"),
    "units": ("20毫克，100毫升", "20mg，100 ml"),
    "full-width forms": ("血压１４０／９０", "血压140/90"),
    "ranges": ("2-3片，两三天", "2～3片，两三天"),
    "halves": ("每次半片，一个半月", "每次半片，一个半月"),
    "Latin": ("布洛芬 0.2g bid", "布洛芬，每次0.2克，每天两次"),
    "a numbered list": ("多喝水。注意休息。", "1. 多喝水。\n2. 注意休息。"),
    "an ordinal": ("先查血常规。", "第一步，先查血常规。"),
    "negation in other words": ("不能喝酒抽烟。", "请您不要喝酒抽烟。"),
    "courtesy": ("考虑慢性胃炎。", "您好，考虑慢性胃炎，不用担心，祝您一天比一天好。"),
    "a short name behind other words": ("考虑痔疮。", "您好，这应该是痔疮。"),
    "a rash": ("起红疹就停药。", "出现皮疹就停药。"),
    "a drug by the name in use": ("口服扑热息痛。", "可以口服对乙酰氨基酚。"),
    "English": ("Take two tablets twice a day.", "Please take 2 tablets, 2 times each day."),
}
OTHER = {
    "number lost": ("连用7天。", "连用几天。"),
    "number added": ("口服。", "口服，每次2片。"),
    "number moved": ("早上2片，晚上3片。", "早上3片，晚上2片。"),
    "drug lost": ("口服阿莫西林。", "口服抗生素。"),
    "drug added": ("多喝水。", "多喝水，可以吃头孢克肟。"),
    "negation lost": ("千万不能吃辛辣食物。", "可以吃辛辣食物。"),
    "negation lost ": ("不要久坐不动", "可以久坐不动"),
    "negation added": ("可以适当运动锻炼。", "不可以适当运动锻炼。"),
    "diagnosis lost": ("考虑慢性胃炎。", "考虑胃不舒服。"),
    "diagnosis added": ("要做胃镜。", "要做胃镜，排除胃癌。"),
}


@pytest.mark.parametrize("case", SAME)
def test_the_same_in_other_words_is_faithful(case):
    assert differences(*SAME[case]) == []


@pytest.mark.parametrize("kind", OTHER)
def test_each_difference_is_found(kind):
    assert [one.kind for one in differences(*OTHER[kind])] == [kind.strip()]


def test_a_dose_that_is_there_twice_must_stay_twice():
    found = differences("早2片，晚3片，睡前2片", "早2片，晚3片，睡前3片")
    assert [(one.kind, one.detail) for one in found] == [("number lost", "2片")]


def test_numbers_are_read_with_their_units():
    found = quantities("一次十五毫克，每日两到三次，体温38.5℃，血压140/90mmHg，一般3-5天")
    assert {str(one): count for one, count in found.items()} == {
        "15mg": 1,
        "2次": 1,
        "3次": 1,
        "38.5度": 1,
        "90mmhg": 1,
        "140": 1,
        "3天": 1,
        "5天": 1,
    }


def test_drugs_and_diagnoses_are_found_by_name_and_by_form():
    assert drugs("口服阿莫西林胶囊和氨氯地平片") >= {"莫西林", "氯地平"}
    assert diagnoses("慢性胃炎伴胃溃疡，有高血压，已消炎") == {"胃炎", "胃溃疡", "高血压"}


FILES = (
    "1_sft_single_real/toyhom_internal_medicine.csv",
    "1_sft_single_real/medicalgpt_medical_sft.jsonl",
    "2_sft_multi_real/CMtMedQA_test.json",
    "2_sft_multi_real/disc_test_examples.jsonl",
)


def test_altered_doses_of_real_answers_are_found_and_faithful_ones_are_kept(shared_data):
    """A dose is altered in one of ten answers, of those that have one."""
    draw, total = random.Random(0), [0, 0, 0, 0]
    for name in FILES:
        texts = [
            message.content
            for one in read_dialogues(shared_data / name)
            for message in one.messages
            if message.role == "assistant"
        ]
        counts = [0, 0, 0, 0]  # Altered, of them found, faithful, of them called unfaithful.
        for text in texts[:2_000]:
            altered = altered_dose(text, draw) if draw.random() < 0.1 else None
            source = text if altered is None else altered
            bad = bool(differences(text, faithful(source, draw)))
            counts[0 if altered is not None else 2] += 1
            counts[1 if altered is not None else 3] += bad
        print(f"{name}: {counts[1]} of {counts[0]} altered found, {counts[3]} of {counts[2]} wrong")
        total = [one + other for one, other in zip(total, counts, strict=True)]
        assert counts[3] <= 0.02 * counts[2]
    assert total[0] > 30 and total[1] == total[0]
    assert total[3] <= 0.02 * total[2]


@pytest.mark.slow
def test_every_altered_dose_of_all_real_answers_is_found(shared_data):
    draw, altered = random.Random(1), 0
    for name in FILES:
        for one in read_dialogues(shared_data / name):
            for message in one.messages:
                if message.role != "assistant":
                    continue
                spoiled = altered_dose(message.content, draw)
                if spoiled is not None:
                    altered += 1
                    assert differences(message.content, faithful(spoiled, draw)), spoiled
    print(f"{altered} altered doses, all found")
    assert altered > 700
