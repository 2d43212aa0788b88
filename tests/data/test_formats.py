import json

import pytest

from huatuo_jax.data.formats import DIALOGUE_FORMATS, PROMPT_FORMATS, Terms, recognise
from huatuo_jax.data.records import Dialogue, Message, Prompt
from huatuo_jax.data.turns import RowProblem

TERMS = Terms(file_name="talks")
ONE = (Message("user", "头痛怎么办？"), Message("assistant", "先量体温。"))
TWO = (*ONE, Message("user", "三十八度。"), Message("assistant", "请到医院就诊。"))
WITH_SYSTEM = (Message("system", "你是医生。"), *TWO)
HUATUO = ["问：头痛怎么办？", "答：先量体温。", "问：三十八度。", "答：请到医院就诊。"]
HISTORY = [["头痛怎么办？", "先量体温。"]]


def sharegpt(messages, user="human", assistant="gpt"):
    names = {"user": user, "assistant": assistant, "system": "system"}
    return [{"from": names[m.role], "value": m.content} for m in messages]


def openai(messages, user="user", assistant="assistant"):
    names = {"user": user, "assistant": assistant, "system": "system"}
    return [{"role": names[m.role], "content": m.content} for m in messages]


# (name of the format, row, messages it must give)
DIALOGUES = [
    ("huatuo", HUATUO, TWO),
    ("huatuo", {"data": HUATUO}, TWO),
    ("huatuo", {"json_dialogue": json.dumps(HUATUO)}, TWO),
    ("huatuo", {"json_dialogue": json.dumps(HUATUO, ensure_ascii=False), "data": None}, TWO),
    ("turns", {"conversations": sharegpt(WITH_SYSTEM)}, WITH_SYSTEM),
    ("turns", {"conversation": sharegpt(TWO, "user", "assistant")}, TWO),
    ("turns", {"conversations": sharegpt(TWO), "system": "你是医生。"}, WITH_SYSTEM),
    ("turns", {"messages": openai(WITH_SYSTEM)}, WITH_SYSTEM),
    ("turns", {"conversation": openai(TWO, "patient", "doctor")}, TWO),
    ("turns", {"conversations": openai(TWO, "病人", "医生"), "messages": None}, TWO),
    ("prompt with reference", {"messages": openai(TWO[:3]), "reference": "请到医院就诊。"}, TWO),
    ("alpaca", {"instruction": "头痛怎么办？", "output": "先量体温。"}, ONE),
    ("alpaca", {"instruct": "头痛怎么办？", "output": "先量体温。"}, ONE),
    ("alpaca", {"instruction": "头痛怎么办？", "input": " ", "output": "先量体温。"}, ONE),
    ("alpaca", {"instruction": "", "input": "头痛怎么办？", "output": "先量体温。"}, ONE),
    (
        "alpaca",
        {
            "instruction": "三十八度。",
            "input": "",
            "output": "请到医院就诊。",
            "history": HISTORY,
            "system": "你是医生。",
        },
        WITH_SYSTEM,
    ),
    ("alpaca", {"instruction": "三十八度。", "output": "请到医院就诊。", "history": HISTORY}, TWO),
    ("question and answer", {"question": "头痛怎么办？", "answer": "先量体温。"}, ONE),
    ("question and answer", {"ask": "头痛怎么办？", "answer": "先量体温。"}, ONE),
    ("question and answer", {"query": "头痛怎么办？", "response": "先量体温。"}, ONE),
    ("question and answer", {"prompt": "头痛怎么办？", "completion": "先量体温。"}, ONE),
    ("question and answer", {"问题": "头痛怎么办？", "回答": "先量体温。"}, ONE),
    ("question and answer", {"input": "头痛怎么办？", "output": "先量体温。"}, ONE),
    (
        "question and answer",
        {"prompt": "三十八度。", "response": "请到医院就诊。", "history": HISTORY},
        TWO,
    ),
]


@pytest.mark.parametrize(("name", "row", "messages"), DIALOGUES)
def test_the_common_dialogue_formats_are_recognised_and_read(name, row, messages):
    found = recognise(row, DIALOGUE_FORMATS)
    assert found.name == name
    converted = found.convert(row, TERMS)
    (dialogue,) = converted.records
    assert isinstance(dialogue, Dialogue) and dialogue.messages == messages
    assert converted.repairs == () and dialogue.extra == {}
    assert dialogue.source == "talks" and dialogue.kind is None and len(dialogue.id) == 16


def test_input_stands_below_the_instruction_or_the_question():
    for row in (
        {"instruction": "翻译。", "input": "头痛", "output": "headache"},
        {"question": "翻译。", "input": "头痛", "answer": "headache"},
    ):
        (dialogue,) = recognise(row, DIALOGUE_FORMATS).convert(row, TERMS).records
        assert dialogue.messages[0].content == "翻译。\n头痛"


def convert(row, terms=TERMS, formats=DIALOGUE_FORMATS):
    return recognise(row, formats).convert(row, terms)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"a": 1, "b": 2}, r"a row with the keys a, b, no known format. Known: huatuo \(.*alpaca"),
        ({"instruction": "头痛", "output": None}, "keys instruction, no known format"),
        (["头痛", "先量体温"], "a row that is a list, not an object"),
        (3, "a row that is a int"),
        ({}, r"keys \(none\)"),
        ({"data": [1, 2]}, "turn 1 is int"),
        ({"conversations": "abc"}, "conversations is str"),
        ({"conversations": []}, "no turns"),
        ({"conversations": [], "messages": []}, "more than one list of turns"),
        ({"question": "a", "query": "b", "answer": "c"}, "more than one question: question, query"),
        ({"question": "a", "answer": "b", "response": "c"}, "more than one answer"),
        ({"instruction": ["a"], "output": "b"}, r"turn 1 \(user\) is list"),
        ({"instruction": "a", "output": ["b", "c"]}, r"turn 2 \(assistant\) is list"),
        ({"instruction": "a", "input": 3, "output": "b"}, r"turn 1 \(user\) is int"),
        ({"instruction": "a", "output": ""}, r"turn 2 \(assistant\) is empty"),
        ({"question": "a", "answer": "b", "kind": "real_conversaton"}, "did you mean 'real_conv"),
    ],
)
def test_rows_that_fit_no_format_say_what_they_have(row, said):
    with pytest.raises(RowProblem, match=said):
        convert(row)


def test_exam_questions_are_not_taken_for_questions_and_answers():
    for row in (
        {"question": "a", "answer": "A", "options": {"A": "x", "B": "y"}},
        {"question": "a", "answer": "A", "A": "x", "B": "y"},
    ):
        with pytest.raises(RowProblem, match="no known format"):
            convert(row)


def test_the_rows_own_id_source_and_kind_are_kept():
    row = {"id": 7, "source": "clinic", "kind": "real_instruction", "age": 3, "none": None}
    row |= {"question": "头痛怎么办？", "answer": "先量体温。"}
    (dialogue,) = convert(row).records
    assert (dialogue.id, dialogue.source, dialogue.kind) == ("7", "clinic", "real_instruction")
    assert dialogue.extra == {"age": 3}
    assert convert({**row, "id": None, "_id": "x1"}).records[0].id == "x1"


def test_a_given_source_and_kind_are_stronger_than_the_rows():
    terms = Terms("talks", source="mine", kind="distilled_conversation")
    row = {"source": "clinic", "kind": "real_conversation", "messages": openai(TWO)}
    (dialogue,) = convert(row, terms).records
    assert (dialogue.source, dialogue.kind) == ("mine", "distilled_conversation")
    assert dialogue.extra == {"original_source": "clinic"}


def test_an_id_is_made_of_source_and_content_where_the_row_has_none():
    ids = {
        convert({"messages": openai(TWO)}).records[0].id,
        convert(HUATUO).records[0].id,
        convert({"id": "", "age": 3, "messages": openai(TWO)}).records[0].id,
    }
    assert len(ids) == 1
    ids.add(convert(HUATUO, Terms("other")).records[0].id)
    ids.add(convert(HUATUO[:2]).records[0].id)
    assert len(ids) == 3


def test_our_own_dialogue_lines_come_back_equal():
    written = Dialogue("d1", WITH_SYSTEM, "real_conversation", "clinic", {"age": 3})
    assert convert(written.to_json(), Terms("file")).records == (written,)


@pytest.mark.parametrize(
    ("name", "row", "messages", "reference"),
    [
        ("prompt", {"messages": openai(TWO[:3])}, TWO[:3], None),
        ("prompt", {"messages": openai(TWO[:3]), "reference": "就诊"}, TWO[:3], "就诊"),
        ("instruction", {"instruction": "三十八度。", "history": HISTORY}, TWO[:3], None),
        ("instruction", {"instruction": "头痛怎么办？", "output": "休息"}, TWO[:1], "休息"),
        ("question", {"question": "头痛怎么办？"}, TWO[:1], None),
        ("question", {"question": "头痛怎么办？", "answer": "休息"}, TWO[:1], "休息"),
        ("question", {"query": "头痛怎么办？"}, TWO[:1], None),
    ],
)
def test_prompts_are_recognised_and_read(name, row, messages, reference):
    row = {**row, "diagnosis": "感冒", "label": 3}
    assert recognise(row, PROMPT_FORMATS).name == name
    (prompt,) = convert(row, formats=PROMPT_FORMATS).records
    assert isinstance(prompt, Prompt) and prompt.messages == messages
    assert (prompt.reference, prompt.diagnosis, prompt.extra) == (reference, "感冒", {"label": 3})


def test_our_own_prompt_lines_come_back_equal():
    written = Prompt("p1", TWO[:3], "clinic", "就诊", "感冒", {"kind": "real_conversation"})
    assert convert(written.to_json(), formats=PROMPT_FORMATS).records == (written,)


def test_prompts_that_do_not_end_with_the_user_are_named():
    with pytest.raises(RowProblem, match="ends with a turn of the assistant"):
        convert({"messages": openai(TWO)}, formats=PROMPT_FORMATS)
    with pytest.raises(RowProblem, match="reference is list, not text"):
        convert({"messages": openai(TWO[:1]), "reference": ["a"]}, formats=PROMPT_FORMATS)
