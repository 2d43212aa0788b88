import pytest

from huatuo_jax.data.files import Row, RowError
from huatuo_jax.data.formats.adapters import (
    ADAPTERS,
    LAST_TURNS_ONLY,
    Adapter,
    LeftOut,
    disc_scores_of,
    find_adapter,
)
from huatuo_jax.data.formats.turns import RowProblem

KEYS = ("title", "ask", "answer", "instruction", "output", "question", "option", "anwer")
KEYS += ("description", "QA_pairs", "QUESTION", "CONTEXTS", "final_decision", "prompt", "scores")


def rewrite(name, *values):
    rows = [Row("f", number, value) for number, value in enumerate(values, start=1)]
    return list(find_adapter(name).rewrite(rows))


def value(name, row):
    (out,) = rewrite(name, row)
    assert isinstance(out, Row), out
    return out.value


def turns(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def test_an_unknown_adapter_gets_the_list_of_known_ones():
    with pytest.raises(ValueError, match="adapter is 'toyhon'; it should be one of: toyhom"):
        find_adapter("toyhon")
    assert len({adapter.name for adapter in ADAPTERS}) == len(ADAPTERS)


@pytest.mark.parametrize(
    ("title", "ask", "question"),
    [
        ("头痛怎么办", "我头痛三天了。", "头痛怎么办\n我头痛三天了。"),
        ("头痛怎么办", "头痛怎么办，三天了。", "头痛怎么办，三天了。"),
        ("头痛怎么办", "无", "头痛怎么办"),
        ("无", "我头痛三天了。", "我头痛三天了。"),
        ("头痛怎么办", None, "头痛怎么办"),
        (None, "我头痛三天了。", "我头痛三天了。"),
    ],
)
def test_toyhom_asks_with_title_and_text(title, ask, question):
    row = {"department": "内科", "title": title, "ask": ask, "answer": "休息。"}
    expected = {"department": "内科", "question": question, "answer": "休息。"}
    assert value("toyhom", row) == expected


def test_huatuo_o1_trains_the_chain_of_thought_before_the_answer():
    row = {"Question": "头痛", "Complex_CoT": "先想。", "Response": "休息。", "id": 3}
    assert value("huatuo_o1", row) == {
        "id": 3,
        "Question": "头痛",
        "Response": "## Thinking\n\n先想。\n\n## Final Response\n\n休息。",
    }
    (error,) = rewrite("huatuo_o1", {"Question": "头痛", "Response": "休息。"})
    assert "this adapter needs Question, Complex_CoT, Response" in error.reason


def test_bentsao_unfolds_its_flattened_turns():
    row = {"instruction": " <user>: 头痛 <bot>: 多久？ <user>: 三天", "output": "就诊", "input": ""}
    assert value("bentsao", {**row, "id": 3}) == {
        "id": 3,
        "messages": [
            {"role": "user", "content": "头痛"},
            {"role": "bot", "content": "多久？"},
            {"role": "user", "content": "三天"},
            {"role": "assistant", "content": "就诊"},
        ],
    }
    (error,) = rewrite("bentsao", {"instruction": "头痛", "output": "就诊"})
    assert error == RowError("f", 1, "instruction does not begin with <user>:")


def test_apollo_lists_become_turns():
    assert value("apollo", ["问", "答", "又问", "又答"]) == {
        "messages": turns("问", "答", "又问", "又答")
    }


def test_apollo_leaves_huatuo_lists_to_their_own_format():
    (error,) = rewrite("apollo", ["问：头痛", "答：休息"])
    assert isinstance(error, RowError) and "needs no adapter" in error.reason


def test_apollo_exams_lose_the_misspelling_and_the_stray_quote():
    row = {"question": "q", "option": '(A) x\n(B) y\n".', "anwer": "(B)"}
    assert value("apollo_exam", row) == {
        "question": "q",
        "option": "(A) x\n(B) y",
        "answer": "(B)",
    }


def test_lists_of_one_are_unwrapped_and_longer_ones_refused():
    row = {"instruction": ["头痛"], "input": "", "output": ["休息"]}
    assert value("huatuo26m", row) == {"instruction": "头痛", "input": "", "output": "休息"}
    (error,) = rewrite("huatuo26m", {"instruction": ["a"], "output": ["b", "c"]})
    assert "lists of one text" in error.reason


def test_a_clinical_case_opens_the_dialogue_of_its_questions():
    pairs = [{"question": "诊断？", "answer": "肺炎"}, {"question": "治疗？", "answer": "休息"}]
    row = {"id": "1", "title": "t", "description": "病史", "QA_pairs": pairs}
    expected = turns("病史\n\n诊断？", "肺炎", "治疗？", "休息")
    assert value("cmb_clin", row) == {"id": "1", "title": "t", "messages": expected}


def test_pubmedqa_becomes_a_question_with_three_options():
    row = {"id": "9", "QUESTION": "Q?", "CONTEXTS": ["a.", "b."], "final_decision": "maybe"}
    assert value("pubmedqa", row) == {
        "id": "9",
        "question": "a.\nb.\nQ?",
        "options": {"A": "yes", "B": "no", "C": "maybe"},
        "answer": "C",
    }


SCORES = "Proactivity: 3\nAccuracy: 4\nHelpfulness: 4.5\nLinguistic Quality: 5"


def test_judged_dialogues_come_out_of_the_judges_prompt():
    prompt = (
        "Rate this.\n[start of conversation]\n\npatient: 头痛\n\n三天了\ndoctor: 一、休息\n二、喝水"
        "\npatient: 谢谢\ndoctor: 不客气\n[end of conversation]\n"
    )
    row = {"id": "1", "model": "m", "source": "s", "scores": SCORES, "prompt": prompt}
    names = ("patient", "doctor")
    texts = ("头痛\n\n三天了", "一、休息\n二、喝水", "谢谢", "不客气")
    assert value("disc_scores", row) == {
        "id": "1",
        "model": "m",
        "source": "s",
        "scores": {
            "Proactivity": 3.0,
            "Accuracy": 4.0,
            "Helpfulness": 4.5,
            "Linguistic Quality": 5.0,
        },
        "conversation": [{"role": names[i % 2], "content": t} for i, t in enumerate(texts)],
    }


@pytest.mark.parametrize("scores", ["", "Accuracy: high", "Accuracy: 7", "4"])
def test_scores_that_are_no_scores_are_refused(scores):
    with pytest.raises(RowProblem, match="scores are not lines of name and 1 to 5"):
        disc_scores_of({"scores": scores})


def tagged(context, asked, told, action="Inform"):
    return (
        f"<|endoftext|> <|context|> {context} <|endofcontext|> <|currentuser|> {asked}"
        f" <|endofcurrentuser|> <|intent|> x <|endofintent|> <|action|> {action} <|endofaction|>"
        f" <|response|> {told} <|endofresponse|> <|endoftext|>"
    )


def test_remedi_lines_grow_into_one_dialogue_each():
    first = "<|user|> 头痛 <|system|> 多久？"
    rows = rewrite(
        "remedi",
        tagged("", "头痛", "多久？", "Inquire"),
        tagged(first, "三天", "休息。", "Advise"),
        tagged("", "咳嗽", "多喝水。"),
        "<|context|> <|endofcontext|> <|currentuser|> 发",
        tagged("", "发烧", "就诊。"),
    )
    assert rows[0] == LeftOut(1, LAST_TURNS_ONLY)
    assert [type(row) for row in rows] == [LeftOut, Row, RowError, Row, Row]
    assert (rows[2].line, rows[2].reason) == (
        *(4, "the line lacks <|currentuser|>, <|response|> with its end (cut off?)"),
    )
    talks = {row.line: row.value for row in rows if isinstance(row, Row)}
    assert talks[2] == {
        "conversation": turns("头痛", "多久？", "三天", "休息。"),
        "annotations": [
            {"intent": "x", "action": "Inquire"},
            {"intent": "x", "action": "Advise"},
        ],
    }
    assert talks[3]["conversation"] == turns("咳嗽", "多喝水。")
    assert talks[5]["conversation"] == turns("发烧", "就诊。")


def test_a_remedi_line_that_continues_another_dialogue_begins_its_own():
    rows = rewrite(
        "remedi",
        tagged("", "头痛", "多久？"),
        tagged("<|user|> 咳嗽 <|system|> 有痰吗？", "没有", "多喝水。"),
    )
    assert [row.value["conversation"] for row in rows] == [
        turns("头痛", "多久？"),
        turns("咳嗽", "有痰吗？", "没有", "多喝水。"),
    ]


def test_errors_of_the_file_pass_through_every_adapter():
    error = RowError("f", 3, "not JSON")
    for adapter in ADAPTERS:
        assert isinstance(adapter, Adapter) and list(adapter.rewrite([error])) == [error]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
@pytest.mark.parametrize("row", [None, 3, "text", [], {}, {"a": 1}, [1, 2], dict.fromkeys(KEYS, 3)])
def test_no_row_breaks_an_adapter(adapter, row):
    for out in adapter.rewrite([Row("f", 1, row)]):
        assert isinstance(out, Row | RowError)
