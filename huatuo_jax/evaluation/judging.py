"""Two models' answers to the same prompts before an offline judge, in both orders."""

import asyncio
from collections.abc import Sequence

from huatuo_jax.feedback.judgements import CRITERIA
from huatuo_jax.feedback.judges import Judge, JudgementFailed
from huatuo_jax.feedback.questions import Answered
from huatuo_jax.feedback.truth_judge import TRUTHS, TruthJudge
from huatuo_jax.feedback.win_rates import Verdict, points_of


def judge_pairs(
    answered: Sequence[Answered], others: Sequence[Answered], judge: Judge
) -> dict[str, list[Verdict | None]]:
    """The verdicts on the answers of the same index, by prompt; None where the judge gave none.

    Args:
        answered: one model's answers.
        others: the other's, to the same prompts in the same order, as many to each.
        judge: is asked twice about each pair, in both orders.
    """

    async def run() -> dict[str, list[Verdict | None]]:
        found: dict[str, list[Verdict | None]] = {}
        for one, other in zip(answered, others, strict=True):
            assert one.prompt.id == other.prompt.id
            found[one.prompt.id] = [
                await _verdict(judge, one, text, against)
                for text, against in zip(one.answers, other.answers, strict=True)
            ]
        return found

    return asyncio.run(run())


def score_answers(
    answered: Sequence[Answered], judge: Judge
) -> dict[str, dict[str, list[float | None]]]:
    """The judge's scores by criterion, then by prompt."""

    async def run() -> dict[str, dict[str, list[float | None]]]:
        found: dict[str, dict[str, list[float | None]]] = {name: {} for name in CRITERIA}
        for one in answered:
            replies = [await judge.score(one.prompt, text) for text in one.answers]
            for name in CRITERIA:
                found[name][one.prompt.id] = [
                    None if reply.scores is None else reply.scores[name] for reply in replies
                ]
        return found

    return asyncio.run(run())


def truth_values(
    answered: Sequence[Answered], judge: TruthJudge
) -> dict[str, dict[str, list[float | None]]]:
    """What is true of each answer, as `truth_{name}` by `TRUTHS`, then by prompt."""
    found: dict[str, dict[str, list[float | None]]] = {f"truth_{name}": {} for name in TRUTHS}
    for one in answered:
        truths = [judge.truths(one.prompt, text) for text in one.answers]
        for name in TRUTHS:
            found[f"truth_{name}"][one.prompt.id] = [values[name] for values in truths]
    return found


async def _verdict(judge: Judge, one: Answered, text: str, against: str) -> Verdict | None:
    """Both orders; None where the judge failed on either."""
    try:
        return Verdict(
            await _points(judge, one, text, against),
            1.0 - await _points(judge, one, against, text),
        )
    except JudgementFailed:
        return None


async def _points(judge: Judge, one: Answered, first: str, second: str) -> float:
    """1 where the first text is the better one, 0 where the second is."""
    reply = await judge.compare(one.prompt, first, second)
    assert reply.p_first is not None
    return points_of(reply.p_first)
