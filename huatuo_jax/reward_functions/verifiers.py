"""Verifiers: the form of a response, and whether its final answer is the reference.

Each is a reward function: lists of prompts, responses and columns in, a list of rewards out, None
where it does not apply.
"""

from collections.abc import Callable, Sequence
from typing import Any

from huatuo_jax.reward_functions.forms import medical_o1_answer, think_answer
from huatuo_jax.reward_functions.matching import Match, is_correct

References = Sequence[str | Sequence[str] | None]
"""The right answer to each prompt, or several of which any is right; None for none."""


def medical_o1(
    prompts: Sequence[Any],
    responses: Sequence[str],
    *,
    reference: References,
    correct: float = 1.0,
    wrong: float = 0.1,
    invalid: float = 0.0,
    match: Match = "auto",
    tolerance: float = 1e-6,
    **columns: Any,
) -> list[float | None]:
    r"""Rewards `## Thinking ... ## Final Response\n\n ...` with a right answer (arXiv 2412.18925).

    Args:
        prompts: not read.
        responses: with their thinking.
        reference: the right answers; a prompt without one has no reward.
        correct: of a response whose final answer is right.
        wrong: of one of the right form whose answer is not.
        invalid: of one of another form, whatever it says.
        match: see `matching.is_correct`.
        tolerance: see there.
        **columns: not read.

    Raises:
        ValueError: as `matching.is_correct`.
    """
    rewards = (correct, wrong, invalid)
    return _verified(responses, reference, medical_o1_answer, rewards, match, tolerance)


def think_and_answer(
    prompts: Sequence[Any],
    responses: Sequence[str],
    *,
    reference: References,
    correct: float = 1.0,
    wrong: float = 0.0,
    invalid: float = 0.0,
    match: Match = "auto",
    tolerance: float = 1e-6,
    **columns: Any,
) -> list[float | None]:
    """Rewards `<think>...</think> ... <answer>...</answer>` with a right last answer.

    Args:
        prompts: not read.
        responses: with their thinking.
        reference: the right answers; a prompt without one has no reward.
        correct: of a response whose last answer is right.
        wrong: of one of the right form whose answer is not.
        invalid: of one of another form, whatever it says.
        match: see `matching.is_correct`.
        tolerance: see there.
        **columns: not read.

    Raises:
        ValueError: as `matching.is_correct`.
    """
    rewards = (correct, wrong, invalid)
    return _verified(responses, reference, think_answer, rewards, match, tolerance)


def references_of(value: str | Sequence[str] | None) -> list[str]:
    """Returns the references of a prompt that hold a text."""
    texts = [value] if isinstance(value, str) else list(value or ())
    return [one for one in texts if one.strip()]


def _verified(
    responses: Sequence[str],
    reference: References,
    answer_of: Callable[[str], str | None],
    rewards: tuple[float, float, float],
    match: Match,
    tolerance: float,
) -> list[float | None]:
    correct, wrong, invalid = rewards
    found: list[float | None] = []
    for response, one in zip(responses, reference, strict=True):
        references, answer = references_of(one), answer_of(response)
        if not references:
            found.append(None)
        elif answer is None:
            found.append(invalid)
        else:
            right = is_correct(answer, references, match=match, tolerance=tolerance)
            found.append(correct if right else wrong)
    return found
