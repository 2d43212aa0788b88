"""Builds the prompts of exam questions: chat messages, plain text, and continuations to score."""

import itertools
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from huatuo_jax.evaluation.exam_questions import Question
from huatuo_jax.evaluation.exam_sets import CEVAL_SUBJECTS, CMMLU_SUBJECTS, MMLU_SUBJECTS

Message = dict[str, str]
Language = Literal["zh", "en"]

_SUBJECTS: Mapping[str, Mapping[str, str]] = {
    "cmmlu": CMMLU_SUBJECTS,
    "ceval": CEVAL_SUBJECTS,
    "mmlu": MMLU_SUBJECTS,
}
_KINDS: Mapping[Language, Mapping[str, str]] = {
    "zh": {"single": "单项选择题", "multiple": "多项选择题"},
    "en": {
        "single": "question, which has one correct answer",
        "multiple": "question, which may have several correct answers",
    },
}
_PROMPT_FIELDS = frozenset(
    {"question", "options", "labels", "context", *("category", "subject", "kind")}
)
_CHINESE = re.compile("[\u4e00-\u9fff]")


@dataclass(frozen=True, kw_only=True)
class PromptForm:
    """Templates of a question's prompt and of an example's reply.

    Fields are in braces: question, options, labels, context, category, subject and kind of the
    question; answer and explanation in `reply`.

    Attributes:
        prompt: the question as the user's message.
        reply: an example's reply, and what the likelihood of an answer is of.
        option: one line of the options, with label and text.
        description: stands once before the first question, examples included.
        plain: the prompt as part of a plain text, up to where the reply begins.
        gap: between `plain` and the reply.
        between: after each example in a plain text.
        language: of the question's kind.
    """

    prompt: str
    reply: str
    option: str = "{label}. {text}"
    description: str = ""
    plain: str = "{prompt}"
    gap: str = ""
    between: str = "\n\n"
    language: Language = "zh"

    def __post_init__(self) -> None:
        """Validates the fields."""
        for name, allowed, needed in (
            ("prompt", _PROMPT_FIELDS, {"question"}),
            ("description", _PROMPT_FIELDS, set()),
            ("reply", {"answer", "explanation"}, {"answer"}),
            ("option", {"label", "text"}, {"text"}),
            ("plain", {"prompt"}, {"prompt"}),
        ):
            found = {
                field for _, field, _, _ in string.Formatter().parse(getattr(self, name)) if field
            }
            if found - allowed or needed - found:
                raise ValueError(
                    f"{name}: has the fields {sorted(found)}; allowed are {sorted(allowed)}, "
                    f"needed {sorted(needed)}"
                )


def _harness(prompt: str, description: str = "", language: Language = "en") -> PromptForm:
    """A form of lm-evaluation-harness: a cue at the end, the answer behind a space."""
    return PromptForm(
        prompt=prompt, description=description, reply="{answer}", gap=" ", language=language
    )


_CMB = "以下是中国{category}中{subject}考试的一道{kind}，"
_QUESTION = "\n{question}\n{options}"
_ASKED_PLAINLY = "问：{prompt}\n答："

DEFAULT_FORMS: Mapping[Language, PromptForm] = {
    "zh": PromptForm(
        prompt="请回答下面的医学{kind}。可以先分析，最后另起一行写“答案：”和{labels}。\n\n"
        "{context}{question}\n{options}",
        reply="答案：{answer}",
        plain=_ASKED_PLAINLY,
    ),
    "en": PromptForm(
        prompt="Answer the following medical {kind}. You may reason first; then write “Answer: ” "
        "and {labels} on the last line.\n\n{context}{question}\n{options}",
        reply="Answer: {answer}",
        plain="User: {prompt}\nAssistant:",
        gap=" ",
        language="en",
    ),
}
"""The one form for all sets, in the language of the question; see `default_form`."""

PUBLISHED_FORMS: Mapping[str, PromptForm] = {
    "cmb": PromptForm(
        prompt=f"{_CMB}不需要做任何分析和解释，直接输出答案选项。{_QUESTION}",
        reply="答案是{answer}。",
        plain=_ASKED_PLAINLY,
        between="\n",
    ),
    "cmb_reasoning": PromptForm(
        prompt=f"{_CMB}请分析每个选项，并最后给出答案。{_QUESTION}",
        reply="{explanation}所以答案是{answer}。",
        plain=_ASKED_PLAINLY,
        between="\n",
    ),
    "huatuogpt2": PromptForm(
        prompt="请回答下面选择题。\n[{kind}]{question}\n{options}",
        reply="答案是{answer}。",
        plain="<问>：{prompt}\n<答>：",
        between="\n",
    ),
    "huatuogpt_o1": PromptForm(
        prompt="Please answer the following multiple-choice question:\n{question}\n{options}",
        reply="The answer is {answer}.",
        plain="{prompt}\n",
        language="en",
    ),
    "huatuogpt_o1_strict": PromptForm(
        prompt="Please answer the following multiple-choice questions, ensuring your response "
        "concludes with the correct option in the format: 'The answer is A.'.\n"
        "{question}\n{options}",
        reply="The answer is {answer}.",
        plain="{prompt}\n",
        language="en",
    ),
    "cmexam": PromptForm(
        prompt="问题: {question}, \n 选项: {options}",
        reply="答案: {answer}",
        option="{label} {text}",
        plain="{prompt}\n",
    ),
    "medqa": _harness("Question: {question}\n{options}\nAnswer:"),
    "medmcqa": _harness("Question: {question}\nChoices:\n{options}\nAnswer:"),
    "pubmedqa": _harness("Abstract: {context}\nQuestion: {question}\nAnswer:"),
    "cmmlu": _harness(
        "{question}\n{options}\n答案：",
        "以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n",
        "zh",
    ),
    "ceval": _harness(
        "{question}\n{options}\n答案：",
        "以下是中国关于{subject}的单项选择题，请选出其中的正确答案。\n\n",
        "zh",
    ),
    "mmlu": _harness(
        "{question}\n{options}\nAnswer:",
        "The following are multiple choice questions (with answers) about {subject}.\n\n",
    ),
}
"""Forms as published: by CMB, HuatuoGPT-II, HuatuoGPT-o1 and CMExam in their evaluators, the others
in lm-evaluation-harness (medqa_4options, medmcqa, pubmedqa, cmmlu, ceval-valid, mmlu). Empty
options alone are left out, where CMB's and HuatuoGPT-II's evaluators also drop those of one
character."""


class LikelihoodPrompt(NamedTuple):
    """A context and the answers to score behind it.

    Attributes:
        context: common to all.
        continuations: one for each answer.
        answers: the labels that each stands for.
    """

    context: str
    continuations: tuple[str, ...]
    answers: tuple[frozenset[str], ...]


def default_form(question: Question) -> PromptForm:
    """The default in the question's language: Chinese where it has a Chinese character."""
    return DEFAULT_FORMS["zh" if _CHINESE.search(question.question) else "en"]


def chat_messages(
    question: Question, form: PromptForm, *, examples: Sequence[Question] = ()
) -> list[Message]:
    """The question as the last user message, behind examples as turns of their own.

    Raises:
        ValueError: the question lacks a class that the form names, or an example its explanation.
    """
    messages = []
    for place, example in enumerate((*examples, question)):
        description = "" if place else _filled(form.description, question, form)
        content = description + _filled(form.prompt, example, form)
        messages.append({"role": "user", "content": content})
        if place < len(examples):
            messages.append({"role": "assistant", "content": _reply(example, form)})
    return messages


def plain_prompt(question: Question, form: PromptForm, *, examples: Sequence[Question] = ()) -> str:
    """The text that a base model continues with its reply; errors as `chat_messages`."""
    parts = [_filled(form.description, question, form)]
    for example in examples:
        prompt = form.plain.format(prompt=_filled(form.prompt, example, form))
        parts.append(prompt + form.gap + _reply(example, form) + form.between)
    parts.append(form.plain.format(prompt=_filled(form.prompt, question, form)))
    return "".join(parts)


def likelihood_prompt(
    question: Question,
    form: PromptForm,
    *,
    examples: Sequence[Question] = (),
    by: Literal["label", "text"] = "label",
) -> LikelihoodPrompt:
    """The plain prompt with each possible answer behind it; see `continuations`."""
    replies, answers = continuations(question, form, by=by)
    context = plain_prompt(question, form, examples=examples)
    return LikelihoodPrompt(context, tuple(form.gap + reply for reply in replies), answers)


def continuations(
    question: Question, form: PromptForm, *, by: Literal["label", "text"] = "label"
) -> tuple[tuple[str, ...], tuple[frozenset[str], ...]]:
    """The replies whose likelihoods decide, and the labels of each.

    A question with several right answers has every set of options, in the order of their size. Each
    of its replies ends with a full stop or a line end, as B would otherwise always be likelier than
    BD.

    Args:
        question: the question.
        form: gives the reply, without an explanation.
        by: whether the labels or the texts of the options are scored.

    Raises:
        ValueError: texts of a question with several right answers.
    """
    several = question.kind == "multiple"
    if several and by == "text":
        raise ValueError(
            f"by: 'text' has no meaning for question {question.id}, which may have several right "
            "answers; it should be 'label'"
        )
    sizes = range(1, len(question.options) + 1) if several else (1,)
    chosen = [labels for size in sizes for labels in itertools.combinations(question.options, size)]
    template = form.reply.split("{explanation}")[-1]
    ending = "\n" if several and template.endswith("{answer}") else ""
    replies = [
        template.format(answer=question.options[labels[0]] if by == "text" else "".join(labels))
        for labels in chosen
    ]
    return tuple(reply + ending for reply in replies), tuple(map(frozenset, chosen))


def _reply(example: Question, form: PromptForm) -> str:
    if "{explanation}" in form.reply and not example.explanation:
        raise ValueError(
            f"question {example.id} has no explanation, which the form's reply needs: {form.reply}"
        )
    ordered = [label for label in example.options if label in example.answer]
    return form.reply.format(answer="".join(ordered), explanation=example.explanation)


def _filled(template: str, question: Question, form: PromptForm) -> str:
    lines = (
        text if len(label) > 1 else form.option.format(label=label, text=text)
        for label, text in question.options.items()
    )
    for field in ("category", "subject"):
        if f"{{{field}}}" in template and not getattr(question, field):
            raise ValueError(
                f"question {question.id} of {question.exam} has no {field}, which the form needs: "
                f"{template[:60]!r}"
            )
    names = _SUBJECTS.get(question.exam, {})
    # A template that names the context itself, as PubMedQA's, has it without a line end.
    own_line = "\n" if question.context and "{context}{question}" in template else ""
    return template.format(
        question=question.question.strip(),
        options="\n".join(lines),
        labels=_labels(question, form.language),
        context=question.context + own_line,
        category=question.category,
        subject=names.get(question.subject, question.subject),
        kind=_KINDS[form.language][question.kind],
    )


def _labels(question: Question, language: Language) -> str:
    """The words for the answer that the prompt asks for."""
    if any(len(label) > 1 for label in question.options):
        words = list(question.options)
        return f"{'、'.join(words)}之一" if language == "zh" else f"one of {', '.join(words)}"
    several = question.kind == "multiple"
    if language == "zh":
        return "所有正确选项的字母" if several else "正确选项的字母"
    return "the letters of all correct options" if several else "the letter of the correct option"
