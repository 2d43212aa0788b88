"""Means with their uncertainty, agreement beyond chance, and other statistics of responses.

Items of one group are not independent, so whole groups (prompts, cases) are drawn with replacement,
and the interval is made of percentiles of their means (Efron and Tibshirani 1993, chapter 13).

All answers to a prompt are one observation: their mean. Models are compared on the same prompts, so
a difference is taken prompt by prompt before anything is drawn (a paired bootstrap). A `Figure`, of
which others are computed, has a standard error in place of the interval.
"""

import itertools
import math
import operator
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

Values = Mapping[str, Sequence[float | None]]
"""The values of each prompt's answers; None where an answer has none."""

NUM_RESAMPLES = 2000
NGRAMS = (1, 2)
# Standard errors over fewer groups are themselves too uncertain.
LEAST_GROUPS = 20
_BYTES_AT_ONCE = 1 << 26


class Share(NamedTuple):
    """A mean over pairs with its 95 % interval, and the numbers of pairs and cases."""

    value: float
    low: float
    high: float
    num_pairs: int
    num_cases: int

    def to_json(self) -> dict[str, float | int]:
        """Returns the numbers by name."""
        return self._asdict()


class Interval(NamedTuple):
    """A mean over prompts and its 95 % interval."""

    value: float
    low: float
    high: float
    num_prompts: int

    def to_json(self) -> dict[str, float | int]:
        """Returns the numbers by name."""
        return self._asdict()


class Figure(NamedTuple):
    """A mean with its standard error and number of items; None where there are too few."""

    value: float | None
    standard_error: float | None
    num_items: int

    def __str__(self) -> str:
        """Formats the figure as `0.123 ± 0.004 (of 900)`."""
        if self.value is None:
            return "none to count"
        error = "" if self.standard_error is None else f" ± {self.standard_error:.4f}"
        return f"{self.value:.4f}{error} (of {self.num_items})"


def bootstrap_mean(
    values: Floats, cases: Ints, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Share:
    """Returns the mean of all values and its interval over resampled cases.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("values: a mean needs at least one")
    _, cases = np.unique(cases, return_inverse=True)
    num_cases = int(cases.max()) + 1
    totals = np.bincount(cases, values, num_cases)
    counts = np.bincount(cases, minlength=num_cases).astype(np.float64)
    draw = np.random.default_rng(seed)
    at_once = max(1, _BYTES_AT_ONCE // (8 * num_cases))
    means: list[Floats] = []
    for first in range(0, num_resamples, at_once):
        size = min(at_once, num_resamples - first)
        drawn = draw.multinomial(num_cases, np.full(num_cases, 1 / num_cases), size=size)
        means.append((drawn @ totals) / (drawn @ counts))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    mean = float(values.mean())
    return Share(mean, float(low), float(high), len(values), num_cases)


def mean_and_half_difference(
    ones: Floats, others: Floats, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> tuple[Share, Share]:
    """Returns the mean of two groups' means and half their difference, which may be negative.

    Each group counts for a half, however many values it has, and is resampled by itself.

    Raises:
        ValueError: a group has no values.
    """
    if not len(ones) or not len(others):
        raise ValueError("values: each group needs at least one")
    draw = np.random.default_rng(seed)

    def means(values: Floats) -> Floats:
        count = len(values)
        drawn = draw.multinomial(count, np.full(count, 1 / count), size=num_resamples)
        found: Floats = drawn @ values / count
        return found

    resampled = means(ones), means(others)

    def share(sign: int) -> Share:
        low, high = np.quantile((resampled[0] + sign * resampled[1]) / 2, (0.025, 0.975))
        value = (float(ones.mean()) + sign * float(others.mean())) / 2
        count = len(ones) + len(others)
        return Share(value, float(low), float(high), count, count)

    return share(1), share(-1)


def mean_over_prompts(values: Values, *, seed: int = 0) -> Interval | None:
    """Returns the mean of the prompts' means; None where no answer has a value."""
    means = prompt_means(values)
    return interval_of(list(means.values()), seed=seed)


def prompt_means(values: Values) -> dict[str, float]:
    """Returns the mean of each prompt that has a value, in the order given."""
    known = {
        name: [value for value in found if value is not None] for name, found in values.items()
    }
    return {name: float(np.mean(found)) for name, found in known.items() if found}


def interval_of(per_prompt: Sequence[float], *, seed: int) -> Interval | None:
    """Returns the mean of one number a prompt, with its interval; None without any."""
    if not per_prompt:
        return None
    values_P: Floats = np.asarray(per_prompt, np.float64)
    share = bootstrap_mean(values_P, np.arange(len(values_P)), seed=seed)
    return Interval(share.value, share.low, share.high, share.num_cases)


def mean_difference(values: Values, others: Values, *, seed: int = 0) -> Interval | None:
    """Returns the mean of `values` minus `others`, over the prompts with a value in both."""
    one, other = prompt_means(values), prompt_means(others)
    return interval_of([one[name] - other[name] for name in one if name in other], seed=seed)


def slope_within_prompts(values: Values, lengths: Values) -> float:
    """Returns the slope of values over lengths among answers to one prompt.

    Least squares with an intercept of its own for each prompt; 0 where lengths do not differ.
    """
    products = squares = 0.0
    for name, found in values.items():
        pairs = [
            (value, length)
            for value, length in zip(found, lengths[name], strict=True)
            if value is not None and length is not None
        ]
        if not pairs:
            continue
        values_N, lengths_N = np.asarray(pairs, np.float64).T
        centred_N = lengths_N - lengths_N.mean()
        products += float(centred_N @ values_N)
        squares += float(centred_N @ centred_N)
    return products / squares if squares else 0.0


def distinct_share(tokens: Sequence[Hashable], ngram: int) -> float | None:
    """Returns the share of distinct n-grams among all of a response (arXiv 1510.03055).

    None where it is shorter than an n-gram.
    """
    grams = [tuple(tokens[start : start + ngram]) for start in range(len(tokens) - ngram + 1)]
    return len(set(grams)) / len(grams) if grams else None


def distinct(texts: Sequence[str], ngram: int) -> float | None:
    """Returns the mean share of distinct n-grams of characters, without white space, of an answer.

    Answers shorter than an n-gram do not count; None where all of them are.
    """
    shares = [distinct_share("".join(text.split()), ngram) for text in texts]
    known = [share for share in shares if share is not None]
    return float(np.mean(known)) if known else None


def bootstrap_settings(seed: int) -> dict[str, str | int]:
    """Returns the settings of the bootstrap, for a report."""
    return {"resampled": "prompts", "paired": "by prompt", "num": NUM_RESAMPLES, "seed": seed}


def mean_figure(values: Sequence[float], groups: Sequence[str]) -> Figure:
    """Returns a mean with a standard error that allows for correlation within each group.

    The error is `sqrt(C / (C - 1) * sum over groups of (sum of deviations)^2) / n` over C groups,
    which is the usual one where every value is its own group, as with fewer than `LEAST_GROUPS`
    groups.

    Args:
        values: any numbers; a share is the mean of zeros and ones.
        groups: the prompt id of each value.
    """
    count = len(values)
    if not count:
        return Figure(None, None, 0)
    mean = math.fsum(values) / count
    deviations: dict[object, list[float]] = defaultdict(list)
    grouped = len(set(groups)) >= LEAST_GROUPS
    for place, (value, group) in enumerate(zip(values, groups, strict=True)):
        deviations[group if grouped else place].append(value - mean)
    if len(deviations) < 2:
        return Figure(mean, None, count)
    squares = math.fsum(math.fsum(found) ** 2 for found in deviations.values())
    correction = len(deviations) / (len(deviations) - 1)
    return Figure(mean, math.sqrt(correction * squares) / count, count)


def chance_agreement(labels: Sequence[Hashable], others: Sequence[Hashable]) -> Fraction:
    """Computes the agreement that two raters would have by chance, from their shares of each label.

    It is exact, so that 1 is recognised: both gave one and the same label to all items.
    """
    counts, other_counts = Counter(labels), Counter(others)
    expected = sum(count * other_counts[label] for label, count in counts.items())
    return Fraction(expected, len(labels) * len(others))


def cohen_kappa(labels: Sequence[Hashable], others: Sequence[Hashable]) -> float | None:
    """Computes the unweighted kappa of two raters of the same items (Cohen 1960).

    Returns:
        None where there is no item, or where chance alone would make the two agree on all.

    Raises:
        ValueError: the two have labels for different numbers of items.
    """
    if len(labels) != len(others):
        raise ValueError(f"kappa of {len(labels)} labels and {len(others)}; it needs as many")
    if not labels or (chance := chance_agreement(labels, others)) == 1:
        return None
    observed = Fraction(sum(map(operator.eq, labels, others)), len(labels))
    return float((observed - chance) / (1 - chance))


def fleiss_kappa(items: Sequence[Sequence[Hashable]]) -> float | None:
    """Computes the kappa of several raters (Fleiss 1971).

    Args:
        items: of each item the labels that it was given, as many for each item.

    Returns:
        None where there is no item, fewer than two labels an item, or one label for all.

    Raises:
        ValueError: items with different numbers of labels.
    """
    sizes = sorted({len(labels) for labels in items})
    if len(sizes) > 1:
        raise ValueError(f"Fleiss' kappa of items with {sizes} labels; it needs as many for each")
    if not sizes or sizes[0] < 2:
        return None
    size, total = sizes[0], sizes[0] * len(items)
    counts = [Counter(labels) for labels in items]
    totals = Counter(itertools.chain.from_iterable(items))
    if len(totals) == 1:
        return None
    agreeing = sum(count * (count - 1) for one in counts for count in one.values())
    observed = agreeing / (total * (size - 1))
    expected = sum(count * count for count in totals.values()) / (total * total)
    return (observed - expected) / (1 - expected)


def agreement_share(labels: Sequence[Hashable], others: Sequence[Hashable]) -> float | None:
    """The share of the items on which two raters agree; None where there is no item."""
    if not labels:
        return None
    return sum(a == b for a, b in zip(labels, others, strict=True)) / len(labels)
