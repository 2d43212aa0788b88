import json

import pytest

from huatuo_jax.data.formats import turns
from huatuo_jax.data.formats.dialogues import (
    BAD_REFERENCE,
    DIALOGUE_FORMATS,
    LABELLED_BAD,
    PROMPT_FORMATS,
    REASONING_COLUMN,
    Terms,
    recognise,
)
from huatuo_jax.data.formats.turns import RowLeftOut, RowProblem
from huatuo_jax.data.records import Dialogue, Message, Prompt

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


def columns(items):
    return {key: [item[key] for item in items] for key in items[0]}


def parts(*texts, role="user"):
    return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}


def columns_of_parts(*texts):
    return {"role": "user", "content": columns(parts(*texts)["content"])}


IN_PARTS = (Message("user", "头痛\n怎么办？"), ONE[1])


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
    # TRL's conversational rows.
    ("question and answer", {"prompt": openai(TWO[:3]), "completion": openai(TWO[3:])}, TWO),
    ("question and answer", {"prompt": openai(TWO[:3]), "completion": "请到医院就诊。"}, TWO),
    ("question and answer", {"prompt": "头痛怎么办？", "completion": openai(ONE[1:])}, ONE),
    # Lists of objects as `datasets` keeps them, as JSON text, and as pandas writes them into CSV.
    ("turns", {"conversations": columns(sharegpt(TWO))}, TWO),
    ("turns", {"messages": columns(openai(WITH_SYSTEM))}, WITH_SYSTEM),
    ("turns", {"messages": json.dumps(openai(TWO))}, TWO),
    ("turns", {"messages": str(openai(TWO))}, TWO),
    ("turns", {"conversations": json.dumps(columns(sharegpt(TWO)))}, TWO),
    ("huatuo", {"data": json.dumps(HUATUO)}, TWO),
    ("question and answer", {"prompt": json.dumps(openai(ONE[:1])), "response": "先量体温。"}, ONE),
    (
        "alpaca",
        {"instruction": "三十八度。", "output": "请到医院就诊。", "history": str(HISTORY)},
        TWO,
    ),
    (
        "alpaca",
        {"instruction": "三十八度。", "output": "请到医院就诊。", "history": openai(ONE)},
        TWO,
    ),
    # A text in parts, whole or as columns.
    ("turns", {"messages": [parts("头痛", "怎么办？"), *openai(ONE[1:])]}, IN_PARTS),
    ("turns", {"messages": [columns_of_parts("头痛", "怎么办？"), *openai(ONE[1:])]}, IN_PARTS),
    # Columns of both spellings of a turn, as tables of mixed sources have them.
    (
        "turns",
        {"messages": [{**one, "from": None, "value": None} for one in openai(TWO)]},
        TWO,
    ),
    (
        "turns",
        {"messages": [{**one, "role": None, "content": None} for one in sharegpt(TWO)]},
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


def test_answers_that_are_not_to_be_trained_are_marked_and_others_are_not():
    marked = (*TWO[:1], Message("assistant", "先量体温。", trained=False), *TWO[2:])
    for field, spelling in (("weight", 0), ("weight", 0.0), ("train", False), ("loss", False)):
        for listed, others in ((openai, {"weight": 1}), (sharegpt, {"train": True})):
            row = {"messages": listed(TWO)}
            row["messages"][1][field] = spelling
            row["messages"][3] |= others
            converted = convert(row)
            assert converted.records[0].messages == marked and converted.repairs == ()
            line = json.dumps(converted.records[0].to_json())
            assert Dialogue.from_json(json.loads(line)) == converted.records[0]
            assert convert(json.loads(line)).records[0].messages == marked
    assert (
        convert({"messages": columns([{**one, "weight": 1} for one in openai(TWO)])})
        .records[0]
        .messages
        == TWO
    )


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"weight": 0.5}, "turn 2 has weight 0.5; a turn is trained"),
        ({"train": "no"}, "turn 2 has train 'no'"),
        ({"train_detail": [{"begin_offset": 0}]}, "turn 2 has train_detail"),
        ({"tool_calls": [{"id": "1"}]}, "turn 2 has tool_calls; only text can be trained on"),
        ({"function_call": {"name": "f"}}, "turn 2 has function_call"),
        ({"content": None, "tool_calls": [{"id": "1"}]}, "turn 2 has tool_calls"),
        ({"content": [{"type": "image_url", "image_url": "u"}]}, "a part of type 'image_url'"),
        ({"content": [{"type": "text", "text": None}]}, "a part of type 'text'"),
        ({"content": []}, r"turn 2 \(assistant\) is list, not text"),
        ({"role": "tool"}, "turn 2 has the unknown role 'tool'"),
        ({"content": "\u200b\ufeff"}, r"turn 2 \(assistant\) is empty"),
    ],
)
def test_what_no_message_can_hold_refuses_its_row(turn, said):
    messages = openai(ONE)
    messages[1] |= turn
    with pytest.raises(RowProblem, match=said):
        convert({"messages": messages})


def test_what_stands_beside_a_text_is_left_out_and_counted():
    def repairs(**fields):
        messages = openai(ONE)
        messages[1] |= fields
        converted = convert({"messages": messages})
        assert converted.records[0].messages == ONE
        return converted.repairs

    assert repairs(tool_calls=[], function_call=None, name="") == ()
    assert repairs(reasoning_content="因为……") == (turns.REASONING,)
    assert repairs(name="Dr. A", thinking="……") == (turns.REASONING, turns.OTHER_FIELDS)
    row = {"messages": [{**openai(ONE)[0], "train": True}, openai(ONE)[1]]}
    assert convert(row).repairs == (turns.USER_TRAINED,)


@pytest.mark.parametrize("label", [False, "False", "false"])
@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_answers_labelled_as_bad_are_no_dialogues_to_learn_from(key, label):
    for row in (
        {"prompt": "头痛怎么办？", "completion": "不知道。"},
        {"prompt": openai(ONE[:1]), "completion": openai(ONE[1:])},
        {"messages": openai(ONE)},
        {"instruction": "头痛怎么办？", "output": "不知道。"},
    ):
        with pytest.raises(RowLeftOut) as caught:
            convert({**row, key: label})
        assert str(caught.value) == LABELLED_BAD
        good = convert({**row, key: True}).records[0]
        assert good.extra == {key: True}
        assert convert({**row, key: 0}).records[0].extra == {key: 0}  # A number is another column.


def test_an_answer_labelled_as_bad_is_no_reference_of_a_prompt():
    row = {"prompt": "头痛怎么办？", "completion": "不知道。", "label": False}
    converted = convert(row, formats=PROMPT_FORMATS)
    assert converted.records[0].reference is None and converted.repairs == (BAD_REFERENCE,)
    row = {"messages": openai(ONE[:1]), "reference": "先量体温。", "label": False}
    assert convert(row, formats=PROMPT_FORMATS).records[0].reference == "先量体温。"


def test_the_chain_of_thought_is_carried_along_and_that_is_said():
    row = {"Question": "头痛怎么办？", "Complex_CoT": "先想。", "Response": "先量体温。"}
    converted = convert(row)
    assert converted.records[0].messages == ONE
    assert converted.records[0].extra == {"Complex_CoT": "先想。"}
    assert converted.repairs == (REASONING_COLUMN,)


def test_own_columns_of_a_fields_name_are_carried_along_under_another():
    row = {"question": "头痛怎么办？", "answer": "先量体温。", "kind": "poem", "diagnosis": ["G44"]}
    converted = convert(row)
    (dialogue,) = converted.records
    assert dialogue.kind is None
    assert dialogue.extra == {"original_kind": "poem", "original_diagnosis": ["G44"]}
    assert sorted(converted.repairs) == [
        "own column 'diagnosis' carried along as 'original_diagnosis'",
        "own column 'kind' carried along as 'original_kind'",
    ]
    assert Dialogue.from_json(dialogue.to_json()) == dialogue
    assert Prompt.of_dialogue(dialogue).diagnosis is None
    row = {"question": "头痛怎么办？", "answer": "先量体温。", "conversation": "c-17"}
    assert convert(row).records[0].extra == {"conversation": "c-17"}


def test_an_empty_reference_or_diagnosis_of_a_prompt_is_none_and_counted():
    row = {"messages": openai(ONE[:1]), "reference": " ", "diagnosis": "\u200b"}
    converted = convert(row, formats=PROMPT_FORMATS)
    assert (converted.records[0].reference, converted.records[0].diagnosis) == (None, None)
    assert converted.repairs == ("empty diagnosis read as none", "empty reference read as none")


def test_text_that_looks_like_a_list_stays_text():
    for text in ("[注意] 头痛", "[1, 2]", '["a"]', "{a}", '{"a": 1}'):
        row = {"question": text, "answer": text}
        assert [one.content for one in convert(row).records[0].messages] == [text, text]


def test_columns_that_are_not_equally_long_are_named():
    row = {"conversations": {"from": ["human", "gpt"], "value": ["a"]}}
    with pytest.raises(RowProblem, match="the columns from, value are not equally long"):
        convert(row)
