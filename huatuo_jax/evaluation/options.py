"""Log-probabilities of several continuations of a context, such as the options of a question.

What continuations of a context have in common goes through the model once: options of one token
each are read from one distribution, and a continuation that begins as a longer one does is read
from the longer one's row.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.core import sharding
from huatuo_jax.data.batches import pack_row, plan_rows
from huatuo_jax.data.tokenizing import UNKNOWN_KIND, Example
from huatuo_jax.training.loop import check_rows
from huatuo_jax.training.losses import hidden_of
from huatuo_jax.training.update import Batch, Variables

_LENGTHS = 128
_CHUNK = 128  # Places of each row whose logits are held at once.


class Continuations(NamedTuple):
    """A context and what may follow it, as tokens.

    Attributes:
        context: at least one token.
        continuations: each at least one token.
    """

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]


class Scored(NamedTuple):
    """A continuation as the model sees it.

    Attributes:
        log_prob: of all its tokens together, in nats.
        is_greedy: whether no other token is likelier than any of its own.
    """

    log_prob: float
    is_greedy: bool


def candidate_scores(
    model: Transformer, variables: Variables, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Scores candidate next tokens.

    Args:
        model: a backbone with a token head.
        variables: its own.
        batch: rows (`token_ids`, `segment_ids`, `positions`, each `[B, T]`), `places` `[B, P]` (of
            the tokens that candidates follow) and `candidates` `[B, P, C]`.

    Returns:
        Log-probabilities `[B, P, C]` in float32, and whether no other token is likelier.
    """
    hidden_BTD = hidden_of(model, variables, batch)
    hidden_BPD = jnp.take_along_axis(hidden_BTD, batch["places"][:, :, None], axis=1)
    rows, num_places = batch["places"].shape
    chunk = min(_CHUNK, num_places)

    def chunks(array_BPX: jax.Array) -> jax.Array:
        padded = jnp.pad(array_BPX, [(0, 0), (0, -num_places % chunk), (0, 0)])
        return padded.reshape(rows, -1, chunk, padded.shape[-1]).swapaxes(0, 1)

    def score(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_BKD, candidates_BKC = inputs
        logits_BKV = model.apply(variables, hidden_BKD, method="logits").astype(jnp.float32)
        chosen_BKC = jnp.take_along_axis(logits_BKV, candidates_BKC, axis=2)
        log_totals_BK1 = jax.nn.logsumexp(logits_BKV, axis=2, keepdims=True)
        return chosen_BKC - log_totals_BK1, chosen_BKC >= logits_BKV.max(axis=2, keepdims=True)

    found = jax.lax.map(score, (chunks(hidden_BPD), chunks(batch["candidates"])))
    log_probs_BPC, is_best_BPC = (
        array_nBKC.swapaxes(0, 1).reshape(rows, -1, array_nBKC.shape[-1])[:, :num_places]
        for array_nBKC in found
    )
    return log_probs_BPC, is_best_BPC


class _Segment(NamedTuple):
    """Tokens that go through the model once.

    Attributes:
        token_ids: a context and a continuation without its last token.
        wanted: by the place of a token, the candidates behind it, each with its column.
    """

    token_ids: Sequence[int]
    wanted: dict[int, dict[int, int]]


class _Found(NamedTuple):
    """Scores of a segment's candidates, `[P, C]` in the order of `wanted`."""

    log_probs_PC: npt.NDArray[np.float32]
    is_best_PC: npt.NDArray[np.bool_]


class ContinuationScorer:
    """Scores continuations in batches of packed rows on a mesh."""

    def __init__(
        self, model: Transformer, variables: Variables, *, mesh: Mesh, rows_at_once: int
    ) -> None:
        """Compiles nothing yet.

        Args:
            model: a backbone with a token head.
            variables: its own, on the mesh.
            mesh: rows are divided over it.
            rows_at_once: rows of a batch.

        Raises:
            ValueError: the mesh does not divide the rows.
        """
        check_rows(rows_at_once, name="rows_at_once", mesh=mesh)
        self._model, self._variables, self._mesh = model, variables, mesh
        self._rows_at_once = rows_at_once
        self._compiled = sharding.OnMesh(
            jax.jit(
                functools.partial(candidate_scores, model),
                out_shardings=jax.NamedSharding(mesh, jax.P()),
            ),
            mesh,
        )

    def __call__(
        self,
        asked: Sequence[Continuations],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[tuple[float, ...]]:
        """Returns the summed log-probabilities of each context's continuations; see `score`."""
        return [tuple(one.log_prob for one in row) for row in self.score(asked, on_progress)]

    def score(
        self,
        asked: Sequence[Continuations],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[tuple[Scored, ...]]:
        """Returns the scores of each context's continuations, in their order.

        Args:
            asked: contexts with their continuations.
            on_progress: is called with the contexts done and all of them.

        Raises:
            ValueError: an empty context or continuation, or one longer than the model's positions
                without its last token, which is not computed.
        """
        most = self._model.cfg.max_positions
        for index, one in enumerate(asked):
            if (
                not len(one.context)
                or not one.continuations
                or not all(map(len, one.continuations))
            ):
                raise ValueError(
                    f"asked[{index}]: context and continuations must hold at least one token each"
                )
            longest = len(one.context) + max(map(len, one.continuations)) - 1
            if longest > most:
                raise ValueError(
                    f"asked[{index}] has {longest} tokens before the last one, more than the "
                    f"model's {most} positions"
                )
        if not asked:
            return []
        groups = [_segments(one) for one in asked]
        segments = [segment for group, _ in groups for segment in group]
        owners = np.repeat(np.arange(len(asked)), [len(group) for group, _ in groups])
        left = np.bincount(owners, minlength=len(asked))
        found: list[_Found | None] = [None] * len(segments)
        for number, values in self._found(segments):
            found[number] = values
            left[owners[number]] -= 1
            if on_progress is not None and not left[owners[number]]:
                on_progress(int((left == 0).sum()), len(asked))
        results, first = [], 0
        for one, (group, places) in zip(asked, groups, strict=True):
            scored = []
            for continuation, place in zip(one.continuations, places, strict=True):
                scores = found[first + place]
                assert scores is not None
                scored.append(_scored(one.context, continuation, group[place], scores))
            results.append(tuple(scored))
            first += len(group)
        return results

    def _found(self, segments: Sequence[_Segment]) -> Iterator[tuple[int, _Found]]:
        """Yields the number and the scores of each segment."""
        lengths = [len(segment.token_ids) for segment in segments]
        self._model.cfg.require_fixed_angles(max(lengths), purpose="scoring in batches")
        row_length = -(-max(lengths) // _LENGTHS) * _LENGTHS
        plan = plan_rows(lengths, np.arange(len(segments)), row_length=row_length)
        planned = [plan[row].tolist() for row in range(len(plan))]
        num_places = max(sum(len(segments[one].wanted) for one in row) for row in planned)
        width = max(len(columns) for one in segments for columns in one.wanted.values())
        for first in range(0, len(planned), self._rows_at_once):
            rows = planned[first : first + self._rows_at_once]
            rows += [[]] * (self._rows_at_once - len(rows))
            batch = _batch(
                [[segments[number] for number in row] for row in rows],
                row_length=row_length,
                num_places=num_places,
                width=width,
            )
            placed = sharding.put_whole(batch, self._mesh)
            log_probs_BPC, is_best_BPC = map(np.asarray, self._compiled(self._variables, placed))
            for place, row in enumerate(rows):
                start = 0
                for number in row:
                    end = start + len(segments[number].wanted)
                    yield (
                        number,
                        _Found(log_probs_BPC[place, start:end], is_best_BPC[place, start:end]),
                    )
                    start = end


def _segments(one: Continuations) -> tuple[list[_Segment], list[int]]:
    """The segments of a context's continuations, and which of them each is read from."""
    stems = sorted({tuple(continuation[:-1]) for continuation in one.continuations})
    number_of: dict[tuple[int, ...], int] = {}
    longest: list[tuple[int, ...]] = []
    for stem in reversed(stems):  # In their order, what continues a stem is right behind it.
        if not longest or longest[-1][: len(stem)] != stem:
            longest.append(stem)
        number_of[stem] = len(longest) - 1
    segments = [_Segment([*one.context, *stem], {}) for stem in longest]
    places = []
    for continuation in one.continuations:
        place = number_of[tuple(continuation[:-1])]
        places.append(place)
        for position, token in enumerate(continuation, start=len(one.context) - 1):
            columns = segments[place].wanted.setdefault(position, {})
            columns.setdefault(token, len(columns))
    return segments, places


def _scored(
    context: Sequence[int], continuation: Sequence[int], segment: _Segment, found: _Found
) -> Scored:
    row_of = {position: row for row, position in enumerate(segment.wanted)}
    log_prob, is_greedy = 0.0, True
    for position, token in enumerate(continuation, start=len(context) - 1):
        cell = row_of[position], segment.wanted[position][token]
        log_prob += float(found.log_probs_PC[cell])
        is_greedy = is_greedy and bool(found.is_best_PC[cell])
    return Scored(log_prob, is_greedy)


def _batch(
    rows: Sequence[Sequence[_Segment]], *, row_length: int, num_places: int, width: int
) -> dict[str, np.ndarray]:
    """Packs the segments of each row, with their places and candidates."""
    packed = [
        pack_row([_example(one.token_ids) for one in row], row_length=row_length, pad_token_id=0)
        for row in rows
    ]
    batch = {
        name: np.stack([one[name] for one in packed])
        for name in ("token_ids", "segment_ids", "positions")
    }
    places_BP = np.zeros((len(rows), num_places), np.int32)
    candidates_BPC = np.zeros((len(rows), num_places, width), np.int32)
    for number, row in enumerate(rows):
        start = place = 0
        for segment in row:
            for position, columns in segment.wanted.items():
                places_BP[number, place] = start + position
                candidates_BPC[number, place, : len(columns)] = list(columns)
                place += 1
            start += len(segment.token_ids)
    return batch | {"places": places_BP, "candidates": candidates_BPC}


def _example(token_ids: Sequence[int]) -> Example:
    ids = np.asarray(token_ids, np.int32)
    return Example(ids, np.zeros(len(ids), bool), UNKNOWN_KIND, "")
