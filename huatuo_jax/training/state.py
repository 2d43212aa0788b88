"""What a training step reads and leaves behind, and where it lies on the mesh."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from huatuo_jax import sharding
from huatuo_jax.training.optimizer import Optimizer

COUNTERS = ("step", "num_updates", "num_not_finite", "not_finite_in_a_row", "num_empty")

Variables = dict[str, Any]
"""Flax collections: `{"params": parameters, "lora": adapters}`, each a plain nested dict."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that the next step needs, the batch aside.

    Attributes:
        step: batches consumed.
        num_updates: updates applied; the schedule goes by a count of its own in `opt_state`, which
            is the same unless `optimizer.advance_schedule` moved it on.
        num_not_finite: batches skipped because their loss or gradient was not finite.
        not_finite_in_a_row: how many of the last batches those were.
        num_empty: batches skipped because they held no trained token.
        trained: the variables that are trained.
        frozen: the variables that are not; together they are all of the model's.
        opt_state: of the trained ones.
        key: the run's PRNG key; randomness folds a role and the step into it.
    """

    step: jax.Array
    num_updates: jax.Array
    num_not_finite: jax.Array
    not_finite_in_a_row: jax.Array
    num_empty: jax.Array
    trained: Variables
    frozen: Variables
    opt_state: Any
    key: jax.Array

    @property
    def variables(self) -> Variables:
        """All variables, for `model.apply`."""
        return join(self.trained, self.frozen)


def new_state(
    variables: Variables,
    *,
    is_trained: Callable[[str], bool],
    optimizer: Optimizer,
    key: jax.Array,
) -> TrainState:
    """The state before the first step.

    Args:
        variables: the model's.
        is_trained: told a path such as `params/layers/mlp/down/kernel`.
        optimizer: from `make_optimizer`.
        key: the run's.

    Raises:
        ValueError: nothing is left to train.
    """
    trained, frozen = split(variables, is_trained)
    if not jax.tree.leaves(trained):
        raise ValueError("every parameter is frozen: nothing is left to train")
    # Arrays of their own, as an update takes over the memory of each.
    counters = {name: jnp.zeros((), jnp.int32) for name in COUNTERS}
    return TrainState(
        **counters,
        trained=trained,
        frozen=frozen,
        opt_state=optimizer.transformation.init(trained),
        key=key,
    )


def make_sharded(
    make: Callable[..., Any], mesh: Mesh, *arguments: Any, donated: tuple[int, ...] = ()
) -> Any:
    """Calls a pure function under `jax.jit` with each array of its result born in its shards.

    Args:
        make: returns a tree with parameters' paths, such as `new_state`.
        mesh: where to.
        *arguments: arrays for `make`.
        donated: which of them are not needed any more, so that their memory is reused.
    """
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(make, *arguments)
        places = sharding.parameter_shardings(shapes, mesh)
        return jax.jit(make, out_shardings=places, donate_argnums=donated)(*arguments)


def abstract(make: Callable[..., Any], mesh: Mesh, *arguments: Any) -> Any:
    """The result of `make_sharded` as `jax.ShapeDtypeStruct` with shardings, without an array."""
    return sharding.abstract_parameters(jax.eval_shape(make, *arguments), mesh)


def split(tree: Mapping[str, Any], wanted: Callable[[str], bool]) -> tuple[Variables, Variables]:
    """Parts a nested dict in two by path: the wanted leaves, and the others."""
    inside: Variables = {}
    outside: Variables = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [key.key for key in path]
        below = inside if wanted("/".join(names)) else outside
        for name in names[:-1]:
            below = below.setdefault(name, {})
        below[names[-1]] = leaf
    return inside, outside


def join(left: Mapping[str, Any], right: Mapping[str, Any]) -> Variables:
    """One nested dict with the leaves of two that share none."""
    joined = dict(left)
    for name, value in right.items():
        if name in joined:
            assert isinstance(value, Mapping), f"{name} is in both trees"
            joined[name] = join(joined[name], value)
        else:
            joined[name] = value
    return joined
