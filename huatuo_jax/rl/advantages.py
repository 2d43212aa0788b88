"""How much better a token did than expected: by a critic (GAE), or by its group (RLOO, GRPO)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from huatuo_jax.rl.masks import last_tokens, masked, wide
from huatuo_jax.rl.moments import mean_of
from huatuo_jax.training.losses import next_tokens


class Estimates(NamedTuple):
    """What a policy and a critic are trained towards; zero outside of the mask.

    Attributes:
        advantages_BT: not whitened.
        returns_BT: those advantages plus the values: the critic's targets.
    """

    advantages_BT: jax.Array
    returns_BT: jax.Array


def gae(
    rewards_BT: jax.Array,
    values_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    gamma: float,
    lambda_: float,
    values_after_B: jax.Array | None = None,
) -> Estimates:
    """Generalised advantage estimation (arXiv 1506.02438, equations 11 and 16).

    A_t = sum over k of (gamma * lambda)^k d_(t+k), with d_t = r_t + gamma * V_(t+1) - V_t, and 0
    for the value after the last token: the answer is over there. With lambda 1 the policy gradient
    is right whatever the critic says; below 1 only with a critic that is right.

    Args:
        rewards_BT: from `rewards.token_rewards`.
        values_BT: the critic's, before each token.
        mask_BT: the answers' tokens.
        gamma: discount of the next token's value; 1 for the objective of
            `rewards.token_rewards`, in which every token's penalty counts the same.
        lambda_: 0 trusts the critic, 1 the rewards.
        values_after_B: the critic's values after the last token, to go on from where an answer was
            cut off; must be 0 where it ended.

    Returns:
        Advantages and returns; nothing is differentiated through them.
    """
    values_BT = masked(values_BT, mask_BT)
    next_values_BT = next_tokens(values_BT)
    if values_after_B is not None:
        after_B1 = wide(values_after_B)[:, None]
        next_values_BT = jnp.where(last_tokens(mask_BT), after_B1, next_values_BT)
    deltas_BT = masked(masked(rewards_BT, mask_BT) + gamma * next_values_BT - values_BT, mask_BT)

    def step(after_B: jax.Array, token: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        delta_B, mask_B = token
        advantage_B = jnp.where(mask_B, delta_B + gamma * lambda_ * after_B, 0)
        return advantage_B, advantage_B

    # One token after the other: a parallel scan would be rounded differently for another padding.
    start_B = jnp.zeros_like(deltas_BT[:, 0])
    _, advantages_TB = jax.lax.scan(step, start_B, (deltas_BT.T, mask_BT.T), reverse=True)
    advantages_BT = advantages_TB.T
    return jax.lax.stop_gradient(Estimates(advantages_BT, advantages_BT + values_BT))


def rloo_advantages(rewards_BG: jax.Array) -> jax.Array:
    """Each answer's reward less the mean of the others' to its prompt (arXiv 2402.14740, eq. 8).

    Unbiased, as no answer is in its own baseline. Lay them on tokens with `masks.over_tokens`.

    Args:
        rewards_BG: of whole answers, one prompt a row: the sum of `rewards.token_rewards`, KL
            penalty included.

    Raises:
        ValueError: there is one answer a prompt.
    """
    num_answers = _count_group(rewards_BG)
    return _from_mean(rewards_BG) * (num_answers / (num_answers - 1))


def grpo_advantages(
    rewards_BG: jax.Array, *, divide_by_deviation: bool, epsilon: float = 1e-4
) -> jax.Array:
    """Each answer's reward less the mean of all to its prompt, itself included.

    With the deviation: arXiv 2402.03300, section 4.1.2, which weighs prompts by how alike their
    answers' rewards are and so has another optimum; its loss is the mean over answers of each one's
    mean, see `masks.count_terms`. Without: arXiv 2503.20783, equation 5, whose gradient is
    (G - 1) / G times that of RLOO.

    Args:
        rewards_BG: of whole answers, one prompt a row.
        divide_by_deviation: by the root of the mean squared deviation (over G, not G - 1, a
            constant factor) plus epsilon.
        epsilon: bounds how far a small deviation is enlarged; a group whose rewards are all equal
            is at 0 exactly.

    Raises:
        ValueError: there is one answer a prompt.
    """
    _count_group(rewards_BG)
    advantages_BG = _from_mean(rewards_BG)
    if not divide_by_deviation:
        return advantages_BG
    deviation_B1 = jnp.sqrt(jnp.square(advantages_BG).mean(axis=1, keepdims=True))
    return advantages_BG / (deviation_B1 + epsilon)


def _from_mean(rewards_BG: jax.Array) -> jax.Array:
    rewards_BG = jax.lax.stop_gradient(wide(rewards_BG))
    return rewards_BG - mean_of(rewards_BG, jnp.ones_like(rewards_BG, bool), axis=1)


def _count_group(rewards_BG: jax.Array) -> int:
    num_answers = rewards_BG.shape[1]
    if num_answers < 2:
        raise ValueError(f"{num_answers} answer to a prompt must be at least 2 to be compared")
    return num_answers
