"""Which slots hold the tokens of an answer, and sums over just those.

An array `[B, T]` holds answers, end tokens included, each in one run of slots without a gap; where
a run starts is free. Where a row holds several (in losses alone; rewards and estimators take one a
row), their prompts stand between them. A mask says which slots those are. What lies in the others
is never read: NaN there changes neither a result nor a gradient. Log-probabilities, values and
rewards of a token lie in the slot of that token, the value being that of the state before it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from huatuo_jax.training.losses import at_tokens, next_tokens


class Answers(NamedTuple):
    """Which answer each token belongs to, where a row may hold several.

    Attributes:
        of_tokens_BT: int, from 0; what it says outside of the mask is not read.
        number: of answers at most; static.
    """

    of_tokens_BT: jax.Array
    number: int


def answer_mask(lengths_B: jax.Array, num_slots: int) -> jax.Array:
    """The mask `[B, T]` of answers that start in slot 0.

    Args:
        lengths_B: tokens of each answer, its end token included; 0 for a row that only fills up a
            batch and counts nowhere.
        num_slots: T.
    """
    return jnp.arange(num_slots)[None, :] < lengths_B[:, None]


def last_tokens(mask_BT: jax.Array) -> jax.Array:
    """Bool `[B, T]`: the last token of each answer."""
    return mask_BT & ~next_tokens(mask_BT)


def has_tokens(mask_BT: jax.Array) -> jax.Array:
    """Bool `[B]`: rows that hold an answer."""
    return mask_BT.any(axis=1)


def wide(values: jax.Array) -> jax.Array:
    """The values in at least float32; float64 stays."""
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def masked(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The values in at least float32, zero outside of the mask, which has their shape."""
    return jnp.where(mask, wide(values), 0)


def count_answers(mask_BT: jax.Array) -> jax.Array:
    """How many answers there are, each having a token."""
    return last_tokens(mask_BT).sum()


def sum_by_answer(
    values_BT: jax.Array, mask_BT: jax.Array, answers: Answers | None = None
) -> jax.Array:
    """Each answer's sum over its tokens.

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
    """One number for each answer, laid on each of its tokens: `[B, T]`, zero elsewhere."""
    return jnp.where(mask_BT, wide(values_B)[:, None], 0)


def answer_lengths(mask_BT: jax.Array) -> jax.Array:
    """How many tokens the answer of each token has, int `[B, T]`; 0 outside of the mask."""
    num_slots = mask_BT.shape[1]
    slots_1T = jnp.arange(num_slots)[None, :]
    starts_BT = mask_BT & ~at_tokens(mask_BT)
    first_BT = jax.lax.cummax(jnp.where(starts_BT, slots_1T, 0), axis=1)
    last_BT = jnp.where(last_tokens(mask_BT), slots_1T, num_slots)
    last_BT = jax.lax.cummin(last_BT, axis=1, reverse=True)
    return jnp.where(mask_BT, last_BT - first_BT + 1, 0)


def per_token(values_BT: jax.Array, mask_BT: jax.Array, *, mean_per_answer: bool) -> jax.Array:
    """What each token adds to the sum of a loss, zero outside of the mask.

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
    """What the sums of a loss are divided by, once added up over the whole optimizer step.

    The first two keep every token's weight independent of the answer it stands in. The third does
    not: it favours short good answers and long bad ones (arXiv 2503.20783, section 3).

    - Neither argument: the number of tokens in the step (DAPO, arXiv 2503.14476, equation 8).
    - `tokens_allowed`: that many for each answer, so that the scale does not move with the lengths
      and the gradient is an unbiased estimate (Dr. GRPO, arXiv 2503.20783).
    - `mean_per_answer`: the number of answers, the terms of each being divided by its own tokens
      (GRPO, arXiv 2402.03300, equation 3).

    Args:
        mask_BT: the tokens.
        tokens_allowed: of an answer at most.
        mean_per_answer: as `per_token` was told.

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
