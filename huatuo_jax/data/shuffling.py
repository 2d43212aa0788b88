"""Random order without a random state: everything follows from a key.

Numpy's own generators may change their streams between releases, and they have a state to save.
Here the random number of an item is a hash of the key and the item's index, so that an order is
the same in every process, on every host and in every release.
"""

import hashlib

import numpy as np
import numpy.typing as npt

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
