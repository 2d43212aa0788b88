"""The policy of a DPO run and its reference, which lie side by side in one state.

The reference takes the place of what is trained, in a collection of its own among the frozen
variables, so a checkpoint holds it and a run that goes on has the very same.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from huatuo_jax.backbone.casting import store_as_computed
from huatuo_jax.training.initial_model import InitialModel
from huatuo_jax.training.optimizer import Optimizer
from huatuo_jax.training.state import TrainState, Variables, abstract, make_sharded

REFERENCE = "reference"
"""The collection with what the reference has in the place of what is trained."""


def make_state(
    policy: InitialModel, key: jax.Array, optimizer: Optimizer, mesh: Mesh
) -> TrainState:
    """The state before the first step, in its shards.

    Raises:
        ValueError: as `InitialModel.make_state`.
        OSError: the weights cannot be read.
    """
    state = policy.make_state(key, optimizer, mesh)
    # Under jit, so that no array is both the policy's and the reference's.
    reference = make_sharded(lambda trained: _reference(policy, trained), mesh, state.trained)
    return dataclasses.replace(state, frozen=state.frozen | {REFERENCE: reference})


def abstract_state(policy: InitialModel, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """That state's shapes and shardings."""
    state = policy.abstract_state(optimizer, mesh)
    reference = abstract(lambda trained: _reference(policy, trained), mesh, state.trained)
    return dataclasses.replace(state, frozen=state.frozen | {REFERENCE: reference})


def both(variables: Variables) -> tuple[Variables, Variables]:
    """The variables of the policy, and those of its reference."""
    own = {name: part for name, part in variables.items() if name != REFERENCE}
    return own, _overlaid(own, variables[REFERENCE])


def _reference(policy: InitialModel, trained: Variables) -> Variables:
    """Adapters of zeros, which add 0; or the weights, stored as the forward pass casts them."""
    if policy.section.lora is not None:
        return jax.tree.map(jnp.zeros_like, trained)
    return dict(
        store_as_computed(trained, policy.compute.compute_dtype, keep_lm_head=policy.cfg.norm_head)
    )


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> Variables:
    """A nested dict with the leaves of the upper one in place of those below."""
    return dict(below) | {
        name: _overlaid(below[name], part) if isinstance(part, Mapping) else part
        for name, part in above.items()
    }
