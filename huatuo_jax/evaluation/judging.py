"""Two models' answers to the same prompts before an offline judge, in both orders."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from huatuo_jax.evaluation.statistics import Interval, mean_over_prompts
from huatuo_jax.feedback.judgements import CRITERIA
from huatuo_jax.feedback.judges import Judge, JudgementFailed
from huatuo_jax.feedback.questions import Answered
from huatuo_jax.feedback.truth_judge import TRUTHS, TruthJudge


class Verdict(NamedTuple):
    """What became of one pair: the first model's points in each order, 1, 1/2 or 0."""

    shown_first: float
    shown_second: float

    @property
    def points(self) -> float:
        """1 for a win, 1/2 for a tie, 0 for a loss; orders that contradict each other tie."""
        total = self.shown_first + self.shown_second
        return 0.5 if total == 1.0 else float(total > 1.0)


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


def win_rates(verdicts: Mapping[str, Sequence[Verdict | None]], *, seed: int) -> dict[str, Any]:
    """Wins, ties and losses of the first model, and its share of the points with its interval.

    Pairs without a verdict are counted as `failed`, and in no other figure.
    """
    everything = [one for found in verdicts.values() for one in found]
    flat = [one for one in everything if one is not None]
    points = [one.points for one in flat]
    share: Interval | None = mean_over_prompts(
        {
            name: [None if one is None else one.points for one in found]
            for name, found in verdicts.items()
        },
        seed=seed,
    )
    return {
        "wins": points.count(1.0),
        "ties": points.count(0.5),
        "losses": points.count(0.0),
        "failed": len(everything) - len(flat),
        "share": None if share is None else share.to_json(),
        "wins_shown_first": sum(one.shown_first == 1.0 for one in flat),
        "wins_shown_second": sum(one.shown_second == 1.0 for one in flat),
        "orders_disagree": sum({one.shown_first, one.shown_second} == {0.0, 1.0} for one in flat),
    }


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
    return 0.5 if reply.p_first == 0.5 else float(reply.p_first > 0.5)
