"""Packing: several dialogues in one row, so that hardly a token of a batch is padding.

Two steps, both pure. A plan says from lengths alone which examples share a row (best fit on
decreasing lengths); a row then lays their tokens end to end, each example a segment of its own.

What a row holds, each of shape `[T]`:

- `token_ids`: the examples' ids, then padding.
- `segment_ids`: 1 for the first example's tokens, 2 for the second's, and 0 for padding. Tokens
  attend within their segment; padding is told by this, never by an id.
- `positions`: 0, 1, 2, ... from the start of each segment; 0 in padding.
- `trained_mask`: whether token t is a target, predicted from token t - 1 of the same segment. It
  is False at every segment's first token, so `token_ids[1:]` with `trained_mask[1:]` are the
  targets of positions `[:-1]`, with no look across a border.
- `kind_ids`: the example's kind, as an index into `huatuo_jax.data.examples.ALL_KINDS`; 0 in
  padding, which is never trained, so that a sum per kind needs no look at it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from huatuo_jax.data.examples import Example
from huatuo_jax.data.shuffling import Indices, permutation

Row = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class PackingPlan:
    """Which examples stand in which row.

    Row r holds `example_indices[row_starts[r] : row_starts[r + 1]]`, in this order, and
    `tokens_per_row[r]` tokens in all, of the `row_length` there is room for.
    """

    example_indices: Indices
    row_starts: Indices
    tokens_per_row: Indices
    row_length: int

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.row_starts) - 1

    def __getitem__(self, row: int) -> Indices:
        """The examples of one row."""
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
    """Best-fit-decreasing bin packing: the row of each example, and the number of rows.

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


def _check_lengths(placed: Indices, order: Indices, row_length: int) -> None:
    wrong = np.flatnonzero((placed > row_length) | (placed < 1))
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} examples do not fit a row of {row_length} tokens, the first is example "
            f"{order[wrong[0]]} with {placed[wrong[0]]}; they should be truncated or dropped "
            "before packing"
        )
