"""The mixture: which examples of which source make an epoch, and in what order.

An epoch of the mixture is a fixed number of examples of each source, told by `epochs` (passes over
the source) or by `weight` (its share of the mixture). The draw is stateless: what epoch e holds
follows from the seed and e alone.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from huatuo_jax.data.shuffling import Indices, permutation


@dataclass(frozen=True, kw_only=True)
class SourceShare:
    """How much of one source an epoch of the mixture takes.

    `epochs` is the number of passes over the source, also a fraction such as 0.5 or 2.5. `weight`
    instead is the source's share of the examples, relative to the other sources' weights. `limit`
    uses at most so many of its examples, a random but fixed choice.
    """

    name: str
    epochs: float | None = None
    weight: float | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        """Refuses amounts that are not positive, and two amounts at once."""
        if self.epochs is not None and self.weight is not None:
            raise ValueError(
                f"mixture.{self.name}: epochs {self.epochs} and weight {self.weight} are both "
                "given, it should be one of them"
            )
        for field in ("epochs", "weight", "limit"):
            value = getattr(self, field)
            if value is not None and not (0 < value < math.inf):
                raise ValueError(f"mixture.{self.name}.{field}: {value}, it should be above 0")


class Mixture:
    """The examples of each epoch, in order."""

    def __init__(
        self, source_ids: Indices, names: Sequence[str], shares: Sequence[SourceShare], *, seed: int
    ) -> None:
        """Settles how many examples of each source an epoch takes.

        Args:
            source_ids: the source of every example, an index into `names`.
            names: the names of the sources there are.
            shares: the sources to take from, and how much. A share that says neither `epochs` nor
                `weight` is one epoch. Weights, if any, are said for all; the epoch then has as many
                examples as its sources (after their limits) have together.
            seed: of the choice and of the order.

        Raises:
            ValueError: an unknown or repeated name, weights for some sources only, or a share too
                small to take a single example.
        """
        _check_names(names, shares)
        self._seed = seed
        self._shares = list(shares)
        self._pools = [_pool(source_ids, names.index(share.name), share, seed) for share in shares]
        self._counts = _counts(self._shares, [len(pool) for pool in self._pools])

    def __len__(self) -> int:
        """The number of examples of an epoch, the same for all epochs."""
        return sum(self._counts)

    @property
    def examples_per_source(self) -> dict[str, int]:
        """How many examples of each source an epoch takes."""
        return {share.name: count for share, count in zip(self._shares, self._counts, strict=True)}

    def epoch(self, epoch: int) -> Indices:
        """The indices of an epoch's examples, shuffled.

        A source is gone through in a fixed random order, round and round, and each epoch goes on
        where the one before stopped. So a fraction of a source is a random part of it with nothing
        twice, and no example is ever more than one pass ahead of another.
        """
        parts = [
            pool[(epoch * count + np.arange(count)) % len(pool)]
            for pool, count in zip(self._pools, self._counts, strict=True)
        ]
        examples = np.concatenate(parts)
        return examples[permutation(len(examples), self._seed, "epoch", epoch)]


def one_epoch_each(names: Sequence[str]) -> list[SourceShare]:
    """The plain mixture: every source once an epoch."""
    return [SourceShare(name=name, epochs=1.0) for name in names]


def _pool(source_ids: Indices, source_id: int, share: SourceShare, seed: int) -> Indices:
    """The examples of a source in their fixed random order, cut to its limit."""
    members = np.flatnonzero(source_ids == source_id)
    if not len(members):
        raise ValueError(f"mixture.{share.name}: none of its examples is in the training split")
    return members[permutation(len(members), seed, "source", share.name)][: share.limit]


def _counts(shares: Sequence[SourceShare], sizes: Sequence[int]) -> list[int]:
    weights = [share.weight for share in shares if share.weight is not None]
    if weights and len(weights) != len(shares):
        unweighted = [share.name for share in shares if share.weight is None]
        raise ValueError(f"mixture: {unweighted} have no weight, it should be all sources or none")
    if weights:
        exact = [weight / sum(weights) * sum(sizes) for weight in weights]
    else:
        passes = [1.0 if share.epochs is None else share.epochs for share in shares]
        exact = [times * size for times, size in zip(passes, sizes, strict=True)]
    counts = [round(count) for count in exact]
    for share, size, count in zip(shares, sizes, counts, strict=True):
        if count == 0:
            raise ValueError(
                f"mixture.{share.name}: its share of {size} examples is less than one, it should "
                "be larger"
            )
    return counts


def _check_names(names: Sequence[str], shares: Sequence[SourceShare]) -> None:
    if not shares:
        raise ValueError(f"mixture: no source, it should name some of {list(names)}")
    wanted = Counter(share.name for share in shares)
    for name, times in wanted.items():
        if name not in names:
            raise ValueError(f"mixture: no source is named {name!r}, there are {list(names)}")
        if times > 1:
            raise ValueError(f"mixture.{name}: stands {times} times, it should stand once")
