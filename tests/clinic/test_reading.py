"""Answers of any model are read by their terms and the cues around them."""

import pytest

from huatuo_jax.clinic.reading import asked, calls_emergency, heard, read
from huatuo_jax.clinic.world import Observation


def claimed(text, kind="disease"):
    return [
        mention.name
        for sentence in read(text)
        for mention in sentence.mentions
        if mention.kind == kind and mention.stance in ("claimed", "hedged")
    ]


@pytest.mark.parametrize(
    "text, names",
    [
        ("考虑胃溃疡。", ["胃溃疡"]),
        ("胃溃疡，去看消化科。", ["胃溃疡"]),
        ("您这个情况，多半就是胃溃疡了！", ["胃溃疡"]),
        ("诊断：２型糖尿病", ["糖尿病"]),
        ("不是胃溃疡，是胃食管反流。", ["胃食管反流"]),
        ("不是胃溃疡而是胃肠炎。", ["胃肠炎"]),
        ("是感冒而不像流感。", ["普通感冒"]),
        ("普通感冒，不是流感。", ["普通感冒"]),
        ("不考虑感冒、流感、肺炎。", []),
        ("可以排除肺炎。", []),
        ("排除肺炎。", []),
        ("肺炎可以排除，支气管炎可能性大。", ["支气管炎"]),
        ("肺炎的可能性不大，考虑支气管炎。", ["支气管炎"]),
        ("感冒、流感的可能性都不大，可能性不大。", []),
        ("拍片是为了排除肺炎。", []),
        ("要排除肺炎。", []),
        ("需要和肺炎鉴别。", []),
        ("不排除肺炎。", ["肺炎"]),
        ("肺炎待排。", ["肺炎"]),
        ("不能排除肺炎的可能。", ["肺炎"]),
        ("可能是偏头痛或紧张性头痛。", ["偏头痛", "紧张性头痛"]),
        ("如果发烧加重，可能是肺炎。", []),
        ("万一变成肺炎就麻烦了。", []),
        ("要避免发展成肺炎。", []),
        ("感冒不治会引发肺炎。", ["普通感冒"]),
        ("是不是肺炎？", []),
        ("得过肺炎吗？", []),
        ("以前得过哮喘，这次是感冒。", ["普通感冒"]),
        ("有哮喘病史，现在考虑肺炎。", ["肺炎"]),
        ("测一下流感试纸，查个尿酸。", []),
        ("多喝水，注意休息。", []),
        ("", []),
        ("。。。？？", []),
    ],
)
def test_only_what_is_claimed_counts_as_a_diagnosis(text, names):
    assert claimed(text) == names


def test_longer_names_hide_shorter_ones():
    assert claimed("急性胃肠炎") == ["胃肠炎"] and claimed("肾盂肾炎") == ["肾盂肾炎"]
    assert claimed("右上腹痛", "symptom") == ["右上腹痛"]
    assert claimed("夜尿多", "symptom") == ["夜尿多"]


@pytest.mark.parametrize(
    "text, drugs",
    [
        ("可以吃布洛芬。", ["布洛芬"]),
        ("疼得厉害的话可以用扑热息痛", ["对乙酰氨基酚"]),
        ("不能吃布洛芬，改用对乙酰氨基酚。", ["对乙酰氨基酚"]),
        ("布洛芬不能用，换成对乙酰氨基酚。", ["对乙酰氨基酚"]),
        ("别用布洛芬、阿司匹林。", []),
        ("不建议用布洛芬。", []),
        ("布洛芬慎用。", []),
        ("怀孕的话不可以吃布洛芬", []),
        ("止痛药，特别是布洛芬，效果好。", ["布洛芬"]),
        ("吃布洛芬可以吗？", []),
    ],
)
def test_only_what_is_recommended_counts_as_a_drug(text, drugs):
    assert claimed(text, "drug") == drugs


def test_tests_and_departments_that_are_not_needed_do_not_count():
    assert claimed("不用做胃镜，挂消化科查个血常规。", "test") == ["血常规"]
    assert claimed("没必要去神经内科，看骨科。", "department") == ["骨科"]


@pytest.mark.parametrize(
    "text, called",
    [
        ("马上去急诊。", True),
        ("赶紧打120", True),
        ("请您立即到医院就诊。", True),
        ("情况急,请去急诊科。", True),
        ("如果出现黑便，请马上去急诊。", False),
        ("一旦胸痛，打120。", False),
        ("不用去急诊。", False),
        ("过几天去医院看看。", False),
    ],
)
def test_a_call_for_emergency_care_counts_when_it_is_for_now(text, called):
    assert calls_emergency(text) == called


@pytest.mark.parametrize(
    "text, symptoms, topics, anything",
    [
        ("发烧吗？多久了？", ("发烧",), {"duration"}, True),
        ("有没有怕光，恶心", ("怕光", "恶心"), set(), True),
        ("几岁了？男的女的？", (), {"age", "sex"}, True),
        ("有药物过敏吗", (), {"conditions"}, True),
        ("还有什么不舒服？", (), {"more"}, True),
        ("还有什么问题吗？", (), set(), False),
        ("明白了吗？", (), set(), False),
        ("考虑感冒。", (), set(), False),
    ],
)
def test_questions_are_told_from_offers(text, symptoms, topics, anything):
    found = asked(text)
    assert (found.symptoms, found.topics, found.anything) == (symptoms, topics, anything)


def test_what_was_volunteered_is_told_from_what_was_asked():
    found = heard(
        [
            ("user", "孩子咳嗽，还有发热，3天了，怎么办？"),
            ("assistant", "痰是黄的吗？有没有气短？"),
            ("user", "没有咳黄痰。有，喘不上气。6岁，男孩。另外青霉素过敏，还鼻塞。"),
        ]
    )
    assert found == Observation(
        opening="咳嗽",
        volunteered=frozenset({"发烧", "鼻塞"}),
        confirmed=frozenset({"气短"}),
        denied=frozenset({"咳黄痰"}),
        age=6,
        child=True,
        sex="男",
        lasts="days",
        conditions=frozenset({"青霉素过敏"}),
    )


@pytest.mark.parametrize(
    "text, lasts",
    [
        ("疼2小时了", "hours"),
        ("10天了", "weeks"),
        ("半个月", "weeks"),
        ("半年了", "months"),
        ("疼半小时不停，3周了", "weeks"),
        ("头痛", None),
    ],
)
def test_durations_are_read(text, lasts):
    assert heard([("user", text)]).lasts == lasts
