"""Scores answers to exam questions: accuracy with confidence intervals, unparsed replies, bias."""

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

from huatuo_jax.evaluation.exam_questions import Question

Answer = frozenset[str] | None
"""The labels that a reply chose; None where it could not be read."""

Name = TypeVar("Name")
_Z_95 = 1.959963984540054  # The normal distribution's 97.5th percentile.


class Proportion(NamedTuple):
    """A share with its 95 % confidence interval.

    Attributes:
        value: the share.
        low: of the interval.
        high: of the interval.
        num: how many it is a share of.
    """

    value: float
    low: float
    high: float
    num: int


class Macro(NamedTuple):
    """An unweighted mean of shares with its 95 % confidence interval.

    Attributes:
        value: the mean.
        low: of the interval.
        high: of the interval.
        num_groups: how many shares it is the mean of.
    """

    value: float
    low: float
    high: float
    num_groups: int


@dataclass(frozen=True, kw_only=True)
class OptionBias:
    """The frequency of one option in the answers and in the keys.

    Attributes:
        given: share of the answers that could be read that have it; None where none could be read.
        key: share of the same questions whose right answer has it.
        recall: of the questions whose right answer has it, the share whose answer has it, too, an
            unparsed reply being none; None where no right answer has it.
    """

    given: float | None
    key: float | None
    recall: float | None


@dataclass(frozen=True, kw_only=True)
class ExamScores:
    """The figures of one model on one exam.

    Attributes:
        accuracy: share of the questions answered with exactly the right options; an unparsed reply
            is wrong.
        unparsed: share of the questions whose reply could not be read.
        by_subject: accuracy by category and class, as in `Question`.
        by_category: CMB's figure: the unweighted mean over a category's classes.
        macro: the unweighted mean over all categories of `by_category`.
        by_kind: accuracy of single and of multiple choice.
        by_option: bias by label, without labels that neither a key nor an answer has.
    """

    accuracy: Proportion
    unparsed: Proportion
    by_subject: Mapping[tuple[str, str], Proportion]
    by_category: Mapping[str, Macro]
    macro: Macro
    by_kind: Mapping[str, Proportion]
    by_option: Mapping[str, OptionBias]

    def to_json(self) -> dict[str, Any]:
        """All figures by name; classes as lists, since JSON has no pairs as keys."""
        return {
            "accuracy": self.accuracy._asdict(),
            "unparsed": self.unparsed._asdict(),
            "by_subject": [
                {"category": category, "subject": subject, **share._asdict()}
                for (category, subject), share in self.by_subject.items()
            ],
            "by_category": {name: one._asdict() for name, one in self.by_category.items()},
            "macro": self.macro._asdict(),
            "by_kind": {name: one._asdict() for name, one in self.by_kind.items()},
            "by_option": {label: asdict(one) for label, one in self.by_option.items()},
        }


class Choice(NamedTuple):
    """The answer chosen by likelihood.

    Attributes:
        answer: the labels of the likeliest answer; None where two are equally likely.
        gap: of its log-likelihood to the next one's, in nats; per unit of length where normalised.
    """

    answer: Answer
    gap: float


def score_exam(questions: Sequence[Question], answers: Sequence[Answer]) -> ExamScores:
    """The figures of the answers to some questions.

    Raises:
        ValueError: no questions, or not as many answers.
    """
    if not questions or len(questions) != len(answers):
        raise ValueError(
            f"answers: {len(answers)} to {len(questions)} questions; there should be one for each "
            "of at least one question"
        )
    right = [given == one.answer for one, given in zip(questions, answers, strict=True)]
    by_subject = _shares(((one.category, one.subject) for one in questions), right)
    categories: dict[str, list[Proportion]] = {}
    for (category, _), share in by_subject.items():
        categories.setdefault(category, []).append(share)
    by_category = {category: macro_mean(shares) for category, shares in categories.items()}
    return ExamScores(
        accuracy=wilson(sum(right), len(right)),
        unparsed=wilson(sum(given is None for given in answers), len(answers)),
        by_subject=by_subject,
        by_category=by_category,
        macro=macro_mean(list(by_category.values())),
        by_kind=_shares((one.kind for one in questions), right),
        by_option=_option_bias(questions, answers),
    )


def wilson(num_hits: int, num: int) -> Proportion:
    """A share with the interval of Wilson's score test (J. Am. Stat. Assoc. 22, 1927).

    Raises:
        ValueError: a share of nothing.
    """
    if not 0 <= num_hits <= num or not num:
        raise ValueError(f"num: {num_hits} of {num}; it should be a part of at least one")
    share = num_hits / num
    spread = _Z_95 * _Z_95 / num
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    # At none and at all the formula is exactly 0 and 1, but for rounding.
    low = 0.0 if num_hits == 0 else middle - half
    high = 1.0 if num_hits == num else middle + half
    return Proportion(share, low, high, num)


def macro_mean(shares: Sequence[Proportion | Macro]) -> Macro:
    """The unweighted mean of independent shares.

    Its interval is put together from theirs by the variance estimates recovery of Zou and Donner
    (Stat. Med. 27, 2008), so that it is not empty where all shares are 0 or 1.
    """
    count = len(shares)
    value = math.fsum(share.value for share in shares) / count
    below = math.sqrt(math.fsum((share.value - share.low) ** 2 for share in shares)) / count
    above = math.sqrt(math.fsum((share.high - share.value) ** 2 for share in shares)) / count
    return Macro(value, value - below, value + above, count)


def choose_by_likelihood(
    log_probs: Sequence[float],
    answers: Sequence[frozenset[str]],
    *,
    lengths: Sequence[int] | None = None,
) -> Choice:
    """The likeliest of some answers.

    Args:
        log_probs: the log-likelihood of each answer's continuation, in nats.
        answers: the labels of each.
        lengths: of the continuations, in tokens, characters or bytes, by which the log-likelihoods
            are divided; None for no normalisation.

    Raises:
        ValueError: counts differ, a length is not positive, or a log-likelihood is not a number.
    """
    lengths = [1] * len(answers) if lengths is None else lengths
    if not len(log_probs) == len(answers) == len(lengths) or len(answers) < 2:
        raise ValueError(
            f"log_probs: {len(log_probs)} for {len(answers)} answers and {len(lengths)} lengths; "
            "there should be one of each for at least two"
        )
    if any(length <= 0 for length in lengths):
        raise ValueError(f"lengths: {min(lengths)} should be positive")
    if any(math.isnan(value) for value in log_probs):
        raise ValueError(f"log_probs: {list(log_probs)} should be numbers")
    values = [value / length for value, length in zip(log_probs, lengths, strict=True)]
    best = max(range(len(values)), key=values.__getitem__)
    rest = max(value for place, value in enumerate(values) if place != best)
    if values[best] == rest:
        return Choice(None, 0.0)
    return Choice(answers[best], values[best] - rest)


def _shares(names: Iterable[Name], right: Sequence[bool]) -> dict[Name, Proportion]:
    """Accuracy by name, in the order in which the names appear."""
    totals: collections.Counter[Name] = collections.Counter()
    hits: collections.Counter[Name] = collections.Counter()
    for name, is_right in zip(names, right, strict=True):
        totals[name] += 1
        hits[name] += is_right
    return {name: wilson(hits[name], total) for name, total in totals.items()}


def _option_bias(questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, OptionBias]:
    read = [(one.answer, given) for one, given in zip(questions, answers, strict=True) if given]
    labels = sorted(
        {label for one in questions for label in one.answer}.union(*(g for _, g in read))
    )
    bias = {}
    for label in labels:
        keyed = [g for one, g in zip(questions, answers, strict=True) if label in one.answer]
        bias[label] = OptionBias(
            given=_mean(label in given for _, given in read),
            key=_mean(label in key for key, _ in read),
            recall=_mean(label in (given or ()) for given in keyed),
        )
    return bias


def _mean(values: Iterable[bool]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None
