import pytest

from huatuo_jax.evaluation.exam_answers import extract_answer
from tests.evaluation.tricky_replies import SEVERAL, SINGLE, YES_NO, YES_NO_MAYBE


def letters(found):
    return "" if found is None else "".join(sorted(found))


@pytest.mark.parametrize(("options", "reply", "chosen"), SINGLE)
def test_tricky_replies_to_single_choice_are_read_right(options, reply, chosen):
    assert letters(extract_answer(reply, options, several=False)) == chosen


@pytest.mark.parametrize(("options", "reply", "chosen"), SEVERAL)
def test_tricky_replies_to_multiple_choice_are_read_right(options, reply, chosen):
    assert letters(extract_answer(reply, options, several=True)) == chosen


@pytest.mark.parametrize(("reply", "chosen"), YES_NO_MAYBE)
def test_yes_no_and_maybe_are_read_right(reply, chosen):
    assert letters(extract_answer(reply, YES_NO, several=False)) == "".join(sorted(chosen))
