import dataclasses

import pytest

from huatuo_jax.evaluation.exam_answers import extract_answer
from huatuo_jax.evaluation.exam_prompts import (
    DEFAULT_FORMS,
    PUBLISHED_FORMS,
    PromptForm,
    chat_messages,
    continuations,
    default_form,
    likelihood_prompt,
    plain_prompt,
)
from huatuo_jax.evaluation.exam_questions import Question
from huatuo_jax.evaluation.exam_sets import YES_NO_MAYBE

ASKED = Question(
    id="1",
    exam="cmb",
    category="医师考试",
    subject="规培结业",
    question="主血脉的是{心}？",
    options={"A": "心", "B": "肝 {脾}"},
    answer=frozenset("A"),
    kind="single",
    explanation="心主血脉。",
)
SEVERAL = dataclasses.replace(
    ASKED,
    id="2",
    question="属于脏的是",
    options={"A": "心", "B": "胃", "C": "肝"},
    answer=frozenset("CA"),
    kind="multiple",
)
ENGLISH = dataclasses.replace(
    ASKED, exam="mmlu", subject="college_biology", question="Which is it?"
)
TRIAL = Question(
    id="17208539",
    exam="pubmedqa",
    question="Does it help?",
    context="First.\nSecond.",
    options=YES_NO_MAYBE,
    answer=frozenset({"maybe"}),
    kind="single",
)


def test_cmbs_prompt_is_the_published_one():
    assert chat_messages(ASKED, PUBLISHED_FORMS["cmb"]) == [
        {
            "role": "user",
            "content": "以下是中国医师考试中规培结业考试的一道单项选择题，不需要做任何分析和解释，"
            "直接输出答案选项。\n主血脉的是{心}？\nA. 心\nB. 肝 {脾}",
        }
    ]


def test_examples_are_turns_of_a_chat_and_lines_of_a_plain_text():
    form = PUBLISHED_FORMS["cmb_reasoning"]
    messages = chat_messages(ASKED, form, examples=[SEVERAL])
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == "心主血脉。所以答案是AC。"
    asked, replied, last = (message["content"] for message in messages)
    assert "多项选择题，请分析每个选项，并最后给出答案。\n属于脏的是" in asked
    assert plain_prompt(ASKED, form, examples=[SEVERAL]) == (
        f"问：{asked}\n答：{replied}\n问：{last}\n答："
    )


def test_the_harness_forms_are_the_harnesss():
    cmmlu = dataclasses.replace(ASKED, exam="cmmlu", subject="anatomy")
    assert likelihood_prompt(cmmlu, PUBLISHED_FORMS["cmmlu"], examples=[cmmlu]) == (
        "以下是关于解剖学的单项选择题，请直接给出正确答案的选项。\n\n"
        "主血脉的是{心}？\nA. 心\nB. 肝 {脾}\n答案： A\n\n"
        "主血脉的是{心}？\nA. 心\nB. 肝 {脾}\n答案：",
        (" A", " B"),
        (frozenset("A"), frozenset("B")),
    )
    ceval = dataclasses.replace(ASKED, exam="ceval", subject="physician")
    assert plain_prompt(ceval, PUBLISHED_FORMS["ceval"]).startswith(
        "以下是中国关于医师资格的单项选择题，请选出其中的正确答案。\n\n主血脉"
    )
    mmlu = chat_messages(ENGLISH, PUBLISHED_FORMS["mmlu"], examples=[ENGLISH])
    assert mmlu[0]["content"].startswith(
        "The following are multiple choice questions (with answers) about college biology.\n\nWhich"
    )
    assert mmlu[1]["content"] == "A" and mmlu[2]["content"].endswith("B. 肝 {脾}\nAnswer:")
    medmcqa = plain_prompt(ENGLISH, PUBLISHED_FORMS["medmcqa"])
    assert medmcqa == "Question: Which is it?\nChoices:\nA. 心\nB. 肝 {脾}\nAnswer:"
    assert likelihood_prompt(TRIAL, PUBLISHED_FORMS["pubmedqa"]) == (
        "Abstract: First.\nSecond.\nQuestion: Does it help?\nAnswer:",
        (" yes", " no", " maybe"),
        (frozenset({"yes"}), frozenset({"no"}), frozenset({"maybe"})),
    )


def test_other_published_prompts_are_as_their_evaluators_have_them():
    def asked(name):
        (message,) = chat_messages(SEVERAL, PUBLISHED_FORMS[name])
        return message["content"]

    options = "属于脏的是\nA. 心\nB. 胃\nC. 肝"
    assert asked("huatuogpt2") == f"请回答下面选择题。\n[多项选择题]{options}"
    assert asked("huatuogpt_o1") == (
        f"Please answer the following multiple-choice question:\n{options}"
    )
    assert asked("cmexam") == "问题: 属于脏的是, \n 选项: A 心\nB 胃\nC 肝"
    assert asked("medqa") == f"Question: {options}\nAnswer:"


def test_the_default_speaks_the_questions_language_and_says_what_is_wanted():
    assert default_form(ASKED) is DEFAULT_FORMS["zh"]
    assert default_form(ENGLISH) is DEFAULT_FORMS["en"]
    for question, words in (
        (ASKED, "最后另起一行写“答案：”和正确选项的字母。"),
        (SEVERAL, "医学多项选择题。可以先分析，最后另起一行写“答案：”和所有正确选项的字母。"),
        (ENGLISH, "the letter of the correct option on the last line"),
        (TRIAL, "one of yes, no, maybe on the last line.\n\nFirst.\nSecond.\nDoes it help?\nyes\n"),
    ):
        (message,) = chat_messages(question, default_form(question))
        assert words in message["content"]


@pytest.mark.parametrize("form", [*PUBLISHED_FORMS.values(), *DEFAULT_FORMS.values()])
@pytest.mark.parametrize("question", [ASKED, SEVERAL])
def test_every_reply_of_every_form_is_read_as_what_it_stands_for(form, question):
    several = question.kind == "multiple"
    for reply, answer in zip(*continuations(question, form), strict=True):
        assert extract_answer(reply, question.options, several=several) == answer
    messages = chat_messages(ASKED, form, examples=[question])
    given = extract_answer(messages[1]["content"], question.options, several=several)
    assert given == question.answer


def test_several_right_answers_are_scored_as_sets_that_end():
    replies, answers = continuations(SEVERAL, PUBLISHED_FORMS["cmmlu"])
    assert replies == ("A\n", "B\n", "C\n", "AB\n", "AC\n", "BC\n", "ABC\n")
    assert len(set(answers)) == 7 and answers[4] == {"A", "C"}
    replies, _ = continuations(SEVERAL, PUBLISHED_FORMS["cmb"])
    assert replies[-1] == "答案是ABC。"


def test_the_texts_of_options_can_be_scored_in_place_of_labels():
    replies, answers = continuations(ASKED, PUBLISHED_FORMS["cmmlu"], by="text")
    assert replies == ("心", "肝 {脾}") and answers == (frozenset("A"), frozenset("B"))
    with pytest.raises(ValueError, match="'text' has no meaning for question 2"):
        continuations(SEVERAL, PUBLISHED_FORMS["cmmlu"], by="text")


def test_what_a_form_needs_has_to_be_there():
    bare = dataclasses.replace(ASKED, category="", explanation="")
    with pytest.raises(ValueError, match="question 1 of cmb has no category"):
        chat_messages(bare, PUBLISHED_FORMS["cmb"])
    with pytest.raises(ValueError, match="question 1 has no explanation"):
        form = dataclasses.replace(PUBLISHED_FORMS["cmb_reasoning"], prompt="{question}")
        chat_messages(ASKED, form, examples=[bare])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": "{options}"}, "prompt: has the fields"),
        ({"prompt": "{question}{author}"}, "prompt: .*author"),
        ({"reply": "B"}, "reply: .*needed \\['answer'\\]"),
        ({"option": "{label}"}, "option: "),
        ({"plain": "x"}, "plain: "),
    ],
)
def test_templates_with_other_fields_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        PromptForm(**{"prompt": "{question}", "reply": "{answer}", **change})


def test_an_option_whose_text_is_its_letter_keeps_its_label():
    region = dataclasses.replace(ENGLISH, options={"A": "A", "B": "C"})
    content = chat_messages(region, PUBLISHED_FORMS["medqa"])[0]["content"]
    assert content == "Question: Which is it?\nA. A\nB. C\nAnswer:"
