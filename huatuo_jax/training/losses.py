"""Log-probabilities of given tokens, masks of answers, and the sums that losses are made of.

Logits over the vocabulary are the largest array of a step, so they are never held whole: they are
made for some positions of every row at a time and, but for a plain sum, made again in the backward
pass. Positions whose score is not wanted (prompts, padding) are moved behind the wanted ones, and
chunks that hold none of those are not computed at all.

An array `[B, T]` holds answers, end tokens included, each in one run of slots without a gap; where
a run starts is free. Where a row holds several (in losses alone; rewards and estimators take one a
row), their prompts stand between them. A mask marks those slots. What lies in the others is never
read: NaN there changes neither a result nor a gradient. Log-probabilities, values and rewards of a
token lie in the slot of that token, the value being that of the state before it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from huatuo_jax.backbone.layers import Head
from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.core import sharding
from huatuo_jax.generation.sampling import TopTokens, top_tokens

_AT_ONCE = 1024  # Positions of a device's rows in a chunk: enough to keep its cores busy.
_FEWEST = 8  # Positions of a row in a chunk, however many rows there are.

Project = Callable[[jax.Array, Any], jax.Array]
"""From the trunk's output `[B, T, D]` and a head to logits `[B, T, V]` in at least float32."""


class TokenScores(NamedTuple):
    """The model's scores of given tokens; zero and False where no score was wanted.

    Attributes:
        log_probs_BT: in the dtype of the logits.
        correct_BT: bool, no other token has a higher logit.
        entropies_BT: in nats, of the whole distribution that the token was looked up in; zero
            where it was not asked for.
        top: the best tokens in the place of each, `[B, T, K]`; None where they were not asked for.
    """

    log_probs_BT: jax.Array
    correct_BT: jax.Array
    entropies_BT: jax.Array
    top: TopTokens | None


class Answers(NamedTuple):
    """The answer of each token, where a row may hold several.

    Attributes:
        of_tokens_BT: int, from 0; not read outside of the mask.
        number: of answers at most; static.
    """

    of_tokens_BT: jax.Array
    number: int


def hidden_of(
    model: Transformer, variables: Mapping[str, Any], batch: Mapping[str, jax.Array]
) -> jax.Array:
    """Returns the trunk's output `[B, T, D]` of rows: `token_ids`, `segment_ids`, `positions`."""
    return model.apply(
        variables,
        batch["token_ids"],
        segment_ids_BT=batch["segment_ids"],
        positions_BT=batch["positions"],
    )


def next_tokens(array_BT: jax.Array) -> jax.Array:
    """Moves what belongs to a token to the position that predicts it, one to the left.

    The last position predicts nothing and gets zeros (False).
    """
    return jnp.concatenate([array_BT[:, 1:], jnp.zeros_like(array_BT[:, :1])], axis=1)


def at_tokens(numbers_BT: jax.Array) -> jax.Array:
    """Moves what belongs to a position to the token that it predicts, one to the right.

    The first token is predicted by nothing and gets zeros.
    """
    return jnp.concatenate([jnp.zeros_like(numbers_BT[:, :1]), numbers_BT[:, :-1]], axis=1)


def token_scores(
    project: Project,
    head: Any,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    wanted_BT: jax.Array,
    *,
    temperature: float = 1.0,
    chunk: int = 128,
    entropy: bool = False,
    num_top: int = 0,
) -> TokenScores:
    """Scores each position's target, in chunks of positions.

    Args:
        project: makes logits; arrays that it closes over get no gradient.
        head: arrays that it makes them with, in any tree.
        hidden_BTD: output of the trunk.
        targets_BT: the token that position t predicts: `next_tokens(token_ids_BT)`.
        wanted_BT: bool, which positions to score.
        temperature: divides the logits.
        chunk: positions of every row whose logits are held at once, fewer where a device has many
            rows; all rows of a micro-batch stay together, so that a mesh keeps each where it is.
        entropy: whether the entropies are wanted.
        num_top: number K of best tokens wanted in the place of each target.

    Raises:
        ValueError: `temperature` is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r} must be above 0")
    scoring = _Scoring(project, temperature, chunk, entropy, num_top)
    return _in_chunks(scoring, head, hidden_BTD, targets_BT, wanted_BT)


def score_tokens(
    model: Transformer,
    variables: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    mask_BT: jax.Array,
    *,
    temperature: float = 1.0,
    chunk: int = 128,
    entropy: bool = False,
    num_top: int = 0,
) -> TokenScores:
    """Scores the tokens of a mask by a model, each at the position that predicts it.

    Args:
        model: a backbone with a token head.
        variables: its own.
        batch: rows of `token_ids`, `segment_ids`, `positions`, each `[B, T]`.
        mask_BT: bool, the tokens to score; never the first of a segment.
        temperature: as for `token_scores`, and so the rest.
        chunk: see there.
        entropy: see there.
        num_top: see there.
    """
    return token_scores(
        functools.partial(model.apply, {}, method="logits"),
        model.apply(variables, method="head"),
        hidden_of(model, variables, batch),
        next_tokens(batch["token_ids"]),
        next_tokens(mask_BT),
        temperature=temperature,
        chunk=chunk,
        entropy=entropy,
        num_top=num_top,
    )


def sum_log_probs(
    model: Transformer,
    variables: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    mask_BT: jax.Array,
    *,
    chunk: int = 128,
) -> tuple[jax.Array, TokenScores]:
    """Sums the log-probabilities of the tokens of a mask, with the sum's gradient at hand.

    All tokens count alike, so the gradient of a chunk's logits is known as soon as they are, and
    none are made again in a backward pass: of four products with the head three are left.

    Args:
        model: as for `score_tokens`, and so the rest.
        variables: see there.
        batch: see there.
        mask_BT: see there.
        chunk: see there.

    Returns:
        The sum, and the scores, through which no gradient flows.
    """
    return _sum_in_chunks(
        _Scoring(functools.partial(model.apply, {}, method="logits"), chunk=chunk),
        model.apply(variables, method="head"),
        hidden_of(model, variables, batch),
        next_tokens(batch["token_ids"]),
        next_tokens(mask_BT),
    )


def sums_by_kind(values_BT: jax.Array, kind_ids_BT: jax.Array, num_kinds: int) -> jax.Array:
    """Sums values over the tokens of each kind.

    Args:
        values_BT: numbers; zero where a token does not count.
        kind_ids_BT: from 0; an id past the last kind is counted nowhere.
        num_kinds: how many kinds there are.

    Returns:
        One sum a kind, in the dtype of the values.
    """
    kinds_1K = jnp.arange(num_kinds)[None, None, :]
    values_BTK = jnp.where(kind_ids_BT[:, :, None] == kinds_1K, values_BT[:, :, None], 0)
    return values_BTK.sum(axis=(0, 1))


def row_sizes(batch: Mapping[str, jax.Array], sliding_window: int | None) -> dict[str, jax.Array]:
    """Counts what a step's floating-point operations follow from.

    Args:
        batch: `segment_ids` and `positions`, each `[B, T]`.
        sliding_window: of the model's attention; None for none.

    Returns:
        `tokens` without padding, and `attended_pairs` of query and key.
    """
    is_token_BT = batch["segment_ids"] > 0
    seen_BT = batch["positions"] + 1
    if sliding_window is not None:
        seen_BT = seen_BT.clip(max=sliding_window)
    return {
        "tokens": is_token_BT.sum(),
        "attended_pairs": (seen_BT * is_token_BT).astype(jnp.float32).sum(),
    }


def answer_mask(lengths_B: jax.Array, num_slots: int) -> jax.Array:
    """Returns the mask `[B, T]` of answers that start in slot 0.

    Args:
        lengths_B: tokens of each answer, its end token included; 0 for a row that only fills up a
            batch and counts nowhere.
        num_slots: T.
    """
    return jnp.arange(num_slots)[None, :] < lengths_B[:, None]


def last_tokens(mask_BT: jax.Array) -> jax.Array:
    """Marks the last token of each answer, bool `[B, T]`."""
    return mask_BT & ~next_tokens(mask_BT)


def has_tokens(mask_BT: jax.Array) -> jax.Array:
    """Marks the rows that hold an answer, bool `[B]`."""
    return mask_BT.any(axis=1)


def wide(values: jax.Array) -> jax.Array:
    """Returns the values in at least float32; float64 stays."""
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def masked(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the values in at least float32, zero outside of the mask, which has their shape."""
    return jnp.where(mask, wide(values), 0)


def count_answers(mask_BT: jax.Array) -> jax.Array:
    """Counts the answers that have a token."""
    return last_tokens(mask_BT).sum()


def sum_by_answer(
    values_BT: jax.Array, mask_BT: jax.Array, answers: Answers | None = None
) -> jax.Array:
    """Returns each answer's sum over its tokens.

    Args:
        values_BT: of the tokens.
        mask_BT: the answers' tokens.
        answers: None for one a row.

    Returns:
        `[B]`, or one for each of `answers.number`: 0 for those that have no token here.
    """
    values_BT = masked(values_BT, mask_BT)
    if answers is None:
        return values_BT.sum(axis=1)
    numbers_BT = jnp.where(mask_BT, answers.of_tokens_BT, 0)
    return jax.ops.segment_sum(values_BT.ravel(), numbers_BT.ravel(), answers.number)


def over_tokens(values_B: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Lays one number of each answer on each of its tokens: `[B, T]`, zero elsewhere."""
    return jnp.where(mask_BT, wide(values_B)[:, None], 0)


def answer_lengths(mask_BT: jax.Array) -> jax.Array:
    """Counts the tokens of each token's answer, int `[B, T]`; 0 outside of the mask."""
    num_slots = mask_BT.shape[1]
    slots_1T = jnp.arange(num_slots)[None, :]
    starts_BT = mask_BT & ~at_tokens(mask_BT)
    first_BT = jax.lax.cummax(jnp.where(starts_BT, slots_1T, 0), axis=1)
    last_BT = jnp.where(last_tokens(mask_BT), slots_1T, num_slots)
    last_BT = jax.lax.cummin(last_BT, axis=1, reverse=True)
    return jnp.where(mask_BT, last_BT - first_BT + 1, 0)


def per_token(values_BT: jax.Array, mask_BT: jax.Array, *, mean_per_answer: bool) -> jax.Array:
    """Returns each token's part of the sum of a loss, zero outside of the mask.

    Args:
        values_BT: of the tokens.
        mask_BT: the answers' tokens.
        mean_per_answer: divide by the number of tokens of the token's answer.
    """
    values_BT = masked(values_BT, mask_BT)
    if not mean_per_answer:
        return values_BT
    return values_BT / jnp.maximum(answer_lengths(mask_BT), 1).astype(values_BT.dtype)


def count_terms(
    mask_BT: jax.Array, *, tokens_allowed: int | None = None, mean_per_answer: bool = False
) -> jax.Array:
    """Counts what a loss is divided by, to be added up over the whole optimizer step.

    The first two keep every token's weight independent of its answer. The third does
    not: it favours short good answers and long bad ones (arXiv 2503.20783, section 3).

    - Neither argument: the number of tokens in the step (DAPO, arXiv 2503.14476, equation 8).
    - `tokens_allowed`: that many for each answer, so that the scale does not move with the lengths
      and the gradient is an unbiased estimate (Dr. GRPO, arXiv 2503.20783).
    - `mean_per_answer`: the number of answers, the terms of each being divided by its own tokens
      (GRPO, arXiv 2402.03300, equation 3).

    Args:
        mask_BT: the tokens.
        tokens_allowed: of an answer at most.
        mean_per_answer: as for `per_token`.

    Raises:
        ValueError: `tokens_allowed` is less than 1, or both are given.
    """
    if tokens_allowed is not None and mean_per_answer:
        raise ValueError(f"tokens_allowed={tokens_allowed!r} must be None for mean_per_answer=True")
    if mean_per_answer:
        return count_answers(mask_BT)
    if tokens_allowed is None:
        return mask_BT.sum()
    if tokens_allowed < 1:
        raise ValueError(f"tokens_allowed={tokens_allowed!r} must be at least 1, or None")
    return count_answers(mask_BT) * tokens_allowed


class _Order(NamedTuple):
    """Positions of rows in chunks, the wanted ones first.

    Attributes:
        position_BT: the position that stands in each place.
        wanted_BT: the positions that are wanted, bool.
        chunk: places C of every row in a chunk; static.
    """

    position_BT: jax.Array
    wanted_BT: jax.Array
    chunk: int

    @classmethod
    def of(cls, wanted_BT: jax.Array, chunk: int) -> "_Order":
        """Orders the positions; a chunk has no more of them than a row.

        Nor do its rows have more than `_AT_ONCE` on a device, so that many short rows neither hold
        large logits nor compute those of many positions that are not wanted.
        """
        position_BT = jnp.argsort(~wanted_BT, axis=1, stable=True)
        num_rows, length = wanted_BT.shape
        mesh = jax.sharding.get_abstract_mesh()
        shards = 1 if mesh.empty else sharding.batch_shards(mesh)
        most = max(_AT_ONCE * shards // num_rows, _FEWEST)
        return cls(position_BT, wanted_BT, min(chunk, length, most))

    def cut(self, array_BT: jax.Array) -> jax.Array:
        """Returns an array of positions in that order, as `[T / C, B, C, ...]`."""
        ordered = jnp.take_along_axis(array_BT, _laid(self.position_BT, array_BT), axis=1)
        surplus = [(0, 0)] * array_BT.ndim
        surplus[1] = (0, -ordered.shape[1] % self.chunk)
        ordered = jnp.pad(ordered, surplus)
        return ordered.reshape(len(ordered), -1, self.chunk, *ordered.shape[2:]).swapaxes(0, 1)

    def join(self, chunks: Any) -> Any:
        """Returns arrays `[T / C, B, C, ...]` in the positions' own order, zero where unwanted."""
        place_BT = jnp.argsort(self.position_BT, axis=1)

        def joined(array_nBC: jax.Array) -> jax.Array:
            ordered = array_nBC.swapaxes(0, 1).reshape(len(place_BT), -1, *array_nBC.shape[3:])
            array_BT = jnp.take_along_axis(ordered, _laid(place_BT, ordered), axis=1)
            return jnp.where(_laid(self.wanted_BT, array_BT), array_BT, jnp.zeros_like(array_BT))

        return jax.tree.map(joined, chunks)


def _laid(numbers_BT: jax.Array, array_BT: jax.Array) -> jax.Array:
    """Returns numbers of positions with as many dimensions as the array."""
    return numbers_BT.reshape(numbers_BT.shape + (1,) * (array_BT.ndim - 2))


def _zeros_like(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


class _Scoring(NamedTuple):
    """Arguments of `token_scores` that are not arrays."""

    project: Project
    temperature: float = 1.0
    chunk: int = 128
    entropy: bool = False
    num_top: int = 0

    def of_chunk(self, head: Any, hidden_BCD: jax.Array, targets_BC: jax.Array) -> TokenScores:
        """Scores the targets of a chunk, whether wanted or not."""
        logits_BCV = self.project(hidden_BCD, head) / self.temperature
        return _score_targets(logits_BCV, targets_BC, entropy=self.entropy, num_top=self.num_top)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_chunks(
    scoring: _Scoring,
    head: Any,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    wanted_BT: jax.Array,
) -> TokenScores:
    """Computes `token_scores`; for the backward pass the arguments alone are kept.

    Derived by jax, the gradient of a chunk that may be left out keeps what it is computed from, a
    copy of the head included, or zeros in their place.
    """

    def score(hidden_BCD: jax.Array, targets_BC: jax.Array, _: Any) -> tuple[None, TokenScores]:
        return None, scoring.of_chunk(head, hidden_BCD, targets_BC)

    return _over_chunks(score, None, scoring.chunk, hidden_BTD, targets_BT, wanted_BT)[1]


def _in_chunks_forward(
    scoring: _Scoring, head: Any, hidden_BTD: Any, targets_BT: Any, wanted_BT: Any
) -> tuple[TokenScores, tuple[Any, ...]]:
    given = tuple(leaf.value for leaf in (hidden_BTD, targets_BT, wanted_BT))
    trained, frozen = _parted(head)
    return _in_chunks(scoring, _whole(trained, frozen), *given), (trained, frozen, *given)


def _in_chunks_backward(
    scoring: _Scoring, saved: tuple[Any, ...], gradients: TokenScores
) -> tuple[Any, ...]:
    trained, frozen, *given, wanted_BT = saved
    symbolic = [isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(gradients)]

    def differentiated(scores: TokenScores) -> list[jax.Array]:
        leaves = jax.tree.leaves(scores)
        return [leaf for leaf, is_zero in zip(leaves, symbolic, strict=True) if not is_zero]

    def differentiate(
        hidden_BCD: jax.Array, targets_BC: jax.Array, _: jax.Array, *gradients_BC: jax.Array
    ) -> tuple[Any, jax.Array]:
        def score(trained: Any, hidden_BCD: jax.Array) -> list[jax.Array]:
            scores = scoring.of_chunk(_whole(trained, frozen), hidden_BCD, targets_BC)
            return differentiated(scores)

        return jax.vjp(score, trained, hidden_BCD)[1](list(gradients_BC))

    # Nothing flows back from positions that are not wanted, whatever their gradient.
    wanted = [
        jnp.where(_laid(wanted_BT, leaf), leaf, jnp.zeros_like(leaf))
        for leaf in differentiated(gradients)
    ]
    arrays = (*given, wanted_BT, *wanted)
    to_head, to_hidden_BTD = _over_chunks(differentiate, trained, scoring.chunk, *arrays)
    return to_head, to_hidden_BTD, None, None


_in_chunks.defvjp(_in_chunks_forward, _in_chunks_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_in_chunks(
    scoring: _Scoring,
    head: Head,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    wanted_BT: jax.Array,
) -> tuple[jax.Array, TokenScores]:
    scores = _in_chunks(scoring, head, hidden_BTD, targets_BT, wanted_BT)
    return scores.log_probs_BT.sum(), scores


def _sum_forward(
    scoring: _Scoring, head: Any, hidden_BTD: Any, targets_BT: Any, wanted_BT: Any
) -> tuple[tuple[jax.Array, TokenScores], tuple[Any, jax.Array]]:
    """Computes the sum with its gradients; of a head that is not trained there is none."""
    trained, frozen = _parted(head)

    def differentiate(
        hidden_BCD: jax.Array, targets_BC: jax.Array, wanted_BC: jax.Array
    ) -> tuple[Any, tuple[jax.Array, TokenScores]]:
        def summed(trained: Any, hidden_BCD: jax.Array) -> tuple[jax.Array, TokenScores]:
            scores = scoring.of_chunk(_whole(trained, frozen), hidden_BCD, targets_BC)
            return jnp.where(wanted_BC, scores.log_probs_BT, 0).sum(), scores

        gradient = jax.grad(summed, argnums=(0, 1), has_aux=True)
        (of_head, of_hidden_BCD), scores = gradient(trained, hidden_BCD)
        return of_head, (of_hidden_BCD, scores)

    given = (leaf.value for leaf in (hidden_BTD, targets_BT, wanted_BT))
    to_head, (to_hidden_BTD, scores) = _over_chunks(differentiate, trained, scoring.chunk, *given)
    return (scores.log_probs_BT.sum(), scores), (to_head, to_hidden_BTD)


def _sum_backward(
    scoring: _Scoring, saved: tuple[Any, jax.Array], gradients: tuple[jax.Array, TokenScores]
) -> tuple[Any, ...]:
    del scoring
    to_head, to_hidden_BTD = jax.tree.map(
        lambda leaf: leaf * gradients[0].astype(leaf.dtype), saved
    )
    return to_head, to_hidden_BTD, None, None


_sum_in_chunks.defvjp(_sum_forward, _sum_backward, symbolic_zeros=True)


def _over_chunks(
    step: Callable[..., tuple[Any, Any]], trained: Any, chunk: int, *arrays: jax.Array
) -> tuple[Any, Any]:
    """Runs a step for each chunk of positions that has a wanted one.

    Args:
        step: from a chunk of each array to gradients like `trained`, and arrays of its positions.
        trained: arrays whose gradients are added up.
        chunk: as for `token_scores`.
        arrays: `[B, T, ...]`; the third tells which positions are wanted.

    Returns:
        The sums, and what else the step returns, zero at positions that are not wanted.
    """
    order = _Order.of(arrays[2], chunk)

    def run(sums: Any, inputs: list[jax.Array]) -> tuple[Any, Any]:
        def compute() -> tuple[Any, Any]:
            added, returned = step(*inputs)
            return jax.tree.map(jnp.add, sums, added), returned

        def skip() -> tuple[Any, Any]:
            return sums, _zeros_like(jax.eval_shape(compute)[1])

        return jax.lax.cond(inputs[2].any(), compute, skip)

    start = jax.tree.map(jnp.zeros_like, trained)
    sums, chunks = jax.lax.scan(run, start, [order.cut(array) for array in arrays])
    return sums, order.join(chunks)


def _parted(head: Any) -> tuple[Any, Any]:
    """Parts a head, as a rule for gradients gets it, into what has one and the rest.

    Returns:
        Two trees like the head's, each with None in the place of what the other holds.
    """
    trained = jax.tree.map(lambda leaf: leaf.value if leaf.perturbed else None, head)
    return trained, jax.tree.map(lambda leaf: None if leaf.perturbed else leaf.value, head)


def _whole(trained: Any, frozen: Any) -> Any:
    """Puts the parts of a head together."""
    return jax.tree.map(
        lambda one, other: other if one is None else one,
        *(trained, frozen),
        is_leaf=lambda leaf: leaf is None,
    )


def _score_targets(
    logits_BTV: jax.Array, targets_BT: jax.Array, *, entropy: bool, num_top: int
) -> TokenScores:
    # The shift cancels out of the log-probability, so nothing flows back through it. XLA:CPU would
    # put a maximum into the product that makes the logits, which with a large vocabulary then takes
    # more than twice as long; a minimum it leaves outside.
    largest_BT = -jax.lax.stop_gradient((-logits_BTV).min(axis=-1))
    shifted_BTV = logits_BTV - largest_BT[:, :, None]
    # Picked by comparison and sum rather than by a gather: it stays local where the vocabulary is
    # split, and its gradient is no scatter.
    is_target_BTV = targets_BT[:, :, None] == jnp.arange(logits_BTV.shape[-1])[None, None, :]
    target_BT = jnp.where(is_target_BTV, shifted_BTV, 0).sum(axis=-1)
    total_BT = jnp.exp(shifted_BTV).sum(axis=-1)
    log_total_BT = jnp.log(total_BT)
    entropies_BT = jnp.zeros_like(log_total_BT)
    if entropy:
        # In padded rows of the vocabulary the exponential is 0 and the logit finite.
        mean_BT = (jnp.exp(shifted_BTV) * shifted_BTV).sum(axis=-1) / total_BT
        entropies_BT = log_total_BT - mean_BT
    top = top_tokens(shifted_BTV, log_total_BT, count=num_top) if num_top else None
    return TokenScores(target_BT - log_total_BT, target_BT >= 0, entropies_BT, top)
