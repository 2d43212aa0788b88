"""The prompts of the samples that show a model's progress."""

import numpy as np
import pytest

from huatuo_jax.data import SAMPLE_FOLDER
from huatuo_jax.data.chat import templates
from huatuo_jax.data.records import Message
from huatuo_jax.data.tokenizing import Example
from huatuo_jax.generation.samples import sample_prompt
from huatuo_jax.hf.tokenizer import load_tokenizer

TALK = [
    Message("user", "头疼怎么办？"),
    Message("assistant", "先量血压。"),
    Message("user", "谢谢。"),
    Message("assistant", "不客气。"),
]


@pytest.mark.parametrize("marks", [(True, True), (False, True), (True, False)])
def test_a_sample_asks_for_the_last_trained_answer_and_shows_that_answer_alone(marks):
    tokenizer = load_tokenizer(SAMPLE_FOLDER / "tokenizer")
    template = templates.by_name("huatuogpt")
    messages = list(TALK)
    for index, trained in zip((1, 3), marks, strict=True):
        messages[index] = messages[index]._replace(trained=trained)
    rendered = template.render(messages, tokenizer)
    example = Example(
        np.array(rendered.token_ids, np.int32), np.array(rendered.trained_mask), "unknown", "a"
    )
    found = sample_prompt(example, template, tokenizer)
    last = 3 if marks[1] else 1
    assert found.token_ids == template.prompt(messages[:last], tokenizer)
    span = [turn for turn in rendered.turns if turn.role == "assistant"][last // 2]
    assert found.reference_ids == rendered.token_ids[span.content_start : span.end]
