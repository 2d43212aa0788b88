import itertools
import json

import pytest

from huatuo_jax.data.formats.dialogues import Terms, recognise
from huatuo_jax.data.formats.preferences import (
    ALL_TIED,
    COMPARISON_FORMATS,
    EMPTY_ANSWER,
    EMPTY_CHOSEN,
    NO_PROBABILITY,
    SAME_TEXT,
    SOME_TIED,
    TOO_FEW,
)
from huatuo_jax.data.formats.turns import RowLeftOut, RowProblem
from huatuo_jax.data.records import Comparison, Message, answer

TERMS = Terms(file_name="pairs")
ASKED = (Message("user", "头痛怎么办？"),)
LATER = (*ASKED, Message("assistant", "先量体温。"), Message("user", "三十八度。"))
GOOD, BAD = "多休息，多喝水。", "不知道。"
ASK_JSON = [{"role": message.role, "content": message.content} for message in LATER]


def convert(row):
    return recognise(row, COMPARISON_FORMATS).convert(row, TERMS)


def said(text):
    return {"role": "assistant", "content": text}


PAIR = {"chosen": GOOD, "rejected": BAD}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "头痛怎么办？", **PAIR}, ASKED),
        ({"question": "头痛怎么办？", "response_chosen": GOOD, "response_rejected": BAD}, ASKED),
        ({"instruction": "头痛怎么办？", "input": "", **PAIR}, ASKED),
        ({"instruction": "头痛", "input": "三天", **PAIR}, (Message("user", "头痛\n三天"),)),
        ({"question": "三十八度。", "history": [["头痛怎么办？", "先量体温。"]], **PAIR}, LATER),
        ({"conversations": [{"from": "human", "value": "头痛怎么办？"}], **PAIR}, ASKED),
        ({"messages": ASK_JSON, **PAIR}, LATER),
        ({"prompt": ASK_JSON, "chosen": [said(GOOD)], "rejected": [said(BAD)]}, LATER),
        ({"prompt": str(ASK_JSON), "chosen": str([said(GOOD)]), "rejected": BAD}, LATER),
        ({"messages": json.dumps(ASK_JSON), **PAIR}, LATER),
        ({"messages": ASK_JSON, "chosen": said(GOOD), "rejected": said(BAD)}, LATER),
        ({"messages": ASK_JSON, "chosen": {"from": "gpt", "value": GOOD}, "rejected": BAD}, LATER),
        ({"chosen": [*ASK_JSON, said(GOOD)], "rejected": [*ASK_JSON, said(BAD)]}, LATER),
        (
            {
                "prompt": "头痛怎么办？",
                "chosen": [ASK_JSON[0], said(GOOD)],
                "rejected": [ASK_JSON[0], said(BAD)],
            },
            ASKED,
        ),
    ],
)
def test_chosen_and_rejected_are_read_in_their_common_spellings(row, prompt):
    (pair,) = convert(row).records
    assert pair.messages == prompt
    assert (pair.chosen, pair.rejected) == (answer(GOOD), answer(BAD))
    assert (pair.p_chosen, pair.margin, pair.extra, pair.source) == (1.0, None, {}, "pairs")


def test_whole_consultations_can_be_compared():
    tail = [said("多久了？"), {"role": "user", "content": "三天"}, said(GOOD)]
    (pair,) = convert({"messages": ASK_JSON, "chosen": tail, "rejected": BAD}).records
    assert [message.role for message in pair.chosen] == ["assistant", "user", "assistant"]
    assert pair.chosen_dialogue == (*LATER, *pair.chosen)
    assert pair.rejected_dialogue == (*LATER, Message("assistant", BAD))


def test_our_own_comparison_lines_come_back_equal():
    for chosen in (answer(GOOD), (*answer("多久了？"), Message("user", "三天"), *answer(GOOD))):
        written = Comparison("c", LATER, chosen, answer(BAD), "clinic", 0.7, 2.0, {"judge": "j"})
        assert convert(written.to_json()).records == (written,)


def test_a_ranked_list_gives_every_pair_best_first():
    texts = ["甲", "乙", "丙", "丁"]
    row = {"instruction": "头痛怎么办？", "input": "", "output": texts, "history": [], "id": 5}
    pairs = convert(row).records
    found = [(pair.chosen[0].content, pair.rejected[0].content) for pair in pairs]
    assert found == list(itertools.combinations(texts, 2))
    assert len({pair.group for pair in pairs}) == 1
    assert len({pair.id for pair in pairs}) == 6 and all(p.id.startswith("5:") for p in pairs)


@pytest.mark.parametrize(
    "answers",
    [
        {"answers": ["甲", "乙", "丙"], "scores": [2, 4.5, 2]},
        {"responses": [{"text": t, "score": s} for t, s in [("甲", 2), ("乙", 4.5), ("丙", 2)]]},
        {"answers": [{"text": "甲"}, {"text": "乙"}, {"text": "丙"}], "scores": [2, 4.5, 2]},
    ],
)
def test_a_scored_list_gives_the_pairs_that_differ_with_their_margins(answers):
    converted = convert({"messages": ASK_JSON, **answers})
    found = [(p.chosen[0].content, p.rejected[0].content, p.margin) for p in converted.records]
    assert found == [("乙", "甲", 2.5), ("乙", "丙", 2.5)]
    assert converted.repairs == (SOME_TIED,)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "头痛", "chosen": GOOD, "rejected": GOOD}, SAME_TEXT),
        ({"chosen": [*ASK_JSON, said(GOOD)], "rejected": [*ASK_JSON, said(GOOD)]}, SAME_TEXT),
        ({"instruction": "头痛", "output": [GOOD]}, TOO_FEW),
        ({"instruction": "头痛", "output": [GOOD, GOOD]}, ALL_TIED),
        ({"prompt": "头痛", "answers": [GOOD, BAD], "scores": [3, 3]}, ALL_TIED),
    ],
)
def test_rows_without_a_preference_are_left_out_by_name(row, reason):
    with pytest.raises(RowLeftOut, match=reason):
        convert(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "头痛", "chosen": "", "rejected": BAD}, "the better answer is empty"),
        ({"prompt": "头痛", "answers": [" ", BAD]}, "the better answer is empty"),
        ({"prompt": "头痛", "chosen": GOOD, "rejected": 3}, r"with rejected: turn 2 .* is int"),
        ({"prompt": "头痛", "chosen": GOOD}, "no known format"),
        ({"chosen": GOOD, "rejected": BAD}, "no known format"),
        ({"prompt": " ", **PAIR}, r"turn 1 \(user\) is empty"),
        ({"messages": [*ASK_JSON, said(GOOD)], **PAIR}, "the prompt ends with .* assistant"),
        ({"messages": ASK_JSON, **PAIR, "p_chosen": 2}, "p_chosen is 2"),
        ({"messages": ASK_JSON, **PAIR, "margin": float("nan")}, "margin is 'nan', not a number"),
        ({"prompt": "头痛", "answers": [GOOD, BAD], "scores": [3]}, "not lists of one length"),
        ({"prompt": "头痛", "answers": [GOOD, BAD], "scores": [3, "x"]}, "score 2 is 'x'"),
        ({"prompt": "头痛", "answers": [{}, BAD], "scores": [3, 2]}, "none of text"),
        ({"messages": ASK_JSON, "chosen": [*ASK_JSON], "rejected": BAD}, "does not end with an"),
    ],
)
def test_broken_comparisons_say_what_is_wrong(row, reason):
    with pytest.raises(RowProblem, match=reason):
        convert(row)


@pytest.mark.parametrize("empty", ["", " \n", "\u3000"])
def test_an_empty_answer_is_an_answer_and_is_counted(empty):
    worse = convert({"messages": ASK_JSON, "chosen": GOOD, "rejected": empty})
    assert worse.records[0].rejected == answer(empty) and worse.repairs == (EMPTY_ANSWER,)
    again = convert(worse.records[0].to_json())
    assert again.records == worse.records
    judged = convert({"messages": ASK_JSON, "chosen": empty, "rejected": BAD, "p_chosen": 0.6})
    assert judged.records[0].chosen == answer(empty) and judged.repairs == (EMPTY_CHOSEN,)
    scored = convert({"messages": ASK_JSON, "answers": [GOOD, empty, BAD], "scores": [3, 1, 2]})
    assert [one.rejected for one in scored.records] == [answer(BAD), answer(empty), answer(empty)]
    tail = [said("多久了？"), {"role": "user", "content": "三天"}, said(empty)]
    whole = convert({"messages": ASK_JSON, "chosen": GOOD, "rejected": tail})
    assert whole.records[0].rejected[-1].content == empty


def test_an_empty_answer_before_the_last_is_still_a_fault():
    tail = [said(""), {"role": "user", "content": "三天"}, said(BAD)]
    with pytest.raises(RowProblem, match=r"with rejected: turn 4 \(assistant\) is empty"):
        convert({"messages": ASK_JSON, "chosen": GOOD, "rejected": tail})


def test_two_empty_answers_are_no_pair():
    with pytest.raises(RowLeftOut, match=SAME_TEXT):
        convert({"messages": ASK_JSON, "chosen": "", "rejected": " \n", "p_chosen": 0.5})
    pairs = convert({"messages": ASK_JSON, "answers": [GOOD, "", "\n"], "scores": [3, 2, 1]})
    assert len(pairs.records) == 2 and SOME_TIED in pairs.repairs


def test_numbers_in_cells_of_text_are_numbers():
    (pair,) = convert({"prompt": "头痛", **PAIR, "margin": "0.5", "p_chosen": "0.75"}).records
    assert (pair.margin, pair.p_chosen) == (0.5, 0.75)
    row = {"prompt": "头痛", "answers": json.dumps([BAD, GOOD]), "scores": "[1, 2.5]"}
    (pair,) = convert(row).records
    assert (pair.chosen, pair.margin) == (answer(GOOD), 1.5)
    row = {"prompt": "头痛", "answers": {"text": [BAD, GOOD], "score": [1, "2"]}}
    (pair,) = convert(row).records
    assert (pair.chosen, pair.margin) == (answer(GOOD), 1.0)
    for wrong in ("x", "nan", "inf", "1e99", ""):
        with pytest.raises(RowProblem, match="margin is .*, not a number"):
            convert({"prompt": "头痛", **PAIR, "margin": wrong})


def test_an_absent_probability_is_one_and_that_is_counted():
    converted = convert({"prompt": "头痛", **PAIR, "p_chosen": None, "margin": None})
    assert converted.records[0].p_chosen == 1.0 and converted.repairs == (NO_PROBABILITY,)
    assert convert({"prompt": "头痛", **PAIR}).repairs == ()


def test_marks_of_what_is_trained_do_not_change_a_comparison():
    plain = convert({"messages": ASK_JSON, "chosen": [said(GOOD)], "rejected": [said(BAD)]})
    marked = [{**one, "weight": 0} for one in ASK_JSON]
    pair = {"chosen": [{**said(GOOD), "weight": 0}], "rejected": [{**said(BAD), "weight": 1}]}
    assert convert({"messages": marked, **pair}).records == plain.records
