"""The stream of packed rows: all epochs end to end, each row found by its global row index.

Row 0 is the first row of epoch 0, and the first row of epoch 1 follows the last one of epoch 0.
What a row holds is a function of the data, the seed, and its index.
"""

import bisect
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from huatuo_jax.data.mixture import Mixture
from huatuo_jax.data.packing import PackingPlan, Row, pack_row, plan_rows
from huatuo_jax.data.shuffling import Indices
from huatuo_jax.data.token_cache import TokenDataset

_PLANS_KEPT = 2  # the epoch that is read and the one that prefetching has already begun


@dataclass(frozen=True, kw_only=True)
class RowConfig:
    """How examples become rows.

    Attributes:
        row_length: the tokens of a row. No example is longer.
        packed: several examples a row (see `huatuo_jax.data.packing`), or one.
        window: how many examples of the shuffled order are packed together; None for the epoch.
        buckets: lengths that a batch may be cut to, where all its rows are that short: each costs a
            compilation and saves padding where rows are not packed. `row_length` is always one.
        pad_token_id: what padding is filled with; no mask looks at it.
    """

    row_length: int
    packed: bool = True
    window: int | None = None
    buckets: tuple[int, ...] = ()
    pad_token_id: int = 0

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
        """The smallest length that holds so many tokens."""
        return min(size for size in (*self.buckets, self.row_length) if size >= num_tokens)


class RowStream:
    """All rows of all epochs, by global row index.

    Plans are made when they are needed: each is a function of the lengths, the seed and the epoch,
    so that every process makes the same ones.
    """

    def __init__(
        self, dataset: TokenDataset, config: RowConfig, *, mixture: Mixture | None, seed: int = 0
    ) -> None:
        """Takes the examples of `mixture`, or without one each example once, unshuffled."""
        self.config = config
        self._dataset = dataset
        self._mixture = mixture
        self._seed = seed
        self._plans: dict[int, PackingPlan] = {}
        self._first_rows = [0]  # of each epoch whose predecessors are planned
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """For another process: without the lock, and the plans are made there again."""
        return {**self.__dict__, "_lock": None, "_plans": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes the state of another process."""
        self.__dict__.update(state, _lock=threading.Lock())

    def plan(self, epoch: int) -> PackingPlan:
        """The rows of an epoch."""
        with self._lock:
            return self._plan(epoch)

    def first_row(self, epoch: int) -> int:
        """The global index of an epoch's first row, which is the number of rows before it."""
        with self._lock:
            while len(self._first_rows) <= epoch:
                rows = len(self._plan(len(self._first_rows) - 1))
                self._first_rows.append(self._first_rows[-1] + rows)
            return self._first_rows[epoch]

    def locate(self, row: int) -> tuple[int, int]:
        """The epoch of a global row, and which row of the epoch it is."""
        while self._first_rows[-1] <= row:
            self.first_row(len(self._first_rows))
        epoch = bisect.bisect_right(self._first_rows, row) - 1
        return epoch, row - self._first_rows[epoch]

    def examples_in(self, row: int) -> Indices:
        """The indices of the examples of a global row."""
        epoch, row_of_epoch = self.locate(row)
        return self.plan(epoch)[row_of_epoch]

    def num_tokens(self, row: int) -> int:
        """The number of places of a global row that are not padding."""
        epoch, row_of_epoch = self.locate(row)
        return int(self.plan(epoch).tokens_per_row[row_of_epoch])

    def read(self, row: int, *, row_length: int) -> Row:
        """Reads a global row, cut to a length that holds it."""
        examples = [self._dataset[index] for index in self.examples_in(row).tolist()]
        return pack_row(examples, row_length=row_length, pad_token_id=self.config.pad_token_id)

    def example_ids(self, row: int) -> list[str]:
        """The ids of the dialogues in a global row, to name the data of a bad step."""
        return [self._dataset[index].id for index in self.examples_in(row).tolist()]

    def _plan(self, epoch: int) -> PackingPlan:
        # Taken out and put in again: the dict's order is that of last use, the first one goes.
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
