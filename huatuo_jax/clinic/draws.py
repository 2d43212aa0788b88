"""Draws that are the same on every machine and every version of Python.

`random` promises this for few of its methods, and `hash` for no text. Here every draw is a SHA-256
of a key and a counter, and nothing else.
"""

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

_BITS = 53  # As many as a float holds exactly.


class Draws:
    """A stream of draws that depends on its key alone."""

    def __init__(self, *key: object) -> None:
        """Start a stream.

        Args:
            key: texts and whole numbers; streams of different keys are independent.
        """
        self._key = "\x1f".join(str(part) for part in key)
        self._count = 0

    def unit(self) -> float:
        """A number from 0 (may be) to 1 (never)."""
        self._count += 1
        return fraction(f"{self._key}\x1e{self._count}")

    def below(self, count: int) -> int:
        """A whole number from 0 to `count` - 1."""
        assert count > 0
        return int(self.unit() * count)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.unit() < probability

    def choice(self, items: Sequence[T]) -> T:
        """One of the items, each as likely as the others."""
        return items[self.below(len(items))]

    def weighted(self, weights: Mapping[T, float]) -> T:
        """One of the keys, in proportion to the weights, which need not add up to 1."""
        # Not `sum`, which rounds otherwise from Python 3.12 on.
        left = self.unit() * math.fsum(weights.values())
        for item, weight in weights.items():
            left -= weight
            if left < 0:
                return item
        return [item for item, weight in weights.items() if weight > 0][-1]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in a random order (Fisher and Yates)."""
        found = list(items)
        for last in range(len(found) - 1, 0, -1):
            other = self.below(last + 1)
            found[last], found[other] = found[other], found[last]
        return found

    def gaussian(self) -> float:
        """A draw of the standard normal distribution."""
        return statistics.NormalDist().inv_cdf(max(self.unit(), 0.5**_BITS))


def fraction(text: str) -> float:
    """Returns a number in [0, 1) computed from a hash of the text."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> (64 - _BITS)) / 2**_BITS


def number(text: str) -> int:
    """Returns a large whole number computed from a hash of the text."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
