import numpy as np
import pytest

from huatuo_jax.data.chat.template import truncate
from huatuo_jax.data.chat.templates import ChatMLTemplate, HuatuoGPTTemplate
from huatuo_jax.data.records import Message
from huatuo_jax.data.tokenizing import (
    CHUNK_SIZE,
    Dropped,
    TemplateTokenizer,
    Tokens,
    tokenize_in_chunks,
    tokenizer_hash,
)


def dialogue(number, num_exchanges=1):
    return tuple(
        message
        for exchange in range(num_exchanges)
        for message in (
            Message("user", f"第{number}位病人问第{exchange}次：咳嗽怎么办？"),
            Message("assistant", f"建议多喝水，{number}天后复诊。"),
        )
    )


@pytest.fixture
def tokenizer(byte_tokenizer):
    return TemplateTokenizer(
        template=ChatMLTemplate(), tokenizer=byte_tokenizer, max_tokens=100_000
    )


def same(first, second):
    if isinstance(first, Dropped) or isinstance(second, Dropped):
        return first == second
    return all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_dialogue_becomes_what_its_template_renders(tokenizer, byte_tokenizer):
    messages = dialogue(1, num_exchanges=2)
    tokens = tokenizer(messages)
    rendered = ChatMLTemplate().render(messages, byte_tokenizer)
    assert tokens.token_ids.tolist() == rendered.token_ids
    assert tokens.trained_mask.tolist() == rendered.trained_mask
    assert tokens.token_ids.dtype == np.int32 and tokens.trained_mask.dtype == np.bool_


def test_a_long_dialogue_loses_its_oldest_turns_and_they_are_counted(byte_tokenizer):
    messages = dialogue(1, num_exchanges=4)
    whole = len(ChatMLTemplate().render(messages, byte_tokenizer).token_ids)
    tokenizer = TemplateTokenizer(
        template=ChatMLTemplate(), tokenizer=byte_tokenizer, max_tokens=whole - 1
    )
    tokens = tokenizer(messages)
    expected = truncate(
        ChatMLTemplate(),
        messages,
        byte_tokenizer,
        max_tokens=whole - 1,
        policy="drop_oldest_turns",
    )
    assert tokens.num_messages_dropped == expected.num_messages_dropped == 2
    assert tokens.token_ids.tolist() == expected.rendered.token_ids


def test_a_dialogue_that_becomes_no_example_is_dropped_with_its_reason(byte_tokenizer):
    tokenizer = TemplateTokenizer(template=ChatMLTemplate(), tokenizer=byte_tokenizer, max_tokens=5)
    assert tokenizer(dialogue(1)).reason == "too long"
    refused = tokenizer(dialogue(1)[:1])
    assert refused.reason == "cannot be rendered" and "user" in refused.detail


def test_marks_reach_the_mask_and_a_dialogue_without_a_trained_answer_is_dropped(tokenizer):
    messages = dialogue(1, num_exchanges=2)
    every = tokenizer(messages)
    marked = (messages[0], messages[1]._replace(trained=False), *messages[2:])
    tokens = tokenizer(marked)
    assert tokens.token_ids.tolist() == every.token_ids.tolist()
    assert not tokens.trained_mask[: len(tokens.trained_mask) // 2].any()
    half = len(every.trained_mask) // 2 + 1
    assert (tokens.trained_mask[half:] == every.trained_mask[half:]).all()
    assert tokens.trained_mask.any()
    dropped = tokenizer((*marked[:3], messages[3]._replace(trained=False)))
    assert dropped.reason == "nothing to train"


def test_several_processes_give_what_one_gives_in_the_same_order(tokenizer):
    dialogues = [dialogue(number) for number in range(3 * CHUNK_SIZE + 5)]
    dialogues[70] = dialogues[70][:1]
    alone, together = (
        sum(tokenize_in_chunks(dialogues, tokenizer, num_processes=num_processes), [])
        for num_processes in (1, 2)
    )
    assert len(alone) == len(together) == len(dialogues)
    assert isinstance(alone[70], Dropped)
    assert all(same(one, other) for one, other in zip(alone, together, strict=True))


def test_the_progress_ends_at_all_dialogues_and_all_tokens(tokenizer):
    dialogues = [dialogue(number) for number in range(CHUNK_SIZE + 1)]
    seen = []
    results = sum(
        tokenize_in_chunks(dialogues, tokenizer, num_processes=1, progress=seen.append), []
    )
    assert [step.num_done for step in seen] == [CHUNK_SIZE, CHUNK_SIZE + 1]
    assert seen[-1].num_dialogues == CHUNK_SIZE + 1
    assert seen[-1].num_tokens == sum(len(one.token_ids) for one in results)
    assert isinstance(results[0], Tokens) and seen[-1].seconds > 0


def test_no_process_at_all_is_refused(tokenizer):
    with pytest.raises(ValueError, match="num_processes: 0"):
        list(tokenize_in_chunks([dialogue(1)], tokenizer, num_processes=0))


def test_the_identity_follows_the_tokenizers_content_and_not_its_place(
    byte_tokenizer, tmp_path_factory
):
    copies = []
    for name in ("first", "second"):
        folder = tmp_path_factory.mktemp(name)
        byte_tokenizer.save_pretrained(folder)
        copies.append(type(byte_tokenizer).from_pretrained(folder))
    assert tokenizer_hash(copies[0]) == tokenizer_hash(copies[1])
    copies[0](["一", "一二三四"], padding=True)  # leaves padding switched on in the backend
    assert tokenizer_hash(copies[0]) == tokenizer_hash(copies[1])
    copies[1].add_tokens(["新词"])
    assert tokenizer_hash(copies[0]) != tokenizer_hash(copies[1])


def test_the_identity_follows_every_setting(byte_tokenizer):
    settings = [
        {"template": ChatMLTemplate(), "max_tokens": 64},
        {"template": ChatMLTemplate(), "max_tokens": 65},
        {"template": ChatMLTemplate(default_system="你是医生。"), "max_tokens": 64},
        {"template": HuatuoGPTTemplate(), "max_tokens": 64},
        {"template": ChatMLTemplate(), "max_tokens": 64, "policy": "drop_row"},
        {"template": ChatMLTemplate(), "max_tokens": 64, "trained": "last"},
    ]
    identities = [TemplateTokenizer(tokenizer=byte_tokenizer, **s).identity for s in settings]
    assert len(set(identities)) == len(settings)
