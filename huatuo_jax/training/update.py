"""One optimizer step as a pure function: train state, gradients over micro-batches, update.

A step runs jitted on a mesh; it can also be compiled ahead of time, from shapes and shardings.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from huatuo_jax.core import sharding
from huatuo_jax.training.losses import wide
from huatuo_jax.training.optimizer import Optimizer, clip_by_norm, schedule_position
from huatuo_jax.training.programs import StageProgram

COUNTERS = ("step", "num_updates", "num_not_finite", "not_finite_in_a_row", "num_empty")

Variables = dict[str, Any]
"""Flax collections: `{"params": parameters, "lora": adapters}`, each a plain nested dict."""


Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
Outputs = dict[str, jax.Array]
"""Numbers of each row, `[B, T]`."""


class LossSums(NamedTuple):
    """Sums that a loss function returns, so that those of micro-batches add up.

    Attributes:
        loss: summed over what it is taken of (trained tokens, comparisons).
        num_terms: how many those are; `loss / num_terms` of a whole step is minimised.
        others: more sums, for metrics.
    """

    loss: jax.Array
    num_terms: jax.Array
    others: dict[str, jax.Array]


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


LossFunction = Callable[[Variables, Batch], LossSums]
Update = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


class Step(NamedTuple):
    """An optimizer step on a mesh; no array is made for it.

    Attributes:
        loss: what is minimised.
        optimizer: by what.
        state: shapes and shardings of what it takes and leaves.
        update: jitted.
        num_micro_batches: that a batch is divided into.
    """

    loss: LossFunction
    optimizer: Optimizer
    state: TrainState
    update: sharding.OnMesh
    num_micro_batches: int


def new_state(
    variables: Variables,
    *,
    is_trained: Callable[[str], bool],
    optimizer: Optimizer,
    key: jax.Array,
) -> TrainState:
    """Makes the state before the first step.

    Args:
        variables: the model's.
        is_trained: tells for a path such as `params/layers/mlp/down/kernel`.
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
    """Returns the result of `make_sharded` as `jax.ShapeDtypeStruct`s, without making an array."""
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
    """Joins two nested dicts that share no leaf."""
    joined = dict(left)
    for name, value in right.items():
        if name in joined:
            assert isinstance(value, Mapping), f"{name} is in both trees"
            joined[name] = join(joined[name], value)
        else:
            joined[name] = value
    return joined


def make_update(loss: LossFunction, optimizer: Optimizer, *, num_micro_batches: int) -> Update:
    """Makes the pure `update(state, batch) -> state, metrics`.

    A step with nothing to train on, or whose loss or gradient is not finite, leaves parameters,
    optimizer and schedule as they were and is counted in the state.

    Args:
        loss: sums over the rows it is given.
        optimizer: from `make_optimizer`.
        num_micro_batches: passes a step's rows are divided into; changes rounding only.

    Returns:
        The update. Its metrics are the loss function's sums, `loss`, `num_terms`, `grad_norm`
        (before it is clipped), `learning_rate` and the state's counters.
    """

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        sums, gradients = _gradients(loss, state, batch, num_micro_batches)
        return apply_gradients(state, sums, gradients, optimizer)

    return update


def apply_gradients(
    state: TrainState, sums: LossSums, gradients: Variables, optimizer: Optimizer
) -> tuple[TrainState, Metrics]:
    """Applies the optimizer step of `make_update`, from the gradients of the summed loss.

    Args:
        state: before it.
        sums: over all rows of the step.
        gradients: of `sums.loss`, like `state.trained`, in at least float32.
        optimizer: of the state.
    """
    terms = jnp.maximum(sums.num_terms, 1)
    gradients = jax.tree.map(lambda leaf: leaf / terms.astype(leaf.dtype), gradients)
    norm = optax.tree.norm(gradients)
    is_empty = sums.num_terms == 0
    is_finite = jnp.isfinite(sums.loss) & jnp.isfinite(norm)
    applied = is_finite & ~is_empty
    trained, opt_state = optimizer.step(
        clip_by_norm(gradients, norm, optimizer.cfg.clip_norm),
        state.opt_state,
        state.trained,
        applied=applied,
    )
    metrics = {
        **sums.others,
        "loss": sums.loss,
        "num_terms": sums.num_terms,
        "grad_norm": norm,
        "learning_rate": optimizer.learning_rate(
            schedule_position(state.opt_state, state.num_updates)
        ),
    }
    counters = _count(state, is_empty=is_empty, is_finite=is_finite)
    new_state = TrainState(
        **counters, trained=trained, frozen=state.frozen, opt_state=opt_state, key=state.key
    )
    return new_state, metrics | {name: counters[name] for name in counters if name != "step"}


def compile_update(update: Update, state: Any, mesh: Mesh) -> sharding.OnMesh:
    """Compiles the update under one `jax.jit`: shards in and out, the old state's memory reused.

    Args:
        update: from `make_update`.
        state: a state, or its abstract form.
        mesh: where state and batch lie.

    Returns:
        An `Update`, which can be lowered too.
    """
    places = sharding.parameter_shardings(state, mesh)
    compiled = jax.jit(
        update,
        in_shardings=(places, sharding.batch_sharding(mesh)),
        out_shardings=(places, jax.NamedSharding(mesh, jax.P())),
        donate_argnums=0,
    )
    return sharding.OnMesh(compiled, mesh)


def over_micro_batches(
    one: Callable[[Batch], tuple[tuple[LossSums, Variables], Outputs]],
    batch: Batch,
    trained: Variables,
    number: int,
) -> tuple[tuple[LossSums, Variables], Outputs]:
    """Adds up the sums and gradients of micro-batches and puts their outputs back in row order.

    Micro-batch i takes rows i, i + number, ...: each device then divides the rows it has, and none
    has to move.

    Args:
        one: computes sums, gradients and outputs `[B, ...]` of some rows.
        batch: all rows, each array `[B, ...]`.
        trained: the variables that the gradients are of.
        number: of micro-batches; it divides B.
    """
    if number == 1:
        return one(batch)
    num_rows = len(next(iter(batch.values())))
    assert num_rows % number == 0, f"{num_rows} rows in {number} micro-batches"
    micro_batches = {
        name: rows.reshape(-1, number, *rows.shape[1:]).swapaxes(0, 1)
        for name, rows in batch.items()
    }

    def add(total: tuple[LossSums, Variables], rows: Batch) -> tuple[Any, Outputs]:
        summed, outputs = one(rows)
        sums, gradients = jax.tree.map(jnp.add, total, summed)
        return (sums, in_place(gradients, trained)), outputs

    shapes, _ = jax.eval_shape(one, {name: rows[0] for name, rows in micro_batches.items()})
    sums, gradients = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, outputs = jax.lax.scan(add, (sums, in_place(gradients, trained)), micro_batches)
    return total, {
        name: array.swapaxes(0, 1).reshape(-1, *array.shape[2:]) for name, array in outputs.items()
    }


def in_place(gradients: Variables, trained: Variables) -> Variables:
    """Constrains gradients to the shards of their parameters, so that none is ever held whole."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return gradients
    specs = jax.tree_util.tree_map_with_path(
        lambda path, _: sharding.parameter_spec(sharding.path_name(path)), trained
    )
    return jax.lax.with_sharding_constraint(gradients, specs)


def make_step(
    loss: LossFunction,
    optimizer: Optimizer,
    state: TrainState,
    mesh: Mesh,
    *,
    num_micro_batches: int,
) -> Step:
    """Makes the step of an abstract state; see `make_update` for the other arguments."""
    update = make_update(loss, optimizer, num_micro_batches=num_micro_batches)
    compiled = compile_update(update, state, mesh)
    return Step(loss, optimizer, state, compiled, num_micro_batches)


def update_program(
    stage: str, step: Step, batch: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> StageProgram:
    """Describes the update of a stage as a program of its own.

    Args:
        stage: its name.
        step: of it.
        batch: from `abstract_batch`.
        mesh: where.
    """
    rows = len(next(iter(batch.values())))
    return StageProgram(
        name=f"{stage}/update",
        function=step.update,
        arguments=(step.state, batch),
        mesh=mesh,
        rows=rows,
        rows_at_once=rows // step.num_micro_batches,
        in_micro_batches=True,
    )


def abstract_batch(
    row: Mapping[str, np.ndarray], batch_size: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and shardings of so many rows like this one."""
    place = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *array.shape), array.dtype, sharding=place)
        for name, array in row.items()
    }


def _gradients(
    loss: LossFunction, state: TrainState, batch: Batch, num_micro_batches: int
) -> tuple[LossSums, Variables]:
    """Sums the loss over the whole batch, and its gradient, in at least float32."""

    def summed(trained: Variables, rows: Batch) -> tuple[jax.Array, LossSums]:
        sums = loss(join(trained, state.frozen), rows)
        return sums.loss, sums

    differentiate = jax.value_and_grad(summed, has_aux=True)

    def wide_gradients(rows: Batch) -> tuple[LossSums, Variables]:
        (_, sums), gradients = differentiate(state.trained, rows)
        return sums, jax.tree.map(wide, gradients)

    (sums, gradients), _ = over_micro_batches(
        lambda rows: (wide_gradients(rows), {}), batch, state.trained, num_micro_batches
    )
    return sums, gradients


def _count(state: TrainState, *, is_empty: jax.Array, is_finite: jax.Array) -> Metrics:
    """Counts a step in the state; empty batches do not reset the consecutive-failure counter."""
    failed = (~is_finite).astype(jnp.int32)
    empty = (is_empty & is_finite).astype(jnp.int32)
    in_a_row = jnp.where(is_finite & ~is_empty, 0, state.not_finite_in_a_row + failed)
    return {
        "step": state.step + 1,
        "num_updates": state.num_updates + 1 - failed - empty,
        "num_not_finite": state.num_not_finite + failed,
        "not_finite_in_a_row": in_a_row,
        "num_empty": state.num_empty + empty,
    }
