"""The host's side of the cache: which row owns which page."""

from collections.abc import Sequence

import numpy as np

from huatuo_jax.generation.cache import Pages

_NONE = -1


class PageTable:
    """Pages given to rows and taken back.

    On a mesh a row's pages lie in its own shard, and are counted within it.

    Attributes:
        pages: who owns what, as the programs take it.
    """

    def __init__(self, *, rows: int, pages_per_row: int, page_size: int, shards: int = 1) -> None:
        """A table of no pages yet.

        Args:
            rows: that can own pages, a multiple of `shards`.
            pages_per_row: that a row can own at most.
            page_size: positions of a page.
            shards: that hold as many rows and pages each.
        """
        assert rows % shards == 0
        self._page_size, self._shards = page_size, shards
        self._rows_per_shard = rows // shards
        self._counts_B = np.zeros(rows, np.int32)
        nothing = np.zeros(0, np.int32)
        self.pages = Pages(np.full((rows, pages_per_row), _NONE, np.int32), nothing, nothing)

    @property
    def num_pages(self) -> int:
        """Owned and free ones, of all shards."""
        return len(self.pages.rows_P)

    def needed(self, lengths_B: Sequence[int] | np.ndarray) -> int:
        """How many pages, of all shards, rows of these lengths take."""
        counts = self._counts_for(lengths_B).reshape(self._shards, -1)
        return int(counts.sum(axis=1).max()) * self._shards

    def of_rows(self, rows_R: np.ndarray) -> Pages:
        """The pages of some rows, which count from 0 in each shard, in the order given.

        Args:
            rows_R: as many of each shard, one shard after another; all that own pages.
        """
        per_shard = len(rows_R) // self._shards
        places = np.full(len(self._counts_B), _NONE, np.int32)
        places[rows_R] = np.arange(len(rows_R)) % per_shard
        owners_P = self.pages.rows_P.reshape(self._shards, -1)
        firsts = self._rows_per_shard * np.arange(self._shards)[:, None]
        renamed_P = np.where(owners_P == _NONE, _NONE, places[owners_P + firsts])
        assert (renamed_P == _NONE).sum() == (owners_P == _NONE).sum(), "a row is left out"
        return Pages(self.pages.table_BM[rows_R], renamed_P.reshape(-1), self.pages.starts_P)

    def fit(self, lengths_B: Sequence[int] | np.ndarray) -> None:
        """Give each row the pages for its length, and take back what is more.

        A row keeps the pages it has, in their order. There must be enough of them, see `needed`.
        """
        counts_B = self._counts_for(lengths_B)
        for row in np.flatnonzero(counts_B < self._counts_B):
            self._take_back(int(row), int(counts_B[row]))
        for row in np.flatnonzero(counts_B > self._counts_B):
            self._give(int(row), int(counts_B[row]))

    def grow(self, num_pages: int) -> None:
        """Have so many pages; the new ones are free."""
        added = (num_pages - self.num_pages) // self._shards
        assert added >= 0 and num_pages % self._shards == 0

        def pad(numbers_P: np.ndarray, value: int) -> np.ndarray:
            parts = numbers_P.reshape(self._shards, -1)
            return np.pad(parts, ((0, 0), (0, added)), constant_values=value).reshape(-1)

        self.pages = self.pages._replace(
            rows_P=pad(self.pages.rows_P, _NONE), starts_P=pad(self.pages.starts_P, 0)
        )

    def shrink(self, num_pages: int) -> np.ndarray:
        """Have so many pages, which the owned ones must fit.

        Returns:
            Where the last pages of each shard move, those of one shard after another: pages to
            overwrite, or the new number of a shard's pages for a page that nobody owns.
        """
        kept = num_pages // self._shards
        assert num_pages < self.num_pages and num_pages % self._shards == 0
        rows = self.pages.rows_P.reshape(self._shards, -1).copy()
        starts = self.pages.starts_P.reshape(self._shards, -1).copy()
        targets = np.full((self._shards, rows.shape[1] - kept), kept, np.int32)
        for shard in range(self._shards):
            moved = kept + np.flatnonzero(rows[shard, kept:] != _NONE)
            free = np.flatnonzero(rows[shard, :kept] == _NONE)[: len(moved)]
            assert len(free) == len(moved)
            targets[shard, moved - kept] = free
            rows[shard, free], starts[shard, free] = rows[shard, moved], starts[shard, moved]
            owners = shard * self._rows_per_shard + rows[shard, free]
            self.pages.table_BM[owners, starts[shard, free] // self._page_size] = free
        self.pages = self.pages._replace(
            rows_P=rows[:, :kept].reshape(-1), starts_P=starts[:, :kept].reshape(-1)
        )
        return targets.reshape(-1)

    def _counts_for(self, lengths_B: Sequence[int] | np.ndarray) -> np.ndarray:
        return -(-np.asarray(lengths_B, np.int32) // self._page_size)

    def _shard_of(self, row: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The row's number within its shard, and the shard's part of the two lists of pages."""
        shard, row = divmod(row, self._rows_per_shard)
        part = slice(*(np.array([shard, shard + 1]) * (self.num_pages // self._shards)))
        return row, self.pages.rows_P[part], self.pages.starts_P[part]

    def _give(self, row: int, count: int) -> None:
        own, rows_P, starts_P = self._shard_of(row)
        owned = int(self._counts_B[row])
        # The first free ones, so that there is little to move when the cache shrinks.
        taken = np.flatnonzero(rows_P == _NONE)[: count - owned]
        assert len(taken) == count - owned, "no page is free"
        rows_P[taken] = own
        starts_P[taken] = np.arange(owned, count) * self._page_size
        self.pages.table_BM[row, owned:count] = taken
        self._counts_B[row] = count

    def _take_back(self, row: int, count: int) -> None:
        _, rows_P, _ = self._shard_of(row)
        owned = int(self._counts_B[row])
        rows_P[self.pages.table_BM[row, count:owned]] = _NONE
        self.pages.table_BM[row, count:owned] = _NONE
        self._counts_B[row] = count
