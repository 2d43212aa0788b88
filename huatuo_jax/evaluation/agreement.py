"""Agreement between raters beyond chance: Cohen's kappa of two, Fleiss' kappa of several."""

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence


def cohen_kappa(labels: Sequence[Hashable], others: Sequence[Hashable]) -> float | None:
    """Computes the unweighted kappa of two raters of the same items (Cohen 1960).

    Returns:
        None where there is no item, or where chance alone would make the two agree on all.

    Raises:
        ValueError: the two have labels for different numbers of items.
    """
    if len(labels) != len(others):
        raise ValueError(f"kappa of {len(labels)} labels and {len(others)}; it needs as many")
    num = len(labels)
    counts, other_counts = Counter(labels), Counter(others)
    # Whole numbers, so that agreement by chance alone is recognised exactly.
    observed = num * sum(one == other for one, other in zip(labels, others, strict=True))
    expected = sum(count * other_counts[label] for label, count in counts.items())
    if expected == num * num:
        return None
    return (observed - expected) / (num * num - expected)


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
