"""The questions that a judge is asked, and the verdicts on pairs of answers that follow from them.

Nothing here depends on the order of the judgements: a question that was judged more than once (by
a judge whose settings changed) counts with the mean of its verdicts.
"""

import itertools
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from huatuo_jax.core.statistics import Interval, mean_over_prompts
from huatuo_jax.data.answers import Sampled, SampledPrompt
from huatuo_jax.data.files import RowError, read_rows
from huatuo_jax.data.records import Prompt, answer, same_answer
from huatuo_jax.judge.judgements import (
    INDEX_NAMES,
    Judge,
    Judgement,
    JudgementFailed,
    Protocol,
    Reply,
    prompt_hash,
    question_key,
    sha256,
)

SMALLEST_PROBABILITY = 1e-6
"""A verdict nearer to 0 or 1 than this is certain: how much nearer depends on rounding alone."""

LARGEST_LOG_ODDS = math.log1p(-SMALLEST_PROBABILITY) - math.log(SMALLEST_PROBABILITY)
"""The log-odds of that probability: 13.8."""

FAILED = "the judgement failed"
NO_PROMPT = "no such prompt or answer in the answers file"
OTHER_TEXT = "judged another text than the answers file holds"


@dataclass(frozen=True)
class Answered:
    """A prompt and the texts of its answers, in the order of the file.

    Attributes:
        prompt: with its extra fields.
        answers: their texts.
        sampled: how each was sampled; empty where the file has texts alone.
        sampled_prompt: the prompt that the model was given.
    """

    prompt: Prompt
    answers: tuple[str, ...]
    sampled: tuple[Sampled, ...] = ()
    sampled_prompt: SampledPrompt | None = None

    def sampled_fields(self, index: int, *, prefix: str) -> dict[str, Any]:
        """Returns how an answer was sampled, as fields of a record of several answers."""
        return self.sampled[index].to_fields(prefix=prefix) if self.sampled else {}


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question to a judge.

    Attributes:
        prompt: with its reference.
        protocol: "score" for one answer, "pairwise" for two.
        answers: indices of the prompt's answers, in the order shown.
        texts: of those answers.
        key: hash of the whole question; equal questions have equal keys.
        judge: the judge's name.
        template: hash of the judge's template.
    """

    prompt: Prompt
    protocol: Protocol
    answers: tuple[int, ...]
    texts: tuple[str, ...]
    key: str
    judge: str
    template: str

    @property
    def identity(self) -> tuple[str, str, tuple[int, ...]]:
        """Returns key, prompt id and answers, as `Judgement.identity` does."""
        return self.key, self.prompt.id, self.answers

    async def ask(self, judge: Judge) -> Reply:
        """Asks the judge; raises as `judgements.Judge` does."""
        if self.protocol == "score":
            return await judge.score(self.prompt, self.texts[0])
        return await judge.compare(self.prompt, self.texts[0], self.texts[1])

    def judgement(self, outcome: Reply | JudgementFailed, *, paid: bool) -> Judgement:
        """Returns the record of the judge's verdict, or of its failure.

        Args:
            outcome: from `ask`.
            paid: this record carries tokens and cost; False for a copy of an equal question's.
        """
        fields: dict[str, Any] = dict(zip(INDEX_NAMES[self.protocol], self.answers, strict=True))
        if isinstance(outcome, Reply):
            fields |= {name: getattr(outcome, name) for name in ("scores", "p_first", "reason")}
        else:
            fields |= {name: getattr(outcome, name) for name in ("failure", "max_tokens")}
            fields["error"] = str(outcome)
        return Judgement(
            id=self.prompt.id,
            key=self.key,
            protocol=self.protocol,
            **fields,
            judge=self.judge,
            template=self.template,
            raw=outcome.raw,
            usage=outcome.usage if paid else None,
            cost=outcome.cost if paid else 0.0,
            latency_s=outcome.latency_s,
            prompt_sha256=prompt_hash(self.prompt),
            answer_sha256=tuple(map(sha256, self.texts)),
        )

    def copy_of(self, judgement: Judgement) -> Judgement:
        """Returns the record of a verdict that an equal question already has."""
        kept = ("scores", "p_first", "reason", "raw", "latency_s")
        reply = Reply(**{name: getattr(judgement, name) for name in kept})
        return self.judgement(reply, paid=False)


def read_answered(path: str | os.PathLike[str], *, encoding: str | None = None) -> list[Answered]:
    """Reads the records of an answers file.

    Raises:
        ValueError: there is no such file, or a row is not an answers record or repeats an id.
    """
    found: dict[str, Answered] = {}
    for row in read_rows(path, encoding=encoding):
        if isinstance(row, RowError):
            raise ValueError(str(row))
        try:
            answered = _answered(row.value)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{row.file}:{row.line}: not an answers record: {error}") from error
        if answered.prompt.id in found:
            raise ValueError(f"{row.file}:{row.line}: id {answered.prompt.id!r} is repeated")
        found[answered.prompt.id] = answered
    if not found:
        raise ValueError(f"{path}: holds no answers")
    return list(found.values())


def score_questions(answered: Iterable[Answered], judge: Judge) -> Iterator[Question]:
    """Yields every answer by itself, so that no score depends on its neighbours."""
    for item in answered:
        for index in range(len(item.answers)):
            yield _question(item, "score", (index,), judge)


def differ(text: str, other: str) -> bool:
    """Returns True if two texts are worth a question; empty ones are all the same."""
    return not same_answer(answer(text), answer(other))


def pairwise_questions(
    answered: Iterable[Answered], judge: Judge, *, max_pairs: int | None = None
) -> Iterator[Question]:
    """Yields every two different answers of a prompt, in both orders.

    Args:
        answered: prompts and answers.
        judge: the judge to ask.
        max_pairs: pairs of a prompt at most; they are chosen by the answers' texts, so that the
            choice does not depend on the order in the file.
    """
    for item in answered:
        pairs = [
            pair
            for pair in itertools.combinations(range(len(item.answers)), 2)
            if differ(*(item.answers[index] for index in pair))
        ]
        if max_pairs is not None and len(pairs) > max_pairs:
            pairs = sorted(sorted(pairs, key=lambda pair: _lot(item, pair))[:max_pairs])
        for first, second in pairs:
            yield _question(item, "pairwise", (first, second), judge)
            yield _question(item, "pairwise", (second, first), judge)


class PairKey(NamedTuple):
    """Two answers of one prompt, by their indices in the answers file; `one` is below `other`."""

    id: str
    one: int
    other: int


class Combined(NamedTuple):
    """The combined verdict of both orders on a pair.

    Attributes:
        p_one: the probability that `one` is better.
        contradicts: the two orders prefer different answers.
        voted: the judge gave votes (0, 0.5, 1) on the pair, not probabilities.
    """

    p_one: float
    contradicts: bool
    voted: bool


class Verdicts(NamedTuple):
    """All verdicts on a pair: probabilities of the answer shown first, by the order shown."""

    one_first: tuple[float, ...]
    other_first: tuple[float, ...]

    @property
    def both_orders(self) -> bool:
        """Returns True if each order was judged."""
        return bool(self.one_first and self.other_first)

    def combined(self) -> Combined:
        """Combines both orders into one soft label.

        Where the judge gives probabilities, the log-odds of the orders are averaged, which removes
        a position bias that is additive in the log-odds exactly; those of a certain verdict are
        bounded, see `bounded_log_odds`. Votes are averaged directly, so that two orders that
        contradict each other give 0.5.
        """
        assert self.both_orders
        for_one, for_other = self.leanings()
        mean = (for_one - for_other) / 2
        p_one = 0.5 + mean if self.voted else probability(mean)
        return Combined(p_one, for_one * for_other > 0, self.voted)

    @property
    def voted(self) -> bool:
        """Returns True if every verdict is certain or a tie, as from a judge that only votes."""
        return all(p == 0.5 or is_certain(p) for p in (*self.one_first, *self.other_first))

    @property
    def certain(self) -> bool:
        """Returns True if one of the verdicts is certain, so that its log-odds are unknown."""
        return any(map(is_certain, (*self.one_first, *self.other_first)))

    def leanings(self) -> tuple[float, float]:
        """Returns how far each order prefers the answer that it shows first.

        In log-odds, or for votes their mean around 0. The two orders contradict each other if the
        signs are equal.
        """
        measured = vote if self.voted else bounded_log_odds
        of_one, of_other = (math.fsum(map(measured, shown)) / len(shown) for shown in self)
        return of_one, of_other


def is_certain(p: float) -> bool:
    """Returns True if a probability is within `SMALLEST_PROBABILITY` of 0 or 1."""
    return min(p, 1.0 - p) <= SMALLEST_PROBABILITY


def log_odds(p: float) -> float:
    """Returns the logarithm of p / (1 - p) for p between 0 and 1, both excluded."""
    return math.log(p) - math.log1p(-p)


def bounded_log_odds(p: float) -> float:
    """Returns the log-odds of a verdict, within +-`LARGEST_LOG_ODDS`.

    A certain verdict thus counts the same whether or not its judge rounds it to 1.
    """
    return log_odds(min(max(p, SMALLEST_PROBABILITY), 1.0 - SMALLEST_PROBABILITY))


def probability(log_odds: float) -> float:
    """Returns the probability of these log-odds, precise also where it is small."""
    odds = math.exp(-abs(log_odds))
    return (1.0 if log_odds >= 0 else odds) / (1.0 + odds)


def vote(p: float) -> float:
    """Returns -0.5, 0 or 0.5 by the side of 0.5 that a probability is on."""
    return (p > 0.5) / 2 - (p < 0.5) / 2


def one_judge(
    judgements: Iterable[Judgement],
    *,
    judge: str | None = None,
    template: str | None = None,
    protocol: Protocol | None = None,
) -> list[Judgement]:
    """Selects the judgements of one judge with one template under one protocol.

    Raises:
        ValueError: none match, or more than one such combination; the message lists them.
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
    """Splits judgements into those of the given texts, and the others with the reason.

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
    """Returns the score of each answer that has one, by prompt id and index."""
    scores: dict[tuple[str, int], list[float]] = defaultdict(list)
    for judgement in judgements:
        if judgement.scores is not None:
            scores[judgement.id, judgement.answers[0]].append(judgement.scores[criterion])
    return {place: math.fsum(found) / len(found) for place, found in sorted(scores.items())}


def pair_verdicts(judgements: Iterable[Judgement]) -> dict[PairKey, Verdicts]:
    """Returns the verdicts on each pair that has any; failed judgements give none."""
    found: dict[PairKey, tuple[list[float], list[float]]] = {}
    for judgement in judgements:
        if judgement.p_first is None:
            continue
        first, second = judgement.answers
        key = PairKey(judgement.id, min(first, second), max(first, second))
        one_first, other_first = found.setdefault(key, ([], []))
        (one_first if first == key.one else other_first).append(judgement.p_first)
    # Sorted, so that sums do not depend on the order of arrival.
    return {key: Verdicts(*(tuple(sorted(side)) for side in found[key])) for key in sorted(found)}


def pairs_of(prompt_id: str, num_answers: int) -> list[PairKey]:
    """Returns all pairs of a prompt's answers."""
    return [
        PairKey(prompt_id, one, other)
        for one, other in itertools.combinations(range(num_answers), 2)
    ]


class Verdict(NamedTuple):
    """The first model's points on one pair in each order: 1, 1/2 or 0."""

    shown_first: float
    shown_second: float

    @property
    def points(self) -> float:
        """Returns 1 for a win, 1/2 for a tie or for contradicting orders, 0 for a loss."""
        total = self.shown_first + self.shown_second
        return 0.5 if total == 1.0 else float(total > 1.0)


def points_of(p_first: float) -> float:
    """Returns 1 if the judge prefers the answer shown first, 0 if the other, 1/2 for a tie."""
    return 0.5 if p_first == 0.5 else float(p_first > 0.5)


def verdicts_of(judgements: Iterable[Judgement], *, one: int, other: int) -> dict[str, Verdict]:
    """Returns the verdicts on two answers of each prompt that was judged in both orders.

    Args:
        judgements: current pairwise ones, see `judgements.current`.
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
    """Counts the first model's wins, ties and losses; gives its share with its interval.

    Pairs without a verdict count as `failed`, and in no other figure.
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


def _answered(row: object) -> Answered:
    if not isinstance(row, dict) or not isinstance(row.get("answers"), list):
        raise ValueError("it should be an object with a list of answers")
    prompt = Prompt.from_json({**row, "source": row["source"] if "source" in row else ""})
    for name in ("id", "reference", "diagnosis"):
        value = getattr(prompt, name)
        if not isinstance(value, str) and not (value is None and name != "id"):
            raise ValueError(f"{name} is {value!r}; it should be text")
    return Answered(
        prompt,
        tuple(map(_text, row["answers"])),
        tuple(map(Sampled.from_fields, row["answers"])),
        SampledPrompt.from_fields(row),
    )


def _text(item: object) -> str:
    text = item["text"] if isinstance(item, dict) and "text" in item else None
    if not isinstance(text, str):
        raise ValueError('each of its answers should be an object with a text, {"text": "..."}')
    return text


def _question(
    item: Answered, protocol: Protocol, answers: tuple[int, ...], judge: Judge
) -> Question:
    texts = tuple(item.answers[index] for index in answers)
    template = judge.template_hash(protocol)
    return Question(
        prompt=item.prompt,
        protocol=protocol,
        answers=answers,
        texts=texts,
        key=question_key(
            settings=judge.settings,
            protocol=protocol,
            template=template,
            prompt=item.prompt,
            texts=texts,
        ),
        judge=judge.name,
        template=template,
    )


def _lot(item: Answered, pair: Sequence[int]) -> str:
    texts = sorted(item.answers[index] for index in pair)
    return sha256("\0".join([prompt_hash(item.prompt), *texts]))
