import datetime
import json
import pathlib

import datasets
import numpy as np
import pytest

from huatuo_jax.data.python_data import as_answer, as_file, as_prompt, as_prompts
from huatuo_jax.data.readers import read_dialogues, read_prompts
from huatuo_jax.data.records import Message, Prompt

ROWS = [{"question": "咳嗽三天了？", "answer": "多喝水。"}, {"question": "b", "answer": "c"}]


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def test_rows_become_a_file_named_by_their_content(tmp_path):
    path = as_file(ROWS, tmp_path, "dialogues")
    assert pathlib.Path(path).parent == tmp_path / "python_data"
    assert read(path) == ROWS
    assert as_file([dict(row) for row in ROWS], tmp_path, "dialogues") == path
    assert as_file(ROWS[::-1], tmp_path, "dialogues") != path
    assert len(list(read_dialogues(path))) == 2


def test_the_same_rows_leave_the_file_as_it_is(tmp_path):
    path = pathlib.Path(as_file(ROWS, tmp_path, "dialogues"))
    before = path.stat().st_mtime_ns
    as_file(ROWS, tmp_path, "dialogues")
    assert path.stat().st_mtime_ns == before
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_dataset_and_an_iterator_give_the_file_of_their_rows(tmp_path):
    path = as_file(ROWS, tmp_path, "dialogues")
    assert as_file(datasets.Dataset.from_list(ROWS), tmp_path, "dialogues") == path
    assert as_file((row for row in ROWS), tmp_path, "dialogues") == path


@pytest.mark.parametrize("path", ["mine.jsonl", pathlib.Path("mine.jsonl")])
def test_a_path_is_given_back_as_it_is(tmp_path, path):
    assert as_file(path, tmp_path, "dialogues") == "mine.jsonl"
    assert not list(tmp_path.iterdir())


def test_values_that_json_lacks_are_converted_and_it_is_said(tmp_path):
    lines = []
    row = {"question": "a", "seen": datetime.date(2026, 1, 2), "age": np.int64(3), "x": {1}}
    path = as_file([row, ROWS[0]], tmp_path, "rows", say=lines.append)
    assert read(path)[0] == {"question": "a", "seen": "2026-01-02", "age": 3, "x": [1]}
    assert lines == ["rows: 1 of 2 rows: seen: time written as ISO 8601 text"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"^rows is empty: it should hold at least one row$"),
        (iter([]), "rows is empty"),
        ([ROWS[0], "a"], r"^rows\[1\] is a str; a row should be a dict"),
        ([["a"]], r"^rows\[0\] is a list"),
        ([ROWS[0], {"answer": object()}], r"^rows\[1\]: answer: holds a object, which JSON cannot"),
        ([{"a": float("inf")}], r"^rows\[0\]: a: holds an infinite number"),
        (ROWS[0], "^rows is a dict; it should be a list of rows"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}), "one split of"),
        (7, "^rows is a int"),
    ],
)
def test_what_is_no_list_of_rows_is_refused_and_leaves_no_file(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        as_file(rows, tmp_path, "rows")
    assert not list(tmp_path.iterdir())


MESSAGES = [
    {"role": "system", "content": "你是医生。"},
    {"role": "user", "content": "咳嗽"},
    {"role": "assistant", "content": "几天了？"},
    {"role": "user", "content": "三天"},
]


def test_text_messages_and_rows_become_prompts():
    assert as_prompt("咳嗽").messages == (Message("user", "咳嗽"),)
    told = tuple(Message(**one) for one in MESSAGES)
    for given in (MESSAGES, told, [*MESSAGES[:2], *told[2:]], {"messages": MESSAGES}):
        assert as_prompt(given).messages == told
    assert as_prompt({"id": 7, "question": "咳嗽", "answer": "多喝水。"}) == Prompt(
        "7", (Message("user", "咳嗽"),), "python", "多喝水。"
    )


def test_a_prompt_without_an_id_has_one_of_its_text(tmp_path):
    assert as_prompt("咳嗽").id == as_prompt([Message("user", "咳嗽")]).id != as_prompt("头痛").id
    assert as_prompt({"question": "咳嗽"}).id == as_prompt("咳嗽").id
    given = Prompt("own", (Message("user", "咳嗽"),), "file")
    assert as_prompt(given) is given


def test_a_row_becomes_the_prompt_that_a_file_of_it_holds(tmp_path):
    row = {"id": "a", "messages": MESSAGES, "source": "s", "ward": 3}
    (read_prompt,) = read_prompts(as_file([row], tmp_path, "prompts"))
    assert as_prompt(row) == read_prompt


@pytest.mark.parametrize(
    ("dialogue", "message"),
    [
        ("", r"^x: turn 1 \(user\) is empty"),
        (" \u200b\n", r"^x: turn 1 \(user\) is empty"),
        ([], "^x: no turns"),
        (MESSAGES[:3], "^x: the prompt ends with a turn of the assistant, not of the user"),
        (MESSAGES[2:], "^x: the dialogue starts with the assistant"),
        ([MESSAGES[1], MESSAGES[1]], "^x: turns 1 and 2 are both of the user"),
        ([MESSAGES[1], MESSAGES[2], MESSAGES[0]], "^x: turn 3 is a system turn in the middle"),
        ([{"role": "nurse", "content": "a"}], "^x: turn 1 has the unknown role 'nurse'"),
        ([{"role": "user"}], "^x: turn 1 needs role and content"),
        ([{"role": "user", "content": 3}], r"^x: turn 1 \(user\) is int, not text"),
        (["咳嗽"], "^x: turn 1 needs role and content"),
        ({"text": "a"}, "^x: a row with the keys text, no known format"),
        ("half\ud83d", "^x: turn 1 .* holds half a character"),
        (7, "^x is a int; it should be text, a list of messages"),
        (b"a", "^x is a bytes"),
    ],
)
def test_a_dialogue_that_cannot_be_answered_is_refused(dialogue, message):
    with pytest.raises(ValueError, match=message):
        as_prompt(dialogue, name="x")


def test_several_dialogues_are_named_by_their_place():
    assert [one.messages[0].content for one in as_prompts(["a", "b"], name="x")] == ["a", "b"]
    with pytest.raises(ValueError, match=r"^x\[1\]: turn 1 \(user\) is empty"):
        as_prompts(["a", ""], name="x")
    for one in ("a", {"question": "a"}, 7):
        with pytest.raises(ValueError, match="it should be a list of dialogues"):
            as_prompts(one, name="x")


def test_a_response_is_text_and_may_be_empty():
    assert as_answer("").messages == (Message("assistant", ""),)
    with pytest.raises(ValueError, match="^response is int, not text"):
        as_answer(3)
