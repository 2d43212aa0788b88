"""Rows of preference pairs, and what the stages that train on them share.

A row holds all answers that its pairs need, so rows can be divided over micro-batches and devices
at will. Which prompts share a row follows from lengths, seed and epoch alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.core.progress import progress_bar
from huatuo_jax.data.accounting import HELD_OUT, Account, placed
from huatuo_jax.data.batches import EpochRows, PackingConfig, Row, pack_row
from huatuo_jax.data.mixture import permutation
from huatuo_jax.data.readers import read_comparisons
from huatuo_jax.data.tokenizing import UNKNOWN_KIND, Example
from huatuo_jax.preferences.data import (
    Answer,
    Comparisons,
    ComparisonsConfig,
    Group,
    Pair,
    Told,
    answers_of,
    case_of,
    groups_of,
    open_comparisons,
    tokenize_answers,
)
from huatuo_jax.training.loop import Job
from huatuo_jax.training.run_directory import StageDirectory
from huatuo_jax.training.stage import TrainingConfig, UpdateStage
from huatuo_jax.training.update import abstract_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Denominator = Literal["pairs", "prompts"]
_OF_TOKENS = ("token_ids", "segment_ids", "positions", "trained_mask")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsConfig(PackingConfig):
    """The rows of groups, beside the fields of `PackingConfig`.

    Attributes:
        denominator: see `parts_of`.
        shuffled: each epoch in an order of its own, or in the given one.
        seed: of that order.
    """

    denominator: Denominator = "pairs"
    shuffled: bool = True
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig(TrainingConfig):
    """The fields of the stages that train on comparisons, beside those of `TrainingConfig`.

    Attributes:
        data: the comparisons.
        num_epochs: passes over the comparisons.
    """

    data: ComparisonsConfig

    def rows(self, *, shuffled: bool, denominator: Denominator = "pairs") -> RowsConfig:
        """Returns how comparisons become rows, to train on or to evaluate."""
        return RowsConfig(
            row_length=self.data.row_length,
            packed=self.data.packed,
            window=self.data.window,
            denominator=denominator,
            shuffled=shuffled,
            seed=self.seed,
        )


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
    """Divides a group into parts that fit a row each: one, unless its answers are too many.

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


class ComparisonRows(EpochRows):
    """All rows of comparisons of all epochs, by global row index.

    Attributes:
        parts: what is packed.
    """

    def __init__(self, groups: Sequence[Group], cfg: RowsConfig) -> None:
        """Plans the first epoch."""
        super().__init__(cfg, key=(cfg.seed, "reward rows"))
        self._cfg = cfg
        self.parts = [
            part
            for group in groups
            for part in parts_of(group, row_length=cfg.row_length, denominator=cfg.denominator)
        ]
        self._lengths = [part.num_tokens for part in self.parts]
        self.plan(0)

    @property
    def num_repeated(self) -> int:
        """Answers that go through the model again in an epoch, as their group fits no row."""
        return sum(len(part.answers) for part in self.parts) - len(
            {
                (part.id, answer.token_ids.tobytes())
                for part in self.parts
                for answer in part.answers
            }
        )

    def placed(self, epoch: int) -> tuple[npt.ArrayLike, npt.ArrayLike]:
        """Returns the lengths of the parts, and an epoch's order of them."""
        if self._cfg.shuffled:
            return self._lengths, permutation(len(self.parts), self._cfg.seed, "prompts", epoch)
        return self._lengths, np.arange(len(self.parts))

    def most_pairs(self, num_rows: int) -> int:
        """Returns the most pairs of any row in the epochs that so many rows take."""
        last_epoch, _ = self.locate(max(num_rows, 1) - 1)
        plans = map(self.plan, range(last_epoch + 1))
        return max(
            sum(len(self.parts[index].pairs) for index in plan[row])
            for plan in plans
            for row in range(len(plan))
        )

    def parts_in(self, row: int) -> list[Part]:
        """Returns the parts that a global row holds."""
        return [self.parts[index] for index in self.examples_in(row).tolist()]

    def ids_in(self, row: int) -> list[str]:
        """Returns the ids of the groups in a global row."""
        return [part.id for part in self.parts_in(row)]

    def reading(self, num_rows: int) -> "PairRows":
        """Returns the reader of the first so many rows, with places for the pairs of each."""
        return PairRows(self, self.most_pairs(num_rows))

    def read(self, row: int | None, *, num_pairs: int) -> Row:
        """Reads a global row with so many places for pairs; None gives an empty row."""
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


class PairRows(NamedTuple):
    """Rows with the same number of places for pairs.

    Attributes:
        rows: of comparisons.
        num_pairs: places for pairs in each.
    """

    rows: ComparisonRows
    num_pairs: int

    def read_batch(self, batch: range, wanted: range) -> list[Row]:
        """Reads rows of a batch; one outside of it is empty."""
        return [
            self.rows.read(row if row in batch else None, num_pairs=self.num_pairs)
            for row in wanted
        ]


def empty_row(cfg: RowsConfig, *, num_pairs: int) -> Row:
    """Returns a row without answers, with so many places for pairs."""
    return _row_of([], cfg, num_pairs=num_pairs)


Preference = TypeVar("Preference", bound=PreferenceConfig)


class PreferenceStage(UpdateStage[Preference]):
    """One run of a stage that trains on comparisons.

    Attributes:
        comparisons: set by `open_data`.
    """

    comparisons: Comparisons

    def open_data(self) -> dict[str, Any]:
        """Reads and tokenises the comparisons."""
        with progress_bar(f"{self.name}: tokenising", "answers") as on_progress:
            comparisons = open_comparisons(self.cfg.data, self.tokenizer, on_progress)
        self.use(comparisons)
        return {"comparisons": comparisons.identity}

    def use(self, comparisons: Comparisons) -> None:
        """Takes comparisons to train on."""
        self.comparisons, self.account = comparisons, comparisons.account

    def make_job(self, directory: StageDirectory, decisive: Mapping[str, Any]) -> Job:
        """Packs the rows and makes the job of the loop."""
        self.train_rows = ComparisonRows(self.comparisons.train, self.cfg.rows(shuffled=True))
        if held_out := self.comparisons.held_out:
            self.held_out_rows = ComparisonRows(held_out, self.cfg.rows(shuffled=False))
        return super().make_job(directory, decisive)


def check_fits(data: ComparisonsConfig, backbone: BackboneConfig, *, stage: str) -> None:
    """Raises ValueError where comparisons do not suit the backbone."""
    if data.max_length > backbone.max_positions:
        raise ValueError(
            f"config.{stage}.data.max_length={data.max_length} must be at most the model's "
            f"{backbone.max_positions} positions"
        )
    # Also where prompts are not packed: the answers of one share a row.
    backbone.require_fixed_angles(data.max_length, purpose="comparing answers in one row")


def abstract_rows(
    cfg: PreferenceConfig, mesh: Mesh, *, num_pairs: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the rows of a step as shapes on a mesh, with places for so many pairs each."""
    row = empty_row(cfg.rows(shuffled=False), num_pairs=num_pairs)
    return abstract_batch(row, cfg.batch_size, mesh)


def open_probe(
    paths: Sequence[str],
    cfg: ComparisonsConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    name: str,
    encoding: str | None = None,
) -> tuple[tuple[Group, ...], Account]:
    """Reads and tokenises pairs; each counts as certain, whatever its label.

    What is measured is how often the `chosen` side gets the higher score.

    Args:
        paths: files of comparisons.
        cfg: how they are rendered.
        tokenizer: the model's.
        name: of the probe; it becomes the source of each pair.
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


def _row_of(answers: Sequence[Answer], cfg: RowsConfig, *, num_pairs: int) -> Row:
    """Returns a row of answers, without their pairs."""
    packed = pack_row(
        [Example(one.token_ids, one.is_answer, UNKNOWN_KIND, "") for one in answers],
        row_length=cfg.row_length,
        pad_token_id=cfg.pad_token_id,
    )
    row: Row = {name: packed[name] for name in _OF_TOKENS}
    row |= {name: np.zeros(num_pairs, np.int32) for name in ("chosen_at", "rejected_at")}
    row |= {name: np.zeros(num_pairs, np.float32) for name in ("p_chosen", "margin", "pair_weight")}
    return row
