"""Figures over prompts, each with the interval of a bootstrap that draws prompts.

All answers to a prompt are one observation: their mean stands for the prompt. Models are compared
on the same prompts, so a difference is taken prompt by prompt before anything is drawn (a paired
bootstrap).
"""

from collections.abc import Sequence

import numpy as np

from huatuo_jax.feedback.intervals import (
    NUM_RESAMPLES,
    Interval,
    Values,
    interval_of,
    prompt_means,
)

NGRAMS = (1, 2)


def mean_difference(values: Values, others: Values, *, seed: int = 0) -> Interval | None:
    """How much higher the first is, over the prompts that have a value in both."""
    one, other = prompt_means(values), prompt_means(others)
    return interval_of([one[name] - other[name] for name in one if name in other], seed=seed)


def slope_within_prompts(values: Values, lengths: Values) -> float:
    """How much a value rises with each unit of length among answers to one prompt.

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
    """The mean over answers of the share of distinct n-grams of characters (arXiv 1510.03055).

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
    """What a reader must know of the intervals."""
    return {"resampled": "prompts", "paired": "by prompt", "num": NUM_RESAMPLES, "seed": seed}
