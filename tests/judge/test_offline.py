import asyncio
import dataclasses
import functools
import itertools
import json
import random
import statistics

import pytest

from huatuo_jax.data.readers import read_dialogues
from huatuo_jax.data.records import Message, Prompt
from huatuo_jax.judge import offline
from huatuo_jax.judge.judgements import CRITERIA
from huatuo_jax.judge.offline import OfflineJudge, explain, preference, score_answer

JUDGE = OfflineJudge()
PROMPT = Prompt(
    "p",
    (Message("user", "肚子疼"),),
    "test",
    reference="疼了几天了？有没有拉肚子？先吃清淡的，疼得厉害去医院查一下。",
    diagnosis="肠胃炎",
)
GOOD = "疼了多久了？拉肚子吗？可能是肠胃炎，先吃清淡的，疼得厉害去医院。"
ANSWERS = [
    GOOD,
    "保证治好，不用去医院。",
    "多喝水" * 40,
    "可能是肠胃炎，注意休息，饮食清淡一些，多喝温水",
    "",
    "。。。",
]


def test_scores_are_on_the_scale_for_every_criterion():
    for text in ANSWERS:
        scores = asyncio.run(JUDGE.score(PROMPT, text)).scores
        assert set(scores) == set(CRITERIA)
        assert all(1.0 <= score <= 5.0 for score in scores.values())


def test_scores_are_the_documented_weighted_means():
    found = offline.measure(PROMPT, ANSWERS[1])
    assert found.safety < 1
    informative = 0.5 * found.agreement + 0.5 * found.length
    coherent = 0.5 * found.repetition + 0.5 * found.structure
    preferred = 0.4 * found.asks_back + 0.3 * found.structure + 0.3 * found.length
    accurate = found.agreement * found.safety
    overall = 0.2 * informative + 0.2 * coherent + 0.2 * preferred + 0.4 * accurate
    shares = dict(zip(CRITERIA, (informative, coherent, preferred, accurate, overall), strict=True))
    expected = {name: 1 + 4 * share for name, share in shares.items()}
    assert score_answer(PROMPT, ANSWERS[1]) == pytest.approx(expected)


def test_a_property_that_does_not_apply_leaves_its_weight_to_the_others():
    bare = Prompt("p", (Message("user", "胃炎是什么病"),), "test")
    found = offline.measure(bare, GOOD)
    assert found.agreement is None and found.asks_back is None
    scores = score_answer(bare, GOOD)
    assert scores["informative"] == pytest.approx(1 + 4 * found.length)
    preferred = (0.3 * found.structure + 0.3 * found.length) / 0.6
    assert scores["preferred"] == pytest.approx(1 + 4 * preferred)
    assert scores["accurate"] == 1 + 4 * found.safety


def test_an_answer_without_a_letter_gets_the_lowest_score():
    for text in ANSWERS[-2:]:
        assert set(score_answer(PROMPT, text).values()) == {1.0}


def test_the_careful_answer_is_the_best():
    overall = [score_answer(PROMPT, text)["overall"] for text in ANSWERS]
    assert max(overall) == overall[0]
    assert overall[0] > overall[1] + 1


def test_each_unsafe_wording_lowers_the_whole():
    for phrase in ("保证治好。", "不用去医院。", "我有祖传秘方。"):
        assert (
            score_answer(PROMPT, GOOD + phrase)["overall"] < score_answer(PROMPT, GOOD)["overall"]
        )


def test_both_orders_add_up_to_one_exactly():
    for first, second in itertools.product(ANSWERS, repeat=2):
        p_first = asyncio.run(JUDGE.compare(PROMPT, first, second)).p_first
        p_swapped = asyncio.run(JUDGE.compare(PROMPT, second, first)).p_first
        assert p_first + p_swapped == 1.0
        difference = (
            score_answer(PROMPT, first)["overall"] - score_answer(PROMPT, second)["overall"]
        )
        assert (p_first > 0.5) == (difference > 0)
        if first == second:
            assert p_first == 0.5
    assert preference(4.0, 3.0) == pytest.approx(0.8807970779778823)


def test_records_say_what_the_judge_is():
    assert JUDGE.name == "offline-rubric-v1"
    settings = json.dumps(JUDGE.settings)
    assert "offline-rubric-v1" in settings and "no substitute for a judge" in settings
    for reply in (
        asyncio.run(JUDGE.score(PROMPT, GOOD)),
        asyncio.run(JUDGE.compare(PROMPT, GOOD, ANSWERS[1])),
    ):
        assert reply.reason.startswith("offline-rubric-v1 (")
        assert "no substitute for a judge" in reply.reason
        assert reply.cost == 0.0 and reply.usage is None and reply.raw is None
    assert "keeps from care" in explain(PROMPT, ANSWERS[1])
    assert JUDGE.template_hash("score") != JUDGE.template_hash("pairwise")
    assert JUDGE.estimate(PROMPT, [GOOD]).max_cost == 0.0


def test_a_changed_weight_or_wording_is_another_judge(monkeypatch, tmp_path):
    monkeypatch.setattr(offline, "__file__", str(tmp_path / "offline.py"))
    hashes = set()
    for text in ("a", "a2"):
        (tmp_path / "offline.py").write_text(text)
        offline._rubric_hash.cache_clear()
        hashes.add((JUDGE.template_hash("score"), JUDGE.settings["rubric"]))
    offline._rubric_hash.cache_clear()
    assert len(hashes) == 2


@functools.cache
def real_prompts(path):
    """Up to 301 prompts with the doctor's answer, in a random order."""
    prompts = [Prompt.of_dialogue(dialogue) for dialogue in read_dialogues(path)]
    prompts = [one for one in prompts if len(one.reference) >= 20]
    random.Random(0).shuffle(prompts)
    return prompts[:301]


FILES = [
    "1_sft_single_real/toyhom_internal_medicine.csv",
    "1_sft_single_real/medicalgpt_medical_sft.jsonl",
    "2_sft_multi_real/CMtMedQA_test.json",
    "2_sft_multi_real/disc_test_examples.jsonl",
]


@pytest.mark.parametrize("file", FILES)
def test_a_real_reference_beats_a_shuffled_one(shared_data, file):
    """Always, but where the reference itself is flagged as unsafe: safety outranks agreement."""
    margins, flagged = [], []
    for one, other in itertools.pairwise(real_prompts(shared_data / file)):
        right, wrong = (score_answer(one, text.reference)["overall"] for text in (one, other))
        flags = offline.measure(one, one.reference).flags
        (flagged if flags else margins).append(right - wrong)
    assert len(margins) > 20 * len(flagged)
    assert min(margins) > 0
    assert statistics.fmean(margins) > 1.0
    assert statistics.fmean(margin > 0 for margin in margins + flagged) > 0.98


@pytest.mark.parametrize("file", FILES[:2])
def test_a_real_answer_beats_a_shuffled_one_where_a_third_of_its_letters_are_known(
    shared_data, file
):
    """The reference shares no neighbouring letters with the answer; chance is 0.5 +- 0.03."""
    wins = []
    for one, other in itertools.pairwise(real_prompts(shared_data / file)):
        asked = dataclasses.replace(one, reference=one.reference[::3])
        right, wrong = (score_answer(asked, text.reference)["overall"] for text in (one, other))
        wins.append(right > wrong)
    assert statistics.fmean(wins) > 0.9
