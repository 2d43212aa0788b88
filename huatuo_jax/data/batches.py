"""Batches of packed rows: several examples a row, rows of all epochs end to end, made ahead.

Packing is two pure steps. A plan decides from lengths alone which examples share a row (best fit on
decreasing lengths); a row then lays their tokens end to end, each example a segment of its own.

Rows form one endless stream: row 0 is the first row of epoch 0, and the first row of epoch 1
follows the last one of epoch 0. What a row holds is a function of the data, the seed and its index.
A batch is a slice of that stream. The saved position is the global index of the next row, so that a
run can resume with another number of hosts, processes, or rows in a batch.

What a row of dialogues holds, each of shape `[T]`:

- `token_ids`: the examples' ids, then padding.
- `segment_ids`: 1 for the first example's tokens, 2 for the second's, and 0 for padding. Tokens
  attend within their segment; padding is known by this, never by an id.
- `positions`: 0, 1, 2, ... from the start of each segment; 0 in padding.
- `trained_mask`: whether token t is a target, predicted from token t - 1 of the same segment. It
  is False at every segment's first token, so `token_ids[1:]` with `trained_mask[1:]` are the
  targets of positions `[:-1]`, with no look across a border.
- `kind_ids`: the example's kind, as an index into `huatuo_jax.data.tokenizing.ALL_KINDS`; 0 in
  padding, which is never trained, so that a sum per kind needs no look at it.
"""

import abc
import bisect
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np
import numpy.typing as npt
from absl import flags

from huatuo_jax.data.mixture import Indices, Mixture, permutation
from huatuo_jax.data.tokenizing import Example, TokenDataset

Row = dict[str, npt.NDArray[Any]]
_PLANS_KEPT = 2  # the epoch that is read and the one that prefetching has already begun


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """The packing of examples into rows.

    Attributes:
        row_length: tokens of a row. No example is longer.
        packed: several examples a row (see `huatuo_jax.data.batches`), or one.
        window: how many examples of the shuffled order are packed together; None for the epoch.
        pad_token_id: what padding is filled with; no mask looks at it.
    """

    row_length: int
    packed: bool = True
    window: int | None = None
    pad_token_id: int = 0


@dataclass(frozen=True, kw_only=True)
class RowConfig(PackingConfig):
    """The rows of dialogues, beside the fields of `PackingConfig`.

    Attributes:
        buckets: lengths that a batch may be cut to, where all its rows are that short: each costs a
            compilation and saves padding where rows are not packed. `row_length` is always one.
    """

    buckets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuses buckets that are no length below a row's."""
        if self.row_length < 1:
            raise ValueError(f"data.row_length: {self.row_length}, it should be at least 1")
        if any(not 0 < bucket < self.row_length for bucket in self.buckets):
            raise ValueError(
                f"data.buckets: {self.buckets}, each should be above 0 and below row_length "
                f"{self.row_length}"
            )

    def bucket_for(self, num_tokens: int) -> int:
        """Returns the smallest length that holds so many tokens."""
        return min(size for size in (*self.buckets, self.row_length) if size >= num_tokens)


@dataclass(frozen=True, kw_only=True)
class PrefetchConfig:
    """Threads that make batches ahead, and processes where threads are not enough.

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
    """A host's part of every global batch: an equal slice, in the order of the hosts."""

    host: int = 0
    num_hosts: int = 1

    def __post_init__(self) -> None:
        """Refuses a host that is none of the hosts."""
        if not 0 <= self.host < self.num_hosts:
            raise ValueError(f"host: {self.host}, it should be 0 to {self.num_hosts - 1}")


@dataclass(frozen=True)
class PackingPlan:
    """The examples of each row.

    Row r holds `example_indices[row_starts[r] : row_starts[r + 1]]`, in this order, and
    `tokens_per_row[r]` tokens in all, of the `row_length` there is room for.
    """

    example_indices: Indices
    row_starts: Indices
    tokens_per_row: Indices
    row_length: int

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.row_starts) - 1

    def __getitem__(self, row: int) -> Indices:
        """Returns the examples of one row."""
        return self.example_indices[self.row_starts[row] : self.row_starts[row + 1]]

    @property
    def efficiency(self) -> float:
        """Share of all places that hold a token, 0 to 1."""
        return float(self.tokens_per_row.sum() / (len(self) * self.row_length))


def plan_rows(
    lengths: npt.ArrayLike,
    order: npt.ArrayLike,
    *,
    row_length: int,
    packed: bool = True,
    window: int | None = None,
    key: tuple[int | str, ...] = (),
) -> PackingPlan:
    """Distributes examples over rows; a pure function of its arguments.

    Args:
        lengths: the number of tokens of every example there is.
        order: the examples to place, as indices into `lengths`; one may come more than once.
        row_length: the most tokens a row can hold.
        packed: False gives every example a row of its own, in the given order.
        window: how many examples in a row of the order are packed together. The default, all of
            them, wastes least; the rows of a small window are closer to a random draw.
        key: what the order of the packed rows depends on. Packing goes by length, so its rows are
            shuffled over the whole epoch.

    Raises:
        ValueError: an example is longer than a row, or empty, or `window` is not positive.
    """
    lengths, order = np.asarray(lengths, np.int64), np.asarray(order, np.int64)
    if window is not None and window < 1:
        raise ValueError(f"window: {window} examples, it should be at least 1, or None for all")
    placed = lengths[order]
    _check_lengths(placed, order, row_length)
    if not packed:
        return PackingPlan(order, np.arange(len(order) + 1), placed, row_length)
    row_of = np.empty(len(order), np.int64)
    num_rows = 0
    window = window or max(len(order), 1)
    for start in range(0, len(order), window):
        rows, used = best_fit_rows(placed[start : start + window], row_length)
        row_of[start : start + window] = rows + num_rows
        num_rows += used
    # New numbers for the rows: row r of the packing becomes row shuffled[r] of the plan.
    shuffled = permutation(num_rows, *key)
    row_of = shuffled[row_of]
    # Examples of equal length have no order among them but the given one, which is random.
    by_row = np.argsort(row_of, kind="stable")
    sizes = np.bincount(row_of, minlength=num_rows)
    tokens = np.zeros(num_rows, np.int64)
    np.add.at(tokens, row_of, placed)
    return PackingPlan(order[by_row], np.append(0, np.cumsum(sizes)), tokens, row_length)


def best_fit_rows(lengths: Indices, row_length: int) -> tuple[Indices, int]:
    """Packs by best fit decreasing; returns the row of each example and the number of rows.

    Longest first, each example goes to the fullest row that still has room for it (of several
    equally full ones the latest), or opens a new row. It uses at most 11/9 of the fewest rows
    possible plus one (Johnson 1974); on dialogues, mostly the fewest. The rows that have exactly r
    tokens of room form a stack; which stacks are not empty is one integer's bits, so that the
    search for the tightest room is two machine-fast operations on it.
    """
    stacks: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms = 0  # bit r is set while some row has exactly r tokens of room
    num_rows = 0
    longest_first = np.argsort(-lengths, kind="stable")
    placed = []
    for length in lengths[longest_first].tolist():
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = stacks[room].pop()
            if not stacks[room]:
                rooms ^= 1 << room
        else:
            room, row = row_length, num_rows
            num_rows += 1
        placed.append(row)
        stacks[room - length].append(row)
        rooms |= 1 << (room - length)
    row_of = np.empty(len(lengths), np.int64)
    row_of[longest_first] = placed
    return row_of, num_rows


def pack_row(examples: Sequence[Example], *, row_length: int, pad_token_id: int) -> Row:
    """Lays examples end to end into one row; see the module for what it holds.

    Without examples it is an empty row: padding that trains nothing.

    Raises:
        ValueError: they do not fit.
    """
    num_tokens = sum(len(example.token_ids) for example in examples)
    if num_tokens > row_length:
        raise ValueError(f"{num_tokens} tokens do not fit a row of {row_length}")
    token_ids = np.full(row_length, pad_token_id, np.int32)
    segment_ids, positions, kinds = np.zeros((3, row_length), np.int32)
    trained_mask = np.zeros(row_length, np.bool_)
    start = 0
    for number, example in enumerate(examples, start=1):
        end = start + len(example.token_ids)
        token_ids[start:end] = example.token_ids
        segment_ids[start:end] = number
        positions[start:end] = np.arange(end - start)
        trained_mask[start + 1 : end] = example.trained_mask[1:]
        kinds[start:end] = example.kind_id
        start = end
    return {
        "token_ids": token_ids,
        "segment_ids": segment_ids,
        "positions": positions,
        "trained_mask": trained_mask,
        "kind_ids": kinds,
    }


class BatchRows(Protocol):
    """Rows by global row index, as `BatchIterator` reads them."""

    def read_batch(self, batch: range, wanted: range) -> list[Row]:
        """Reads rows of a batch, all of the same shapes.

        Args:
            batch: the rows of the global batch; every host gives the same ones.
            wanted: those to read; a row outside of `batch` is empty.
        """


class EpochRows(abc.ABC):
    """Packed rows of all epochs, by global row index.

    Plans are made when they are needed: each is a function of the lengths, the seed and the epoch,
    so that every process makes the same ones.
    """

    def __init__(self, packing: PackingConfig, *, key: tuple[int | str, ...]) -> None:
        """Plans nothing yet.

        Args:
            packing: how rows are packed.
            key: with the epoch it decides the order of an epoch's rows.
        """
        self._packing, self._key = packing, key
        self._plans: dict[int, PackingPlan] = {}
        self._first_rows = [0]  # of each epoch whose predecessors are planned
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the lock and the plans, which another process makes again."""
        return {**self.__dict__, "_lock": None, "_plans": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes the state of another process."""
        self.__dict__.update(state, _lock=threading.Lock())

    @abc.abstractmethod
    def placed(self, epoch: int) -> tuple[npt.ArrayLike, npt.ArrayLike]:
        """Returns the lengths of all examples, and an epoch's order as indices into them."""

    @abc.abstractmethod
    def ids_in(self, row: int) -> list[str]:
        """Returns the ids of what a global row holds, to name the data of a bad step."""

    @abc.abstractmethod
    def reading(self, num_rows: int) -> BatchRows:
        """Returns the reader of the first so many rows."""

    def plan(self, epoch: int) -> PackingPlan:
        """Returns the rows of an epoch."""
        with self._lock:
            return self._plan(epoch)

    def first_row(self, epoch: int) -> int:
        """Returns the global index of an epoch's first row, the number of rows before it."""
        with self._lock:
            while len(self._first_rows) <= epoch:
                rows = len(self._plan(len(self._first_rows) - 1))
                self._first_rows.append(self._first_rows[-1] + rows)
            return self._first_rows[epoch]

    def locate(self, row: int) -> tuple[int, int]:
        """Returns the epoch of a global row, and its index in that epoch."""
        while self._first_rows[-1] <= row:
            self.first_row(len(self._first_rows))
        epoch = bisect.bisect_right(self._first_rows, row) - 1
        return epoch, row - self._first_rows[epoch]

    def examples_in(self, row: int) -> Indices:
        """Returns the indices of the examples of a global row."""
        epoch, row_of_epoch = self.locate(row)
        return self.plan(epoch)[row_of_epoch]

    def _plan(self, epoch: int) -> PackingPlan:
        # Taken out and put in again: the dict's order is that of last use, the first one goes.
        plan = self._plans.pop(epoch) if epoch in self._plans else self._make_plan(epoch)
        while len(self._plans) >= _PLANS_KEPT:
            del self._plans[next(iter(self._plans))]
        self._plans[epoch] = plan
        return plan

    def _make_plan(self, epoch: int) -> PackingPlan:
        lengths, order = self.placed(epoch)
        return plan_rows(
            lengths,
            order,
            row_length=self._packing.row_length,
            packed=self._packing.packed,
            window=self._packing.window,
            key=(*self._key, epoch),
        )


class RowStream(EpochRows):
    """All rows of dialogues of all epochs, by global row index."""

    def __init__(
        self, dataset: TokenDataset, config: RowConfig, *, mixture: Mixture | None, seed: int = 0
    ) -> None:
        """Takes the examples of `mixture`, or without one each example once, unshuffled."""
        super().__init__(config, key=(seed, "rows"))
        self.config = config
        self._dataset = dataset
        self._mixture = mixture

    def placed(self, epoch: int) -> tuple[npt.ArrayLike, npt.ArrayLike]:
        """Returns the lengths of the dialogues, and the mixture's draw of an epoch."""
        every = np.arange(len(self._dataset))
        order = every if self._mixture is None else self._mixture.epoch(epoch)
        return self._dataset.lengths, order

    def num_tokens(self, row: int) -> int:
        """Returns the number of places of a global row that are not padding."""
        epoch, row_of_epoch = self.locate(row)
        return int(self.plan(epoch).tokens_per_row[row_of_epoch])

    def read(self, row: int | None, *, row_length: int) -> Row:
        """Reads a global row, cut to a length that holds it; None gives an empty row."""
        indices = [] if row is None else self.examples_in(row).tolist()
        return pack_row(
            [self._dataset[index] for index in indices],
            row_length=row_length,
            pad_token_id=self.config.pad_token_id,
        )

    def read_batch(self, batch: range, wanted: range) -> list[Row]:
        """Reads rows of a batch, as long as its longest row needs."""
        # All hosts have to come to the same length, so all rows of the batch count.
        row_length = self.config.row_length
        if self.config.buckets:
            row_length = self.config.bucket_for(max(map(self.num_tokens, batch), default=0))
        return [self.read(row if row in batch else None, row_length=row_length) for row in wanted]

    def ids_in(self, row: int) -> list[str]:
        """Returns the ids of the dialogues in a global row."""
        return [self._dataset[index].id for index in self.examples_in(row).tolist()]

    def reading(self, num_rows: int) -> "RowStream":
        """Returns the stream itself: its rows are alike, however many are read."""
        del num_rows
        return self


class HostBatches:
    """A host's slices of the global batches from one row on, by number; grain reads these.

    Rows from `end_row` on, where it is given, are empty.
    """

    def __init__(
        self,
        rows: BatchRows,
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
        """Returns the number of batches; the stream of training has no end."""
        if self._end_row is None:
            return sys.maxsize
        return max(0, -(-(self._end_row - self._start_row) // self._batch_size))

    def __getitem__(self, batch: int) -> Row:
        """Reads this host's rows of a global batch, each array stacked to `[B, ...]`."""
        start = self._start_row + batch * self._batch_size
        stop = start + self._batch_size
        if self._end_row is not None:
            stop = min(stop, self._end_row)
        rows_per_host = self._batch_size // self._share.num_hosts
        first = start + self._share.host * rows_per_host
        rows = self._rows.read_batch(range(start, stop), range(first, first + rows_per_host))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class BatchIterator(grain.DatasetIterator[Row]):
    """Batches in order, made ahead, at a position that is one number.

    `get_state` is `{"next_row": GLOBAL_ROW_INDEX}`: the same on all hosts, whatever their number,
    and whatever was prefetched. Orbax and grain's checkpoint handler save it as it is.
    """

    def __init__(
        self,
        rows: BatchRows,
        *,
        batch_size: int,
        share: HostShare | None = None,
        prefetch: PrefetchConfig | None = None,
        end_row: int | None = None,
    ) -> None:
        """Starts at row 0.

        Args:
            rows: from `EpochRows.reading`.
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
        self._host_batches()  # checks the sizes now, and starts nothing yet

    def __next__(self) -> Row:
        """Returns the next batch.

        Raises:
            StopIteration: all rows were given.
        """
        if self._batches is None:
            self._batches = self._make_ahead()
        batch = next(self._batches)
        self._next_row += self._batch_size
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the position, as JSON values."""
        return {"next_row": self._next_row}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position from `get_state`, saved by any number of hosts."""
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
        """Returns this host's batches from the next row on."""
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
    rows: EpochRows,
    *,
    batch_size: int,
    share: HostShare | None = None,
    prefetch: PrefetchConfig | None = None,
) -> BatchIterator:
    """Reads each row of a stream's first epoch once; the last batch is filled with empty rows."""
    end_row = rows.first_row(1)
    return BatchIterator(
        rows.reading(end_row),
        batch_size=batch_size,
        share=share,
        prefetch=prefetch,
        end_row=end_row,
    )


def _check_lengths(placed: Indices, order: Indices, row_length: int) -> None:
    wrong = np.flatnonzero((placed > row_length) | (placed < 1))
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} examples do not fit a row of {row_length} tokens, the first is example "
            f"{order[wrong[0]]} with {placed[wrong[0]]}; they should be truncated or dropped "
            "before packing"
        )
