"""From judgements of answers to one verdict on each pair of a prompt's answers.

Nothing here depends on the order in which judgements came: a question that was judged more than
once (by a judge whose settings changed) counts with the mean of its verdicts.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from huatuo_jax.feedback.judgements import Judgement, Protocol, prompt_hash, sha256
from huatuo_jax.feedback.questions import Answered

SMALLEST_PROBABILITY = 1e-6
"""A verdict nearer to 0 or 1 than this is certain: how much nearer is the rounding of its judge."""
LARGEST_LOG_ODDS = math.log1p(-SMALLEST_PROBABILITY) - math.log(SMALLEST_PROBABILITY)
"""Of that probability: 13.8."""

FAILED = "the judgement failed"
NO_PROMPT = "no such prompt or answer in the answers file"
OTHER_TEXT = "judged another text than the answers file holds"


class PairKey(NamedTuple):
    """Two answers of one prompt, by their places in the answers file; `one` is below `other`."""

    id: str
    one: int
    other: int


class Combined(NamedTuple):
    """The verdict of both orders on a pair.

    Attributes:
        p_one: the probability that `one` is better.
        contradicts: whether the two orders prefer different answers.
        voted: whether the judge gave votes (0, 0.5, 1) on the pair and no probabilities.
    """

    p_one: float
    contradicts: bool
    voted: bool


class Verdicts(NamedTuple):
    """All verdicts on a pair: the probabilities of the answer shown first, by which that was."""

    one_first: tuple[float, ...]
    other_first: tuple[float, ...]

    @property
    def both_orders(self) -> bool:
        """Whether each order was judged."""
        return bool(self.one_first and self.other_first)

    def combined(self) -> Combined:
        """Both orders in one soft label.

        Where the judge gives probabilities, the log-odds of the orders are averaged, which takes
        out a position bias that is additive in the log-odds exactly; those of a certain verdict
        are bounded, see `bounded_log_odds`. Votes are averaged as they are, so that two orders that
        contradict each other give 0.5.
        """
        assert self.both_orders
        for_one, for_other = self.leanings()
        mean = (for_one - for_other) / 2
        p_one = 0.5 + mean if self.voted else probability(mean)
        return Combined(p_one, for_one * for_other > 0, self.voted)

    @property
    def voted(self) -> bool:
        """Whether every verdict is certain or a tie, as a judge gives them that has no others."""
        return all(p == 0.5 or is_certain(p) for p in (*self.one_first, *self.other_first))

    @property
    def certain(self) -> bool:
        """Whether one of the verdicts is certain, so that its log-odds are not known."""
        return any(map(is_certain, (*self.one_first, *self.other_first)))

    def leanings(self) -> tuple[float, float]:
        """How far each order prefers the answer that it shows first.

        In log-odds; of votes their mean around 0. Of one sign, the two orders contradict each
        other.
        """
        measured = vote if self.voted else bounded_log_odds
        of_one, of_other = (math.fsum(map(measured, shown)) / len(shown) for shown in self)
        return of_one, of_other


def is_certain(p: float) -> bool:
    """Whether a probability is 0 or 1 but for `SMALLEST_PROBABILITY`."""
    return min(p, 1.0 - p) <= SMALLEST_PROBABILITY


def log_odds(p: float) -> float:
    """The logarithm of p over 1 - p, for a p between 0 and 1, both excluded."""
    return math.log(p) - math.log1p(-p)


def bounded_log_odds(p: float) -> float:
    """The log-odds of a verdict, within +-`LARGEST_LOG_ODDS`.

    So a certain verdict counts the same whether its judge rounds it to 1 or not.
    """
    return log_odds(min(max(p, SMALLEST_PROBABILITY), 1.0 - SMALLEST_PROBABILITY))


def probability(log_odds: float) -> float:
    """The probability of these log-odds, in full precision also where it is small."""
    odds = math.exp(-abs(log_odds))
    return (1.0 if log_odds >= 0 else odds) / (1.0 + odds)


def vote(p: float) -> float:
    """-0.5, 0 or 0.5 for the side that a probability is on."""
    return (p > 0.5) / 2 - (p < 0.5) / 2


def one_judge(
    judgements: Iterable[Judgement],
    *,
    judge: str | None = None,
    template: str | None = None,
    protocol: Protocol | None = None,
) -> list[Judgement]:
    """The judgements of one judge with one template under one protocol.

    Raises:
        ValueError: there are none, or more than one such combination; the message lists them.
    """
    found = [
        one
        for one in judgements
        if judge in (None, one.judge)
        and template in (None, one.template)
        and protocol in (None, one.protocol)
    ]
    kinds = sorted({(one.judge, one.protocol, one.template) for one in found})
    if len(kinds) == 1:
        return found
    if not kinds:
        raise ValueError(
            f"no judgement with judge={judge!r}, template={template!r}, protocol={protocol!r}"
        )
    listed = "; ".join(
        f"judge={one!r} protocol={two!r} template={three!r}" for one, two, three in kinds
    )
    raise ValueError(f"the labels hold more than one kind of judgement, choose one: {listed}")


def matching(
    judgements: Iterable[Judgement], answered: Mapping[str, Answered]
) -> tuple[list[Judgement], list[tuple[Judgement, str]]]:
    """Parts the judgements into those of the texts at hand, and the others with the reason.

    Labels of another answers file would otherwise teach preferences between texts that no judge
    has seen.
    """
    hashes = {
        prompt_id: (prompt_hash(item.prompt), [sha256(text) for text in item.answers])
        for prompt_id, item in answered.items()
    }
    fitting, others = [], []
    for judgement in judgements:
        of_prompt, of_texts = hashes[judgement.id] if judgement.id in hashes else ("", [])
        if any(index >= len(of_texts) for index in judgement.answers):
            others.append((judgement, NO_PROMPT))
        elif judgement.prompt_sha256 != of_prompt or judgement.answer_sha256 != tuple(
            of_texts[index] for index in judgement.answers
        ):
            others.append((judgement, OTHER_TEXT))
        else:
            fitting.append(judgement)
    return fitting, others


def answer_scores(
    judgements: Iterable[Judgement], *, criterion: str
) -> dict[tuple[str, int], float]:
    """The score of each answer that has one, by prompt id and place."""
    scores: dict[tuple[str, int], list[float]] = defaultdict(list)
    for judgement in judgements:
        if judgement.scores is not None:
            scores[judgement.id, judgement.answers[0]].append(judgement.scores[criterion])
    return {place: math.fsum(found) / len(found) for place, found in sorted(scores.items())}


def pair_verdicts(judgements: Iterable[Judgement]) -> dict[PairKey, Verdicts]:
    """The verdicts on each pair that has any; failed judgements give none."""
    found: dict[PairKey, tuple[list[float], list[float]]] = {}
    for judgement in judgements:
        if judgement.p_first is None:
            continue
        first, second = judgement.answers
        key = PairKey(judgement.id, min(first, second), max(first, second))
        one_first, other_first = found.setdefault(key, ([], []))
        (one_first if first == key.one else other_first).append(judgement.p_first)
    # Sorted, so that sums do not depend on who came first.
    return {key: Verdicts(*(tuple(sorted(side)) for side in found[key])) for key in sorted(found)}


def pairs_of(prompt_id: str, num_answers: int) -> list[PairKey]:
    """All pairs of a prompt's answers."""
    return [
        PairKey(prompt_id, one, other)
        for one, other in itertools.combinations(range(num_answers), 2)
    ]
