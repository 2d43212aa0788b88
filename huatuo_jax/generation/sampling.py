"""Samples tokens from logits, each row by its own settings.

The order is transformers': repetition penalty, minimum length, temperature, top-k, top-p, min-p.
No vocabulary is sorted. Top-k and top-p each keep the scores above a threshold, and the threshold
is found bit by bit from counts and sums, which stay cheap with the vocabulary split over devices.
Filters that no row uses are skipped at run time.

Tokens are drawn by the Gumbel-max rule: the best of the kept scores after each is perturbed by its
own noise. The noise comes from the request's seed, the answer's index and the token's index alone,
so that an answer does not depend on the answers decoded beside it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

MAX_TOP_LOG_PROBS = 20  # A fixed width, so that no request causes a recompilation.
_LARGEST_BIT = 31


class Settings(NamedTuple):
    """The sampling of each row, as arrays, so that no setting causes a recompilation.

    Attributes:
        temperature_B: float32; 0 takes the best token.
        top_k_B: int32; 0 keeps all.
        top_p_B: float32; 1 keeps all.
        min_p_B: float32; 0 keeps all.
        repetition_penalty_B: float32; 1 changes nothing.
        min_new_tokens_B: int32; no stop token before this many.
        max_new_tokens_B: int32.
        stop_token_ids_BE: int32, filled up with -1.
        seed_B: uint32.
        answer_B: int32, the answer's index among those of its request.
        num_top_log_probs_B: int32, wanted alternatives to each token; 0 for none.
    """

    temperature_B: Any
    top_k_B: Any
    top_p_B: Any
    min_p_B: Any
    repetition_penalty_B: Any
    min_new_tokens_B: Any
    max_new_tokens_B: Any
    stop_token_ids_BE: Any
    seed_B: Any
    answer_B: Any
    num_top_log_probs_B: Any


class Chosen(NamedTuple):
    """A token of each row.

    Attributes:
        tokens_B: int32.
        log_probs_B: under the softmax of logits / temperature (1 where the temperature is 0).
        sampling_log_probs_B: under the distribution it was drawn from, with all filters; 0 where
            the temperature is 0.
        top: the best tokens, where any row wants them.
    """

    tokens_B: jax.Array
    log_probs_B: jax.Array
    sampling_log_probs_B: jax.Array
    top: "TopTokens"


class TopTokens(NamedTuple):
    """The best tokens of distributions, best first; of equal ones the lowest id comes first.

    Attributes:
        token_ids: int32, `[..., K]`.
        log_probs: of each, float32.
    """

    token_ids: Any
    log_probs: Any


def choose(
    logits_BV: jax.Array,
    seen_BV: jax.Array,
    settings: Settings,
    *,
    generated_B: jax.Array,
    active_B: jax.Array,
) -> Chosen:
    """Draws the next token of each row.

    Args:
        logits_BV: at least float32.
        seen_BV: bool, the token is in the prompt or in the answer so far.
        settings: of each row.
        generated_B: int32, tokens of the answer so far.
        active_B: rows in use; the settings of others are ignored.
    """
    drawn_B = active_B & (settings.temperature_B > 0)
    temperature_B1 = jnp.where(settings.temperature_B > 0, settings.temperature_B, 1.0)[:, None]
    plain_BV = logits_BV / temperature_B1
    too_early_B = active_B & (generated_B < settings.min_new_tokens_B)

    def changed() -> jax.Array:
        scores_BV = penalise_repetition(
            logits_BV, seen_BV, jnp.where(active_B, settings.repetition_penalty_B, 1.0)
        )
        scores_BV = forbid(scores_BV, settings.stop_token_ids_BE, too_early_B)
        return filter_scores(scores_BV / temperature_B1, settings, drawn_B)

    # One condition for all filters: each condition costs a copy of the scores.
    is_changed = (too_early_B | _changes_scores(settings, active_B, drawn_B)).any()
    scores_BV = jax.lax.cond(is_changed, changed, lambda: plain_BV)
    noise_BV = jax.lax.cond(
        drawn_B.any(),
        lambda: gumbel_noise(settings, generated_B, logits_BV),
        lambda: jnp.zeros_like(logits_BV),
    )
    tokens_B = _best_tokens(scores_BV + jnp.where(drawn_B[:, None], noise_BV, 0.0))
    total_B = jax.nn.logsumexp(plain_BV, axis=-1)
    plain_B = _score(plain_BV, tokens_B) - total_B
    sampling_B = jax.lax.cond(
        is_changed,
        lambda: _score(scores_BV, tokens_B) - jax.nn.logsumexp(scores_BV, axis=-1),
        lambda: plain_B,
    )
    none = no_top_tokens(*logits_BV.shape)
    top = jax.lax.cond(
        (active_B & (settings.num_top_log_probs_B > 0)).any(),
        lambda: top_tokens(plain_BV, total_B, count=none.log_probs.shape[-1]),
        lambda: none,
    )
    return Chosen(tokens_B, plain_B, jnp.where(drawn_B, sampling_B, 0.0), top)


def top_tokens(scores: jax.Array, total: jax.Array, *, count: int) -> TopTokens:
    """Returns the best tokens of each distribution.

    Args:
        scores: logits divided by the temperature, `[..., V]`.
        total: their logsumexp, `[...]`.
        count: number K of tokens.
    """
    best, token_ids = jax.lax.top_k(scores, count)
    return TopTokens(token_ids, (best - total[..., None]).astype(jnp.float32))


def no_top_tokens(*shape: int) -> TopTokens:
    """Returns zeros in place of the best of scores of this shape, `[..., V]`."""
    *rows, vocab_size = shape
    count = min(MAX_TOP_LOG_PROBS, vocab_size)
    return TopTokens(jnp.zeros((*rows, count), jnp.int32), jnp.zeros((*rows, count), jnp.float32))


def penalise_repetition(
    logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array
) -> jax.Array:
    """Divides positive logits of seen tokens by the penalty and multiplies negative ones.

    Source: CTRL, arXiv 1909.05858, section 4.1, in the variant of transformers.
    """

    def penalise() -> jax.Array:
        penalty_B1 = penalty_B[:, None]
        lowered_BV = jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
        return jnp.where(seen_BV, lowered_BV, logits_BV)

    return jax.lax.cond((penalty_B != 1).any(), penalise, lambda: logits_BV)


def forbid(scores_BV: jax.Array, token_ids_BE: jax.Array, where_B: jax.Array) -> jax.Array:
    """Removes some tokens (-1 for none) from the rows of `where_B`."""

    def without() -> jax.Array:
        asked_BE = where_B[:, None] & (token_ids_BE >= 0)
        # An index past the end is dropped.
        columns_BE = jnp.where(asked_BE, token_ids_BE, scores_BV.shape[1])
        return jax.vmap(lambda row_V, ids_E: row_V.at[ids_E].set(-jnp.inf, mode="drop"))(
            scores_BV, columns_BE
        )

    return jax.lax.cond(where_B.any(), without, lambda: scores_BV)


def filter_scores(scores_BV: jax.Array, settings: Settings, drawn_B: jax.Array) -> jax.Array:
    """Applies top-k, then top-p, then min-p: scores that they remove become -inf.

    Ties at a threshold are all kept. Top-p applies to what top-k left, min-p is relative to the
    best token.

    Args:
        scores_BV: divided by the temperature.
        settings: of each row.
        drawn_B: rows to filter.
    """
    top_k_B = jnp.where(drawn_B & (settings.top_k_B > 0), settings.top_k_B, 0)
    top_p_B = jnp.where(drawn_B, settings.top_p_B, 1.0)
    min_p_B = jnp.where(drawn_B, settings.min_p_B, 0.0)
    scores_BV = jax.lax.cond(
        (top_k_B > 0).any(), lambda: _keep_top_k(scores_BV, top_k_B), lambda: scores_BV
    )
    scores_BV = jax.lax.cond(
        (top_p_B < 1).any(), lambda: _keep_top_p(scores_BV, top_p_B), lambda: scores_BV
    )
    best_B1 = scores_BV.max(axis=-1, keepdims=True)
    lowest_B1 = best_B1 + jnp.log(min_p_B)[:, None]  # log(0) is -inf: all are kept.
    return jnp.where(scores_BV < lowest_B1, -jnp.inf, scores_BV)


def gumbel_noise(settings: Settings, generated_B: jax.Array, like_BV: jax.Array) -> jax.Array:
    """Returns Gumbel noise `[B, V]` from each row's seed, answer and token index."""

    def row(seed: jax.Array, answer: jax.Array, generated: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), answer)
        key = jax.random.fold_in(key, generated)
        return jax.random.gumbel(key, like_BV.shape[1:], like_BV.dtype)

    return jax.vmap(row)(settings.seed_B, settings.answer_B, generated_B)


def _changes_scores(settings: Settings, active_B: jax.Array, drawn_B: jax.Array) -> jax.Array:
    """Returns rows whose settings remove or lower scores, whatever the token's index."""
    filters_B = (settings.top_k_B > 0) | (settings.top_p_B < 1) | (settings.min_p_B > 0)
    return (active_B & (settings.repetition_penalty_B != 1)) | (drawn_B & filters_B)


def _keep_top_k(scores_BV: jax.Array, top_k_B: jax.Array) -> jax.Array:
    """Keeps the k best scores; all where k is 0."""
    ordered_BV = _ordered(scores_BV)
    ones_BV = jnp.ones_like(scores_BV, dtype=jnp.int32)
    wanted_B = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, scores_BV.shape[1]), 0)
    lowest_B = _largest_threshold(ordered_BV, ones_BV, wanted_B)
    # Every threshold meets a target of 0: those rows keep everything.
    lowest_B = jnp.where(top_k_B > 0, lowest_B, 0)
    return jnp.where(ordered_BV >= lowest_B[:, None], scores_BV, -jnp.inf)


def _keep_top_p(scores_BV: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Keeps the smallest set of best scores with probability p; all where p is 1."""
    ordered_BV = _ordered(scores_BV)
    probabilities_BV = jax.nn.softmax(scores_BV, axis=-1)
    lowest_B = _largest_threshold(ordered_BV, probabilities_BV, top_p_B)
    lowest_B = jnp.where(top_p_B < 1, lowest_B, 0)
    return jnp.where(ordered_BV >= lowest_B[:, None], scores_BV, -jnp.inf)


def _ordered(scores_BV: jax.Array) -> jax.Array:
    """Returns uint32 that compare like the float32 scores."""
    bits_BV = jax.lax.bitcast_convert_type(scores_BV.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << _LARGEST_BIT)
    return jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)


def _largest_threshold(
    ordered_BV: jax.Array, weights_BV: jax.Array, target_B: jax.Array
) -> jax.Array:
    """Returns the largest t such that scores from t on have enough weight; 0 if none.

    The weight is enough if it reaches the target. Bits are tried from the highest down: one stays
    set if enough weight remains above.
    """

    def try_bit(step: jax.Array, found_B: jax.Array) -> jax.Array:
        bit = jnp.uint32(1) << (_LARGEST_BIT - step).astype(jnp.uint32)
        candidate_B = found_B | bit
        above_BV = ordered_BV >= candidate_B[:, None]
        weight_B = jnp.where(above_BV, weights_BV, 0).sum(axis=-1)
        return jnp.where(weight_B >= target_B, candidate_B, found_B)

    none_B = jnp.zeros(ordered_BV.shape[:1], jnp.uint32)
    return jax.lax.fori_loop(0, _LARGEST_BIT + 1, try_bit, none_B)


def _best_tokens(scores_BV: jax.Array) -> jax.Array:
    """Returns the first of the best tokens of each row, int32.

    It takes two plain reductions of scores in memory: on CPU an argmax is computed number by
    number, and everything that makes the scores is fused with it, which takes three times as long.
    """
    scores_BV = jax.lax.optimization_barrier(scores_BV)
    vocab_size = scores_BV.shape[1]
    is_best_BV = scores_BV >= scores_BV.max(axis=-1, keepdims=True)
    tokens_V = jnp.arange(vocab_size, dtype=jnp.int32)
    first_B = jnp.where(is_best_BV, tokens_V[None, :], vocab_size).min(axis=-1)
    return jnp.minimum(first_B, vocab_size - 1)  # NaN scores have no best one.


def _score(scores_BV: jax.Array, tokens_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(scores_BV, tokens_B[:, None], axis=-1)[:, 0]
