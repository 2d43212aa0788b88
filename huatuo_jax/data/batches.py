"""Batches of packed rows: packing, the stream of rows, and batches for training and evaluation.

Packing puts several dialogues in one row, so that hardly a token of a batch is padding, in two pure
steps: a plan assigns examples to rows by their lengths alone (best fit on decreasing lengths), and
a row then lays their tokens end to end, each example a segment of its own. A row holds, each of
shape `[T]`:

- `token_ids`: the examples' ids, then padding.
- `segment_ids`: 1 for the first example's tokens, 2 for the second's, and 0 for padding. Tokens
  attend within their segment; padding is recognized by this, never by an id.
- `positions`: 0, 1, 2, ... from the start of each segment; 0 in padding.
- `trained_mask`: whether token t is a target, predicted from token t - 1 of the same segment. It
  is False at every segment's first token, so `token_ids[1:]` with `trained_mask[1:]` are the
  targets of positions `[:-1]`, never across a border.
- `kind_ids`: the example's kind, as an index into `huatuo_jax.data.tokenizing.ALL_KINDS`; 0 in
  padding, which is never trained, so a sum per kind may ignore it.

The stream of rows is all epochs end to end: the first row of epoch 1 follows the last one of epoch
0. A row is a function of the data, the seed, and its global row index. A batch is a slice of the
stream and may span two epochs. The saved position is the global index of the next row, so a run
may resume with another number of hosts, processes, or rows in a batch.
"""

import bisect
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
import numpy.typing as npt
from absl import flags

from huatuo_jax.data.mixture import Indices, Mixture, permutation
from huatuo_jax.data.tokenizing import Example, TokenDataset

Row = dict[str, npt.NDArray[Any]]

_PLANS_KEPT = 2  # the epoch that is read and the one that is prefetched


@dataclass(frozen=True, kw_only=True)
class RowConfig:
    """Settings of packing examples into rows.

    Attributes:
        row_length: the tokens of a row. No example is longer.
        packed: several examples a row (see `huatuo_jax.data.batches`), or one.
        window: number of examples of the shuffled order packed together; None for the epoch.
        buckets: lengths that a batch may be cut to, if all its rows are that short: each costs a
            compilation and saves padding if rows are not packed. `row_length` is always one.
        pad_token_id: of padding; no mask depends on it.
    """

    row_length: int
    packed: bool = True
    window: int | None = None
    buckets: tuple[int, ...] = ()
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        """Refuses buckets that are not lengths below a row's."""
        if self.row_length < 1:
            raise ValueError(f"data.row_length: {self.row_length}, it should be at least 1")
        if any(not 0 < bucket < self.row_length for bucket in self.buckets):
            raise ValueError(
                f"data.buckets: {self.buckets}, each should be above 0 and below row_length "
                f"{self.row_length}"
            )

    def bucket_for(self, num_tokens: int) -> int:
        """Returns the smallest length that holds a number of tokens."""
        return min(size for size in (*self.buckets, self.row_length) if size >= num_tokens)


@dataclass(frozen=True, kw_only=True)
class PrefetchConfig:
    """Settings of prefetching: threads, and processes where threads are not enough.

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
        """Validates the index of the host."""
        if not 0 <= self.host < self.num_hosts:
            raise ValueError(f"host: {self.host}, it should be 0 to {self.num_hosts - 1}")


@dataclass(frozen=True)
class PackingPlan:
    """The assignment of examples to rows.

    Row r holds `example_indices[row_starts[r] : row_starts[r + 1]]`, in this order, and
    `tokens_per_row[r]` tokens in all, of at most `row_length`.
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
        """The share of all places that hold a token, 0 to 1."""
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
        lengths: the number of tokens of every example.
        order: the examples to place, as indices into `lengths`; one may occur more than once.
        row_length: the most tokens a row can hold.
        packed: False gives every example a row of its own, in the given order.
        window: number of consecutive examples of the order that are packed together. The default,
            all of them, wastes least; the rows of a small window are closer to a random draw.
        key: seed of the order of the packed rows. Packing sorts by length, so its rows are shuffled
            over the whole epoch.

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
    # Renumber the rows: row r of the packing becomes row shuffled[r] of the plan.
    shuffled = permutation(num_rows, *key)
    row_of = shuffled[row_of]
    # Examples of equal length keep the given order, which is random.
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
    """Lays examples end to end into one row; the module documents its arrays.

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


class RowStream:
    """All rows of all epochs, by global row index.

    Plans are made on demand: each is a function of the lengths, the seed and the epoch, so every
    process makes the same ones.
    """

    def __init__(
        self, dataset: TokenDataset, config: RowConfig, *, mixture: Mixture | None, seed: int = 0
    ) -> None:
        """Uses the examples of `mixture`, or without one each example once, unshuffled."""
        self.config = config
        self._dataset = dataset
        self._mixture = mixture
        self._seed = seed
        self._plans: dict[int, PackingPlan] = {}
        self._first_rows = [0]  # of each epoch whose predecessors are planned
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for another process, which makes its own lock and plans."""
        return {**self.__dict__, "_lock": None, "_plans": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores the state in another process."""
        self.__dict__.update(state, _lock=threading.Lock())

    def plan(self, epoch: int) -> PackingPlan:
        """Returns the rows of an epoch."""
        with self._lock:
            return self._plan(epoch)

    def first_row(self, epoch: int) -> int:
        """Returns the global index of an epoch's first row: the number of rows before it."""
        with self._lock:
            while len(self._first_rows) <= epoch:
                rows = len(self._plan(len(self._first_rows) - 1))
                self._first_rows.append(self._first_rows[-1] + rows)
            return self._first_rows[epoch]

    def locate(self, row: int) -> tuple[int, int]:
        """Returns the epoch of a global row, and its index in the epoch."""
        while self._first_rows[-1] <= row:
            self.first_row(len(self._first_rows))
        epoch = bisect.bisect_right(self._first_rows, row) - 1
        return epoch, row - self._first_rows[epoch]

    def examples_in(self, row: int) -> Indices:
        """Returns the indices of the examples of a global row."""
        epoch, row_of_epoch = self.locate(row)
        return self.plan(epoch)[row_of_epoch]

    def num_tokens(self, row: int) -> int:
        """Returns the number of tokens of a global row that are not padding."""
        epoch, row_of_epoch = self.locate(row)
        return int(self.plan(epoch).tokens_per_row[row_of_epoch])

    def read(self, row: int, *, row_length: int) -> Row:
        """Reads a global row, cut to a length that holds it."""
        examples = [self._dataset[index] for index in self.examples_in(row).tolist()]
        return pack_row(examples, row_length=row_length, pad_token_id=self.config.pad_token_id)

    def example_ids(self, row: int) -> list[str]:
        """Returns the ids of the dialogues in a global row, to report the data of a bad step."""
        return [self._dataset[index].id for index in self.examples_in(row).tolist()]

    def _plan(self, epoch: int) -> PackingPlan:
        # Removed and inserted again: the dict is in order of last use, its first plan is dropped.
        plan = self._plans.pop(epoch) if epoch in self._plans else self._make_plan(epoch)
        while len(self._plans) >= _PLANS_KEPT:
            del self._plans[next(iter(self._plans))]
        self._plans[epoch] = plan
        return plan

    def _make_plan(self, epoch: int) -> PackingPlan:
        every = np.arange(len(self._dataset))
        return plan_rows(
            self._dataset.lengths,
            every if self._mixture is None else self._mixture.epoch(epoch),
            row_length=self.config.row_length,
            packed=self.config.packed,
            window=self.config.window,
            key=(self._seed, "rows", epoch),
        )


class HostBatches:
    """A host's slices of the global batches from one row on, by number; grain reads these.

    Rows from `end_row` on, if it is given, are empty.
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
        """Checks that the hosts can share the batch equally; else ValueError."""
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
        """Returns the number of batches; the training stream is endless."""
        if self._end_row is None:
            return sys.maxsize
        return max(0, -(-(self._end_row - self._start_row) // self._batch_size))

    def __getitem__(self, batch: int) -> Row:
        """Returns this host's rows of a global batch, `[B, T]` each."""
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
        """Returns the batch's length, from all its rows, so that all hosts agree on it."""
        config = self._rows.config
        if not config.buckets:
            return config.row_length
        return config.bucket_for(max(self._rows.num_tokens(row) for row in rows))


class BatchIterator(grain.DatasetIterator[Row]):
    """Batches in order, prefetched, with a position that is one number.

    `get_state` is `{"next_row": GLOBAL_ROW_INDEX}`: the same on all hosts, for any number of them,
    whatever is prefetched. Orbax and grain's checkpoint handler save it unchanged.
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
            rows: the stream.
            batch_size: the rows of a global batch.
            share: this host's part; by default the whole.
            prefetch: settings of prefetching; by default `PrefetchConfig()`.
            end_row: end of the stream; by default none. The last batch is filled with empty rows
                (all segment ids 0), so that every batch has the same shape and no row is lost.

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
        self._host_batches()  # checks the arguments, and starts nothing yet

    def __next__(self) -> Row:
        """Returns the next batch.

        Raises:
            StopIteration: all rows were returned.
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
        """Returns the position in JSON types."""
        return {"next_row": self._next_row}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position of `get_state`, from any number of hosts."""
        self._drop_batches()
        self._next_row = int(state["next_row"])

    def start_prefetch(self) -> None:
        """Starts prefetching before the first batch is asked for."""
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
            if not flags.FLAGS.is_parsed():  # grain reads its own flags, also in a notebook
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
    """Returns the batches of a stream's first epoch, each row once; empty rows fill the last."""
    return BatchIterator(
        rows,
        batch_size=batch_size,
        share=share,
        prefetch=prefetch,
        end_row=rows.first_row(1),
    )


def _check_lengths(placed: Indices, order: Indices, row_length: int) -> None:
    wrong = np.flatnonzero((placed > row_length) | (placed < 1))
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} examples do not fit a row of {row_length} tokens, the first is example "
            f"{order[wrong[0]]} with {placed[wrong[0]]}; they should be truncated or dropped "
            "before packing"
        )
