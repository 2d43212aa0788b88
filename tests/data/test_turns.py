import pytest

from huatuo_jax.data.formats.turns import (
    EMPTY_SYSTEM,
    UNANSWERED,
    RowProblem,
    check_turns,
    dialogue_messages,
    history_turns,
    huatuo_turns,
    listed_turns,
    prompt_messages,
)
from huatuo_jax.data.records import Message, is_empty

ASK, TELL = ("user", "头痛怎么办？"), ("assistant", "先量体温。")


def checked(*turns, limit=100):
    return check_turns(turns, max_turn_chars=limit)


def test_good_turns_stand_as_they_were_written():
    turns = [
        ("system", " 你是医生 "),
        ("患者", " 头痛\n"),
        ("Doctor", "多久了？ "),
        ("human", "三天"),
    ]
    messages, repairs = checked(*turns)
    assert [message.content for message in messages] == [content for _, content in turns]
    assert [message.role for message in messages] == ["system", "user", "assistant", "user"]
    assert repairs == ()


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([], "no turns"),
        ([("system", "你好")], "no user turn"),
        ([("system", "")], "no turns"),
        ([TELL, ASK], "the dialogue starts with the assistant"),
        ([("system", "好"), TELL], "the dialogue starts with the assistant"),
        ([ASK, ASK, TELL], "turns 1 and 2 are both of the user"),
        ([ASK, TELL, TELL], "turns 2 and 3 are both of the assistant"),
        ([ASK, ("system", "好"), TELL], "turn 2 is a system turn in the middle"),
        ([ASK, ("nurse", "好")], "turn 2 has the unknown role 'nurse'"),
        ([(None, "好")], "turn 1 has the unknown role None"),
        ([ASK, ("assistant", " \n")], r"turn 2 \(assistant\) is empty"),
        ([ASK, ("assistant", None)], r"turn 2 \(assistant\) is NoneType, not text"),
        ([("user", ["好"])], r"turn 1 \(user\) is list, not text"),
        ([ASK, ("assistant", "药" * 101)], r"has 101 characters, more than max_turn_chars=100"),
        ([("user", "头\ud83d痛")], r"holds half a character \(\\ud83d\)"),
    ],
)
def test_turns_that_no_dialogue_has_are_named(turns, said):
    with pytest.raises(RowProblem, match=said):
        checked(*turns)


@pytest.mark.parametrize(
    ("text", "blank"),
    [
        ("", True),
        (" \n\u3000\u00a0\u2003\u2028", True),
        ("\u200b\u200c\u200d\u2060\ufeff\u00ad", True),
        ("\u202a\u202e\u2066\u200e", True),
        ("\x00\x07\x1b\x7f\x85", True),
        ("\u3164\u115f\u1160\uffa0\u2800", True),
        ("\u0301\ufe0f\u034f\U000e0100", True),
        ("\U000e0041\U000e007f", True),
        ("\u200b好", False),
        ("。", False),
        ("❤\ufe0f", False),
        ("0", False),
        ("\ufffd", False),
        ("\ue000", False),
    ],
)
def test_a_text_that_shows_nothing_is_empty(text, blank):
    assert is_empty(text) == blank
    if blank:
        with pytest.raises(RowProblem, match=r"turn 2 \(assistant\) is empty"):
            checked(ASK, ("assistant", text))


def test_a_five_megabyte_turn_is_reported_by_its_length_alone():
    with pytest.raises(RowProblem) as caught:
        checked(("user", "药" * 1_700_000), limit=100_000)
    assert str(caught.value) == (
        "turn 1 (user) has 1,700,000 characters, more than max_turn_chars=100,000"
    )


def test_an_empty_system_turn_is_left_out_and_counted():
    assert checked(("system", ""), ASK) == ((Message(*ASK),), (EMPTY_SYSTEM,))


def test_the_last_unanswered_turn_of_a_dialogue_is_dropped_and_counted():
    messages, repairs = dialogue_messages([ASK, TELL, ASK], max_turn_chars=100)
    assert messages == (Message(*ASK), Message(*TELL)) and repairs == (UNANSWERED,)
    with pytest.raises(RowProblem, match="no assistant turn"):
        dialogue_messages([ASK], max_turn_chars=100)


def test_a_prompt_ends_with_the_user():
    assert prompt_messages([ASK, TELL, ASK], max_turn_chars=100)[0][-1] == Message(*ASK)
    with pytest.raises(RowProblem, match="the prompt ends with a turn of the assistant"):
        prompt_messages([ASK, TELL], max_turn_chars=100)


def test_huatuo_marks_give_the_roles_and_leave_the_text():
    talk = ["问：头痛。问：是什么？", "答：先量体温 ", "问:还有呢", "答:休息"]
    expected = [
        ("user", "头痛。问：是什么？"),
        ("assistant", "先量体温 "),
        ("user", "还有呢"),
        ("assistant", "休息"),
    ]
    assert [turn[:2] for turn in huatuo_turns(talk)] == expected
    as_text = '["问：头痛。问：是什么？", "答：先量体温 "]'
    assert [turn[:2] for turn in huatuo_turns(as_text)] == expected[:2]
    for wrong, said in [
        (["问：头痛", "先量体温"], "turn 2 begins with neither"),
        (["问：头痛", 3], "turn 2 is int, not text"),
        ('["问：头', "json_dialogue is not JSON"),
        ({"a": 1}, "the dialogue is dict"),
    ]:
        with pytest.raises(RowProblem, match=said):
            huatuo_turns(wrong)


def test_lists_of_turns_and_histories_say_what_they_miss():
    with pytest.raises(RowProblem, match=r"turn 2 needs role and content.*has keys \['role'\]"):
        listed_turns([{"from": "human", "value": "a"}, {"role": "user"}], "messages")
    with pytest.raises(RowProblem, match="messages is str, not a list of turns"):
        listed_turns("hello", "messages")
    with pytest.raises(RowProblem, match=r"history\[1\] is not a pair"):
        history_turns({"history": [["a", "b"], ["c"]]})
    with pytest.raises(RowProblem, match="history is str"):
        history_turns({"history": "a"})
