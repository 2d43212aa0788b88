"""Gives lm-evaluation-harness exam questions from local files, with our prompts and scores.

A task names the set and the form of its prompts; where the files are is said by `--metadata`, as
`{"cmb": "CMB-test-choice-question-merge.json", "cmb_answers": "CMB-test-choice-answer.json"}`.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import datasets

from huatuo_jax.evaluation.exam_answers import extract_answer
from huatuo_jax.evaluation.exam_files import read_exam_sets
from huatuo_jax.evaluation.exam_prompts import (
    PUBLISHED_FORMS,
    PromptForm,
    chat_messages,
    continuations,
    default_form,
    plain_prompt,
)
from huatuo_jax.evaluation.exam_questions import Question
from huatuo_jax.evaluation.exam_scores import Answer, choose_by_likelihood, score_exam

Document = Mapping[str, Any]
Outcome = tuple[Question, Answer]

_FURTHER_FILES = ("cmb_answers", "pubmedqa_test")
_log = logging.getLogger(__name__)


def read(
    *, exam: str, form: str, by: Literal["likelihood", "generation"], **given: Any
) -> dict[str, datasets.Dataset]:
    """Returns the split `test` of a task; the harness calls it.

    Args:
        exam: the set.
        form: of the prompts: `default`, or one of the published ones by name.
        by: `likelihood` gives a plain prompt and its continuations, `generation` the user's
            message.
        **given: the task's and the run's metadata; the set's file or folder is under its name.

    Raises:
        ValueError: no file is given, or it is in another layout.
    """
    path = given.get(exam)
    if not isinstance(path, str):
        raise ValueError(
            f'the files of {exam} are not given; name them by --metadata \'{{"{exam}": "PATH"}}\''
        )
    further = {name: given.get(name) for name in _FURTHER_FILES if name.startswith(exam)}
    found = read_exam_sets({exam: path, **further})[exam]
    if found.excluded or found.num_empty_options:
        _log.warning("%s", found.describe())
    chosen = [(one, _form(form, one)) for one in found.questions]
    make = _by_likelihood if by == "likelihood" else _by_generation
    rows = [_fields(one) | make(one, its_form) for one, its_form in chosen]
    return {"test": datasets.Dataset.from_list(rows)}


def likelihood_results(document: Document, results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Returns the figures of a question from its continuations; the likeliest is the answer."""
    answers = list(map(frozenset, document["answers"]))
    choice = choose_by_likelihood([log_prob for log_prob, _ in results], answers)
    return _figures(_question(document), choice.answer)


def generation_results(document: Document, results: Sequence[str]) -> dict[str, Any]:
    """Returns the figures of a question from its response; see `extract_answer`."""
    question = _question(document)
    several = question.kind == "multiple"
    return _figures(question, extract_answer(results[0], question.options, several=several))


def macro_accuracy(outcomes: Sequence[Outcome]) -> float:
    """Returns the mean over categories of the mean over their classes, as CMB's scorer has it."""
    questions, answers = zip(*outcomes, strict=True)
    return score_exam(questions, answers).macro.value


def _form(name: str, question: Question) -> PromptForm:
    return default_form(question) if name == "default" else PUBLISHED_FORMS[name]


def _fields(question: Question) -> dict[str, Any]:
    """A question in columns that all rows of a table have."""
    return {
        "id": question.id,
        "exam": question.exam,
        "question": question.question,
        "labels": list(question.options),
        "texts": list(question.options.values()),
        "answer": [label for label in question.options if label in question.answer],
        "kind": question.kind,
        "category": question.category,
        "subject": question.subject,
        "context": question.context,
    }


def _question(document: Document) -> Question:
    return Question(
        options=dict(zip(document["labels"], document["texts"], strict=True)),
        answer=frozenset(document["answer"]),
        **{
            name: document[name]
            for name in ("id", "exam", "question", "kind", "category", "subject", "context")
        },
    )


def _by_likelihood(question: Question, form: PromptForm) -> dict[str, Any]:
    replies, answers = continuations(question, form)
    return {
        "prompt": plain_prompt(question, form),
        # The gap before a reply is the task's `target_delimiter`, which chats do without.
        "choices": list(replies),
        "answers": list(map(sorted, answers)),
        "target": answers.index(question.answer),
    }


def _by_generation(question: Question, form: PromptForm) -> dict[str, Any]:
    (message,) = chat_messages(question, form)
    return {"prompt": message["content"], "target": "".join(sorted(question.answer))}


def _figures(question: Question, answer: Answer) -> dict[str, Any]:
    return {
        "acc": float(answer == question.answer),
        "acc_macro": (question, answer),
        "unparsed": float(answer is None),
    }
