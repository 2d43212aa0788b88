"""Means with bootstrap intervals over prompts or cases, and other statistics of responses.

Items of one group are not independent, so whole groups (prompts, cases) are drawn with replacement,
and the interval is made of percentiles of their means (Efron and Tibshirani 1993, chapter 13).

All answers to a prompt are one observation: their mean. Models are compared on the same prompts, so
a difference is taken prompt by prompt before anything is drawn (a paired bootstrap).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

Values = Mapping[str, Sequence[float | None]]
"""The values of each prompt's answers; None where an answer has none."""

NUM_RESAMPLES = 2000
NGRAMS = (1, 2)
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

    @property
    def without_zero(self) -> bool:
        """Tells whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0

    def to_json(self) -> dict[str, float | int]:
        """Returns the numbers by name."""
        return self._asdict()


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


def distinct(texts: Sequence[str], ngram: int) -> float | None:
    """Returns the mean share of distinct n-grams of characters of an answer (arXiv 1510.03055).

    Answers shorter than an n-gram do not count; None where all of them are.
    """
    shares = []
    for text in texts:
        characters = "".join(text.split())
        grams = [characters[start : start + ngram] for start in range(len(characters) - ngram + 1)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return float(np.mean(shares)) if shares else None


def bootstrap_settings(seed: int) -> dict[str, str | int]:
    """Returns the settings of the bootstrap, for a report."""
    return {"resampled": "prompts", "paired": "by prompt", "num": NUM_RESAMPLES, "seed": seed}
