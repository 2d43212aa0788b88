"""The reward of a multiple-choice question: the evaluation's extractor, against the right options.

So a policy is trained by the very reading of its answers that it is measured by.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from huatuo_jax.evaluation.exam_answers import extract_answer
from huatuo_jax.reward_functions.forms import final_part, last_answer_tag, think_answer


def multiple_choice(
    prompts: Sequence[Any],
    responses: Sequence[str],
    *,
    options: Sequence[Mapping[str, str] | None],
    answer: Sequence[str | Sequence[str] | None],
    correct: float = 1.0,
    wrong: float = 0.0,
    needs_thinking: bool = False,
    **columns: Any,
) -> list[float | None]:
    """Rewards the responses that choose exactly the right options, in any order.

    What is in the last `<answer>` tag behind the thinking counts, where there is one; else the
    whole final part. A reply that chooses nothing is wrong.

    Args:
        prompts: not read.
        responses: with their thinking.
        options: texts by label of each question; a prompt without them has no reward.
        answer: labels of the right options, such as BD or a list of labels; more than one where
            several are to be chosen. A prompt without them has no reward.
        correct: of a right choice.
        wrong: of any other, and of none.
        needs_thinking: a response that is not `<think>...</think>` and `<answer>...</answer>` is
            wrong, as for OnePO where the thinking is required.
        **columns: not read.

    Raises:
        ValueError: right options that are not among the options.
    """
    found: list[float | None] = []
    for response, texts, labels in zip(responses, options, answer, strict=True):
        if not texts or not labels:
            found.append(None)
            continue
        right = frozenset(labels)
        if isinstance(labels, str) and labels in texts:  # A label of several letters, as yes.
            right = frozenset((labels,))
        if not right <= set(texts):
            raise ValueError(f"answer {labels!r} must be among the options {list(texts)}")
        formed = not needs_thinking or think_answer(response) is not None
        tagged = last_answer_tag(final_part(response))
        chosen = extract_answer(
            response if tagged is None else tagged, texts, several=len(right) > 1
        )
        found.append(correct if formed and chosen == right else wrong)
    return found
