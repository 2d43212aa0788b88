"""Log-probabilities of given tokens, and the sums a token loss is made of.

Logits over the vocabulary are the largest array of a step, so they are never held whole: they are
made for some positions of every row at a time and made again in the backward pass. Positions whose
score nobody wants (prompts, padding) are moved behind the wanted ones, and chunks that hold none of
those are not computed at all.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from huatuo_jax.backbone.transformer import Transformer

Project = Callable[[jax.Array], jax.Array]
"""From the trunk's output `[B, T, D]` to logits `[B, T, V]` in at least float32."""


class TokenScores(NamedTuple):
    """What the model says of given tokens; zero and False where no score was wanted.

    Attributes:
        log_probs_BT: in the dtype of the logits.
        correct_BT: bool, no other token has a higher logit.
        entropies_BT: in nats, of the whole distribution that the token was looked up in; zero
            where it was not asked for.
    """

    log_probs_BT: jax.Array
    correct_BT: jax.Array
    entropies_BT: jax.Array


def hidden_of(
    model: Transformer, variables: Mapping[str, Any], batch: Mapping[str, jax.Array]
) -> jax.Array:
    """The trunk's output `[B, T, D]` of rows: `token_ids`, `segment_ids`, `positions`."""
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
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    wanted_BT: jax.Array,
    *,
    temperature: float = 1.0,
    chunk: int = 128,
    entropy: bool = False,
) -> TokenScores:
    """Scores each position's target, in chunks of positions.

    Args:
        project: makes logits; what it closes over is differentiated too.
        hidden_BTD: output of the trunk.
        targets_BT: the token that position t predicts: `next_tokens(token_ids_BT)`.
        wanted_BT: bool, which positions to score.
        temperature: divides the logits.
        chunk: positions of every row whose logits are held at once; all rows of a micro-batch
            stay together, so that a mesh keeps each row where it is.
        entropy: whether the entropies are wanted.

    Raises:
        ValueError: `temperature` is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r} must be above 0")
    length = hidden_BTD.shape[1]
    chunk = min(chunk, length)
    order_BT = jnp.argsort(~wanted_BT, axis=1, stable=True)  # Wanted positions first.

    def chunks(array_BT: jax.Array) -> jax.Array:
        """The array in that order, as `[T / chunk, B, chunk, ...]`."""
        index = order_BT.reshape(order_BT.shape + (1,) * (array_BT.ndim - 2))
        ordered = jnp.take_along_axis(array_BT, index, axis=1)
        surplus = [(0, 0)] * array_BT.ndim
        surplus[1] = (0, -length % chunk)
        ordered = jnp.pad(ordered, surplus)
        return ordered.reshape(ordered.shape[0], -1, chunk, *ordered.shape[2:]).swapaxes(0, 1)

    def score_chunk(hidden_BCD: jax.Array, targets_BC: jax.Array) -> TokenScores:
        return _score_targets(project(hidden_BCD) / temperature, targets_BC, entropy=entropy)

    def score(_: None, inputs: tuple[jax.Array, ...]) -> tuple[None, TokenScores]:
        hidden_BCD, targets_BC, wanted_BC = inputs
        shapes = jax.eval_shape(score_chunk, hidden_BCD, targets_BC)
        scores = jax.lax.cond(
            wanted_BC.any(),
            lambda: score_chunk(hidden_BCD, targets_BC),
            lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes),
        )
        return None, scores

    # The body of a scan cannot be merged with its recomputation: no guard against that is needed.
    recomputed = jax.checkpoint(score, prevent_cse=False)
    inputs = (chunks(hidden_BTD), chunks(targets_BT), chunks(wanted_BT))
    _, scores_nBC = jax.lax.scan(recomputed, None, inputs)
    place_BT = jnp.argsort(order_BT, axis=1)

    def unordered(array_nBC: jax.Array) -> jax.Array:
        array_BT = array_nBC.swapaxes(0, 1).reshape(place_BT.shape[0], -1)
        array_BT = jnp.take_along_axis(array_BT, place_BT, axis=1)
        return jnp.where(wanted_BT, array_BT, jnp.zeros_like(array_BT))

    return TokenScores(*(unordered(array_nBC) for array_nBC in scores_nBC))


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


def _score_targets(logits_BTV: jax.Array, targets_BT: jax.Array, *, entropy: bool) -> TokenScores:
    # The shift cancels out of the log-probability, so nothing flows back through it.
    largest_BT = jax.lax.stop_gradient(logits_BTV.max(axis=-1))
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
    return TokenScores(target_BT - log_total_BT, target_BT >= 0, entropies_BT)
