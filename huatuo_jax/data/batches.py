"""Batches out of packed rows: the endless stream of training, and the finite one of evaluation.

A batch is a slice of the stream of rows; one that starts in one epoch goes on in the next. The
saved position is the global index of the next row, so that a run goes on with another number of
hosts, processes, or rows in a batch.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags

from huatuo_jax.data.packing import Row, pack_row
from huatuo_jax.data.rows import RowStream


@dataclass(frozen=True, kw_only=True)
class PrefetchConfig:
    """How batches are made ahead: by threads, and by processes where threads are not enough.

    Attributes:
        num_threads: threads that read and pack, in each process. 0 makes each batch when asked.
        num_batches: batches that are made ahead.
        num_processes: 0 for threads of this process only.
    """

    num_threads: int = 2
    num_batches: int = 8
    num_processes: int = 0


@dataclass(frozen=True, kw_only=True)
class HostShare:
    """Which part of every global batch a host takes: an equal slice, in the order of the hosts."""

    host: int = 0
    num_hosts: int = 1

    def __post_init__(self) -> None:
        """Refuses a host that is none of the hosts."""
        if not 0 <= self.host < self.num_hosts:
            raise ValueError(f"host: {self.host}, it should be 0 to {self.num_hosts - 1}")


class HostBatches:
    """A host's slices of the global batches from one row on, by number; grain reads these.

    Rows from `end_row` on, where it is given, are empty.
    """

    def __init__(
        self,
        rows: RowStream,
        *,
        batch_size: int,
        share: HostShare,
        start_row: int,
        end_row: int | None,
    ) -> None:
        """Raises ValueError if the hosts cannot share the batch equally."""
        if batch_size < 1 or batch_size % share.num_hosts:
            raise ValueError(
                f"batch_size: {batch_size} rows, it should be a multiple of the number of hosts "
                f"{share.num_hosts}"
            )
        self._rows = rows
        self._batch_size = batch_size
        self._share = share
        self._start_row = start_row
        self._end_row = end_row

    def __len__(self) -> int:
        """The number of batches; the stream of training has no end."""
        if self._end_row is None:
            return sys.maxsize
        return max(0, -(-(self._end_row - self._start_row) // self._batch_size))

    def __getitem__(self, batch: int) -> Row:
        """This host's rows of a global batch, `[B, T]` each."""
        start = self._start_row + batch * self._batch_size
        stop = start + self._batch_size
        if self._end_row is not None:
            stop = min(stop, self._end_row)
        row_length = self._row_length(range(start, stop))
        rows_per_host = self._batch_size // self._share.num_hosts
        first = start + self._share.host * rows_per_host
        rows = [
            self._rows.read(row, row_length=row_length)
            if row < stop
            else pack_row([], row_length=row_length, pad_token_id=self._rows.config.pad_token_id)
            for row in range(first, first + rows_per_host)
        ]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _row_length(self, rows: Sequence[int]) -> int:
        """The batch's length: all hosts have to come to the same one, so all its rows count."""
        config = self._rows.config
        if not config.buckets:
            return config.row_length
        return config.bucket_for(max(self._rows.num_tokens(row) for row in rows))


class BatchIterator(grain.DatasetIterator[Row]):
    """Batches in order, made ahead, at a position that is one number.

    `get_state` is `{"next_row": GLOBAL_ROW_INDEX}`: the same on all hosts, whatever their number,
    and whatever was prefetched. Orbax and grain's checkpoint handler save it as it stands.
    """

    def __init__(
        self,
        rows: RowStream,
        *,
        batch_size: int,
        share: HostShare | None = None,
        prefetch: PrefetchConfig | None = None,
        end_row: int | None = None,
    ) -> None:
        """Starts at row 0.

        Args:
            rows: all there is.
            batch_size: the rows of a global batch.
            share: this host's part; by default the whole.
            prefetch: how batches are made ahead; by default `PrefetchConfig()`.
            end_row: where the stream ends; by default never. The last batch is filled up with empty
                rows (all segment ids 0), so that every batch has the same shape and no row is lost.

        Raises:
            ValueError: the hosts cannot share the batch equally.
        """
        super().__init__()
        self._batches: grain.DatasetIterator[Row] | None = None
        self._rows = rows
        self._batch_size = batch_size
        self._share = share or HostShare()
        self._prefetch = prefetch or PrefetchConfig()
        self._end_row = end_row
        self._next_row = 0
        self._host_batches()  # says what is wrong now, and starts nothing yet

    def __next__(self) -> Row:
        """The next batch.

        Raises:
            StopIteration: all rows were given.
        """
        if self._batches is None:
            self._batches = self._make_ahead()
        batch = next(self._batches)
        self._next_row += self._batch_size
        return batch

    @property
    def next_row(self) -> int:
        """The global index of the next batch's first row."""
        return self._next_row

    def get_state(self) -> dict[str, Any]:
        """The position, as what JSON can say."""
        return {"next_row": self._next_row}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` gave, here or on any number of hosts."""
        self._drop_batches()
        self._next_row = int(state["next_row"])

    def start_prefetch(self) -> None:
        """Begins to make batches before the first one is asked for."""
        if self._batches is None:
            self._batches = self._make_ahead()
        self._batches.start_prefetch()

    def close(self) -> None:
        """Ends the threads and processes that make batches."""
        self._drop_batches()
        super().close()

    def _drop_batches(self) -> None:
        if self._batches is not None:
            self._batches.close()
        self._batches = None

    def _host_batches(self) -> HostBatches:
        """This host's batches from the next row on."""
        return HostBatches(
            self._rows,
            batch_size=self._batch_size,
            share=self._share,
            start_row=self._next_row,
            end_row=self._end_row,
        )

    def _make_ahead(self) -> "grain.DatasetIterator[Row]":
        threads = grain.ReadOptions(
            num_threads=self._prefetch.num_threads,
            prefetch_buffer_size=self._prefetch.num_batches,
        )
        prefetched = grain.MapDataset.source(self._host_batches()).to_iter_dataset(threads)
        if self._prefetch.num_processes:
            if not flags.FLAGS.is_parsed():  # grain asks its own flags, also in a notebook
                flags.FLAGS.mark_as_parsed()
            prefetched = prefetched.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._prefetch.num_processes)
            )
        return iter(prefetched)


def evaluation_batches(
    rows: RowStream,
    *,
    batch_size: int,
    share: HostShare | None = None,
    prefetch: PrefetchConfig | None = None,
) -> BatchIterator:
    """Each row of a stream's first epoch once, the last batch filled up with empty rows."""
    return BatchIterator(
        rows,
        batch_size=batch_size,
        share=share,
        prefetch=prefetch,
        end_row=rows.first_row(1),
    )
