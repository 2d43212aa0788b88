"""Log-probabilities of several continuations of a context, such as the options of a question.

Where the continuations of a context differ in their first token alone, the context goes through the
model once for all of them: their log-probabilities are read from one distribution. Others are
scored one by one.
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
from huatuo_jax.training.losses import hidden_of
from huatuo_jax.training.scoring import GivenAnswer, Scorer
from huatuo_jax.training.update import Batch, Variables

_LENGTHS = 128


class Continuations(NamedTuple):
    """A context and what may follow it, as tokens.

    Attributes:
        context: at least one token.
        continuations: each at least one token.
    """

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]


def candidate_log_probs(model: Transformer, variables: Variables, batch: Batch) -> jax.Array:
    """Returns the log-probabilities of candidate next tokens, `[B, P, C]` in float32.

    Args:
        model: a backbone with a token head.
        variables: its own.
        batch: rows (`token_ids`, `segment_ids`, `positions`, each `[B, T]`), `places` `[B, P]`
            (where the last tokens of contexts stand) and `candidates` `[B, P, C]`.
    """
    hidden_BTD = hidden_of(model, variables, batch)
    hidden_BPD = jnp.take_along_axis(hidden_BTD, batch["places"][:, :, None], axis=1)
    logits_BPV = model.apply(variables, hidden_BPD, method="logits").astype(jnp.float32)
    chosen_BPC = jnp.take_along_axis(logits_BPV, batch["candidates"], axis=2)
    return chosen_BPC - jax.nn.logsumexp(logits_BPV, axis=2, keepdims=True)


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
        self._model, self._variables, self._mesh = model, variables, mesh
        self._rows_at_once = rows_at_once
        self._scorer = Scorer(model, variables, mesh=mesh, rows_at_once=rows_at_once)
        self._compiled = sharding.OnMesh(
            jax.jit(
                functools.partial(candidate_log_probs, model),
                out_shardings=jax.NamedSharding(mesh, jax.P()),
            ),
            mesh,
        )

    def __call__(
        self,
        asked: Sequence[Continuations],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[tuple[float, ...]]:
        """Returns the summed log-probabilities of each context's continuations, in their order.

        Args:
            asked: contexts with their continuations.
            on_progress: is called with the contexts done and all of them.

        Raises:
            ValueError: an empty context or continuation, or one longer than the model's positions.
        """
        for index, one in enumerate(asked):
            if (
                not len(one.context)
                or not one.continuations
                or not all(map(len, one.continuations))
            ):
                raise ValueError(
                    f"asked[{index}]: context and continuations must hold at least one token each"
                )
        once = [i for i, one in enumerate(asked) if all(len(c) == 1 for c in one.continuations)]
        others = [i for i, one in enumerate(asked) if any(len(c) > 1 for c in one.continuations)]
        found: list[tuple[float, ...]] = [()] * len(asked)
        done = 0
        for index, values in self._from_one_distribution(asked, once):
            found[index] = values
            done += 1
            if on_progress is not None:
                on_progress(done, len(asked))
        given = [
            GivenAnswer(_ids([*asked[i].context, *tokens]), len(asked[i].context))
            for i in others
            for tokens in asked[i].continuations
        ]
        sums = iter([float(np.sum(values_T, dtype=np.float64)) for values_T in self._sums(given)])
        for index in others:
            found[index] = tuple(next(sums) for _ in asked[index].continuations)
        if on_progress is not None and others:
            on_progress(len(asked), len(asked))
        return found

    def _sums(self, given: Sequence[GivenAnswer]) -> list[npt.NDArray[np.float32]]:
        return self._scorer.log_probs(given) if given else []

    def _from_one_distribution(
        self, asked: Sequence[Continuations], which: Sequence[int]
    ) -> Iterator[tuple[int, tuple[float, ...]]]:
        """Yields the index and the log-probabilities of contexts with one-token continuations."""
        if not which:
            return
        lengths = [len(asked[index].context) for index in which]
        longest, backbone = max(lengths), self._model.cfg
        if longest >= backbone.max_positions:
            raise ValueError(
                f"asked[{which[lengths.index(longest)]}] has a context of {longest} tokens; with a "
                f"continuation it is longer than the model's {backbone.max_positions} positions"
            )
        backbone.require_fixed_angles(longest, purpose="scoring in batches")
        row_length = -(-longest // _LENGTHS) * _LENGTHS
        plan = plan_rows(lengths, np.arange(len(which)), row_length=row_length)
        most = max(len(plan[row]) for row in range(len(plan)))
        width = max(len(asked[index].continuations) for index in which)
        for first in range(0, len(plan), self._rows_at_once):
            numbers = range(first, min(first + self._rows_at_once, len(plan)))
            rows = [[which[place] for place in plan[row].tolist()] for row in numbers]
            rows += [[]] * (self._rows_at_once - len(rows))
            batch = _batch(asked, rows, row_length=row_length, num_places=most, width=width)
            placed = sharding.put_whole(batch, self._mesh)
            values_BPC = np.asarray(self._compiled(self._variables, placed))
            for row_PC, row in zip(values_BPC, rows, strict=True):
                for values_C, index in zip(row_PC, row, strict=False):
                    count = len(asked[index].continuations)
                    yield index, tuple(map(float, values_C[:count]))


def _batch(
    asked: Sequence[Continuations],
    rows: Sequence[Sequence[int]],
    *,
    row_length: int,
    num_places: int,
    width: int,
) -> dict[str, np.ndarray]:
    """Packs the contexts of each row, with the places and candidates of each."""
    packed = [
        pack_row([_example(asked[i].context) for i in row], row_length=row_length, pad_token_id=0)
        for row in rows
    ]
    batch = {
        name: np.stack([one[name] for one in packed])
        for name in ("token_ids", "segment_ids", "positions")
    }
    places_BP = np.zeros((len(rows), num_places), np.int32)
    candidates_BPC = np.zeros((len(rows), num_places, width), np.int32)
    for number, row in enumerate(rows):
        end = 0
        for place, index in enumerate(row):
            end += len(asked[index].context)
            places_BP[number, place] = end - 1
            tokens = [token for (token,) in asked[index].continuations]
            candidates_BPC[number, place, : len(tokens)] = tokens
    return batch | {"places": places_BP, "candidates": candidates_BPC}


def _example(token_ids: Sequence[int]) -> Example:
    return Example(_ids(token_ids), np.zeros(len(token_ids), bool), UNKNOWN_KIND, "")


def _ids(token_ids: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.asarray(token_ids, np.int32)
