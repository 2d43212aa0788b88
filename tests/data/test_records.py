import dataclasses
import itertools
import json

import pytest

from huatuo_jax.data.records import (
    Case,
    Comparison,
    Dialogue,
    ExamQuestion,
    Message,
    Prompt,
    Ranking,
    answer,
    content_id,
    messages_from_json,
    unmarked,
)

ASKED = (Message("user", "孩子咳嗽三天了。"),)
ANSWERED = (*ASKED, Message("assistant", "有没有发烧？"))
RECORDS = [
    Dialogue("d1", ANSWERED, "real_conversation", "clinic", {"department": "儿科"}),
    Dialogue("d2", (Message("system", "你是医生。"), *ANSWERED), None, "clinic"),
    Prompt("p1", ASKED, "clinic", "多喝水。", "感冒", {"age": 3}),
    Prompt("p2", ASKED, "clinic"),
    Comparison("c1", ASKED, answer("好"), answer("不好"), "clinic", 0.75, 1.5, {"judge": "x"}),
    Comparison("c2", ASKED, (*ANSWERED[1:], *ANSWERED), answer("不好"), "clinic"),
    Case("k1", "咳嗽三天", "感冒", "儿科", "clinic", {"age": 3}),
    Case("k2", "咳嗽三天", "感冒", None, "clinic"),
    ExamQuestion(
        "e1", "哪些对？", {"A": "甲", "B": "乙", "C": "丙"}, "AC", "exam", "因为", {"n": 1}
    ),
    ExamQuestion("e2", "哪个对？", {"A": "甲", "B": "乙"}, "B", "exam"),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.id)
def test_a_record_comes_back_from_its_json_line(record):
    line = json.dumps(record.to_json(), ensure_ascii=False)
    assert type(record).from_json(json.loads(line)) == record


def test_json_names_the_fields_of_the_file_contract():
    assert RECORDS[0].to_json() == {
        "id": "d1",
        "messages": [
            {"role": "user", "content": "孩子咳嗽三天了。"},
            {"role": "assistant", "content": "有没有发烧？"},
        ],
        "kind": "real_conversation",
        "source": "clinic",
        "department": "儿科",
    }
    pair = RECORDS[4].to_json()
    assert (pair["chosen"], pair["rejected"], pair["p_chosen"], pair["margin"]) == (
        *("好", "不好", 0.75, 1.5),
    )
    assert isinstance(RECORDS[5].to_json()["chosen"], list)
    assert "margin" not in RECORDS[5].to_json()


def test_extra_fields_never_shadow_the_record():
    record = Dialogue("d1", ANSWERED, None, "clinic", {"id": "other", "source": "other"})
    assert record.to_json()["id"] == "d1" and record.to_json()["source"] == "clinic"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"messages": None}, "messages is a NoneType"),
        ({"messages": [{"role": "doctor", "content": "x"}]}, r"messages\[0\] has role 'doctor'"),
        ({"messages": [{"role": "user", "content": 3}]}, "a int as content"),
        ({"messages": [{"role": "user"}]}, "messages lacks 'content'"),
        ({"kind": "poem"}, "kind is 'poem'.*distilled_instruction"),
    ],
)
def test_json_that_is_no_dialogue_is_refused_with_the_field(change, said):
    with pytest.raises(ValueError, match=said):
        Dialogue.from_json({**RECORDS[0].to_json(), **change})


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="lacks 'id'; it has"):
        Prompt.from_json({"messages": []})


def test_content_ids_depend_on_source_and_content_alone():
    assert content_id("a", ANSWERED) == content_id("a", ANSWERED)
    others = {content_id("a", ANSWERED), content_id("b", ANSWERED), content_id("a", ASKED)}
    assert len(others) == 3 and all(len(one) == 16 for one in others)
    # Written down once: an id that changes with the code would orphan every label file.
    assert content_id("clinic", ASKED) == "1e91b020b134c04a"


def test_a_prompt_of_a_dialogue_keeps_the_last_answer_as_reference():
    prompt = Prompt.of_dialogue(RECORDS[0])
    assert prompt.messages == ASKED and prompt.reference == "有没有发烧？"
    assert prompt.extra == {"department": "儿科", "kind": "real_conversation"}


def test_a_prompt_of_a_dialogue_has_its_diagnosis_as_a_field():
    def prompt(diagnosis):
        extra = {"diagnosis": diagnosis, "department": "儿科"}
        return Prompt.of_dialogue(dataclasses.replace(RECORDS[0], extra=extra))

    assert prompt("普通感冒").diagnosis == "普通感冒"
    assert prompt("普通感冒").extra == {"department": "儿科", "kind": "real_conversation"}
    assert Prompt.from_json(prompt("普通感冒").to_json()) == prompt("普通感冒")
    for missing in (None, " "):
        assert prompt(missing).diagnosis is None and "diagnosis" not in prompt(missing).to_json()
    with pytest.raises(ValueError, match="diagnosis is list; it should be text"):
        prompt(["普通感冒"])


def test_a_ranking_of_k_answers_gives_all_pairs_of_one_group():
    texts = ("最好", "较好", "较差", "最差")
    ranking = Ranking("r", ASKED, tuple(answer(text) for text in texts), "clinic", (5, 4, 2, 1))
    pairs = ranking.comparisons()
    expected = [
        (texts[i], texts[j], (5, 4, 2, 1)[i] - (5, 4, 2, 1)[j])
        for i, j in itertools.product(range(4), range(4))
        if i < j
    ]
    assert [(p.chosen[0].content, p.rejected[0].content, p.margin) for p in pairs] == expected
    assert len({pair.group for pair in pairs}) == 1 and len({pair.id for pair in pairs}) == 6
    other = Comparison("x", ANSWERED, answer("好"), answer("坏"), "clinic")
    assert other.group != pairs[0].group


def test_a_ranking_gives_no_pair_of_ties_or_of_equal_answers():
    same = Ranking("r", ASKED, (answer("甲"), answer("甲"), answer("乙")), "clinic")
    assert [p.id for p in same.comparisons()] == ["r:0-2", "r:1-2"]
    tied = Ranking(
        "r", ASKED, (answer("甲"), answer("乙"), answer("丙")), "clinic", (2.0, 2.0, 1.0)
    )
    assert [p.id for p in tied.comparisons()] == ["r:0-2", "r:1-2"]


def test_scores_that_rise_are_refused():
    with pytest.raises(ValueError, match="best answer should come first"):
        Ranking("r", ASKED, (answer("甲"), answer("乙")), "clinic", (1.0, 2.0))


def test_records_refuse_values_out_of_range():
    with pytest.raises(ValueError, match="p_chosen is 1.5"):
        Comparison("c", ASKED, answer("a"), answer("b"), "s", p_chosen=1.5)
    with pytest.raises(ValueError, match="answer is 'D'; it should be letters out of 'AB'"):
        ExamQuestion("e", "?", {"A": "甲", "B": "乙"}, "D", "exam")


def test_marks_stand_in_json_as_a_weight_and_change_no_id_of_what_has_none():
    marked = (*ASKED, Message("assistant", "好", trained=False))
    dialogue = Dialogue("d", marked, None, "clinic")
    assert dialogue.to_json()["messages"][-1] == {"role": "assistant", "content": "好", "weight": 0}
    assert Dialogue.from_json(dialogue.to_json()) == dialogue
    assert content_id("a", marked) != content_id("a", unmarked(marked))
    for weight in (1, None):
        row = {"role": "assistant", "content": "好", "weight": weight}
        assert messages_from_json([row]) == (Message("assistant", "好"),)
    with pytest.raises(ValueError, match=r"messages\[0\].weight is 0.5; it should be 0 or 1"):
        messages_from_json([{"role": "assistant", "content": "好", "weight": 0.5}])


def test_an_answer_that_is_not_to_be_learned_is_no_reference():
    messages = (*ASKED, Message("assistant", "坏", trained=False))
    prompt = Prompt.of_dialogue(Dialogue("d", messages, None, "clinic", {"reference": "书"}))
    assert prompt.reference is None and prompt.messages == ASKED
    assert prompt.extra == {"original_reference": "书"}
    assert "reference" not in prompt.to_json()
