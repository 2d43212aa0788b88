"""Log-probabilities of several continuations of a context, such as the options of a question.

What they have in common goes through the model once: options of one token each are read from one
distribution, longer ones follow one copy of their context, and contexts that begin alike, with the
same instruction or examples, stand behind one copy of it in a row.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.core import sharding
from huatuo_jax.training.loop import check_rows
from huatuo_jax.training.metrics import ModelFlops
from huatuo_jax.training.update import Batch, Variables

ROWS_AT_ONCE = 4  # Some thousand tokens; on a CPU larger batches are slower.

_LENGTHS = 128
_ROW_LENGTHS = tuple(_LENGTHS * 2**power for power in range(1, 9))
_WAITING = 64  # Sequences that the next one of a row is chosen from.
_PLACES, _CANDIDATES = 16, 4  # Sizes are multiples of them, so that few programs are compiled.
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
        batch: rows of trees (`token_ids`, `positions`, `subtree_ends`, each `[B, T]`), `places`
            `[B, P]` (of the tokens that candidates follow) and `candidates` `[B, P, C]`.

    Returns:
        Log-probabilities `[B, P, C]` in float32, and whether no other token is likelier.
    """
    hidden_BPD = model.apply(
        variables,
        batch["token_ids"],
        batch["places"],
        positions_BT=batch["positions"],
        subtree_ends_BT=batch["subtree_ends"],
        method="at_places",
    )
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
    """Scores continuations in batches of rows on a mesh."""

    def __init__(
        self, model: Transformer, variables: Variables, *, mesh: Mesh, rows_at_once: int
    ) -> None:
        """Compiles nothing yet.

        Args:
            model: a backbone with a token head.
            variables: its own, on the mesh.
            mesh: rows are divided over it.
            rows_at_once: rows of a batch, at most; fewer where rows are longer than the longest
                context with its continuation.

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
        tokens = [tuple(segment.token_ids) for segment in segments]
        in_order = sorted(range(len(segments)), key=tokens.__getitem__)
        longest = max(map(len, tokens))
        self._model.cfg.require_fixed_angles(longest, purpose="scoring in batches")
        shortest = _rounded_up(longest, _LENGTHS)
        shards = sharding.batch_shards(self._mesh)
        most = self._rows_at_once * shortest  # Tokens of a batch.
        planned, row_length = _plan(
            [tokens[number] for number in in_order],
            [shortest, *(size for size in _ROW_LENGTHS if shortest < size <= most // shards)],
            flops=ModelFlops.of(self._model.cfg),
        )
        # As many in each batch, so that the last one has few empty rows.
        num_batches = -(-len(planned) // max(most // row_length, shards))
        rows_at_once = _rounded_up(-(-len(planned) // num_batches), shards)
        num_places = max(sum(len(segments[in_order[one]].wanted) for one in row) for row in planned)
        width = max(len(columns) for one in segments for columns in one.wanted.values())

        def read(rows: Sequence[Sequence[int]], scores: Any) -> Iterator[tuple[int, _Found]]:
            log_probs_BPC, is_best_BPC = map(np.asarray, scores)
            for place, row in enumerate(rows):
                start = 0
                for number in row:
                    end = start + len(segments[number].wanted)
                    yield (
                        number,
                        _Found(log_probs_BPC[place, start:end], is_best_BPC[place, start:end]),
                    )
                    start = end

        before: tuple[Sequence[Sequence[int]], Any] | None = None
        for first in range(0, len(planned), rows_at_once):
            rows = [[in_order[one] for one in row] for row in planned[first : first + rows_at_once]]
            rows += [[]] * (rows_at_once - len(rows))
            batch = _batch(
                [[segments[number] for number in row] for row in rows],
                row_length=row_length,
                num_places=_rounded_up(num_places, _PLACES),
                width=_rounded_up(width, _CANDIDATES),
            )
            running = self._compiled(self._variables, sharding.put_whole(batch, self._mesh))
            if before is not None:  # While this batch runs.
                yield from read(*before)
            before = rows, running
        assert before is not None
        yield from read(*before)


def _rounded_up(size: int, step: int) -> int:
    return -(-size // step) * step


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


def _plan(
    sequences: Sequence[Sequence[int]], row_lengths: Sequence[int], *, flops: ModelFlops
) -> tuple[list[list[int]], int]:
    """Chooses the row length that takes least computing; returns its rows and the length.

    In longer rows more sequences share what they have in common, and attention costs more. Each
    row's sequences are indices in rising order; `sequences` are in lexical order.
    """
    lengths_S = np.array([len(one) for one in sequences])
    shared_S = np.array([0, *(map(_num_shared, sequences, sequences[1:]))])
    plans = [
        (rows_of_trees(lengths_S, shared_S, row_length=length), length) for length in row_lengths
    ]

    def cost(plan: tuple[list[list[int]], int]) -> float:
        rows, length = plan
        # Masked pairs of a row are computed too.
        return len(rows) * flops.of_forward(
            tokens=length, scored_tokens=0, attended_pairs=length**2
        )

    return min(plans, key=cost)


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that both begin with."""
    length = min(len(first), len(second))
    differ = np.asarray(first[:length]) != np.asarray(second[:length])
    return int(differ.argmax()) if differ.any() else length


def rows_of_trees(
    lengths_S: npt.NDArray[np.int_], shared_S: npt.NDArray[np.int_], *, row_length: int
) -> list[list[int]]:
    """Distributes sequences over rows that hold the tokens that several begin with once.

    A row begins with the first sequence that has no place. Of those behind it, the one that has
    most tokens in common with the row comes next, of several the longest that fits.

    Args:
        lengths_S: tokens of each sequence; the sequences are in lexical order.
        shared_S: tokens that each has in common with the one before it, 0 for the first.
        row_length: the most tokens that a row can hold.

    Returns:
        The indices of each row's sequences, rising.
    """
    rows: list[list[int]] = []
    behind = min(_WAITING, len(lengths_S))
    waiting_W = np.arange(behind)
    while len(waiting_W):
        row: list[int] = []
        room = row_length
        common_W = np.zeros(len(waiting_W), np.int64)
        while True:
            needed_W = lengths_S[waiting_W] - common_W
            fits_W = needed_W <= room
            if not row:
                fits_W[1:] = False
            if not fits_W.any():
                break
            best = int(np.lexsort((needed_W, common_W, fits_W))[-1])
            chosen = int(waiting_W[best])
            room -= int(needed_W[best])
            row.append(chosen)
            waiting_W, common_W = np.delete(waiting_W, best), np.delete(common_W, best)
            if not len(waiting_W):
                break
            common_W = np.maximum(common_W, _num_common(shared_S, chosen, waiting_W))
        rows.append(sorted(row))
        added = min(len(row), len(lengths_S) - behind)
        waiting_W = np.append(waiting_W, np.arange(behind, behind + added))
        behind += added
    return rows


def _num_common(
    shared_S: npt.NDArray[np.int_], chosen: int, others_W: npt.NDArray[np.int_]
) -> npt.NDArray[np.int_]:
    """Tokens that each of the others has in common with the chosen one, in lexical order."""
    least = min(chosen, others_W[0])
    common = np.empty(max(chosen, others_W[-1]) - least + 1, np.int64)
    before = shared_S[least + 1 : chosen + 1][::-1]
    common[: chosen - least] = np.minimum.accumulate(before)[::-1]
    common[chosen - least + 1 :] = np.minimum.accumulate(shared_S[chosen + 1 : least + len(common)])
    return common[others_W - least]


def _batch(
    rows: Sequence[Sequence[_Segment]], *, row_length: int, num_places: int, width: int
) -> dict[str, np.ndarray]:
    """Lays out the segments of each row as trees, with their places and candidates."""
    token_ids_BT, positions_BT = np.zeros((2, len(rows), row_length), np.int32)
    # A token of the padding sees itself only.
    ends_BT = np.tile(np.arange(1, row_length + 1, dtype=np.int32), (len(rows), 1))
    places_BP = np.zeros((len(rows), num_places), np.int32)
    candidates_BPC = np.zeros((len(rows), num_places, width), np.int32)
    for number, row in enumerate(rows):
        end = place = 0
        before: Sequence[int] = ()
        branch_L = np.zeros(0, np.int32)  # The index of each token of the segment before.
        for segment in row:
            shared, length = _num_shared(before, segment.token_ids), len(segment.token_ids)
            ends_BT[number, branch_L[shared:]] = end
            added = slice(end, end + length - shared)
            token_ids_BT[number, added] = segment.token_ids[shared:]
            positions_BT[number, added] = np.arange(shared, length)
            end = added.stop
            branch_L = np.append(branch_L[:shared], np.arange(added.start, end, dtype=np.int32))
            before = segment.token_ids
            for position, columns in segment.wanted.items():
                places_BP[number, place] = branch_L[position]
                candidates_BPC[number, place, : len(columns)] = list(columns)
                place += 1
        ends_BT[number, branch_L] = end
    return {
        "token_ids": token_ids_BT,
        "positions": positions_BT,
        "subtree_ends": ends_BT,
        "places": places_BP,
        "candidates": candidates_BPC,
    }
