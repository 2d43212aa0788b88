"""The caches of prompts: those that wait for a slot, and parts of earlier ones to begin with.

A later turn of a conversation begins with the turns before it, and many prompts begin with the same
system text. Whole pages of what a model has read are kept on the device; a prompt that begins with
the same tokens gets copies of them, and only the rest of it is run through the model. A key depends
on the tokens before it alone: this holds for every kind of position and of attention that the
backbone has (rotary, ALiBi, sliding windows). When the pages are used up, the least recently used
ones go first.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from huatuo_jax.generation.buckets import bucket_of
from huatuo_jax.generation.cache import Cache
from huatuo_jax.generation.forward import Variables
from huatuo_jax.generation.programs import Programs

_ROOT = 0  # The number of the page before each first page.


class _Kept(NamedTuple):
    """A page that is kept.

    Attributes:
        number: its own, which is never used again; the next page's key holds it.
        place: its index in the cache of kept pages.
    """

    number: int
    place: int


_Key = tuple[int, tuple[int, ...]]  # The number of the page before, and the page's tokens.


class PrefixCache:
    """Pages of earlier prompts and answers, on the device, and their tokens, on the host.

    All processes of a mesh must make the same calls.
    """

    def __init__(self, programs: Programs, *, num_pages: int, pages_per_row: int) -> None:
        """Allocates nothing yet.

        Args:
            programs: the engine's.
            num_pages: pages to keep at most, of all batch shards; 0 keeps nothing.
            pages_per_row: pages of a prompt and its answer at most.
        """
        self._programs, self.num_pages, self._width = programs, num_pages, pages_per_row
        self.clear()

    def clear(self) -> None:
        """Forgets everything, and releases the memory."""
        self._cache: Cache | None = None
        self._numbers = itertools.count(_ROOT + 1)
        self._free = list(range(self.num_pages))[::-1]
        # In the order of their last use. A page is always used after those that follow it, so that
        # the first of all never has a successor.
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()

    def find(self, token_ids: Sequence[int]) -> list[int]:
        """Returns the kept pages with the longest whole part of these tokens, for `restore`."""
        return [self._kept[key].place for key in self._used(token_ids)]

    def restore(self, prompts: Cache, row: int, places: Sequence[int]) -> Cache:
        """Returns the prompt cache with these kept pages at the start of a row."""
        if not places:
            return prompts
        assert self._cache is not None
        first = row * self._width
        return self._copied(self._cache, prompts, places, range(first, first + len(places)))

    def keep(self, token_ids: Sequence[int], source: Cache, pages: Sequence[int]) -> None:
        """Keeps the whole pages of these tokens; those that are kept already are not copied.

        Args:
            token_ids: from the first one of a prompt.
            source: a cache that holds their keys and values.
            pages: its pages that do, counted over all shards.
        """
        count = min(len(token_ids) // self._programs.page_size, self.num_pages)
        keys = self._used(token_ids)[:count]
        first = len(keys)
        if first == count:
            return
        number = self._kept[keys[-1]].number if keys else _ROOT
        places = []
        for index in range(first, count):
            # Those of this prompt have just been used, and there are pages for all of it.
            place = self._free.pop() if self._free else self._kept.popitem(last=False)[1].place
            keys.append((number, self._tokens_of(token_ids, index)))
            number = next(self._numbers)
            self._kept[keys[-1]] = _Kept(number, place)
            places.append(place)
        self._mark(keys)
        if self._cache is None:
            self._cache = self._programs.allocate(num_pages=self.num_pages)
        try:
            self._cache = self._copied(source, self._cache, pages[first:count], places)
        except BaseException:
            self.clear()  # The cache was donated, and is gone.
            raise

    def _used(self, token_ids: Sequence[int]) -> list[_Key]:
        """Returns the keys of the kept pages of these tokens, from the first, and marks them."""
        keys: list[_Key] = []
        number = _ROOT
        for index in range(len(token_ids) // self._programs.page_size):
            key = (number, self._tokens_of(token_ids, index))
            if key not in self._kept:
                break
            keys.append(key)
            number = self._kept[key].number
        self._mark(keys)
        return keys

    def _mark(self, keys: Sequence[_Key]) -> None:
        for key in reversed(keys):
            self._kept.move_to_end(key)

    def _tokens_of(self, token_ids: Sequence[int], index: int) -> tuple[int, ...]:
        size = self._programs.page_size
        return tuple(token_ids[index * size : (index + 1) * size])

    def _copied(
        self, source: Cache, target: Cache, pages: Sequence[int], places: Sequence[int]
    ) -> Cache:
        """Returns the target, which is donated, with pages of the source at these places."""
        sources_M, targets_M = (
            np.array([*some, *[-1] * (self._width - len(some))], np.int32)
            for some in (pages, places)
        )
        return self._programs.insert(target, source, sources_M, targets_M)


class PromptCache:
    """The prompts that wait for a slot, one a row."""

    def __init__(
        self,
        programs: Programs,
        prefixes: PrefixCache,
        *,
        rows: int,
        pages_per_row: int,
        lengths: tuple[int, ...],
    ) -> None:
        """Allocates nothing yet.

        Args:
            programs: the engine's.
            prefixes: parts of earlier prompts; those that are run are kept there.
            rows: number R of prompts run at once.
            pages_per_row: pages of the longest prompt.
            lengths: numbers of tokens, rising, that programs are compiled for.
        """
        self._programs, self._prefixes = programs, prefixes
        self._rows, self._pages_per_row, self._lengths = rows, pages_per_row, lengths
        self._cache: Cache | None = None

    @property
    def cache(self) -> Cache:
        """Returns their keys and values; row r owns the r-th of R equal parts of its pages."""
        assert self._cache is not None
        return self._cache

    def release(self) -> None:
        """Releases the memory until the next `run`."""
        self._cache = None

    def run(self, variables: Variables, prompts: Sequence[Sequence[int]]) -> int:
        """Runs prompts into the rows, in their order; returns the tokens that the prefixes held.

        Args:
            variables: the model's.
            prompts: R at most.
        """
        if self._cache is None:
            self._cache = self._programs.allocate(num_pages=self._rows * self._pages_per_row)
        starts_R = np.zeros(self._rows, np.int32)
        for row, prompt in enumerate(prompts):
            places = self._prefixes.find(prompt)
            self._cache = self._prefixes.restore(self._cache, row, places)
            starts_R[row] = len(places) * self._programs.page_size
        rest = [prompt[start:] for start, prompt in zip(starts_R.tolist(), prompts, strict=False)]
        length = bucket_of(max(map(len, rest)), self._lengths)
        tokens_RT = np.zeros((self._rows, length), dtype=np.int32)
        for row, tokens in enumerate(rest):
            tokens_RT[row, : len(tokens)] = tokens
        if not starts_R.any():
            self._cache = self._programs.prefill(variables, self._cache, tokens_RT)
        elif any(rest):
            self._cache = self._programs.extend(variables, self._cache, tokens_RT, starts_R)
        for row, prompt in enumerate(prompts):
            first = row * self._pages_per_row
            self._prefixes.keep(prompt, self._cache, range(first, first + self._pages_per_row))
        return int(starts_R.sum())
