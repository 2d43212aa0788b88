"""Mean and variance under a mask, of parts that can be put together, and whitening by them."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from huatuo_jax.rl.masks import masked

_EPSILON = 1e-8


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
    mean = values.sum() / jnp.maximum(count, 1)
    return Moments(count, mean, jnp.square(masked(values - mean, mask)).sum())


def combine(left: Moments, right: Moments) -> Moments:
    """Those of all numbers of both (Chan, Golub and LeVeque 1979, equation 2.1)."""
    count = left.count + right.count
    right_share = right.count / jnp.maximum(count, 1)
    difference = right.mean - left.mean
    squares = left.squares + right.squares + jnp.square(difference) * left.count * right_share
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

    Args:
        values_BT: advantages; or rewards, with `shift_mean` False as arXiv 1909.08593's code has
            it: a reward's sign is not to change.
        mask_BT: the answers' tokens.
        statistics: of the whole global batch.
        shift_mean: take the mean off.
        epsilon: added to the variance.
    """
    values_BT = masked(values_BT, mask_BT)
    shifted_BT = values_BT - statistics.mean if shift_mean else values_BT
    return masked(shifted_BT * jax.lax.rsqrt(statistics.variance + epsilon), mask_BT)
