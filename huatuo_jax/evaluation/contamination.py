"""Finds test texts that share a long passage with training texts (contamination).

A test text overlaps with a training text where the two have 64 characters in a row in common, in
NFKC and without white space. Most Chinese exam questions are shorter: they overlap where they are
in a training text as a whole, and are reported apart, as that may be by chance. Texts of less than
a quarter of the length are too common to tell and are listed as unchecked.

Every passage of the test texts is hashed once; training texts are read once, each of their
positions costs the same (rolling hash, Karp and Rabin 1987), and a hit is compared character by
character. Memory grows with the test texts alone.
"""

import functools
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from huatuo_jax.data.files import RowError, read_rows

Hashes = npt.NDArray[np.uint64]

_BASE = 0x9E3779B97F4A7C15  # Odd, so that it has an inverse modulo 2 ** 64.
_BLOCK = 1 << 18  # Positions hashed together.
_FILTER_BITS = 22
_NUM_SHOWN = 20
_BETWEEN = "\n"  # White space is in no normalised text, so that no passage goes over it.


class SharedPassage(NamedTuple):
    """A passage that a test text shares with a training text.

    Attributes:
        source: the training text by name.
        passage: what they have in common, as long as it goes.
    """

    source: str
    passage: str


@dataclass(frozen=True, kw_only=True)
class Contamination:
    """The overlap of test texts with training texts.

    Attributes:
        overlaps: the first shared passages of each test text that has any, by its id.
        short: those of them that are shorter than an overlap and were found as a whole.
        num_checked: test texts that were looked for.
        unchecked: ids of test texts that are too short.
        num_sources: training texts.
    """

    overlaps: Mapping[str, Sequence[SharedPassage]]
    short: Sequence[str]
    num_checked: int
    unchecked: Sequence[str]
    num_sources: int

    def describe(self) -> str:
        """The counts in one line."""
        return (
            f"{len(self.overlaps)} of {self.num_checked} test texts overlap with one of "
            f"{self.num_sources} training texts ({len(self.short)} of them short, as a whole); "
            f"{len(self.unchecked)} are too short to tell"
        )


def find_overlaps(
    tests: Mapping[str, str],
    sources: Iterable[tuple[str, str]],
    *,
    size: int = 64,
    num_examples: int = 3,
) -> Contamination:
    """Looks for test texts in training texts.

    Args:
        tests: the test texts by id.
        sources: name and text of each training text.
        size: characters in a row that make an overlap.
        num_examples: training texts that are named for each test text.

    Raises:
        ValueError: a size below 4, or no examples wanted.
    """
    if size < 4 or num_examples < 1:
        raise ValueError(
            f"size: {size} should be at least 4; num_examples: {num_examples} at least 1"
        )
    texts = {name: normalised(text) for name, text in tests.items()}
    whole = {name: text for name, text in texts.items() if size // 4 <= len(text) < size}
    long = {name: text for name, text in texts.items() if len(text) >= size}
    tables = [
        _Passages(wanted, window, num_examples=num_examples, whole=wanted is whole)
        for wanted, window in ((long, size), (whole, size // 4))
        if wanted
    ]
    num_sources = 0
    for names, joined in _batches(sources):
        num_sources += len(names)
        for table in tables:
            table.scan(names, joined)
    found = {name: shared for table in tables for name, shared in table.found.items()}
    return Contamination(
        overlaps={name: tuple(found[name]) for name in texts if name in found},
        short=tuple(name for name in whole if name in found),
        num_checked=len(whole) + len(long),
        unchecked=tuple(name for name in texts if name not in whole and name not in long),
        num_sources=num_sources,
    )


def normalised(text: str) -> str:
    """NFKC without white space."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def overlaps_with_files(
    tests: Mapping[str, Mapping[str, str]], paths: Sequence[str | os.PathLike[str]]
) -> dict[str, Any]:
    """Looks for test texts in training files of any layout: all strings of a row are its text.

    Args:
        tests: test texts by suite, then by id.
        paths: files or folders of training data.

    Returns:
        The numbers of training texts and of rows that could not be read; by suite the numbers of
        texts, of those too short to tell, the ids of those that overlap, and the passages of some.

    Raises:
        ValueError: a file cannot be read.
    """
    names = {f"{suite}\0{name}": text for suite in tests for name, text in tests[suite].items()}
    unreadable: list[str] = []
    found = find_overlaps(names, _training_texts(paths, unreadable))
    unchecked, short = set(found.unchecked), set(found.short)
    by_suite: dict[str, Any] = {}
    for suite, texts in tests.items():
        own = {name: f"{suite}\0{name}" for name in texts}
        shared = [name for name in own if own[name] in found.overlaps]
        by_suite[suite] = {
            "num": len(own),
            "num_unchecked": sum(one in unchecked for one in own.values()),
            "num_short": sum(one in short for one in own.values()),
            "overlaps": shared,
            "examples": {
                name: [one._asdict() for one in found.overlaps[own[name]]]
                for name in shared[:_NUM_SHOWN]
            },
        }
    return {
        "files": [os.fspath(path) for path in paths],
        "num_training_texts": found.num_sources,
        "num_unreadable_rows": len(unreadable),
        "suites": by_suite,
    }


def _training_texts(
    paths: Sequence[str | os.PathLike[str]], unreadable: list[str]
) -> Iterator[tuple[str, str]]:
    """Name and text of each row; unreadable rows are noted."""
    for path in paths:
        for row in read_rows(path):
            if isinstance(row, RowError):
                unreadable.append(str(row))
            else:
                yield f"{row.file}:{row.line}", "\n".join(strings_of(row.value))


def strings_of(value: Any) -> Iterator[str]:
    """The texts of a row of any layout, in its order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from strings_of(one)


class _Passages:
    """The passages of some test texts, by hash."""

    def __init__(
        self, texts: Mapping[str, str], window: int, *, num_examples: int, whole: bool
    ) -> None:
        self.found: dict[str, list[SharedPassage]] = {}
        self._names = list(texts)
        self._texts = list(texts.values())
        self._window = window
        self._num_examples = num_examples
        self._whole = whole
        hashes, owners, offsets = [], [], []
        for owner, text in enumerate(self._texts):
            found = _window_hashes(_codes(text[:window] if whole else text), window)
            hashes.append(found)
            owners.append(np.full(len(found), owner, np.int64))
            offsets.append(np.arange(len(found)))
        order = np.argsort(np.concatenate(hashes), kind="stable")
        self._owners = np.concatenate(owners)[order]
        self._offsets = np.concatenate(offsets)[order]
        self._hashes, self._starts = np.unique(np.concatenate(hashes)[order], return_index=True)
        self._ends = np.append(self._starts[1:], len(order))
        self._active = np.ones(len(self._hashes), bool)
        self._filter = np.zeros(1 << _FILTER_BITS, bool)
        self._filter[self._hashes >> np.uint64(64 - _FILTER_BITS)] = True

    def scan(self, names: Sequence[str], joined: str) -> None:
        """Looks for the passages in texts that stand behind one another."""
        codes = _codes(joined)
        if len(codes) < self._window:
            return
        breaks = np.flatnonzero(codes == ord(_BETWEEN))
        for first in range(0, len(codes) - self._window + 1, _BLOCK):
            piece = codes[first : first + _BLOCK + self._window - 1]
            hashes = _window_hashes(piece, self._window)
            places = np.flatnonzero(self._filter[hashes >> np.uint64(64 - _FILTER_BITS)])
            rows = np.searchsorted(self._hashes, hashes[places])
            rows = np.minimum(rows, len(self._hashes) - 1)
            hits = (self._hashes[rows] == hashes[places]) & self._active[rows]
            places, rows = places[hits] + first, rows[hits]
            sources = np.searchsorted(breaks, places)
            # Each passage once for each training text, so that repetitions cost nothing. Where the
            # passage is but the beginning of a test text, only a later one may go on as it does.
            _, once = np.unique(rows * (len(names) + 1) + sources, return_index=True)
            for at in range(len(rows)) if self._whole else np.sort(once):
                row, source = int(rows[at]), int(sources[at])
                if self._active[row]:
                    self._record(row, int(places[at]), names[source], joined)

    def _record(self, row: int, place: int, source: str, joined: str) -> None:
        """Takes a hit down for all test texts that have the passage."""
        full = True
        for entry in range(self._starts[row], self._ends[row]):
            owner, offset = int(self._owners[entry]), int(self._offsets[entry])
            shared = self._shared(owner, offset, place, joined)
            found = self.found.get(self._names[owner], [])
            new = all(one.source != source for one in found)
            if shared and new and len(found) < self._num_examples:
                found = [*found, SharedPassage(source, shared)]
                self.found[self._names[owner]] = found
            full &= len(found) >= self._num_examples
        self._active[row] = not full

    def _shared(self, owner: int, offset: int, place: int, joined: str) -> str:
        """The passage around a hit; empty where the hash was right by chance."""
        text, window = self._texts[owner], self._window
        if self._whole:
            return text if joined.startswith(text, place) else ""
        if joined[place : place + window] != text[offset : offset + window]:
            return ""
        before = after = 0
        while (
            before < min(offset, place) and text[offset - before - 1] == joined[place - before - 1]
        ):
            before += 1
        ends = min(len(text) - offset, len(joined) - place)
        after = window
        while after < ends and text[offset + after] == joined[place + after]:
            after += 1
        return text[offset - before : offset + after]


def _batches(sources: Iterable[tuple[str, str]]) -> Iterator[tuple[list[str], str]]:
    """Training texts joined until they fill a block."""
    names: list[str] = []
    texts: list[str] = []
    length = 0
    for name, text in sources:
        names.append(name)
        texts.append(normalised(text))
        length += len(texts[-1]) + 1
        if length >= _BLOCK:
            yield names, _BETWEEN.join(texts)
            names, texts, length = [], [], 0
    if names:
        yield names, _BETWEEN.join(texts)


def _codes(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@functools.lru_cache(maxsize=4)
def _powers(count: int) -> tuple[Hashes, Hashes]:
    """The first powers of the base and of its inverse, modulo 2 ** 64."""
    tables = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        powers = np.full(count, base, np.uint64)
        powers[0] = 1
        tables.append(np.cumprod(powers, dtype=np.uint64))
    return tables[0], tables[1]


def _window_hashes(codes: npt.NDArray[np.uint32], window: int) -> Hashes:
    """The polynomial hash, modulo 2 ** 64, of every passage of a length."""
    count = len(codes)
    if count < window:
        return np.zeros(0, np.uint64)
    longest = _BLOCK + window
    if count > longest:
        cut = [
            _window_hashes(codes[first : first + _BLOCK + window - 1], window)
            for first in range(0, count - window + 1, _BLOCK)
        ]
        return np.concatenate(cut)
    powers, inverses = _powers(longest)
    sums = np.zeros(count + 1, np.uint64)
    np.cumsum((codes.astype(np.uint64) + np.uint64(1)) * powers[:count], out=sums[1:])
    return (sums[window:] - sums[:-window]) * inverses[: count - window + 1]
