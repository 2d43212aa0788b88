"""Dialogues that stand twice: within the training data, and across it and the held-out data.

Exact duplicates have one normalised text. Near duplicates are found by MinHash signatures of their
character n-grams and locality-sensitive hashing of the signatures in bands (Broder 1997; Leskovec,
Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3), and every candidate is verified: its
similarity is the true Jaccard index of the two sets of n-grams.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from huatuo_jax.data.mixture import key_number, mix_bits

Hashes = npt.NDArray[np.uint64]
Signatures = npt.NDArray[np.uint32]

_HASHES_AT_ONCE = 1 << 14  # n-grams times signature length stay inside the processor's cache


@dataclass(frozen=True, kw_only=True)
class DuplicatesConfig:
    """What counts as a duplicate, and what is done about it.

    Attributes:
        remove: take out of the training data what is also held out (exactly or nearly), and exact
            repetitions within it. Otherwise duplicates are only reported.
        threshold: the Jaccard index from which two dialogues are near duplicates, 0.5 to 1.
        ngram: the number of characters in an n-gram.
        num_hashes: the length of a signature.
        num_bands: the bands it is cut into. With 128 hashes in 32 bands a pair of Jaccard index
            0.8 is missed once in 10 million, one of 0.7 once in 6,000, one of 0.5 one time in 8.
    """

    remove: bool = True
    threshold: float = 0.8
    ngram: int = 5
    num_hashes: int = 128
    num_bands: int = 32

    def __post_init__(self) -> None:
        """Refuses what the search could not keep its promise for."""
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


class NearDuplicate(NamedTuple):
    """A text of the training data that is nearly one of the held-out data."""

    train: int
    held_out: int
    similarity: float


class DuplicateReport(NamedTuple):
    """What stands twice; all numbers are indices into the training or the held-out texts.

    Attributes:
        repeated_in_train: training texts that stood before in the training data.
        repeated_in_held_out: held-out texts that stood before in the held-out data.
        held_out_too: training texts that are also held out, word for word.
        nearly_held_out: training texts that are nearly a held-out text, without those that are one.
    """

    repeated_in_train: list[int]
    repeated_in_held_out: list[int]
    held_out_too: list[int]
    nearly_held_out: list[NearDuplicate]

    @property
    def removable(self) -> set[int]:
        """The training texts to take out, so that each stands once and none is held out."""
        near = {pair.train for pair in self.nearly_held_out}
        return near.union(self.repeated_in_train, self.held_out_too)


def find_duplicates(
    train: Sequence[str], held_out: Sequence[str], config: DuplicatesConfig
) -> DuplicateReport:
    """Looks for exact and near duplicates among normalised texts (`held_out.dialogue_text`)."""
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
    """The indices of all texts that stood before."""
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
    """All pairs across the two lists whose Jaccard index reaches the threshold.

    Identical texts count as pairs of similarity 1. Pairs within one list are not looked for. The
    search is a random one with fixed random numbers: it always finds the same, and misses a true
    pair as rarely as `DuplicatesConfig` says.
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
    """The set of a text's character n-grams, each as a hash of 64 bits, sorted.

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
    """The size of two sets' intersection over that of their union."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / (len(left) + len(right) - shared)


def signature(text: str, config: DuplicatesConfig) -> Signatures:
    """The MinHash signature of a text: the least n-gram under each of many random orders.

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


def _candidates(
    held_out: Signatures, train: Signatures, config: DuplicatesConfig
) -> Iterable[tuple[int, int]]:
    """Pairs (held out, train) that agree in a whole band and are similar by their signatures."""
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
    # threshold no true pair is lost, and most of the costly verifications are spared.
    least = config.threshold - 2.5 / np.sqrt(config.num_hashes)
    for index, train_index in sorted(pairs):
        if np.mean(held_out[index] == train[train_index]) >= least:
            yield index, train_index
