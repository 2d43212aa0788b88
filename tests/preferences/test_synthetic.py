import collections

import pytest

from huatuo_jax.data.records import Dialogue, Message, answer
from huatuo_jax.preferences.synthetic import (
    SPOILED,
    WHOLE_DIALOGUE,
    cut_short,
    mismatched_references,
    repeated,
    shuffled,
    spoiled_answers,
)

LONG = "建议多休息，少熬夜，疼得厉害再来。"


def dialogue(name, *texts):
    roles = ("user", "assistant")
    turns = tuple(Message(roles[index % 2], text) for index, text in enumerate(texts))
    return Dialogue(name, turns, None, "talk")


DIALOGUES = [
    dialogue("a", "头疼", LONG, "谢谢", "再见。"),
    dialogue("b", "咳嗽三天", "多喝水，一周不好来拍个片子。"),
    dialogue("c", "胃胀", "几天了？", "两天", "先吃清淡的，别吃撑，过两天看看。"),
]


def test_each_spoiled_form_is_what_its_name_says():
    assert cut_short("abcde") == "abc"
    assert repeated("abcdefgh") == "abababab" and repeated("abcde") == "ababa"
    mixed = shuffled(LONG)
    assert mixed != LONG and collections.Counter(mixed) == collections.Counter(LONG)
    assert mixed == shuffled(LONG)


def test_the_longest_answer_stands_against_four_forms_after_what_was_said_before_it():
    made = spoiled_answers(DIALOGUES)
    assert made == spoiled_answers(DIALOGUES[::-1])
    by_id = {one.id: one for one in made}
    assert len(by_id) == len(made) == 12
    assert {one.source for one in made} == {*SPOILED, "mismatched_reference"}
    assert by_id["a:cut_short"].messages == (Message("user", "头疼"),)
    assert by_id["a:cut_short"].chosen == answer(LONG)
    assert by_id["a:cut_short"].rejected == answer(cut_short(LONG))
    assert len(by_id["c:shuffled"].messages) == 3
    longest = {by_id[f"{name}:shuffled"].chosen for name in "abc"}
    for name in "abc":
        other = by_id[f"{name}:mismatched_reference"]
        assert other.rejected in longest - {other.chosen}
        assert len({by_id[f"{name}:{form}"].group for form in SPOILED} | {other.group}) == 1
    assert by_id["a:repeated"].extra[WHOLE_DIALOGUE] == f"头疼\n{LONG}\n谢谢\n再见。".replace(
        "，", ","
    )


def test_a_form_that_would_be_the_answer_itself_is_left_out():
    made = spoiled_answers([dialogue("x", "疼", "好"), dialogue("y", "痒", "去看看")])
    assert {one.id for one in made if one.id.startswith("x")} == {"x:mismatched_reference"}


@pytest.mark.parametrize("make", [mismatched_references, spoiled_answers])
def test_dialogues_of_one_answer_give_nothing_to_compare(make):
    with pytest.raises(ValueError, match="all have the same answer"):
        make([dialogue("x", "疼", "好的。"), dialogue("y", "痒", "好的。")])
