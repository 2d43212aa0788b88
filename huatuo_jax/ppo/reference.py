"""The reference that the policy is held near: the initial policy, or one that follows it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from huatuo_jax.backbone.matmul import store_as_computed
from huatuo_jax.core import sharding
from huatuo_jax.ppo.config import PpoConfig
from huatuo_jax.training.initial_model import InitialModel
from huatuo_jax.training.optimizer import Optimizer, OptimizerConfig
from huatuo_jax.training.update import TrainState, Variables


def make_reference(cfg: PpoConfig, policy: InitialModel, key: jax.Array, mesh: Mesh) -> Variables:
    """Makes the first reference, which takes the place of the policy's trained variables.

    With adapters it is adapters of zeros: what they add is 0 and the program stays the same.
    Otherwise it is the first state's weights, see `stored`.
    """
    # Read once more, and without moments, so that a resumed run has the very same.
    without_state = Optimizer(OptimizerConfig(learning_rate=1.0), 1, optax.identity())
    if policy.section.lora is not None:
        shapes = policy.abstract_state(without_state, mesh).trained
        return jax.tree.map(_zeros, shapes)
    return stored(cfg, policy, policy.make_state(key, without_state, mesh).trained)


def stored(cfg: PpoConfig, policy: InitialModel, trained: Variables) -> Variables:
    """Returns trained variables of the policy as a reference holds them.

    Weights are cast as the forward pass does it, unless the reference is a mean over iterations,
    which small steps would leave where it is; adapters are not cast.
    """
    is_mean = cfg.reference_sync is not None and not cfg.reference_sync.copies
    if policy.section.lora is not None or is_mean:
        return trained
    found: Variables = store_as_computed(
        trained, policy.compute.compute_dtype, keep_lm_head=policy.cfg.norm_head
    )
    return found


def abstract_reference(cfg: PpoConfig, policy: InitialModel, state: TrainState) -> Variables:
    """Returns the reference's shapes and shardings, from those of the policy's state."""
    places = jax.tree.map(lambda leaf: leaf.sharding, state.trained)
    shapes = jax.eval_shape(lambda trained: stored(cfg, policy, trained), state.trained)
    found: Variables = sharding.abstract_arrays(shapes, places)
    return found


def compile_sync(
    cfg: PpoConfig, policy: InitialModel, state: TrainState, mesh: Mesh
) -> sharding.OnMesh:
    """Compiles a move of the reference towards the policy, under one `jax.jit`.

    Args:
        cfg: the run's settings, with `reference_sync`.
        policy: to start from.
        state: the policy's, or its abstract form.
        mesh: where it lies.

    Returns:
        From the policy's trained variables and the reference, which is used up, to the next one.
    """
    assert cfg.reference_sync is not None
    sync = cfg.reference_sync

    def move(trained: Variables, reference: Variables) -> Variables:
        if sync.copies:
            return stored(cfg, policy, trained)
        return jax.tree.map(
            lambda new, old: sync.mixup_alpha * new + (1 - sync.mixup_alpha) * old,
            trained,
            reference,
        )

    compiled = jax.jit(
        move,
        out_shardings=sharding.parameter_shardings(state.trained, mesh),
        donate_argnums=() if sync.copies else 1,
    )
    return sharding.OnMesh(compiled, mesh)


def _zeros(shape: Any) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype, device=shape.sharding)
