"""Scores given responses: one reward each, or per-token log-probs.

The answers are tokens already, and lengths tell prompt, answer and padding apart: no mask looks at
an id, so padding may equal EOS. The score of an answer is the head's at its last token, which is
the end of the assistant's last turn. Rows are packed or padded, on either side, on any mesh: it
makes no difference but rounding.
"""

import copy
import dataclasses
import functools
import json
import math
import operator
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.core import sharding
from huatuo_jax.core.files import write_file
from huatuo_jax.data.batches import PackingPlan, Row, pack_row, plan_rows
from huatuo_jax.data.tokenizing import UNKNOWN_KIND, Example, TokenIds
from huatuo_jax.generation.buckets import bucket_of
from huatuo_jax.hf.generation_config import CONFIG_FILE
from huatuo_jax.training.loop import check_rows
from huatuo_jax.training.losses import at_tokens, hidden_of, score_tokens
from huatuo_jax.training.update import Batch, Variables

NORMALIZATION_FILE = "reward_normalization.json"
CONFIG_FIELDS = ("task_specific_params", "reward_normalization")
"""Where a Hugging Face config.json holds the normalization."""

Side = Literal["left", "right"]
Progress = Callable[[int, int], None]

_LENGTHS = 64  # Row lengths are multiples of it, so that few programs are compiled.


@dataclasses.dataclass(frozen=True)
class GivenAnswer:
    """A prompt and an answer to it, as tokens.

    Attributes:
        token_ids: of both, `[T]`, up to the last token of the answer.
        prompt_length: how many of them are the prompt's.
    """

    token_ids: TokenIds
    prompt_length: int

    def __post_init__(self) -> None:
        """Raises ValueError for an answer without a token, or an invalid length."""
        if not 0 <= self.prompt_length < len(self.token_ids):
            raise ValueError(
                f"prompt_length={self.prompt_length} must be 0 or more and below the "
                f"{len(self.token_ids)} tokens of prompt and answer"
            )


class ScoredTokens(NamedTuple):
    """The log-probabilities of given tokens, and the best tokens in the place of each.

    Attributes:
        log_probs: of the tokens, `[T]`, or `[B, T]` within a program.
        token_ids: of the best tokens, best first, `[T, K]`, or `[B, T, K]`.
        top_log_probs: of these.
    """

    log_probs: Any
    token_ids: Any
    top_log_probs: Any


def head_scores(model: Transformer, variables: Variables, batch: Batch) -> jax.Array:
    """Computes the score head's output at every token, `[B, T]` in at least float32.

    Args:
        model: a backbone with a score head.
        variables: its own.
        batch: `token_ids`, `segment_ids`, `positions`, each `[B, T]`, as
            `huatuo_jax.data.batches` describes them; padding may be on either side.
    """
    return model.apply(variables, hidden_of(model, variables, batch), method="scores")


def answer_log_probs(
    model: Transformer,
    variables: Variables,
    batch: Batch,
    *,
    temperature: float = 1.0,
    chunk: int = 128,
) -> jax.Array:
    """Computes the log-probability of every answer token given those before it, `[B, T]`.

    Args:
        model: a backbone with a token head.
        variables: its own.
        batch: as for `head_scores`, and `trained_mask`, which is True at the tokens of answers;
            never at the first token of a segment.
        temperature: divides the logits.
        chunk: positions of each row whose logits are held at once.

    Returns:
        At t, that of token t; 0 where it is no answer's.
    """
    scores = score_tokens(
        model, variables, batch, batch["trained_mask"], temperature=temperature, chunk=chunk
    )
    return at_tokens(scores.log_probs_BT)


def answer_top_log_probs(
    model: Transformer,
    variables: Variables,
    batch: Batch,
    *,
    count: int,
    temperature: float = 1.0,
    chunk: int = 128,
) -> ScoredTokens:
    """Computes `answer_log_probs`, and the best tokens in the place of each.

    Args:
        model: a backbone with a token head.
        variables: its own.
        batch: as for `answer_log_probs`.
        count: number K of best tokens.
        temperature: divides the logits.
        chunk: positions of each row whose logits are held at once.

    Returns:
        At t, those for token t given the tokens before it; zeros where it is no answer's.
    """
    scores = score_tokens(
        model,
        variables,
        batch,
        batch["trained_mask"],
        temperature=temperature,
        chunk=chunk,
        num_top=count,
    )
    assert scores.top is not None
    return ScoredTokens(*map(at_tokens, (scores.log_probs_BT, *scores.top)))


def compile_values(values: Callable[[Variables, Batch], Any], mesh: Mesh) -> sharding.OnMesh:
    """Compiles one of the above under one `jax.jit`, its values on every device of the mesh."""
    return sharding.OnMesh(jax.jit(values, out_shardings=jax.NamedSharding(mesh, jax.P())), mesh)


def padded_batch(
    token_ids_BT: jax.Array,
    *,
    prompt_lengths_B: jax.Array,
    lengths_B: jax.Array,
    side: Side = "right",
) -> dict[str, jax.Array]:
    """Makes a batch of one answer a row, for `head_scores` and `answer_log_probs`.

    Args:
        token_ids_BT: prompt and answer end to end, then padding of any ids; or padding first.
        prompt_lengths_B: tokens of each prompt.
        lengths_B: tokens of prompt and answer together; 0 for a row of nothing.
        side: where the padding is.

    Returns:
        Beside the arrays `[B, T]` of a batch, `last_B`: index of each answer's last token (0
        in a row of nothing).
    """
    width = token_ids_BT.shape[1]
    places_1T = jnp.arange(width, dtype=jnp.int32)[None, :]
    starts_B1 = (width - lengths_B if side == "left" else jnp.zeros_like(lengths_B))[:, None]
    positions_BT = places_1T - starts_B1
    is_token_BT = (positions_BT >= 0) & (positions_BT < lengths_B[:, None])
    is_answer_BT = is_token_BT & (positions_BT >= jnp.maximum(prompt_lengths_B[:, None], 1))
    return {
        "token_ids": token_ids_BT,
        "segment_ids": is_token_BT.astype(jnp.int32),
        "positions": jnp.where(is_token_BT, positions_BT, 0),
        "trained_mask": is_answer_BT,
        "last_B": jnp.maximum(starts_B1[:, 0] + lengths_B - 1, 0),
    }


class Scorer:
    """Scores of any number of answers, in batches of rows on a mesh."""

    def __init__(
        self,
        model: Transformer,
        variables: Variables,
        *,
        mesh: Mesh,
        rows_at_once: int,
        row_length: int | Sequence[int] | None = None,
        packed: bool = True,
        pad_token_id: int = 0,
    ) -> None:
        """Compiles nothing yet.

        Args:
            model: with the head that is asked for.
            variables: on the mesh.
            mesh: rows are divided over it.
            rows_at_once: rows of a batch.
            row_length: tokens of a row; of several, in rising order, the first that holds the
                longest answer; None for the longest answer's.
            packed: several answers a row.
            pad_token_id: what padding is filled with; nothing looks at it.

        Raises:
            ValueError: the mesh does not divide the rows.
        """
        check_rows(rows_at_once, name="rows_at_once", mesh=mesh)
        self._model, self._variables, self._mesh = model, variables, mesh
        self._rows_at_once, self._row_length = rows_at_once, row_length
        self._packed, self._pad_token_id = packed, pad_token_id
        self._scores = compile_values(functools.partial(head_scores, model), mesh)
        self._log_probs: dict[tuple[float, int, int], sharding.OnMesh] = {}

    def of(self, variables: Variables) -> "Scorer":
        """Returns the same programs, compiled once for both, with other variables of the model."""
        other = copy.copy(self)
        other._variables = variables
        return other

    def scores(
        self, answers: Sequence[GivenAnswer], on_progress: Progress | None = None
    ) -> npt.NDArray[np.float32]:
        """Returns the head's score at the last token of each answer, in their order.

        Raises:
            ValueError: an answer is longer than a row or than the model's positions.
        """
        scores_N = np.zeros(len(answers), np.float32)
        for index, values_T in self._values(self._scores, answers, on_progress):
            scores_N[index] = values_T[-1]
        return scores_N

    def log_probs(
        self,
        answers: Sequence[GivenAnswer],
        *,
        temperature: float = 1.0,
        chunk: int = 128,
        on_progress: Progress | None = None,
    ) -> list[npt.NDArray[np.float32]]:
        """Returns each answer's log-probabilities, one a token; prompts have to hold a token.

        Raises:
            ValueError: an answer is too long, or has no prompt.
        """
        return self._of_tokens(answers, (temperature, chunk, 0), on_progress)

    def top_log_probs(
        self,
        answers: Sequence[GivenAnswer],
        *,
        count: int,
        temperature: float = 1.0,
        chunk: int = 128,
        on_progress: Progress | None = None,
    ) -> list[ScoredTokens]:
        """Returns `log_probs` of each answer, and the `count` best tokens in place of each.

        Raises:
            ValueError: as for `log_probs`; or the vocabulary does not have that many tokens.
        """
        if not 1 <= count <= self._model.cfg.vocab_size:
            raise ValueError(
                f"count={count} must lie between 1 and the vocabulary's "
                f"{self._model.cfg.vocab_size} tokens"
            )
        return self._of_tokens(answers, (temperature, chunk, count), on_progress)

    def _of_tokens(
        self,
        answers: Sequence[GivenAnswer],
        settings: tuple[float, int, int],
        on_progress: Progress | None,
    ) -> list[Any]:
        """Returns the values of each answer's own tokens; `settings` ends with the count."""
        for index, one in enumerate(answers):
            if not one.prompt_length:
                raise ValueError(f"answers[{index}]: prompt_length=0 must be at least 1")
        if settings not in self._log_probs:
            temperature, chunk, count = settings
            function: Callable[..., Any] = answer_log_probs
            if count:
                function = functools.partial(answer_top_log_probs, count=count)
            values = functools.partial(function, self._model, temperature=temperature, chunk=chunk)
            self._log_probs[settings] = compile_values(values, self._mesh)
        found: list[Any] = [None] * len(answers)
        for index, values in self._values(self._log_probs[settings], answers, on_progress):
            own = operator.itemgetter(slice(answers[index].prompt_length, None))
            found[index] = jax.tree.map(np.copy, jax.tree.map(own, values))
        return found

    def _values(
        self,
        compiled: sharding.OnMesh,
        answers: Sequence[GivenAnswer],
        on_progress: Progress | None,
    ) -> Iterator[tuple[int, Any]]:
        """Yields each answer's index, and the values of its prompt's and its own tokens."""
        if not answers:
            return
        plan = self._plan(answers)
        for first in range(0, len(plan), self._rows_at_once):
            numbers = range(first, min(first + self._rows_at_once, len(plan)))
            batch = self._batch([[answers[index] for index in plan[row]] for row in numbers], plan)
            placed = sharding.put_whole(batch, self._mesh)
            values = jax.device_get(compiled(self._variables, placed))
            for row in numbers:
                start, place = 0, row - first
                for index in plan[row].tolist():
                    end = start + len(answers[index].token_ids)
                    own = operator.itemgetter((place, slice(start, end)))
                    yield index, jax.tree.map(own, values)
                    start = end
            if on_progress is not None:
                on_progress(numbers.stop, len(plan))

    def _plan(self, answers: Sequence[GivenAnswer]) -> PackingPlan:
        lengths = [len(one.token_ids) for one in answers]
        longest, backbone = max(lengths), self._model.cfg
        if longest > backbone.max_positions:
            raise ValueError(
                f"answers[{lengths.index(longest)}] has {longest} tokens with its prompt, more "
                f"than the model's {backbone.max_positions} positions"
            )
        backbone.require_fixed_angles(longest, purpose="scoring in batches")
        if self._row_length is None:
            row_length = -(-longest // _LENGTHS) * _LENGTHS
        elif isinstance(self._row_length, int):
            row_length = self._row_length
        else:
            row_length = bucket_of(longest, tuple(self._row_length))
        order = np.arange(len(answers))
        return plan_rows(lengths, order, row_length=row_length, packed=self._packed)

    def _batch(self, rows: Sequence[Sequence[GivenAnswer]], plan: PackingPlan) -> Row:
        """Returns the rows, filled up with empty ones to the compiled program's number."""
        surplus: list[Sequence[GivenAnswer]] = [[]] * (self._rows_at_once - len(rows))
        packed = [
            pack_row(
                [_example(one) for one in row],
                row_length=plan.row_length,
                pad_token_id=self._pad_token_id,
            )
            for row in [*rows, *surplus]
        ]
        names = ("token_ids", "segment_ids", "positions", "trained_mask")
        return {name: np.stack([row[name] for row in packed]) for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normalization:
    """Mean and deviation that give raw scores mean 0 and standard deviation 1 on some answers.

    Attributes:
        mean: of the raw scores.
        standard_deviation: of the raw scores, as a population.
        num_answers: how many answers those were.
        answers: which ones, in words.
    """

    mean: float
    standard_deviation: float
    num_answers: int
    answers: str

    @classmethod
    def of(cls, scores: npt.ArrayLike, *, answers: str) -> "Normalization":
        """Computes the normalization of these raw scores.

        Raises:
            ValueError: there are none, they are all the same, or one is not finite.
        """
        scores_N = np.asarray(scores, np.float64)
        # Not by their deviation: that of equal numbers is the rounding of their mean.
        if not len(scores_N) or not np.isfinite(scores_N).all() or not np.ptp(scores_N) > 0:
            raise ValueError(
                f"{answers}: {len(scores_N)} scores, which must be finite and differ, so that "
                "they can be normalized"
            )
        return cls(
            mean=float(scores_N.mean()),
            standard_deviation=float(scores_N.std()),
            num_answers=len(scores_N),
            answers=answers,
        )

    def apply(self, scores: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Returns raw scores in units of the standard deviation, from the mean."""
        return (np.asarray(scores, np.float64) - self.mean) / self.standard_deviation

    def to_json(self) -> dict[str, Any]:
        """Returns its fields."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Normalization":
        """Makes it from the fields that `to_json` gave.

        Raises:
            ValueError: a field is missing or unknown, or a number is invalid.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != names:
            raise ValueError(f"a normalization has {sorted(names)}, this has {sorted(fields)}")
        numbers = (fields["mean"], fields["standard_deviation"])
        if not all(isinstance(one, int | float) and math.isfinite(one) for one in numbers) or not (
            fields["standard_deviation"] > 0
        ):
            raise ValueError(f"mean and standard_deviation of a normalization are {numbers}")
        return cls(**fields)


def save_normalization(folder: pathlib.Path, normalization: Normalization) -> None:
    """Writes it beside a model's weights, whole or not at all."""
    text = json.dumps(normalization.to_json(), ensure_ascii=False, indent=2)
    write_file(folder / NORMALIZATION_FILE, f"{text}\n")


def load_normalization(folder: pathlib.Path) -> Normalization | None:
    """Returns the normalization that was stored with a model; None for a model without one.

    It is in a file of its own, and in the config.json of an exported model.

    Raises:
        ValueError: it cannot be read.
    """
    for name, fields in ((NORMALIZATION_FILE, ()), (CONFIG_FILE, CONFIG_FIELDS)):
        path = folder / name
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
            for field in fields:
                found = found[field] if found and field in found else None
            if found is not None:
                return Normalization.from_json(found)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
    return None


def _example(one: GivenAnswer) -> Example:
    is_answer_T = np.arange(len(one.token_ids)) >= one.prompt_length
    return Example(one.token_ids, is_answer_T, UNKNOWN_KIND, "")
