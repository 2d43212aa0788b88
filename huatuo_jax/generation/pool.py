"""The cache of the slots while answers run: grows and shrinks with what they need."""

import numpy as np

from huatuo_jax.generation.buckets import Buckets
from huatuo_jax.generation.cache import Cache, Pages
from huatuo_jax.generation.page_table import PageTable
from huatuo_jax.generation.programs import Programs


class Pool:
    """A cache on the device, and the table of its pages on the host.

    Attributes:
        cache: taken and given back by the programs, which donate it; set it to what they return.
        shards: batch shards of the mesh.
    """

    cache: Cache

    def __init__(
        self, programs: Programs, buckets: Buckets, *, slots: int, max_length: int, shards: int
    ) -> None:
        """Nothing is allocated yet: see `make_room`.

        Args:
            programs: of the engine.
            buckets: of the engine.
            slots: rows.
            max_length: positions of a row at most.
            shards: batch shards of the mesh.
        """
        self._programs, self._sizes = programs, buckets
        self.shards, self._slots_per_shard = shards, slots // shards
        page_size = programs.page_size
        self._table = PageTable(
            rows=slots,
            pages_per_row=-(-max_length // page_size),
            page_size=page_size,
            shards=shards,
        )

    def pages_of(self, rows_R: np.ndarray) -> Pages:
        """Who owns what, for these slots alone, see `PageTable.of_rows`."""
        return self._table.of_rows(rows_R)

    @property
    def pages_per_slot(self) -> int:
        """How many pages a slot can own."""
        return self._table.pages.table_BM.shape[1]

    def make_room(self, lengths_B: np.ndarray) -> None:
        """Let every slot own pages for its length, 0 for a free one; what it held stays."""
        table, sizes = self._table, self._sizes.pages
        wanted = self._sizes.pages_for(table.needed(lengths_B), table.num_pages)
        if not table.num_pages:
            self.cache = self._programs.allocate(num_pages=wanted)
            table.grow(wanted)
        for size in sizes:
            if table.num_pages < size <= wanted:
                self.cache = self._programs.grow(
                    self.cache, added=(size - table.num_pages) // self.shards
                )
                table.grow(size)
        table.fit(lengths_B)
        for size in reversed(sizes):
            if wanted <= size < table.num_pages:
                self.cache = self._programs.shrink(self.cache, table.shrink(size))

    def insert(self, prefix: Cache, *, row: int, slot: int, length: int) -> None:
        """Copy a prompt of this length from a row of the prefix cache into a slot."""
        page_size = self._programs.page_size
        targets_M = self._table.pages.table_BM[slot].copy()
        targets_M[-(-length // page_size) :] = -1
        self.cache = self._programs.insert(
            self.cache,
            prefix,
            first=row * len(targets_M),
            targets_M=targets_M,
            shard=slot // self._slots_per_shard,
        )
