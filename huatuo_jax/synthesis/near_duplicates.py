"""Near-duplicates of texts by ROUGE-L over characters, found without comparing every pair.

Self-instruct (Wang et al. 2023, arXiv 2212.10560) drops an instruction whose ROUGE-L F with an
earlier one is above .7. Over words, Chinese text has no such measure, so it is taken over
characters, in NFKC, small letters and without white space. ROUGE-L F of lengths a and b is
2 L / (a + b) with L the longest common subsequence, which is rapidfuzz's normalised Indel
similarity.

L is at most the number of characters that both texts have, whatever their order. This bound is
computed for all earlier texts at once from their counts of characters; only where it reaches the
threshold is the subsequence computed. Characters share buckets by code point, which can only raise
the bound, so that no pair is missed. Memory is 1 KiB a text beside the texts themselves.
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rapidfuzz import process
from rapidfuzz.distance import Indel

from huatuo_jax.evaluation.contamination import normalised

THRESHOLD = 0.7
_NUM_BUCKETS = 512
_CHUNK = 1 << 14  # Texts whose counts lie together: a row of sums stays in the cache.
_LONGEST = 60_000  # Characters; counts are 16 bits wide.
_ROUNDING = 1e-9


class Match(NamedTuple):
    """An earlier text and its similarity, ROUGE-L F from 0 to 1."""

    name: str
    similarity: float


def comparable(text: str) -> str:
    """The text as it is compared: NFKC, small letters, no white space."""
    return normalised(text).casefold()


def similarity(one: str, other: str) -> float:
    """ROUGE-L F over the characters of two texts, from 0 to 1."""
    return float(Indel.normalized_similarity(comparable(one), comparable(other)))


class NearDuplicateIndex:
    """Texts to be compared with; the answer is that of comparing with each of them."""

    def __init__(
        self, texts: Iterable[tuple[str, str]] = (), *, threshold: float = THRESHOLD
    ) -> None:
        """Takes the first texts.

        Args:
            texts: name and text of each.
            threshold: texts are near-duplicates above this ROUGE-L F.

        Raises:
            ValueError: a threshold outside (0, 1].
        """
        if not 0.0 < threshold <= 1.0:
            raise ValueError(f"threshold is {threshold}; it should be above 0, at most 1")
        self._threshold = threshold
        self._names: list[str] = []
        self._chunks: list[_Chunk] = []
        for name, text in texts:
            self.add(name, text)

    def __len__(self) -> int:
        """The number of texts."""
        return len(self._names)

    def add(self, name: str, text: str) -> None:
        """Takes one more text.

        Raises:
            ValueError: it is too long to be compared.
        """
        plain = _checked(comparable(text))
        if len(self._names) == _CHUNK * len(self._chunks):
            self._chunks.append(_Chunk())
        self._names.append(name)
        self._chunks[-1].add(plain)

    def nearest(self, text: str) -> Match | None:
        """The most similar text above the threshold, the first of equals; None where none is.

        Raises:
            ValueError: the text is too long to be compared.
        """
        plain = _checked(comparable(text))
        counts = _bucket_counts(plain)
        best, place = self._threshold, -1
        for number, chunk in enumerate(self._chunks):
            rows = chunk.candidates(len(plain), counts, best)
            found = chunk.best(plain, rows, best)
            if found is not None:
                best, place = found[0], number * _CHUNK + found[1]
        return None if place < 0 else Match(self._names[place], best)


class _Chunk:
    """Up to `_CHUNK` texts with their counts of characters, a row for each bucket."""

    def __init__(self) -> None:
        self._size = 0
        self._texts = np.empty(_CHUNK, dtype=object)
        self._lengths = np.zeros(_CHUNK, np.int32)
        self._counts = np.zeros((_NUM_BUCKETS, _CHUNK), np.uint16)
        self._term = np.empty(_CHUNK, np.uint16)

    def add(self, plain: str) -> None:
        place = self._size
        for bucket, count in _bucket_counts(plain).items():
            self._counts[bucket, place] = count
        self._texts[place], self._lengths[place] = plain, len(plain)
        self._size += 1

    def candidates(
        self, length: int, counts: Counter[int], threshold: float
    ) -> npt.NDArray[np.intp]:
        """The texts that may be as similar as the threshold or more."""
        size = self._size
        common, term = np.zeros(size, np.uint16), self._term[:size]
        for bucket, count in counts.items():
            np.minimum(self._counts[bucket, :size], np.uint16(count), out=term)
            np.add(common, term, out=common)
        least = (threshold - _ROUNDING) / 2.0 * (self._lengths[:size] + length)
        return np.flatnonzero(common >= least)

    def best(
        self, plain: str, rows: npt.NDArray[np.intp], threshold: float
    ) -> tuple[float, int] | None:
        """Similarity and place of the most similar of these, where it is above the threshold."""
        if not len(rows):
            return None
        found = process.extractOne(
            plain,
            self._texts[rows].tolist(),
            scorer=Indel.normalized_similarity,
            score_cutoff=threshold,
        )
        if found is None or found[1] <= threshold:
            return None
        return float(found[1]), int(rows[found[2]])


def _bucket_counts(plain: str) -> Counter[int]:
    return Counter(ord(character) % _NUM_BUCKETS for character in plain)


def _checked(plain: str) -> str:
    if len(plain) > _LONGEST:
        raise ValueError(
            f"a text has {len(plain)} characters; texts of up to {_LONGEST} are compared"
        )
    return plain
