"""Answers as they were sampled: when their ids are taken, and what their texts become elsewhere."""

import pytest

from huatuo_jax.data.answers import (
    AnswerToTokenize,
    Sampled,
    SampledPrompt,
    sampled_for,
    says,
    text_of,
    without_oldest,
)
from huatuo_jax.data.chat import templates
from huatuo_jax.data.records import Message, answer
from huatuo_jax.hf.tokenizer import load_tokenizer
from tests.data.test_templates import LLAMA2_JINJA, LLAMA3_JINJA, QWEN_JINJA
from tests.tiny import TOKENIZER

SPECIALS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
PROMPT = (Message("user", "咳嗽三天了，怎么办？"),)
CONTENTS = ["多喝水，注意休息。", "您好", "a b", "1. 查血\n2. 复查", "好 "]
NAMED = ["huatuogpt", "chatml", "llama2", "llama3", "baichuan"]
OWN = {"qwen": QWEN_JINJA, "llama2's": LLAMA2_JINJA, "llama3's": LLAMA3_JINJA}


@pytest.fixture(params=[*NAMED, *OWN])
def speaking(request):
    """A template with a tokenizer that can say it."""
    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
    if request.param in OWN:
        tokenizer.chat_template = OWN[request.param]
        return templates.by_name("tokenizer"), tokenizer
    return templates.by_name(request.param), tokenizer


def _trained(template, tokenizer, content):
    """The ids that a model is trained to say after the prompt, up to the end of its turn."""
    prompt = template.prompt(PROMPT, tokenizer)
    rendered = template.render([*PROMPT, *answer(content)], tokenizer)
    end = max(place for place, trained in enumerate(rendered.trained_mask) if trained) + 1
    return prompt, rendered.token_ids[len(prompt) : end]


@pytest.mark.parametrize("content", CONTENTS)
def test_what_a_template_adds_it_takes_off(speaking, content):
    template, tokenizer = speaking
    _, ids = _trained(template, tokenizer, content)
    found = template.content_of(text_of(tokenizer, ids[:-1]), tokenizer, ended=True)
    assert found.strip() == content.strip()
    # Rendered again, it is what was sampled: nothing is there twice.
    assert _trained(template, tokenizer, found)[1] == ids
    assert _trained(template, tokenizer, template.content_of(found, tokenizer, ended=True))[0]


@pytest.mark.parametrize("content", CONTENTS[:4])
def test_an_answer_that_was_cut_off_is_the_start_of_the_whole_one(speaking, content):
    template, tokenizer = speaking
    prompt, whole = _trained(template, tokenizer, content + "。以后再来")
    found = template.unfinished(PROMPT, content, tokenizer)
    assert found[: len(prompt)] == prompt
    assert not set(template.stop_token_ids(tokenizer)) & set(found[len(prompt) :])
    text = text_of(tokenizer, found[len(prompt) :])
    assert template.content_of(text, tokenizer, ended=False) == content
    # All but the last token, which may merge with what follows.
    assert whole[: len(found) - len(prompt) - 1] == found[len(prompt) : -1]


def test_ids_are_taken_where_they_are_of_this_tokenizer_template_and_text(speaking):
    template, tokenizer = speaking
    prompt, ids = _trained(template, tokenizer, "多喝水。")
    sampled = Sampled(tuple(ids), "stop")
    assert sampled_for(PROMPT, SampledPrompt(tuple(prompt)), template, tokenizer)
    assert says(AnswerToTokenize(answer("多喝水。"), sampled), template, tokenizer)
    # Edited since, or ended by a stop string, behind whose text the ids go on.
    assert not says(AnswerToTokenize(answer("少喝水。"), sampled), template, tokenizer)
    assert not says(AnswerToTokenize(answer("多喝"), sampled), template, tokenizer)
    beyond = Sampled((*ids[:-1], len(tokenizer)), "stop")
    assert not says(AnswerToTokenize(answer("多喝水。"), beyond), template, tokenizer)
    assert not sampled_for(PROMPT, SampledPrompt((*prompt, 5)), template, tokenizer)
    assert not sampled_for(PROMPT, None, template, tokenizer)


def test_ids_that_are_not_what_their_text_tokenises_to_are_taken(speaking):
    template, tokenizer = speaking
    _, ids = _trained(template, tokenizer, "好的")
    apart = [one for text in "好的" for one in tokenizer.encode(text, add_special_tokens=False)]
    assert apart != ids[: len(apart)]
    sampled = Sampled((*apart, ids[-1]), "stop")
    assert says(AnswerToTokenize(answer("好的"), sampled), template, tokenizer)
    # Half a character: its text is a replacement character, the ids are what was sampled.
    broken = tuple(tokenizer.encode("疼", add_special_tokens=False)[:1])
    if "\ufffd" in (text := text_of(tokenizer, broken)):
        sampled = Sampled(broken, "length")
        assert says(AnswerToTokenize(answer(text), sampled), template, tokenizer)


def test_the_ids_of_a_prompt_that_was_cut_fit_the_whole_prompt(speaking):
    template, tokenizer = speaking
    prompt = (*PROMPT, *answer("发烧吗？"), Message("user", "没有。"))
    ids = tuple(template.prompt(prompt[2:], tokenizer))
    assert without_oldest(prompt, 2) == prompt[2:]
    assert sampled_for(prompt, SampledPrompt(ids, 2), template, tokenizer)
    assert not sampled_for(prompt, SampledPrompt(ids, 0), template, tokenizer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_ids": [1, "2"]}, "token_ids should be a list of token ids"),
        ({"token_ids": [1, -2]}, "token_ids should be a list of token ids"),
        ({"token_ids": [True]}, "token_ids should be a list of token ids"),
        ({"token_ids": []}, "token_ids is empty"),
        ({"finish_reason": "eos"}, "finish_reason is 'eos'; it should be one of"),
    ],
)
def test_fields_that_cannot_be_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampled.from_fields(fields)


def test_the_fields_of_a_record_come_back_as_they_were():
    sampled = Sampled((3, 4), "length")
    fields = sampled.to_fields(prefix="chosen_")
    assert fields == {"chosen_token_ids": [3, 4], "chosen_finish_reason": "length"}
    assert Sampled.from_fields(fields, prefix="chosen_") == sampled
    assert Sampled.from_fields(fields) == Sampled() and Sampled().ended and not sampled.ended
    with pytest.raises(ValueError, match="messages_dropped is 3; it should be an even number"):
        SampledPrompt.from_fields({"prompt_token_ids": [1], "messages_dropped": 3})
