"""Rows of answers and the pairs among them, and the batches of a run.

A row holds all answers that its pairs need, so rows can be divided over micro-batches and devices
at will. Which prompts share a row follows from lengths, seed and epoch alone; the position of a run
is the global index of its next row.

Pairs that a model is measured by and not trained on: they differ in one thing alone.
"""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from huatuo_jax.data.accounting import HELD_OUT, Account, placed
from huatuo_jax.data.batches import HostShare, PackingPlan, Row, pack_row, plan_rows
from huatuo_jax.data.mixture import permutation
from huatuo_jax.data.readers import read_comparisons
from huatuo_jax.data.tokenizing import UNKNOWN_KIND, Example
from huatuo_jax.preferences.data import (
    Answer,
    ComparisonsConfig,
    Group,
    Pair,
    Told,
    answers_of,
    case_of,
    groups_of,
    tokenize_answers,
)

Denominator = Literal["pairs", "prompts"]
_OF_TOKENS = ("token_ids", "segment_ids", "positions", "trained_mask")


class Part(NamedTuple):
    """Pairs of one group that share a row, and the answers they need.

    Attributes:
        id: of the group.
        answers: each once.
        pairs: of those.
        weight: of each pair in the loss.
    """

    id: str
    answers: tuple[Answer, ...]
    pairs: tuple[Pair, ...]
    weight: float

    @property
    def num_tokens(self) -> int:
        """Of all answers."""
        return sum(len(answer.token_ids) for answer in self.answers)


def parts_of(group: Group, *, row_length: int, denominator: Denominator) -> list[Part]:
    """A group as parts that fit a row each: one, unless its answers are too many.

    Where they are, pairs go in order to the first part with room for the answers they add, and an
    answer that several parts need goes through the model once for each.

    Args:
        group: the pairs of one prompt.
        row_length: tokens of a row; any two answers fit.
        denominator: `pairs` gives each pair a weight of 1, `prompts` gives all pairs of the group
            together 1.
    """
    weight = 1.0 if denominator == "pairs" else 1.0 / len(group.pairs)
    lengths = [len(answer.token_ids) for answer in group.answers]
    members: list[dict[int, int]] = []  # Of each part: answer -> its place there.
    pairs: list[list[Pair]] = []
    for pair in group.pairs:
        needed = {pair.chosen, pair.rejected}
        fitting = (
            index
            for index, inside in enumerate(members)
            if sum(lengths[one] for one in needed | inside.keys()) <= row_length
        )
        index = next(fitting, len(members))
        if index == len(members):
            members.append({})
            pairs.append([])
        inside = members[index]
        for one in (pair.chosen, pair.rejected):
            inside.setdefault(one, len(inside))
        pairs[index].append(
            pair._replace(chosen=inside[pair.chosen], rejected=inside[pair.rejected])
        )
    return [
        Part(group.id, tuple(group.answers[one] for one in inside), tuple(those), weight)
        for inside, those in zip(members, pairs, strict=True)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """How groups become rows.

    Attributes:
        row_length: tokens of a row.
        packed: several groups a row, or one.
        window: how many are packed together; None for the epoch.
        denominator: see `parts_of`.
        shuffled: each epoch in an order of its own, or in the given one.
        seed: of that order.
        pad_token_id: what padding is filled with; nothing looks at it.
    """

    row_length: int
    packed: bool = True
    window: int | None = None
    denominator: Denominator = "pairs"
    shuffled: bool = True
    seed: int = 0
    pad_token_id: int = 0


class ComparisonRows:
    """All rows of all epochs, by global row index; each holds as many places for pairs.

    Attributes:
        parts: what is packed.
    """

    def __init__(self, groups: Sequence[Group], cfg: RowsConfig) -> None:
        """Plans the first epoch."""
        self._cfg = cfg
        self.parts = [
            part
            for group in groups
            for part in parts_of(group, row_length=cfg.row_length, denominator=cfg.denominator)
        ]
        self._lengths = [part.num_tokens for part in self.parts]
        self._plans: list[PackingPlan] = []
        self._first_rows = [0]
        self._most_pairs = 0
        self._add_epoch()

    @property
    def num_repeated(self) -> int:
        """How many answers go through the model again in an epoch, as their group fits no row."""
        return sum(len(part.answers) for part in self.parts) - len(
            {
                (part.id, answer.token_ids.tobytes())
                for part in self.parts
                for answer in part.answers
            }
        )

    def first_row(self, epoch: int) -> int:
        """The global index of an epoch's first row."""
        while len(self._first_rows) <= epoch:
            self._add_epoch()
        return self._first_rows[epoch]

    def most_pairs(self, num_rows: int) -> int:
        """The most pairs of any row in the epochs that so many rows take."""
        while self._first_rows[-1] < num_rows:
            self._add_epoch()
        return self._most_pairs

    def parts_in(self, row: int) -> list[Part]:
        """What a global row holds."""
        while self._first_rows[-1] <= row:
            self._add_epoch()
        epoch = bisect.bisect_right(self._first_rows, row) - 1
        indices = self._plans[epoch][row - self._first_rows[epoch]]
        return [self.parts[index] for index in indices.tolist()]

    def read(self, row: int | None, *, num_pairs: int) -> Row:
        """A global row with so many places for pairs; None for an empty row."""
        parts = [] if row is None else self.parts_in(row)
        answers = [answer for part in parts for answer in part.answers]
        row_of = _row_of(answers, self._cfg, num_pairs=num_pairs)
        ends = np.cumsum([len(one.token_ids) for one in answers], dtype=np.int64) - 1
        firsts = np.cumsum([0, *(len(part.answers) for part in parts)])
        placed = [
            (pair, int(first), part.weight)
            for part, first in zip(parts, firsts, strict=False)
            for pair in part.pairs
        ]
        assert len(placed) <= num_pairs, f"{len(placed)} pairs in a row with {num_pairs} places"
        for index, (pair, first, weight) in enumerate(placed):
            row_of["chosen_at"][index] = ends[first + pair.chosen]
            row_of["rejected_at"][index] = ends[first + pair.rejected]
            row_of["p_chosen"][index] = pair.p_chosen
            row_of["margin"][index] = 0.0 if pair.margin is None else pair.margin
            row_of["pair_weight"][index] = weight
        return row_of

    def _add_epoch(self) -> None:
        epoch, cfg = len(self._plans), self._cfg
        order = np.arange(len(self.parts))
        if cfg.shuffled:
            order = permutation(len(self.parts), cfg.seed, "prompts", epoch)
        plan = plan_rows(
            self._lengths,
            order,
            row_length=cfg.row_length,
            packed=cfg.packed,
            window=cfg.window,
            key=(cfg.seed, "reward rows", epoch),
        )
        self._plans.append(plan)
        self._first_rows.append(self._first_rows[-1] + len(plan))
        most = max(sum(len(self.parts[i].pairs) for i in plan[row]) for row in range(len(plan)))
        self._most_pairs = max(self._most_pairs, most)


def empty_row(cfg: RowsConfig, *, num_pairs: int) -> Row:
    """A row without answers, with so many places for pairs."""
    return _row_of([], cfg, num_pairs=num_pairs)


def _row_of(answers: Sequence[Answer], cfg: RowsConfig, *, num_pairs: int) -> Row:
    """A row of answers, without their pairs."""
    packed = pack_row(
        [Example(one.token_ids, one.is_answer, UNKNOWN_KIND, "") for one in answers],
        row_length=cfg.row_length,
        pad_token_id=cfg.pad_token_id,
    )
    row: Row = {name: packed[name] for name in _OF_TOKENS}
    row |= {name: np.zeros(num_pairs, np.int32) for name in ("chosen_at", "rejected_at")}
    row |= {name: np.zeros(num_pairs, np.float32) for name in ("p_chosen", "margin", "pair_weight")}
    return row


class ComparisonBatches(Iterator[Row]):
    """This host's rows of the global batches; the position is `{"next_row": GLOBAL_ROW_INDEX}`."""

    def __init__(
        self,
        rows: ComparisonRows,
        *,
        batch_size: int,
        num_pairs: int,
        share: HostShare,
        end_row: int | None = None,
    ) -> None:
        """Starts at row 0.

        Args:
            rows: all there is.
            batch_size: rows of a global batch.
            num_pairs: places for pairs in each row.
            share: this host's part.
            end_row: where the stream ends, the last batch filled up with empty rows; None for
                never.
        """
        assert batch_size % share.num_hosts == 0, (batch_size, share)
        self._rows, self._batch_size, self._num_pairs = rows, batch_size, num_pairs
        self._share, self._end_row = share, end_row
        self._next_row = 0

    def __next__(self) -> Row:
        """The next batch.

        Raises:
            StopIteration: all rows were given.
        """
        start, end = self._next_row, self._end_row
        if end is not None and start >= end:
            raise StopIteration
        per_host = self._batch_size // self._share.num_hosts
        first = start + self._share.host * per_host
        rows = [
            self._rows.read(row if end is None or row < end else None, num_pairs=self._num_pairs)
            for row in range(first, first + per_host)
        ]
        self._next_row += self._batch_size
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> dict[str, Any]:
        """The position, as what JSON can say."""
        return {"next_row": self._next_row}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` gave, here or on any number of hosts."""
        self._next_row = int(state["next_row"])


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_probe(
    paths: Sequence[str],
    cfg: ComparisonsConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    name: str,
    encoding: str | None = None,
) -> tuple[tuple[Group, ...], Account]:
    """Reads and tokenises pairs; each counts as certain, whatever its label says.

    What is measured is how often the `chosen` side gets the higher score.

    Args:
        paths: files of comparisons.
        cfg: how they are rendered.
        tokenizer: the model's.
        name: of the probe; it stands for the source of each pair.
        encoding: of text files; None tells it by evidence.

    Returns:
        The pairs by prompt, and what became of all rows.

    Raises:
        ValueError: a file is not readable, or too many pairs exceed `max_length`.
    """
    account = Account("comparisons")
    told = []
    for path in paths:
        reading = read_comparisons(path, source=name, encoding=encoding)
        for place, one in placed(reading):
            certain = dataclasses.replace(one, source=name, p_chosen=1.0, margin=None)
            told.append(Told(certain, place, case_of(one, None), held_out=True, always=True))
        account.add_rows(reading)
    tokens = tokenize_answers((answers_of(one.comparison) for one in told), cfg, tokenizer)
    groups = groups_of(told, tokens, account, HELD_OUT)
    account.check(
        cfg.max_left_out_share,
        name="data.max_left_out_share",
        limit=f"data.max_length={cfg.max_length}",
    )
    return groups, account
