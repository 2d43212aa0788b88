"""Rewards on the clinic's prompts, whose truth is known: the right diagnosis, and a rubric."""

from collections.abc import Sequence
from typing import Any

from huatuo_jax.clinic.findings import Findings, find
from huatuo_jax.data.records import Message, Prompt
from huatuo_jax.reward_functions.forms import final_part
from huatuo_jax.reward_functions.rubrics import HUATUOGPT_3

_ENOUGH_FRIENDLY = 3


def right_diagnosis(
    prompts: Sequence[Any],
    responses: Sequence[str],
    *,
    diagnosis: Sequence[str | None],
    correct: float = 1.0,
    wrong: float = 0.0,
    **columns: Any,
) -> list[float | None]:
    """Verifies that a response names the patient's disease, alone or clearly first.

    Args:
        prompts: of the clinic.
        responses: with their thinking, which is not read.
        diagnosis: the true disease; a prompt without one has no reward, and neither has one in
            which the patient has not told enough to know it.
        correct: of a response that names it.
        wrong: of any other.
        **columns: not read.

    Raises:
        ValueError: a diagnosis that the clinic does not know.
    """
    found: list[float | None] = []
    for prompt, response, disease in zip(prompts, responses, diagnosis, strict=True):
        facts = None if disease is None else _facts(prompt, response, disease)
        if facts is None or facts.should_ask:
            found.append(None)
        else:
            found.append(correct if facts.diagnosis == "right" else wrong)
    return found


def clinic_rubric(
    prompts: Sequence[Any],
    responses: Sequence[str],
    *,
    diagnosis: Sequence[str | None],
    **columns: Any,
) -> list[float | None]:
    """Scores a response by a rubric of signed points, as HuatuoGPT-3 does, from the clinic's truth.

    Where the patient has told enough: the disease (5 points), a right test, department and advice
    (2, 2, 1); else a useful question (5); in both a friendly manner (1). Off go points for what the
    patient must not have and for an emergency that is missed (5 each), another disease, test,
    department, advice or drug than the right one (2) and broken text (2).

    Args:
        prompts: of the clinic.
        responses: with their thinking, which is not read.
        diagnosis: the true disease; a prompt without one has no reward.
        **columns: not read.

    Raises:
        ValueError: a diagnosis that the clinic does not know.
    """
    found: list[float | None] = []
    for prompt, response, disease in zip(prompts, responses, diagnosis, strict=True):
        items = [] if disease is None else _items(_facts(prompt, response, disease))
        points, met = [one for one, _ in items], [one for _, one in items]
        found.append(HUATUOGPT_3.score(points, met) if items else None)
    return found


def _facts(prompt: Any, response: str, disease: str) -> Findings:
    messages = tuple(Message(one["role"], one["content"]) for one in prompt)
    asked = Prompt(id="", messages=messages, source="", diagnosis=disease)
    return find(asked, final_part(response))


def _items(facts: Findings) -> list[tuple[float, bool]]:
    """The points of each criterion, and whether it is met."""
    right = {item.kind for item in facts.items if item.right}
    if facts.should_ask:
        wanted = [(5.0, facts.asks_when_needed)]
    else:
        wanted = [
            (5.0, facts.diagnosis == "right"),
            (2.0, "test" in right),
            (2.0, "department" in right or facts.urgent),
            (1.0, "advice" in right),
        ]
    return [
        *wanted,
        (1.0, len(facts.friendly) >= _ENOUGH_FRIENDLY),
        (-5.0, bool(facts.contraindicated)),
        (-5.0, facts.red_flag_missed),
        (-2.0, facts.diagnosis == "wrong" or bool(facts.wrong_items)),
        (-2.0, not facts.coherent),
    ]
