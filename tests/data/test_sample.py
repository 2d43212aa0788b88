import collections
import itertools
import json
import os
import re
import statistics
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from huatuo_jax.data import SAMPLE_FOLDER, build_tokenizer
from huatuo_jax.data.chat.templates import HuatuoGPTTemplate
from huatuo_jax.data.records import KINDS, Case, Dialogue, ExamQuestion


def read(name):
    lines = (SAMPLE_FOLDER / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


BY_KIND = {kind: read(f"{kind}.jsonl") for kind in KINDS}
DIALOGUES = [row for rows in BY_KIND.values() for row in rows]
CASES = read("cases.jsonl")
EXAMS = read("exams.jsonl")


def doctor_turns(rows):
    return [m["content"] for row in rows for m in row["messages"] if m["role"] == "assistant"]


def texts_of(row):
    """Every text of a dialogue, a case or an exam question."""
    if "messages" in row:
        return [message["content"] for message in row["messages"]]
    if "options" in row:
        return [row["question"], row["explanation"], *row["options"].values()]
    return [row["medical_case"], row["doctor_diagnosis"], row["department"]]


ALL_TEXTS = [text for row in DIALOGUES + CASES + EXAMS for text in texts_of(row)]


def five_grams(text):
    joined = re.sub(r"\s", "", text)
    return {joined[i : i + 5] for i in range(len(joined) - 4)}


def jaccard(first, second):
    return len(first & second) / len(first | second)


# Dialogues


def test_each_kind_has_its_share_of_dialogues():
    assert all(len(rows) >= 60 for rows in BY_KIND.values())
    assert len(DIALOGUES) >= 240
    for kind, rows in BY_KIND.items():
        assert {row["kind"] for row in rows} == {kind}
        assert {row["source"] for row in rows} == {"huatuo_jax sample"}


def test_records_come_back_from_the_rows_unchanged():
    assert all(Dialogue.from_json(row).to_json() == row for row in DIALOGUES)
    for record, rows in ((Case, CASES), (ExamQuestion, EXAMS)):
        for row in rows:
            back = record.from_json({"source": "huatuo_jax sample", **row}).to_json()
            assert back == {**row, "source": "huatuo_jax sample"}


def test_ids_are_unique_over_all_files():
    ids = [row["id"] for row in DIALOGUES + CASES + EXAMS]
    assert len(set(ids)) == len(ids)


def test_patient_and_doctor_alternate_and_the_doctor_ends():
    for row in DIALOGUES:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2), row["id"]
    for kind, rows in BY_KIND.items():
        exchanges = {len(row["messages"]) // 2 for row in rows}
        assert exchanges == ({1} if "instruction" in kind else {2, 3, 4, 5}), kind


def test_no_text_is_empty_or_padded_with_space():
    assert all(text and text == text.strip() for text in ALL_TEXTS)
    assert not any(re.search(r" \n|\n |\n\n|  ", text) for text in ALL_TEXTS)


def test_no_turn_is_said_twice():
    for row in DIALOGUES:
        turns = texts_of(row)
        assert len(set(turns)) == len(turns), row["id"]
    answers = doctor_turns(DIALOGUES)
    assert len(set(answers)) == len(answers)
    openings = [row["messages"][0]["content"] for row in DIALOGUES]
    assert len(set(openings)) == len(openings)


def test_rows_are_not_near_duplicates():
    sample = "咳嗽三天，有一点白痰，没有发烧。" * 4
    assert jaccard(five_grams(sample), five_grams(sample + "头疼")) > 0.7  # It sees a near copy.
    for rows in (DIALOGUES, CASES, EXAMS):
        grams = {row["id"]: five_grams("\n".join(texts_of(row))) for row in rows}
        for first, second in itertools.combinations(grams, 2):
            assert jaccard(grams[first], grams[second]) < 0.3, (first, second)


def test_the_kinds_differ_in_length_as_they_should():
    mean = {kind: statistics.mean(map(len, doctor_turns(rows))) for kind, rows in BY_KIND.items()}
    assert 200 < mean["distilled_instruction"] < 300
    assert 40 < mean["real_instruction"] < 80
    assert 50 < mean["distilled_conversation"] < 100
    assert 15 < mean["real_conversation"] < 40
    assert all(2 <= len(text) <= 320 for text in doctor_turns(DIALOGUES))
    patients = [m["content"] for row in DIALOGUES for m in row["messages"] if m["role"] == "user"]
    assert all(2 <= len(text) <= 60 for text in patients)


def test_distilled_conversations_end_with_a_goodbye_from_both():
    for row in BY_KIND["distilled_conversation"]:
        farewell, answer = (message["content"] for message in row["messages"][-2:])
        assert "再见" in farewell and "再见" in answer, row["id"]
        assert not any("再见" in m["content"] for m in row["messages"][:-2]), row["id"]


def test_long_answers_say_when_to_see_a_doctor():
    care = re.compile("医生|医院|就诊|就医|急诊|120|[到去][^，。]{1,8}[科诊]")
    for row in BY_KIND["distilled_instruction"]:
        assert care.search(row["messages"][-1]["content"]), row["id"]
    for row in BY_KIND["distilled_conversation"]:
        assert any(care.search(text) for text in doctor_turns([row])), row["id"]


# Language


def test_texts_are_simplified_chinese_with_chinese_punctuation():
    for text in ALL_TEXTS:
        # GB 2312 holds no traditional character and no mojibake; 啰 came into the standard later.
        text.replace("啰", "").encode("gb2312")
        assert re.search("[\u4e00-\u9fff]", text) or text.isascii(), text
        # ASCII marks stand only where they belong: "1. ", 38.5, 150/100, -2.5, TI-RADS, 70%.
        rest = re.sub(r"^\d\. |-?\d+\.\d+%?|\d+/\d+|[A-Z]+-[A-Z]+\d*|\d%", "", text, flags=re.M)
        marks = re.findall(r"[^\u4e00-\u9fffA-Za-z0-9，。？！：；、“”（）\n ]", rest)
        assert not marks, (marks, text)
        assert text.count("“") == text.count("”") and text.count("（") == text.count("）")


def test_numbered_lists_count_from_one():
    for text in ALL_TEXTS:
        expected = 1
        for number in map(int, re.findall(r"^(\d+)\. ", text, flags=re.M)):
            expected = 1 if number == 1 else expected
            assert number == expected, text
            expected += 1


def test_nothing_looks_like_personal_data_or_a_dose():
    for text in ALL_TEXTS:
        assert not re.search(r"\d{6}|@|www|http|先生|女士|小姐", text), text
        assert not re.search(r"毫克|mg|微克|国际单位", text), text


# Cases and exams


def test_departments_have_five_cases_each():
    departments = collections.Counter(row["department"] for row in CASES)
    assert len(departments) >= 12 and set(departments.values()) == {5}
    assert len({row["doctor_diagnosis"] for row in CASES}) == len(CASES) >= 60


def test_cases_do_not_name_their_diagnosis():
    assert not [row for row in CASES if row["doctor_diagnosis"] in row["medical_case"]]
    assert all(60 <= len(row["medical_case"]) <= 160 for row in CASES)


def test_exam_answers_are_letters_of_their_options():
    assert len(EXAMS) >= 60
    for row in EXAMS:
        assert "".join(row["options"]) == "ABCDE", row["id"]
        assert set(row["answer"]) <= set(row["options"])
        assert row["answer"] == "".join(sorted(set(row["answer"])))
        assert len(set(row["options"].values())) == len(row["options"])


def test_exam_letters_are_balanced():
    single = collections.Counter(row["answer"] for row in EXAMS if len(row["answer"]) == 1)
    assert set(single) == set("ABCDE")
    assert max(single.values()) - min(single.values()) <= 1
    several = collections.Counter("".join(r["answer"] for r in EXAMS if len(r["answer"]) > 1))
    assert max(several.values()) <= 2 * min(several[letter] for letter in "ABCDE")


# The tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SAMPLE_FOLDER / "tokenizer")


def test_building_the_tokenizer_again_gives_the_same_files(tmp_path):
    build_tokenizer.build(SAMPLE_FOLDER, tmp_path / "here")
    # Another process with one thread: no dependence on hash seeds or the number of cores.
    command = [
        sys.executable,
        "-m",
        "huatuo_jax.data.build_tokenizer",
        SAMPLE_FOLDER,
        tmp_path / "there",
    ]
    environment = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, cwd=SAMPLE_FOLDER.parents[2])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shipped = (SAMPLE_FOLDER / "tokenizer" / name).read_bytes()
        assert (tmp_path / "here" / name).read_bytes() == shipped
        assert (tmp_path / "there" / name).read_bytes() == shipped


def test_special_tokens_are_where_the_readme_says(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == build_tokenizer.VOCAB_SIZE
    tokens = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(tokens) == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert set(tokenizer.all_special_ids) == {0, 1, 2, 3, 4}
    assert tokenizer.unk_token is None
    assert tokenizer("您好").input_ids[0] == 1
    assert 1 not in tokenizer("您好", add_special_tokens=False).input_ids


def test_every_sample_text_comes_back_from_its_tokens(tokenizer):
    encoded = tokenizer(ALL_TEXTS, add_special_tokens=False).input_ids
    assert tokenizer.batch_decode(encoded) == ALL_TEXTS
    turns = [text for row in DIALOGUES for text in texts_of(row)]
    num_tokens = sum(map(len, tokenizer(turns, add_special_tokens=False).input_ids))
    assert sum(map(len, turns)) / num_tokens > 1.3


def test_every_dialogue_fits_in_512_tokens(tokenizer):
    template = HuatuoGPTTemplate()
    for row in DIALOGUES:
        rendered = template.render(Dialogue.from_json(row).messages, tokenizer)
        assert len(rendered.token_ids) <= 512, row["id"]
