"""Mean and variance under a mask, of parts that can be put together, and whitening by them."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from huatuo_jax.rl.masks import masked

_EPSILON = 1e-8

# Numbers that differ from their mean by no more units in its last place are taken as equal.
_ROUNDING = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and variance of numbers seen so far.

    Kept as deviations from the mean, and not as the sum of squares, because that loses all digits
    of a variance that is small beside the mean. `combine` adds those of micro-batches, devices or
    rollouts: kept from one rollout to the next, they are running statistics.

    Attributes:
        count: of numbers, in their dtype (float32 counts to 16 million).
        mean: of them; 0 where there are none.
        squares: their summed squared deviations from the mean.
    """

    count: jax.Array
    mean: jax.Array
    squares: jax.Array

    @property
    def variance(self) -> jax.Array:
        """Squared deviations divided by the count (not by one less)."""
        return self.squares / jnp.maximum(self.count, 1)

    @property
    def standard_deviation(self) -> jax.Array:
        """The root of the variance; 0 where it is no more than the rounding of the mean."""
        deviation = jnp.sqrt(self.variance)
        rounding = _ROUNDING * jnp.finfo(deviation.dtype).eps * jnp.abs(self.mean)
        return jnp.where(deviation <= rounding, 0, deviation)


def no_moments(dtype: DTypeLike = jnp.float32) -> Moments:
    """Those of no numbers, to start running statistics from."""
    # Arrays of their own, as an update may take over the memory of each.
    return Moments(jnp.zeros((), dtype), jnp.zeros((), dtype), jnp.zeros((), dtype))


def moments(values: jax.Array, mask: jax.Array) -> Moments:
    """Those of the values in a mask of the same shape; under `jax.jit`, of the whole global array.

    In two passes, first the mean, then deviations from it.
    """
    values = masked(values, mask)
    count = mask.sum().astype(values.dtype)
    mean = mean_of(values, mask)
    return Moments(count, mean, jnp.square(masked(values - mean, mask)).sum())


def mean_of(values: jax.Array, mask: jax.Array, *, axis: int | None = None) -> jax.Array:
    """The mean of the values in a mask of the same shape, exact where they are all equal.

    The sum of n equal numbers, divided by n, is rounded, and what is left when that is taken off
    them is not 0. So the deviations from one of them are averaged, and once more from that mean,
    for its last digits where one of them lies far away.

    Args:
        values: any numbers.
        mask: which of them count.
        axis: one mean for each slice along it, which is kept with length 1; None for a scalar.

    Returns:
        The mean in at least float32, 0 where nothing is in the mask.
    """
    values = masked(values, mask)
    keepdims = axis is not None
    count = jnp.maximum(mask.sum(axis=axis, keepdims=keepdims), 1).astype(values.dtype)
    one = jnp.where(mask, values, -jnp.inf).max(axis=axis, keepdims=keepdims)
    mean = jnp.where(mask.any(axis=axis, keepdims=keepdims), one, 0)
    for _ in range(2):
        mean += masked(values - mean, mask).sum(axis=axis, keepdims=keepdims) / count
    return mean


def combine(left: Moments, right: Moments) -> Moments:
    """Those of all numbers of both (Chan, Golub and LeVeque 1979, equation 2.1)."""
    count = left.count + right.count
    right_share = right.count / jnp.maximum(count, 1)
    difference = right.mean - left.mean
    # In this order nothing is 0 times infinity where one side is empty and the other one large.
    between = (difference * left.count) * (difference * right_share)
    squares = left.squares + right.squares + between
    return Moments(count, left.mean + difference * right_share, squares)


def whiten(
    values_BT: jax.Array,
    mask_BT: jax.Array,
    statistics: Moments,
    *,
    shift_mean: bool = True,
    epsilon: float = _EPSILON,
) -> jax.Array:
    """Brings the values in the mask to variance 1 and, if wanted, mean 0; zero elsewhere.

    Values without a spread, which nothing can bring to variance 1, become 0.

    Args:
        values_BT: advantages; or rewards, with `shift_mean` False: a reward of 0 stays 0, and no
            sign changes. The code of arXiv 1909.08593 has another rule for rewards: it takes the
            mean off, divides, and adds the mean back, so that every token, those of reward 0 too,
            is moved by mean * (1 - 1 / deviation), and a long answer by more than a short one.
        mask_BT: the answers' tokens.
        statistics: of the whole global batch.
        shift_mean: take the mean off; without it the mean is divided like the values.
        epsilon: added to the variance.
    """
    values_BT = masked(values_BT, mask_BT)
    shifted_BT = values_BT - statistics.mean if shift_mean else values_BT
    # Asked so that a spread that is no number stays one.
    has_none = statistics.standard_deviation == 0
    scaled_BT = shifted_BT * jax.lax.rsqrt(statistics.variance + epsilon)
    return masked(jnp.where(has_none, 0, scaled_BT), mask_BT)
