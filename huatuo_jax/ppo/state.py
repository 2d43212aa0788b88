"""What an iteration of PPO reads and leaves behind."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from huatuo_jax.rl.moments import Moments, no_moments
from huatuo_jax.training.state import TrainState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PpoState:
    """All that the next iteration needs; what never changes (reference, reward model) is not in it.

    Attributes:
        iteration: rollouts that were made and trained on.
        next_prompt: the row of the endless order of prompts that comes next.
        kl_coef: of the next rollout.
        scores: moments of all raw scores so far.
        key: the run's; each rollout's randomness is the iteration folded into it.
        policy: with its optimizer.
        value: the critic with its own; None where there is none.
    """

    iteration: jax.Array
    next_prompt: jax.Array
    kl_coef: jax.Array
    scores: Moments
    key: jax.Array
    policy: TrainState
    value: TrainState | None


def new_ppo_state(
    policy: TrainState, value: TrainState | None, *, kl_coef: float, seed: int, mesh: Mesh
) -> PpoState:
    """The state before the first iteration."""
    everywhere = jax.NamedSharding(mesh, jax.P())
    small = jax.jit(_beside_the_models, static_argnums=(0, 1), out_shardings=everywhere)
    return PpoState(**small(kl_coef, seed), policy=policy, value=value)


def abstract_ppo_state(policy: TrainState, value: TrainState | None, mesh: Mesh) -> PpoState:
    """That state's shapes and shardings, from those of its parts."""
    everywhere = jax.NamedSharding(mesh, jax.P())

    def scalar(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

    small = jax.tree.map(scalar, _beside_the_models(kl_coef=0.0, seed=0))
    return PpoState(**small, policy=policy, value=value)


def _beside_the_models(kl_coef: float, seed: int) -> dict[str, Any]:
    """All of the first state but policy and critic."""
    return {
        "iteration": jnp.zeros((), jnp.int32),
        "next_prompt": jnp.zeros((), jnp.int32),
        "kl_coef": jnp.asarray(kl_coef, jnp.float32),
        "scores": no_moments(),
        "key": jax.random.key(seed),
    }
