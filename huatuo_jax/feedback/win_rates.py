"""Two models' answers before a judge in both orders: wins, ties, losses and the share of points."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from huatuo_jax.feedback.intervals import Interval, mean_over_prompts
from huatuo_jax.feedback.judgements import Judgement


class Verdict(NamedTuple):
    """What became of one pair: the first model's points in each order, 1, 1/2 or 0."""

    shown_first: float
    shown_second: float

    @property
    def points(self) -> float:
        """1 for a win, 1/2 for a tie, 0 for a loss; orders that contradict each other tie."""
        total = self.shown_first + self.shown_second
        return 0.5 if total == 1.0 else float(total > 1.0)


def points_of(p_first: float) -> float:
    """1 where the judge prefers the answer shown first, 0 where the other one, 1/2 for a tie."""
    return 0.5 if p_first == 0.5 else float(p_first > 0.5)


def verdicts_of(judgements: Iterable[Judgement], *, one: int, other: int) -> dict[str, Verdict]:
    """The verdicts on two answers of each prompt, where there is one in both orders.

    Args:
        judgements: pairwise ones, see `judgements.current`.
        one: index of the answer whose points are counted.
        other: index of the answer that it is compared with.
    """
    orders: dict[str, dict[tuple[int, ...], float]] = {}
    for judgement in judgements:
        if judgement.p_first is not None:
            found = orders.setdefault(judgement.id, {})
            found[judgement.answers] = points_of(judgement.p_first)
    return {
        name: Verdict(found[one, other], 1.0 - found[other, one])
        for name, found in orders.items()
        if (one, other) in found and (other, one) in found
    }


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
