"""Near-duplicates found by the index are those that a loop over all pairs finds."""

import csv
import json
import random
import resource
import time

import pytest
from rapidfuzz.distance import Indel

from huatuo_jax.synthesis.near_duplicates import NearDuplicateIndex, comparable, similarity

CHINESE = "患者三天前开始咳嗽咳痰伴有发热医生建议口服阿莫西林胶囊每次两粒注意休息多饮水"
ENGLISH = "the patient has had a dry cough and a mild fever for three days, what should be done?"


def longest_common_subsequence(one, other):
    lengths = [0] * (len(other) + 1)
    for a in one:
        before = 0
        for place, b in enumerate(other, 1):
            above = lengths[place]
            lengths[place] = before + 1 if a == b else max(above, lengths[place - 1])
            before = above
    return lengths[-1]


def changed(draw, text, share):
    """A text with this share of its characters dropped, doubled or replaced."""
    out = []
    for one in text:
        lot = draw.random()
        if lot < share / 3:
            continue
        out.append(draw.choice(CHINESE + ENGLISH) if lot < 2 * share / 3 else one)
        if 2 * share / 3 <= lot < share:
            out.append(one)
    return "".join(out)


def full_width(text):
    return "".join(chr(ord(one) + 0xFEE0) if "!" <= one <= "~" else one for one in text)


def made_texts(count, seed):
    """Texts in Chinese, English, both, and full-width forms, a part of them near another."""
    draw = random.Random(seed)
    texts = []
    for _ in range(count):
        if texts and draw.random() < 0.5:
            text = changed(draw, draw.choice(texts), draw.uniform(0.0, 0.6))
        else:
            alphabet = draw.choice((CHINESE, ENGLISH, CHINESE + ENGLISH))
            text = "".join(draw.choice(alphabet) for _ in range(draw.randrange(1, 90)))
        texts.append(full_width(text) if draw.random() < 0.2 else text)
    return texts


def plain_loop(texts, threshold):
    """Which texts are kept, and what each dropped one is nearest to, by comparing every pair."""
    kept, dropped = [], {}
    plain = [comparable(text) for text in texts]
    for number, text in enumerate(plain):
        values = [(Indel.normalized_similarity(text, plain[other]), other) for other in kept]
        best = max(values, key=lambda one: one[0], default=(0.0, -1))
        if best[0] > threshold:
            dropped[number] = (str(best[1]), best[0])
        else:
            kept.append(number)
    return dropped


def indexed(texts, threshold):
    index, dropped = NearDuplicateIndex(threshold=threshold), {}
    for number, text in enumerate(texts):
        match = index.nearest(text)
        if match is None:
            index.add(str(number), text)
        else:
            dropped[number] = tuple(match)
    return dropped


def test_similarity_is_rouge_l_over_characters():
    for one, other in (("发热三天", "发热五天了"), ("abc", "acbd"), ("１４０／９０", "140/90")):
        a, b = comparable(one), comparable(other)
        expected = 2 * longest_common_subsequence(a, b) / (len(a) + len(b))
        assert similarity(one, other) == pytest.approx(expected, abs=1e-12)
    assert similarity("ＡＢＣ 发热", "abc发热") == 1.0


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_the_index_finds_what_a_loop_over_all_pairs_finds(threshold):
    texts = made_texts(700, seed=int(100 * threshold))
    expected = plain_loop(texts, threshold)
    assert 50 < len(expected) < 650
    assert indexed(texts, threshold) == expected


def test_more_texts_than_one_chunk_are_all_compared(monkeypatch):
    monkeypatch.setattr("huatuo_jax.synthesis.near_duplicates._CHUNK", 64)
    texts = made_texts(400, seed=5)
    assert indexed(texts, 0.7) == plain_loop(texts, 0.7)


def test_characters_that_share_a_bucket_hide_no_pair():
    one = "".join(chr(0x4E00 + 512 * number) for number in range(20))
    index = NearDuplicateIndex([("one", one)])
    assert index.nearest(one).similarity == 1.0
    assert index.nearest(chr(0x4E00) * 20) is None


def test_a_similarity_at_the_threshold_is_no_duplicate():
    index = NearDuplicateIndex([("one", "abcdefghij")], threshold=0.7)
    assert similarity("abcdefgxyz", "abcdefghij") == 0.7
    assert index.nearest("abcdefgxyz") is None
    assert index.nearest("abcdefghyz").name == "one"


def test_empty_texts_are_duplicates_of_each_other():
    index = NearDuplicateIndex([("empty", " \n")])
    assert index.nearest("").name == "empty"
    assert index.nearest("发热") is None


def test_a_wrong_threshold_is_refused():
    with pytest.raises(ValueError, match="threshold is 0.0; it should be above 0, at most 1"):
        NearDuplicateIndex(threshold=0.0)


def real_questions(shared_data):
    folder = shared_data / "6_exam"
    names = ("apollo_en_medmcqa", "apollo_en_mmlu-medical", "apollo_zh_cmexam")
    texts = [
        json.loads(line)["question"]
        for name in names
        for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    path = shared_data / "1_sft_single_real" / "toyhom_internal_medicine.csv"
    with path.open(encoding="gb18030", newline="") as file:
        texts += [row[2] for row in csv.reader(file)][1:]
    return texts


def test_real_questions_are_deduplicated_as_by_a_loop_over_all_pairs(shared_data):
    texts = random.Random(0).sample(real_questions(shared_data), 900)
    texts += [full_width(text) for text in texts[:50]]
    assert indexed(texts, 0.7) == plain_loop(texts, 0.7)


@pytest.mark.slow
def test_a_hundred_thousand_rows_are_deduplicated_in_minutes_and_bounded_memory(shared_data):
    draw, pool = random.Random(1), real_questions(shared_data)
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in pool]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    index, dropped, started = NearDuplicateIndex(), 0, time.process_time()
    for number in range(100_000):
        text = (draw.choice(halves)[0] + draw.choice(halves)[1])[:150]
        if index.nearest(text) is None:
            index.add(str(number), text)
        else:
            dropped += 1
    print(f"{len(index)} kept, {dropped} dropped in {time.process_time() - started:.0f} s of CPU")
    assert len(index) + dropped == 100_000 and dropped > 0
    # KiB: 1 a text for counts, and the texts.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
