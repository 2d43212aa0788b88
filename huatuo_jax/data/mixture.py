"""Which dialogues are trained on, and in what order: held-out split, duplicates, mixture.

Everything is drawn by hashes instead of a random state, so that a choice or an order is the same in
every process, on every host and in every release. (NumPy's generators may change their streams
between releases, and they have a state to save.)

- Held out: whether a dialogue is held out depends on its text, the salt and the share only. It
  stays where it is when data is added, removed or reordered, and a larger share keeps all that a
  smaller one held out.
- Duplicates: exact duplicates have one normalized text. Near duplicates are found by MinHash
  signatures of their character n-grams and locality-sensitive hashing of the signatures in bands
  (Broder 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3); every
  candidate is verified by the true Jaccard index of the two sets of n-grams.
- Mixture: an epoch is a fixed number of examples of each source, given by `epochs` (passes over
  the source) or by `weight` (its share of the mixture). What epoch e holds follows from the seed
  and e alone.
"""

import hashlib
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from huatuo_jax.data.records import Message

Indices = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Signatures = npt.NDArray[np.uint32]
Item = TypeVar("Item")

_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)
_HASHES_AT_ONCE = 1 << 14  # n-grams times signature length stay inside the processor's cache
_TURN_BREAK = "\n"  # Stands in no normalized text, so turns cannot run into each other unseen.


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """The dialogues that are held out, chosen by their content.

    Attributes:
        share: of the dialogues, 0 to 1.
        salt: of the draw; another one holds out others.
    """

    share: float = 0.02
    salt: str = "held-out"

    def __post_init__(self) -> None:
        """Refuses a share that leaves nothing to train."""
        if not 0.0 <= self.share < 1.0:
            raise ValueError(f"held_out.share: {self.share}, it should be 0 or more and below 1")

    def holds_out(self, text: str) -> bool:
        """Returns whether the dialogue of a normalized text (`dialogue_text`) is held out."""
        salted = hashlib.blake2b(
            text.encode("utf-8", "surrogatepass"), digest_size=8, key=_salt_key(self.salt)
        )
        return int.from_bytes(salted.digest(), "big") < self.share * 2**64


@dataclass(frozen=True, kw_only=True)
class DuplicatesConfig:
    """The definition of a duplicate, and whether duplicates are removed.

    Attributes:
        remove: remove from the training data dialogues that are also held out (exactly or nearly),
            and exact repetitions. Otherwise duplicates are only reported.
        threshold: the Jaccard index from which two dialogues are near duplicates, 0.5 to 1.
        ngram: the number of characters in an n-gram.
        num_hashes: the length of a signature.
        num_bands: of a signature. With 128 hashes in 32 bands a pair of Jaccard index 0.8 is missed
            once in 10 million, one of 0.7 once in 6,000, one of 0.5 one time in 8.
    """

    remove: bool = True
    threshold: float = 0.8
    ngram: int = 5
    num_hashes: int = 128
    num_bands: int = 32

    def __post_init__(self) -> None:
        """Refuses settings for which the search is not reliable."""
        if not 0.5 <= self.threshold <= 1.0:
            raise ValueError(
                f"duplicates.threshold: {self.threshold}, it should be 0.5 to 1 (the search is "
                "not made for less similar texts)"
            )
        if self.ngram < 1:
            raise ValueError(f"duplicates.ngram: {self.ngram}, it should be at least 1")
        if self.num_bands < 1 or self.num_hashes % self.num_bands:
            raise ValueError(
                f"duplicates.num_bands: {self.num_bands}, it should divide num_hashes "
                f"{self.num_hashes}"
            )


@dataclass(frozen=True, kw_only=True)
class SourceShare:
    """The amount of one source in an epoch of the mixture.

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


def key_number(*key: int | str) -> int:
    """Returns a 64-bit number for a key; the place and type of each part count."""
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
    """Returns a permutation of `0 .. num_items - 1` that depends on its key only."""
    counters = np.arange(1, num_items + 1, dtype=np.uint64) * _GOLDEN_RATIO
    # Item i gets number i of the SplitMix64 stream that the key starts.
    return np.argsort(mix_bits(counters + np.uint64(key_number(*key))), kind="stable")


def normalized(text: str) -> str:
    """Normalizes what copies may differ in: width and form of characters, case, white space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(folded.split())


def dialogue_text(messages: Sequence[Message]) -> str:
    """Returns the normalized turns of a dialogue, one a line; equal texts are duplicates.

    The system message is left out: it is mostly one text for a whole source, and does not make a
    dialogue another one.
    """
    spoken = (message for message in messages if message.role != "system")
    return _TURN_BREAK.join(normalized(message.content) for message in spoken)


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


class NearDuplicate(NamedTuple):
    """A text of the training data that nearly equals one of the held-out data."""

    train: int
    held_out: int
    similarity: float


class DuplicateReport(NamedTuple):
    """The duplicates found; all numbers are indices into the training or the held-out texts.

    Attributes:
        repeated_in_train: training texts that occurred before in the training data.
        repeated_in_held_out: held-out texts that occurred before in the held-out data.
        held_out_too: training texts that are also held out, word for word.
        nearly_held_out: training texts that are nearly, but not exactly, a held-out text.
    """

    repeated_in_train: list[int]
    repeated_in_held_out: list[int]
    held_out_too: list[int]
    nearly_held_out: list[NearDuplicate]

    @property
    def removable(self) -> set[int]:
        """The training texts to remove, so that each occurs once and none is held out."""
        near = {pair.train for pair in self.nearly_held_out}
        return near.union(self.repeated_in_train, self.held_out_too)


def find_duplicates(
    train: Sequence[str], held_out: Sequence[str], config: DuplicatesConfig
) -> DuplicateReport:
    """Finds exact and near duplicates among normalized texts (`dialogue_text`)."""
    held_out_texts = set(held_out)
    held_out_too = [index for index, text in enumerate(train) if text in held_out_texts]
    same = set(held_out_too)
    near = near_duplicates(train, held_out, config)
    return DuplicateReport(
        repeated_in_train=repetitions(train),
        repeated_in_held_out=repetitions(held_out),
        held_out_too=held_out_too,
        nearly_held_out=[pair for pair in near if pair.train not in same],
    )


def repetitions(texts: Sequence[str]) -> list[int]:
    """Returns the indices of all texts that occurred before."""
    met: set[str] = set()
    repeated = []
    for index, text in enumerate(texts):
        if text in met:
            repeated.append(index)
        met.add(text)
    return repeated


def near_duplicates(
    train: Sequence[str], held_out: Sequence[str], config: DuplicatesConfig
) -> list[NearDuplicate]:
    """Returns all pairs across the two lists whose Jaccard index reaches the threshold.

    Identical texts count as pairs of similarity 1. Pairs within one list are not searched. The
    search is random with fixed random numbers: it always finds the same pairs, and misses a true
    one as rarely as `DuplicatesConfig` documents.
    """
    if not train or not held_out:
        return []
    train_signatures = np.stack([signature(text, config) for text in train])
    held_out_signatures = np.stack([signature(text, config) for text in held_out])
    found = []
    shown: tuple[int, Hashes] = (-1, np.zeros(0, np.uint64))
    for held_out_index, train_index in _candidates(held_out_signatures, train_signatures, config):
        if shown[0] != held_out_index:
            shown = (held_out_index, ngram_hashes(held_out[held_out_index], config.ngram))
        similarity = jaccard(shown[1], ngram_hashes(train[train_index], config.ngram))
        if similarity >= config.threshold:
            found.append(NearDuplicate(train_index, held_out_index, similarity))
    return sorted(found)


def ngram_hashes(text: str, ngram: int) -> Hashes:
    """Returns the set of a text's character n-grams, each as a hash of 64 bits, sorted.

    A text shorter than an n-gram is one n-gram by itself.
    """
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    length = min(ngram, max(len(characters), 1))
    hashes = np.full(max(len(characters) - length + 1, 1), length, np.uint64)
    if len(characters):
        for offset in range(length):
            window = characters[offset : offset + len(hashes)].astype(np.uint64)
            hashes = mix_bits(hashes + window)
    return np.unique(hashes)


def jaccard(left: Hashes, right: Hashes) -> float:
    """Returns the size of two sets' intersection over that of their union."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / (len(left) + len(right) - shared)


def signature(text: str, config: DuplicatesConfig) -> Signatures:
    """Returns the MinHash signature of a text: the least n-gram under each of many random orders.

    Two signatures agree in about the share of places that is the Jaccard index of the two texts.
    """
    hashes = ngram_hashes(text, config.ngram)
    counters = np.arange(1, config.num_hashes + 1, dtype=np.uint64)
    # Multiply-shift hashing: an odd factor and the upper half of the product.
    factors = mix_bits(counters + np.uint64(key_number("minhash"))) | np.uint64(1)
    smallest = np.full(config.num_hashes, np.iinfo(np.uint32).max, np.uint32)
    step = max(_HASHES_AT_ONCE // config.num_hashes, 1)
    for start in range(0, len(hashes), step):
        ordered = (hashes[start : start + step, None] * factors) >> np.uint64(32)
        np.minimum(smallest, ordered.min(axis=0).astype(np.uint32), out=smallest)
    return smallest


class Mixture:
    """The examples of each epoch, in order."""

    def __init__(
        self, source_ids: Indices, names: Sequence[str], shares: Sequence[SourceShare], *, seed: int
    ) -> None:
        """Computes the number of examples of each source in an epoch.

        Args:
            source_ids: the source of every example, an index into `names`.
            names: the names of all sources.
            shares: the sources to use, and their amounts. A share without `epochs` and `weight` is
                one epoch. Weights are given for all or none; the epoch then has as many examples as
                its sources (after their limits) have together.
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
        """Returns the number of examples of an epoch, the same for all epochs."""
        return sum(self._counts)

    @property
    def examples_per_source(self) -> dict[str, int]:
        """The number of examples of each source in an epoch."""
        return {share.name: count for share, count in zip(self._shares, self._counts, strict=True)}

    def epoch(self, epoch: int) -> Indices:
        """Returns the indices of an epoch's examples, shuffled.

        A source is read in a fixed random order, again and again, and each epoch continues where
        the one before stopped. So a fraction of a source is a random part of it without
        repetitions, and no example is ever more than one pass ahead of another.
        """
        parts = [
            pool[(epoch * count + np.arange(count)) % len(pool)]
            for pool, count in zip(self._pools, self._counts, strict=True)
        ]
        examples = np.concatenate(parts)
        return examples[permutation(len(examples), self._seed, "epoch", epoch)]


def one_epoch_each(names: Sequence[str]) -> list[SourceShare]:
    """Returns the plain mixture: every source once an epoch."""
    return [SourceShare(name=name, epochs=1.0) for name in names]


def _salt_key(salt: str) -> bytes:
    """Returns the salt as a hash key; blake2b takes at most 64 bytes."""
    return hashlib.sha256(salt.encode("utf-8")).digest()


def _candidates(
    held_out: Signatures, train: Signatures, config: DuplicatesConfig
) -> Iterable[tuple[int, int]]:
    """Yields pairs (held out, train) with an equal band and similar signatures."""
    width = config.num_hashes // config.num_bands
    pairs: set[tuple[int, int]] = set()
    for start in range(0, config.num_hashes, width):
        held_out_bands = held_out[:, start : start + width]
        buckets: dict[bytes, list[int]] = defaultdict(list)
        for index, band in enumerate(held_out_bands):
            buckets[band.tobytes()].append(index)
        for train_index, band in enumerate(train[:, start : start + width]):
            for index in buckets.get(band.tobytes(), ()):
                pairs.add((index, train_index))
    # The estimate's standard deviation is at most 0.5 / sqrt(num_hashes); five of them below the
    # threshold no true pair is lost, and most of the costly verifications are avoided.
    least = config.threshold - 2.5 / np.sqrt(config.num_hashes)
    for index, train_index in sorted(pairs):
        if np.mean(held_out[index] == train[train_index]) >= least:
            yield index, train_index


def _pool(source_ids: Indices, source_id: int, share: SourceShare, seed: int) -> Indices:
    """Returns the examples of a source in their fixed random order, cut to its limit."""
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
        exact = [weight / math.fsum(weights) * sum(sizes) for weight in weights]
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
            raise ValueError(f"mixture.{name}: named {times} times, it should be named once")
