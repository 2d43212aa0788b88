import json
import random
import tracemalloc

import pytest

from huatuo_jax.evaluation import contamination
from huatuo_jax.evaluation.contamination import find_overlaps, normalised
from huatuo_jax.evaluation.exam_sets import read_apollo, read_cmexam


def overlapping_by_a_plain_loop(tests, sources, size):
    texts = [normalised(text) for _, text in sources]
    found = set()
    for name, test in tests.items():
        test = normalised(test)
        passages = {test[start : start + size] for start in range(len(test) - size + 1)}
        if size // 4 <= len(test) < size:
            passages = {test}
        if any(passage in text for passage in passages for text in texts):
            found.add(name)
    return found


@pytest.mark.parametrize("block", [16, 64, 1 << 18])
def test_overlaps_are_those_of_a_plain_loop(monkeypatch, block):
    monkeypatch.setattr(contamination, "_BLOCK", block)
    draw = random.Random(block)
    some = 0
    for _ in range(60):
        size = draw.choice([4, 6, 9])
        tests = {
            str(number): "".join(draw.choices("甲乙 ab", k=draw.randrange(30)))
            for number in range(6)
        }
        sources = [
            (f"train:{number}", "".join(draw.choices("甲乙ab\n", k=draw.randrange(40))))
            for number in range(12)
        ]
        found = find_overlaps(tests, sources, size=size)
        assert set(found.overlaps) == overlapping_by_a_plain_loop(tests, sources, size)
        assert found.num_sources == 12
        assert found.num_checked + len(found.unchecked) == 6
        texts = {name: normalised(text) for name, text in sources}
        for name, shared in found.overlaps.items():
            some += 1
            assert len({one.source for one in shared}) == len(shared) <= 3
            for one in shared:
                assert one.passage in texts[one.source]
                assert one.passage in normalised(tests[name])
    assert some > 100


def test_the_passage_is_as_long_as_it_goes_and_width_and_white_space_do_not_matter():
    passage = "患者男，４５岁，因转移性右下腹痛伴恶心呕吐十二小时入院，体温三十八度五，" * 2
    tests = {"1": f"前文甲{passage}后文乙", "2": "不相干的另一道题" * 20, "3": "太短"}
    spaced = " ".join(passage)
    found = find_overlaps(tests, [("a.jsonl:7", f"丙{spaced}丁"), ("b:1", "无关")])
    (shared,) = found.overlaps["1"]
    assert list(found.overlaps) == ["1"] and found.unchecked == ("3",)
    assert shared.source == "a.jsonl:7" and shared.passage == normalised(passage)
    assert found.describe() == (
        "1 of 2 test texts overlap with one of 2 training texts (0 of them short, as a whole); "
        "1 are too short to tell"
    )


def test_short_questions_count_as_a_whole_and_are_told_apart():
    question = "关于急性阑尾炎的临床表现下列哪一项叙述是不正确的"
    found = find_overlaps({"1": question, "2": "甲" * 64}, [("t", f"问：{question}答" + "甲" * 70)])
    assert set(found.overlaps) == {"1", "2"} and found.short == ("1",)
    assert not find_overlaps({"1": question}, [("t", question[:-1])]).overlaps
    assert find_overlaps({"1": question[:16]}, [("t", question)]).overlaps
    assert find_overlaps({"1": question[:15]}, [("t", question)]).unchecked == ("1",)


def test_a_short_question_is_found_behind_its_own_beginning():
    question = "一二三四五六七八九十甲乙丙丁戊己庚辛"
    found = find_overlaps({"1": question}, [("t", f"{question[:17]}，{question}")])
    assert found.overlaps["1"][0].passage == question


def test_no_passage_goes_over_the_border_of_two_training_texts():
    text = "一二三四五六七八九十" * 8
    assert not find_overlaps({"1": text}, [("a", text[:40]), ("b", text[40:])]).overlaps
    assert find_overlaps({"1": text}, [("a", text[:70]), ("b", text[70:])]).overlaps


def test_every_example_is_of_another_training_text():
    text = "".join(chr(0x4E00 + place) for place in range(200))
    sources = [(f"t{number}", text * 3) for number in range(50)]
    found = find_overlaps({"1": text, "2": text[:100]}, sources, num_examples=4)
    for name in ("1", "2"):
        assert [one.source for one in found.overlaps[name]] == ["t0", "t1", "t2", "t3"]


@pytest.mark.parametrize("settings", [{"size": 3}, {"num_examples": 0}])
def test_settings_without_meaning_are_refused(settings):
    with pytest.raises(ValueError, match="should be at least"):
        find_overlaps({}, [], **settings)


def test_without_tests_or_sources_nothing_overlaps():
    assert find_overlaps({}, [("a", "x" * 100)]).num_sources == 1
    assert not find_overlaps({"1": "x" * 100}, []).overlaps
    assert not find_overlaps({"1": "x" * 100}, [("a", ""), ("b", "y")]).overlaps


def test_memory_does_not_grow_with_the_training_texts():
    tests = {str(number): f"{number}号题" * 30 for number in range(20)}

    def peak(num_sources):
        sources = ((f"t{number}", f"训练文本{number}" * 200) for number in range(num_sources))
        tracemalloc.start()
        find_overlaps(tests, sources)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(4000) < 1.2 * peak(1000)


def test_planted_real_questions_are_found_and_no_others(shared_data):
    exams = shared_data / "6_exam"
    asked = read_apollo(exams / "apollo_en_medqa-usmle.jsonl").questions[:60]
    tests = {question.id: question.text for question in asked}
    train = read_cmexam(exams / "cmexam_test_01_clinical_depart.csv").questions[:60]
    sources = [(question.id, question.text) for question in train]
    assert not find_overlaps(tests, sources).overlaps
    planted = {question.id for question in asked[::6]}
    sources += [(f"planted:{name}", f"问：{tests[name][5:]} 答：") for name in planted]
    found = find_overlaps(tests, sources)
    checked = planted - set(found.unchecked)
    by_loop = overlapping_by_a_plain_loop(tests, sources, 64)
    assert set(found.overlaps) == by_loop and by_loop >= {
        name for name in checked if len(normalised(tests[name])) > 80
    }
    named = {name: {one.source for one in found.overlaps[name]} for name in planted & by_loop}
    assert all(f"planted:{name}" in sources for name, sources in named.items())


def test_training_files_are_searched_in_any_layout(tmp_path):
    shared = "".join(chr(0x4E00 + 7 * n) for n in range(80))
    row = {"messages": [{"role": "user", "content": f"前文。{shared}后文。"}]}
    path = tmp_path / "train.jsonl"
    path.write_text(f"{json.dumps(row)}\nno json\n", encoding="utf-8")
    tests = {"exams": {"a": shared, "b": "另一道题" * 20}, "single_turn": {"a": "短"}}
    found = contamination.overlaps_with_files(tests, [path])
    assert found["num_training_texts"] == 1 and found["num_unreadable_rows"] == 1
    exams, single = found["suites"]["exams"], found["suites"]["single_turn"]
    assert exams["overlaps"] == ["a"] and exams["num"] == 2
    assert exams["examples"]["a"][0] == {"source": f"{path}:1", "passage": shared}
    assert single["overlaps"] == [] and single["num_unchecked"] == 1
