"""Comparisons of other files, such as general-domain preferences, to train on beside our own."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from huatuo_jax.data.readers import read_comparisons
from huatuo_jax.data.records import Comparison
from huatuo_jax.feedback.comparison_balance import in_random_order
from huatuo_jax.feedback.comparison_config import MixedFile

REPEATED = "the same id again"
ERROR = "error in its row"
OVER_LIMIT = "over its limit"


def read_mixed(
    files: Sequence[MixedFile], *, num_own: int, seed: int
) -> tuple[list[Comparison], dict[str, int], dict[str, int]]:
    """The comparisons of other files, how many of each file, and why others are not among them.

    Their ids get the source's name in front.

    Args:
        files: which, and how much of each.
        num_own: the comparisons of our own, for `MixedFile.per_own`.
        seed: of the choice.

    Raises:
        ValueError: a file that is not there, holds no comparisons, or too many bad rows.
    """
    taken: list[Comparison] = []
    mixed: dict[str, int] = {}
    left_out = Counter[str]()
    for one in files:
        reading = read_comparisons(one.path)
        found = {}
        for comparison in reading:
            if comparison.id in found:
                left_out[REPEATED] += 1
                continue
            found[comparison.id] = dataclasses.replace(
                comparison, id=f"{comparison.source}/{comparison.id}", margin=None
            )
        left_out[ERROR] += len(reading.errors)
        left_out.update(reading.exclusions)
        bounds = [
            len(found),
            len(found) if one.limit is None else one.limit,
            len(found) if one.per_own is None else int(one.per_own * num_own),
        ]
        ordered = in_random_order(found.values(), seed=seed, purpose="mix")
        kept = ordered[: min(bounds)]
        left_out[OVER_LIMIT] += len(ordered) - len(kept)
        mixed[one.path] = len(kept)
        taken += kept
    return taken, mixed, dict(+left_out)
