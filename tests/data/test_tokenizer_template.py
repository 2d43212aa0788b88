"""The tokenizer's own chat template: masks by construction, and what is refused."""

import copy
import random

import pytest

from huatuo_jax.data.chat.templates import ChatMLTemplate, Llama2Template, Llama3Template, by_name
from huatuo_jax.data.chat.tokenizer_template import TokenizerTemplate
from huatuo_jax.data.records import Message

LOOP = "{%- for message in messages -%}"
HEAD = "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
END = "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
PROMPT = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
EVERY = "{{- message['content'] -}}"
PLAIN = LOOP + HEAD + EVERY + END + PROMPT
MARKED = (
    LOOP
    + HEAD
    + "{%- if message['role'] == 'assistant' -%}{%- generation -%}"
    + "{{- message['content'] -}}{{- '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}"
    + "{%- else -%}{{- message['content'] + '<|im_end|>\\n' -}}{%- endif -%}{%- endfor -%}"
    + PROMPT
)
# Only what follows a thinking block is marked as generated, and the end of turn is left outside.
MARKED_AFTER_THINKING = MARKED.replace(
    "{%- generation -%}{{- message['content'] -}}{{- '<|im_end|>' -}}{%- endgeneration -%}",
    "{{- '思考 ' -}}{%- generation -%}{{- message['content'] -}}{%- endgeneration -%}"
    "{{- '<|im_end|>' -}}",
)
DIALOGUE = [
    Message("user", "头痛三天了"),
    Message("assistant", "建议多喝水。"),
    Message("user", "还有咳嗽"),
    Message("assistant", "去医院检查。"),
]


def with_template(tokenizer, chat_template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = chat_template
    return tokenizer


def trained_text(tokenizer, rendered) -> list[str]:
    """What is trained of each answer, decoded."""
    texts = []
    for span in rendered.turns:
        ids = [
            rendered.token_ids[i] for i in range(span.start, span.end) if rendered.trained_mask[i]
        ]
        texts += [tokenizer.decode(ids)] if ids else []
    return texts


@pytest.mark.parametrize("template", [ChatMLTemplate(), Llama3Template()])
def test_the_exported_template_renders_as_the_named_one(byte_tokenizer, template):
    tokenizer = with_template(byte_tokenizer, template.to_jinja(byte_tokenizer))
    assert_same_as_named(template, tokenizer)


def test_llama2s_exported_template_renders_as_the_named_one(llama_tokenizer):
    template = Llama2Template()
    assert_same_as_named(
        template, with_template(llama_tokenizer, template.to_jinja(llama_tokenizer))
    )


def assert_same_as_named(template, tokenizer):
    draw = random.Random(0)
    alphabet = [*"头痛咳嗽。a “", " ", "\n", "\n\n", "<|im_end|>", "</s>", "<|eot_id|>", "\ue000"]
    for _ in range(60):
        messages = [Message("system", "你是医生。")] if draw.random() < 0.5 else []
        for role in ["user", "assistant"] * draw.randrange(1, 4):
            content = "".join(draw.choice(alphabet) for _ in range(draw.randrange(1, 9)))
            messages.append(Message(role, "答" + content if role == "assistant" else content))
        ours = TokenizerTemplate().render(messages, tokenizer)
        named = template.render(messages, tokenizer)
        assert (ours.token_ids, ours.trained_mask) == (named.token_ids, named.trained_mask)
        assert TokenizerTemplate().text(messages, tokenizer) == template.text(messages, tokenizer)
        prompt = TokenizerTemplate().prompt(messages[:-1], tokenizer)
        assert prompt == template.prompt(messages[:-1], tokenizer)
    stops = TokenizerTemplate().stop_token_ids(tokenizer)
    assert stops == template.stop_token_ids(tokenizer)


def test_an_answer_that_merges_into_its_header_keeps_the_prompts_tokens(byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, PLAIN)
    for start in ("\n", "\n\n", " \n", "  "):
        messages = [message._replace(content=start + message.content) for message in DIALOGUE]
        rendered = TokenizerTemplate().render(messages, tokenizer)
        assert tokenizer.decode(rendered.token_ids) == TokenizerTemplate().text(messages, tokenizer)
        for place, span in ((1, rendered.turns[1]), (3, rendered.turns[3])):
            prompt = TokenizerTemplate().prompt(messages[:place], tokenizer)
            assert rendered.token_ids[: span.content_start] == prompt
        expected = [f"{start}{DIALOGUE[i].content}<|im_end|>" for i in (1, 3)]
        assert trained_text(tokenizer, rendered) == expected
        cut_off = TokenizerTemplate().unfinished(messages[:3], messages[3].content, tokenizer)
        assert cut_off == rendered.token_ids[: len(cut_off)]
        assert tokenizer.decode(cut_off).endswith(messages[3].content)


def test_generation_marks_give_the_mask_of_transformers(byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, MARKED)
    encoded = tokenizer.apply_chat_template(
        [message._asdict() for message in DIALOGUE], return_assistant_tokens_mask=True
    )
    rendered = TokenizerTemplate().render(DIALOGUE, tokenizer)
    assert rendered.token_ids == encoded["input_ids"]
    assert [int(trained) for trained in rendered.trained_mask] == encoded["assistant_masks"]


def test_the_end_of_turn_is_trained_though_the_marks_leave_it_out(byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, MARKED_AFTER_THINKING)
    rendered = TokenizerTemplate().render(DIALOGUE, tokenizer)
    expected = ["建议多喝水。<|im_end|>", "去医院检查。<|im_end|>"]
    assert trained_text(tokenizer, rendered) == expected


REFUSED = {
    "strips the thinking of earlier answers": (
        PLAIN.replace(EVERY, "{{- message['content'] if loop.last else message['content'][:2] -}}"),
        "renders earlier turns of this dialogue otherwise",
    ),
    "opens a thinking block for the prompt only": (
        PLAIN.replace("assistant\\n' -}}{%- endif", "assistant\\n<think>' -}}{%- endif"),
        "or a prompt otherwise than the training text",
    ),
    "never ends an answer": (
        PLAIN.replace("<|im_end|>\\n", "\\n"),
        "puts no special token after an answer",
    ),
    "marks nothing": (
        MARKED.replace("== 'assistant' -%}{%- generation", "== 'doctor' -%}{%- generation"),
        "marks no text of an answer as generated",
    ),
    "raises": ("{{- raise_exception('no such role') -}}", "fails on them: no such role"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_template_is_refused_that(byte_tokenizer, reason):
    chat_template, message = REFUSED[reason]
    with pytest.raises(ValueError, match=message):
        TokenizerTemplate().render(DIALOGUE, with_template(byte_tokenizer, chat_template))


def test_a_fixed_date_is_handed_to_the_template_and_exported(byte_tokenizer):
    dated = (
        "{%- if date_string is not defined -%}{%- set date_string = strftime_now('%d') -%}"
        "{%- endif -%}{{- 'Today: ' + date_string + '\\n' -}}"
    )
    tokenizer = with_template(byte_tokenizer, dated + PLAIN)
    template = TokenizerTemplate(variables={"date_string": "26 Jul 2024"}, default_system="医生")
    text = template.text(DIALOGUE, tokenizer)
    assert text.startswith("Today: 26 Jul 2024\n<|im_start|>system\n医生<|im_end|>")
    exported = with_template(byte_tokenizer, template.to_jinja(tokenizer))
    messages = [message._asdict() for message in DIALOGUE]
    assert exported.apply_chat_template(messages, tokenize=False) == text


LLAMA_31 = (
    '{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}'
    "{{- 'Today Date: ' + date_string + '\\n' -}}"
)
LLAMA_32 = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}'
    '{%- set date_string = "25 Jul 2024" %}{%- endif %}{%- endif %}'
    "{{- 'Today Date: ' + date_string + '\\n' -}}"
)
MISTRAL = "{%- set today = strftime_now('%Y-%m-%d') %}{{- 'Today: ' + today + '\\n' -}}"


@pytest.mark.parametrize(
    ("program", "date", "first_line"),
    [
        (LLAMA_31, None, "Today Date: 26 Jul 2024"),
        (LLAMA_31, "2025-01-02", "Today Date: 02 Jan 2025"),
        (LLAMA_32, None, "Today Date: 25 Jul 2024"),
        (LLAMA_32, "2025-01-02", "Today Date: 02 Jan 2025"),
        (MISTRAL, None, "Today: 2024-07-26"),
        (MISTRAL, "2025-01-02", "Today: 2025-01-02"),
        ("{{- strftime_now('%A, %-d %B %y') + '\\n' -}}", "2025-01-02", "Thursday, 2 January 25"),
    ],
)
def test_a_program_that_prints_the_date_prints_one_and_the_same(
    byte_tokenizer, program, date, first_line
):
    tokenizer = with_template(byte_tokenizer, program + PLAIN)
    template = by_name("tokenizer", date=date)
    text = template.text(DIALOGUE, tokenizer)
    assert text.split("\n")[0] == first_line
    rendered = template.render(DIALOGUE, tokenizer)
    assert tokenizer.decode(rendered.token_ids) == text
    # The exported one, in transformers alone, and as the tokenizer of what is trained next.
    exported = with_template(byte_tokenizer, template.to_jinja(tokenizer))
    messages = [message._asdict() for message in DIALOGUE]
    assert exported.apply_chat_template(messages, return_dict=False) == rendered.token_ids
    assert by_name("tokenizer").render(DIALOGUE, exported) == rendered
    assert by_name("tokenizer", date=date).to_jinja(exported) == exported.chat_template


def test_a_date_that_nothing_would_print_is_refused(byte_tokenizer):
    with pytest.raises(ValueError, match="template_date='2025-01-02' must be None for 'chatml'"):
        by_name("chatml", date="2025-01-02")
    with pytest.raises(ValueError, match="must be a date as 2024-07-26"):
        by_name("tokenizer", date="2 Jan 2025")
    dated = by_name("tokenizer", date="2025-01-02")
    with pytest.raises(ValueError, match="prints no date"):
        dated.render(DIALOGUE, with_template(byte_tokenizer, PLAIN))
    trained = with_template(byte_tokenizer, MISTRAL + PLAIN)
    trained = with_template(trained, by_name("tokenizer").to_jinja(trained))
    with pytest.raises(ValueError, match="was fixed to 2024-07-26 in training"):
        dated.render(DIALOGUE, trained)


def test_a_template_that_leaves_system_messages_out_is_refused(byte_tokenizer):
    silent = "{%- for message in messages if message['role'] != 'system' -%}" + PLAIN[len(LOOP) :]
    tokenizer = with_template(byte_tokenizer, silent)
    with pytest.raises(ValueError, match="leaves system messages out"):
        TokenizerTemplate().render([Message("system", "你是医生。"), *DIALOGUE], tokenizer)
    assert TokenizerTemplate().render(DIALOGUE, tokenizer)


def test_a_tokenizer_without_a_template_is_refused(byte_tokenizer):
    with pytest.raises(ValueError, match="this one has none"):
        by_name("tokenizer").render(DIALOGUE, byte_tokenizer)
