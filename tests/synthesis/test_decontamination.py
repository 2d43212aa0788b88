"""Texts of evaluation sets are kept out of synthetic data, by passages and by likeness."""

import json
import random

import pytest

from huatuo_jax.synthesis.decontamination import EvaluationTexts, read_test_texts


def text(length, seed):
    draw = random.Random(seed)
    return "".join(chr(draw.randrange(0x4E00, 0x9FA5)) for _ in range(length))


LONG, SHORT = text(150, 1), text(30, 2)
TESTS = EvaluationTexts({"long": LONG, "short": SHORT}, threshold=0.7)


def test_a_shared_passage_contaminates_every_row_that_has_it():
    rows = {str(number): ("提问", f"{text(50, number + 10)}{LONG[40:104]}") for number in range(9)}
    found = TESTS.contaminated(rows)
    assert {name: (one.check, one.test) for name, one in found.items()} == {
        name: ("overlap", "long") for name in rows
    }


def test_63_characters_in_common_are_no_overlap():
    assert not TESTS.contaminated({"row": ("提问", f"甲{LONG[40:103]}乙")})


def test_a_short_test_text_contaminates_as_a_whole():
    found = TESTS.contaminated({"row": ("提问", f"问：{SHORT[:10]} {SHORT[10:]}。")})
    assert found["row"].check == "overlap" and found["row"].test == "short"


def test_a_prompt_near_a_test_text_contaminates():
    near = SHORT[:12] + "某" + SHORT[13:25] + SHORT[26:]
    found = TESTS.contaminated({"row": (near, near), "other": (text(30, 5), "答")})
    assert {name: one.check for name, one in found.items()} == {"row": "near_duplicate"}
    assert found["row"].test == "short" and found["row"].detail.startswith("ROUGE-L 0.9")


def test_without_test_texts_nothing_is_contaminated():
    assert not EvaluationTexts({}, threshold=0.7).contaminated({"row": (LONG, LONG)})


def test_test_texts_are_the_strings_of_files_of_any_layout(tmp_path):
    path = tmp_path / "exam.jsonl"
    row = {"question": LONG, "options": {"A": "是", "B": SHORT}, "answer": "B"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert sorted(read_test_texts([path]).values()) == sorted([LONG, SHORT])


def test_a_broken_file_of_test_texts_is_refused_by_line(tmp_path):
    path = tmp_path / "exam.jsonl"
    path.write_text('{"question": "发热几天应当就医？"}\n{broken\n', encoding="utf-8")
    with pytest.raises(ValueError, match="exam.jsonl:2"):
        read_test_texts([path])


@pytest.mark.parametrize("content", ["[1, 2, 3]", '{"answer": "B"}\n'])
def test_a_file_without_test_texts_is_refused(tmp_path, content):
    path = tmp_path / "exam.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="exam.json: there is no text of 8 characters in it"):
        read_test_texts([path])
