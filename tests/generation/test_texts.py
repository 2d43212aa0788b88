import dataclasses

import pytest

from huatuo_jax.data.answers import text_of
from huatuo_jax.generation.requests import find_stop
from huatuo_jax.generation.streaming import GrowingText
from tests.generation import tiny


def test_the_token_that_completes_the_stop_string_is_the_last(tokenizer):
    ids = tokenizer.encode("先热敷几天。\n问：还有吗", add_special_tokens=False)
    cut = find_stop(GrowingText(tokenizer), ids, ["\n问：", "休息"], first=1)
    assert cut.text == "先热敷几天。"
    assert "\n问：" in text_of(tokenizer, ids[: cut.num_tokens])
    assert "\n问：" not in text_of(tokenizer, ids[: cut.num_tokens - 1])


def test_of_two_stop_strings_the_one_that_completes_first_counts(tokenizer):
    ids = tokenizer.encode("a b c d e", add_special_tokens=False)
    assert find_stop(GrowingText(tokenizer), ids, ["d e", "b c"], first=1).text == "a "


def test_what_was_complete_before_the_first_allowed_length_is_passed_over(tokenizer):
    ids = tokenizer.encode("x#y#z", add_special_tokens=False)
    assert len(ids) == 5
    assert find_stop(GrowingText(tokenizer), ids, ["#"], first=1).text == "x"
    assert find_stop(GrowingText(tokenizer), ids, ["#"], first=3).text == "x#y"
    assert find_stop(GrowingText(tokenizer), ids, ["#"], first=5) is None


@pytest.mark.parametrize("steps_per_round", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_a_stop_string_ends_an_answer_and_the_ids_agree(tokenizer, steps_per_round):
    cfg = tiny.config(vocab_size=len(tokenizer))
    engine = tiny.engine(
        model=type(tiny.MODEL)(cfg), tokenizer=tokenizer, steps_per_round=steps_per_round
    )
    free = tiny.request(6, seed=2, num_answers=6, max_new_tokens=60)
    (unbroken,) = engine.generate_in_order([free])
    stop = unbroken[0].text[20:22]
    sampling = dataclasses.replace(free.sampling, stop_strings=(stop,))
    (answers,) = engine.generate_in_order([dataclasses.replace(free, sampling=sampling)])
    assert answers[0].finish_reason == "stop"
    for answer, whole in zip(answers, unbroken, strict=True):
        count = len(answer.token_ids)
        assert answer.token_ids == whole.token_ids[:count]
        assert len(answer.log_probs) == count == answer.usage.completion_tokens
        if answer.finish_reason == "length":
            assert stop not in answer.text and answer.text == whole.text
        else:
            assert answer.text == whole.text[: whole.text.index(stop)]
            assert stop in text_of(tokenizer, answer.token_ids)
            assert stop not in text_of(tokenizer, answer.token_ids[:-1])
