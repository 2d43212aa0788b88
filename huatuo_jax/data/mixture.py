"""The mixture: which examples of which source make an epoch, and in what order.

An epoch of the mixture is a fixed number of examples of each source, told by `epochs` (passes over
the source) or by `weight` (its share of the mixture). The draw is stateless: what epoch e holds
follows from the seed and e alone.

Random order without a random state: everything follows from a key.

Numpy's own generators may change their streams between releases, and they have a state to save.
Here the random number of an item is a hash of the key and the item's index, so that an order is
the same in every process, on every host and in every release.

The held-out split, told from a dialogue's own content.

Whether a dialogue is held out depends on its text, the salt and the share, and on nothing else: it
stays where it is when data is added, removed or reordered. A larger share keeps all that a smaller
one held out.
"""

import hashlib
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from huatuo_jax.data.records import Message

Indices = npt.NDArray[np.int64]

_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


def key_number(*key: int | str) -> int:
    """A number of 64 bits that stands for a key; each part's place and type count."""
    plain = tuple(part if isinstance(part, str) else int(part) for part in key)  # no numpy scalars
    return int.from_bytes(hashlib.blake2b(repr(plain).encode(), digest_size=8).digest(), "big")


def mix_bits(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Spreads every bit of 64-bit numbers over all bits; one to one.

    It is the output function of SplitMix64 (Steele, Lea and Flood 2014).
    """
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def permutation(num_items: int, *key: int | str) -> Indices:
    """A permutation of `0 .. num_items - 1` that depends on its key and on nothing else."""
    counters = np.arange(1, num_items + 1, dtype=np.uint64) * _GOLDEN_RATIO
    # Item i gets number i of the SplitMix64 stream that the key starts.
    return np.argsort(mix_bits(counters + np.uint64(key_number(*key))), kind="stable")


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


Item = TypeVar("Item")

_TURN_BREAK = "\n"  # Stands in no normalised text, so turns cannot run into each other unseen.


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """What share of the dialogues is held out, 0 to 1, and the salt of the draw."""

    share: float = 0.02
    salt: str = "held-out"

    def __post_init__(self) -> None:
        """Refuses a share that leaves nothing to train."""
        if not 0.0 <= self.share < 1.0:
            raise ValueError(f"held_out.share: {self.share}, it should be 0 or more and below 1")

    def holds_out(self, text: str) -> bool:
        """Tells whether the dialogue of this normalised text (`dialogue_text`) is held out."""
        salted = hashlib.blake2b(
            text.encode("utf-8", "surrogatepass"), digest_size=8, key=_salt_key(self.salt)
        )
        return int.from_bytes(salted.digest(), "big") < self.share * 2**64


def normalised(text: str) -> str:
    """A text without what copies differ in: width and form of characters, case, white space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(folded.split())


def dialogue_text(messages: Sequence[Message]) -> str:
    """The normalised turns of a dialogue, one a line; equal texts are duplicates.

    The system message is left out: it is mostly one text over a whole source, and the dialogue
    under it is no other dialogue.
    """
    spoken = (message for message in messages if message.role != "system")
    return _TURN_BREAK.join(normalised(message.content) for message in spoken)


def chosen_by_content(
    items: Sequence[Item], limit: int | None, *, text: Callable[[Item], str]
) -> list[Item]:
    """Selects at most `limit` items by a hash of their text, in the order given.

    Args:
        items: to choose from.
        limit: how many; None for all.
        text: the content of one.
    """
    if limit is None or len(items) <= limit:
        return list(items)
    digests = [hashlib.sha256(text(one).encode("utf-8", "surrogatepass")).digest() for one in items]
    kept = sorted(range(len(items)), key=digests.__getitem__)[:limit]
    return [items[index] for index in sorted(kept)]


def _salt_key(salt: str) -> bytes:
    """The salt as a hash key; blake2b takes at most 64 bytes."""
    return hashlib.sha256(salt.encode("utf-8")).digest()
