"""Where the answers of a minibatch stand: several to a row, so that little of it is padding.

Prompts and answers differ much in length. A row has room for the longest that may be, and holds as
many others as fit: each a segment of its own, with positions from 0, as `data.packing` has it. Rows
come in few numbers, and in one width or two, as each shape is compiled.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from huatuo_jax.data.packing import best_fit_rows
from huatuo_jax.generation.buckets import bucket_of, ladder

Rows = dict[str, npt.NDArray[Any]]
Numbers = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The places of some answers of a rollout (n of them) in a minibatch.

    Attributes:
        numbers_n: of the answers in the rollout.
        lengths_n: tokens of each, with its prompt.
        rows_n: its row.
        starts_n: its first slot there.
        segments_n: its segment, from 1.
        num_rows: R, those that only fill up the minibatch among them.
        width: of a row.
    """

    numbers_n: Numbers
    lengths_n: Numbers
    rows_n: Numbers
    starts_n: Numbers
    segments_n: Numbers
    num_rows: int
    width: int

    def pack(self, rollout: Mapping[str, npt.NDArray[Any]]) -> Rows:
        """The minibatch.

        Args:
            rollout: arrays `[N, T]`, one answer a row, from slot 0.

        Returns:
            Those arrays as `[R, width]`, zero where nothing stands, `segment_ids` anew; and
            `answers`, int32: which of the n answers a token belongs to, n outside of them.
        """
        here, there = self._here(), self._there()
        numbers = {
            "segment_ids": (self.segments_n, 0),
            "answers": (np.arange(len(self.numbers_n)), len(self.numbers_n)),
        }
        packed = {}
        for name, array_NT in rollout.items():
            if name not in numbers:
                packed[name] = np.zeros((self.num_rows, self.width), array_NT.dtype)
                packed[name][here] = array_NT[there]
        for name, (of_n, nothing) in numbers.items():
            packed[name] = np.full((self.num_rows, self.width), nothing, np.int32)
            packed[name][here] = np.repeat(of_n, self.lengths_n)
        return packed

    def unpack(self, minibatch_RT: Any, into_NT: npt.NDArray[Any]) -> None:
        """Writes numbers of the minibatch's tokens where the rollout has them."""
        into_NT[self._there()] = np.asarray(minibatch_RT)[self._here()]

    def _here(self) -> tuple[Numbers, Numbers]:
        """Row and slot in the minibatch of every token."""
        places = self._inside() + np.repeat(self.starts_n, self.lengths_n)
        return np.repeat(self.rows_n, self.lengths_n), places

    def _there(self) -> tuple[Numbers, Numbers]:
        """The same in the rollout."""
        return np.repeat(self.numbers_n, self.lengths_n), self._inside()

    def _inside(self) -> Numbers:
        """The place of every token in its answer."""
        ends_n = np.cumsum(self.lengths_n)
        return np.arange(self.lengths_n.sum()) - np.repeat(ends_n - self.lengths_n, self.lengths_n)


def packed_layout(
    numbers_n: Numbers,
    lengths_n: Numbers,
    *,
    width: int,
    narrow: int,
    row_counts: tuple[int, ...],
) -> Layout:
    """Answers packed into as few rows as they need, and then some that nothing stands in.

    A mesh of many devices wants more rows than short answers need. Narrow ones are taken there if
    they come to fewer slots.

    Args:
        numbers_n: of the answers in the rollout.
        lengths_n: tokens of each.
        width: of a row; none is longer.
        narrow: another width, which none is longer than either.
        row_counts: numbers of rows to choose from; the largest is enough for an answer a row.
    """
    rows_n, num_rows = best_fit_rows(lengths_n, width)
    if num_rows < row_counts[0]:
        narrow_rows_n, num_narrow = best_fit_rows(lengths_n, narrow)
        if bucket_of(num_narrow, row_counts) * narrow < row_counts[0] * width:
            rows_n, num_rows, width = narrow_rows_n, num_narrow, narrow
    # Within a row they stand in the order of the minibatch.
    order = np.argsort(rows_n, kind="stable")
    is_first = np.append(True, np.diff(rows_n[order]) > 0)
    ahead = np.cumsum(lengths_n[order]) - lengths_n[order]
    row_begins = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
    starts_n, segments_n = np.empty_like(lengths_n), np.empty_like(lengths_n)
    starts_n[order] = ahead - ahead[row_begins]
    segments_n[order] = np.arange(len(order)) - row_begins + 1
    return Layout(
        numbers_n,
        lengths_n,
        rows_n,
        starts_n,
        segments_n,
        num_rows=bucket_of(num_rows, row_counts),
        width=width,
    )


def plain_layout(numbers_n: Numbers, lengths_n: Numbers, *, width: int) -> Layout:
    """One answer a row, in their order."""
    number = len(numbers_n)
    return Layout(
        numbers_n,
        lengths_n,
        np.arange(number),
        np.zeros(number, np.int64),
        np.ones(number, np.int64),
        num_rows=number,
        width=width,
    )


def row_counts(minibatch_size: int, *, rows_at_once: int, shards: int) -> tuple[int, ...]:
    """The numbers of rows that minibatches come in.

    Whole micro-batches, or less than one where that is enough.

    Args:
        minibatch_size: the largest.
        rows_at_once: of a micro-batch, which divides it.
        shards: of the mesh, which divide a micro-batch.
    """
    few = {shards * size for size in ladder(1, rows_at_once // shards)}
    many = {rows_at_once * size for size in ladder(1, minibatch_size // rows_at_once)}
    return tuple(sorted(few | many))
