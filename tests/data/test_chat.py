"""What every template does: order of turns, which turns are trained, truncation, real dialogues."""

import itertools
import json
import random

import pytest
from transformers import AutoTokenizer

from huatuo_jax.data.chat.template import NothingToTrain, cut_apart, truncate
from huatuo_jax.data.chat.templates import (
    HUATUOGPT_SYSTEM,
    ChatMLTemplate,
    HuatuoGPTTemplate,
    Llama2Template,
    Llama3Template,
)
from huatuo_jax.data.records import Message

SYSTEM = Message("system", "你是医生。")


def dialogue(num_exchanges: int, *, length: int = 3) -> list[Message]:
    messages = []
    for number in range(num_exchanges):
        messages.append(Message("user", f"第{number}问：" + "头痛" * length))
        messages.append(Message("assistant", f"第{number}答：" + "多喝水" * length))
    return messages


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ([], "no turn"),
        (["system"], "no turn"),
        (["assistant"], r"messages\[0\].role: 'assistant', but 'user' is due"),
        (["user", "user", "assistant"], r"messages\[1\].role: 'user', but 'assistant' is due"),
        (["system", "user", "system"], r"messages\[2\].role: 'system', but 'assistant' is due"),
        (["user", "assistant", "user"], r"messages\[-1\].role: 'user'; it has to be 'assistant'"),
    ],
)
def test_a_dialogue_out_of_order_is_refused(byte_tokenizer, roles, message):
    with pytest.raises(ValueError, match=message):
        HuatuoGPTTemplate().render([Message(role, "甲") for role in roles], byte_tokenizer)


def test_a_prompt_has_to_end_with_the_patient(byte_tokenizer):
    with pytest.raises(ValueError, match="has to be 'user'"):
        ChatMLTemplate().prompt(dialogue(1), byte_tokenizer)


def test_only_the_last_answer_is_trained_when_asked(byte_tokenizer):
    template = ChatMLTemplate()
    every = template.render(dialogue(3), byte_tokenizer)
    last = template.render(dialogue(3), byte_tokenizer, trained="last")
    assert last.token_ids == every.token_ids and last.turns == every.turns
    start = every.turns[-1].start
    assert not any(last.trained_mask[:start]) and any(every.trained_mask[:start])
    assert last.trained_mask[start:] == every.trained_mask[start:]
    with pytest.raises(ValueError, match="trained: 'first' is not one of"):
        template.render(dialogue(1), byte_tokenizer, trained="first")


@pytest.mark.parametrize("template", [HuatuoGPTTemplate(), ChatMLTemplate(), Llama3Template()])
def test_an_answer_that_is_marked_as_not_to_be_trained_is_not(byte_tokenizer, template):
    messages = [SYSTEM, *dialogue(4)]
    every = template.render(messages, byte_tokenizer)
    spans = [turn for turn in every.turns if turn.role == "assistant"]
    for marked in itertools.product([True, False], repeat=4):
        if not any(marked):
            continue
        answers = iter(marked)
        some = [
            one._replace(trained=next(answers)) if one.role == "assistant" else one
            for one in messages
        ]
        rendered = template.render(some, byte_tokenizer)
        expected = list(every.trained_mask)
        for span, trained in zip(spans, marked, strict=True):
            if not trained:
                expected[span.start : span.end] = [False] * (span.end - span.start)
        assert rendered == (every.token_ids, expected, every.turns)
    none = [one._replace(trained=False) for one in messages]
    with pytest.raises(NothingToTrain, match="would train no token"):
        template.render(none, byte_tokenizer)
    last = [*messages[:-1], messages[-1]._replace(trained=False)]
    with pytest.raises(NothingToTrain):
        template.render(last, byte_tokenizer, trained="last")


def test_truncation_drops_a_dialogue_whose_trained_answers_went_with_its_oldest_turns(
    byte_tokenizer,
):
    template = ChatMLTemplate()
    messages = dialogue(4)
    for number, trained_left in ((1, False), (7, True)):
        marked = [
            one._replace(trained=index == number) if one.role == "assistant" else one
            for index, one in enumerate(messages)
        ]
        limit = len(template.render(messages[4:], byte_tokenizer).token_ids)
        truncated = truncate(
            template, marked, byte_tokenizer, max_tokens=limit, policy="drop_oldest_turns"
        )
        if trained_left:
            assert truncated == (template.render(marked[4:], byte_tokenizer), 4)
        else:
            assert truncated == (None, 8)


def test_a_template_that_trains_no_token_is_an_error(byte_tokenizer):
    class Mute(ChatMLTemplate):
        def _answer(self, content, tokenizer):
            return tuple(
                piece._replace(trained=False) for piece in super()._answer(content, tokenizer)
            )

    with pytest.raises(ValueError, match="would train no token"):
        Mute().render(dialogue(2), byte_tokenizer)


def test_texts_are_cut_at_every_special_token():
    strings = frozenset(["</s>", "<s>", "<|im_end|>"])
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(
            draw.choice(["<", "/s>", "s>", "</s>", "<s>", "<|im_end|>", "a"]) for _ in range(9)
        )
        chunks = cut_apart(text, strings)
        assert "".join(chunks) == text
        assert not any(string in chunk for chunk in chunks for string in strings)
        if not any(string in text for string in strings):
            assert chunks == [text]


@pytest.mark.parametrize("template", [HuatuoGPTTemplate(), ChatMLTemplate()])
def test_truncation_drops_the_oldest_exchanges_until_it_fits(byte_tokenizer, template):
    messages = [SYSTEM, *dialogue(5)]
    num_tokens = [
        len(template.render([SYSTEM, *messages[start:]], byte_tokenizer).token_ids)
        for start in (1, 3, 5, 7, 9)
    ]
    for max_tokens in range(min(num_tokens) - 2, max(num_tokens) + 2):
        fitting = [index for index, num in enumerate(num_tokens) if num <= max_tokens]
        truncated = truncate(
            template,
            messages,
            byte_tokenizer,
            max_tokens=max_tokens,
            policy="drop_oldest_turns",
        )
        if not fitting:
            assert truncated == (None, len(messages))
            continue
        kept = [SYSTEM, *messages[1 + 2 * fitting[0] :]]
        assert truncated.num_messages_dropped == 2 * fitting[0] == len(messages) - len(kept)
        assert truncated.rendered == template.render(kept, byte_tokenizer)
        assert (
            truncated.rendered.token_ids[-1] == template.render(kept, byte_tokenizer).token_ids[-1]
        )


def test_truncation_keeps_the_system_text_inside_llama2s_first_question(llama_tokenizer):
    messages = [SYSTEM, *dialogue(4)]
    kept = [SYSTEM, *messages[5:]]
    max_tokens = len(Llama2Template().render(kept, llama_tokenizer).token_ids)
    truncated = truncate(
        Llama2Template(),
        messages,
        llama_tokenizer,
        max_tokens=max_tokens,
        policy="drop_oldest_turns",
    )
    assert truncated.num_messages_dropped == 4
    assert "你是医生。" in llama_tokenizer.decode(truncated.rendered.token_ids)


def test_truncation_by_row_drops_what_is_too_long_and_nothing_else(byte_tokenizer):
    template = HuatuoGPTTemplate()
    rendered = template.render(dialogue(2), byte_tokenizer)
    num_tokens = len(rendered.token_ids)
    for max_tokens, expected in ((num_tokens, (rendered, 0)), (num_tokens - 1, (None, 4))):
        truncated = truncate(
            template, dialogue(2), byte_tokenizer, max_tokens=max_tokens, policy="drop_row"
        )
        assert truncated == expected
    with pytest.raises(ValueError, match="policy: 'cut' is not one of"):
        truncate(template, dialogue(1), byte_tokenizer, max_tokens=9, policy="cut")


def real_dialogues(shared_data) -> list[list[Message]]:
    """The first ten dialogues of each file of two kinds, patient and doctor in turn."""
    roles = {"patient": "user", "user": "user", "doctor": "assistant", "assistant": "assistant"}
    dialogues = []
    for path in sorted(shared_data.glob("3_distilled/disc_dialogues/*.json")):
        for row in json.loads(path.read_text())[:10]:
            turns = [Message(roles[t["role"]], t["content"]) for t in row["conversation"]]
            turns = turns[: len(turns) // 2 * 2]
            if [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2) and turns:
                dialogues.append(turns)
    return dialogues


@pytest.mark.slow
def test_real_dialogues_in_chatml_equal_transformers(shared_data):
    dialogues = real_dialogues(shared_data)
    assert len(dialogues) > 100
    template = ChatMLTemplate()
    for name in ("qwen2.5", "minimind_6400"):
        tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name)
        chat_template = template.to_jinja(tokenizer)
        for messages in dialogues:
            conversation = [{"role": one.role, "content": one.content} for one in messages]
            ids = tokenizer.apply_chat_template(
                conversation, chat_template=chat_template, return_dict=False
            )
            rendered = template.render(messages, tokenizer)
            # None of these answers starts with a blank or a line break, the stated exception.
            assert rendered.token_ids == ids
            assert tokenizer.decode(rendered.token_ids) == template.text(messages, tokenizer)
            span = rendered.turns[-1]
            prompt = template.prompt(messages[:-1], tokenizer)
            assert rendered.token_ids[: span.content_start] == prompt


def test_real_dialogues_in_huatuogpts_template_are_its_pieces(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "baichuan_rebuilt")
    for messages in real_dialogues(shared_data):
        expected = tokenizer(HUATUOGPT_SYSTEM).input_ids
        trained = [False] * len(expected)
        for message in messages:
            role, end = ("<病人>", []) if message.role == "user" else ("<HuatuoGPT>", [2])
            text = f"{role}：{message.content} "
            ids = tokenizer(text, add_special_tokens=False).input_ids + end
            expected += ids
            trained += [message.role == "assistant"] * len(ids)
        rendered = HuatuoGPTTemplate().render(messages, tokenizer)
        assert rendered.token_ids == expected
        assert rendered.trained_mask == trained
