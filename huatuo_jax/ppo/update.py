"""One pass over a minibatch, with or without its gradient, and the step that uses the gradient.

Both kinds of pass are one compiled program, so that numbers computed before an update (old
log-probabilities, old values, the reference's) equal those of the update's first minibatch bit for
bit: whether to differentiate is asked at run time, after the forward pass.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from huatuo_jax import sharding
from huatuo_jax.training.optimizer import Optimizer
from huatuo_jax.training.state import TrainState, Variables, join
from huatuo_jax.training.update import Batch, LossSums, Metrics, apply_gradients

Outputs = dict[str, jax.Array]
"""Numbers of each row, `[B, T]`."""

RowLoss = Callable[[Variables, Batch, jax.Array], tuple[LossSums, Outputs]]
"""Told variables, rows and the KL coefficient."""


class Pass(NamedTuple):
    """What a pass over a minibatch gives.

    Attributes:
        sums: over all of its rows.
        outputs: of each row.
        gradients: of the summed loss, in at least float32; zero where none was wanted.
    """

    sums: LossSums
    outputs: Outputs
    gradients: Variables


def compile_pass(
    loss: RowLoss, state: TrainState, mesh: Mesh, *, rows_at_once: int
) -> sharding.OnMesh:
    """The pass under one `jax.jit`.

    Args:
        loss: sums over the rows it is given, and numbers of each.
        state: whose variables it will be given, or its abstract form.
        mesh: where state and batch lie.
        rows_at_once: rows of a micro-batch; changes rounding only. Of rows that it does not divide
            there are fewer, and all go together.

    Returns:
        From trained and frozen variables, rows, the KL coefficient, and whether to differentiate,
        to a `Pass`.
    """
    places = sharding.parameter_shardings(state.trained, mesh)
    everywhere = jax.NamedSharding(mesh, jax.P())

    def run(
        trained: Variables,
        frozen: Variables,
        batch: Batch,
        kl_coef: jax.Array,
        differentiate: jax.Array,
    ) -> Pass:
        def one(rows: Batch) -> tuple[tuple[LossSums, Variables], Outputs]:
            return _one_pass(
                lambda trained: loss(join(trained, frozen), rows, kl_coef), trained, differentiate
            )

        number = max(len(batch["mask"]) // rows_at_once, 1)
        (sums, gradients), outputs = _over_micro_batches(one, batch, trained, number)
        return Pass(sums, outputs, gradients)

    prefix: Any = (everywhere, everywhere, places)
    return sharding.OnMesh(jax.jit(run, out_shardings=Pass(*prefix)), mesh)


def compile_apply(optimizer: Optimizer, state: TrainState, mesh: Mesh) -> sharding.OnMesh:
    """The step from a pass's gradients, under one `jax.jit`; the old state is used up.

    A step whose loss or gradient is not finite is skipped and counted, as `training.update` does.

    Args:
        optimizer: of the state.
        state: a state, or its abstract form.
        mesh: where it lies.

    Returns:
        From a state, and the sums and gradients of a pass, to the next state and its metrics.
    """
    places = sharding.parameter_shardings(state, mesh)

    def apply(
        state: TrainState, sums: LossSums, gradients: Variables
    ) -> tuple[TrainState, Metrics]:
        new, metrics = apply_gradients(
            dataclasses.replace(state, frozen={}), sums, gradients, optimizer
        )
        return dataclasses.replace(new, frozen=state.frozen), metrics

    compiled = jax.jit(
        apply,
        out_shardings=(places, jax.NamedSharding(mesh, jax.P())),
        donate_argnums=0,
    )
    return sharding.OnMesh(compiled, mesh)


def _one_pass(
    loss: Callable[[Variables], tuple[LossSums, Outputs]],
    trained: Variables,
    differentiate: jax.Array,
) -> tuple[tuple[LossSums, Variables], Outputs]:
    def summed(trained: Variables) -> tuple[jax.Array, tuple[LossSums, Outputs]]:
        sums, outputs = loss(trained)
        return sums.loss, (sums, outputs)

    value, pull_back, (sums, outputs) = jax.vjp(summed, trained, has_aux=True)

    def gradients() -> Variables:
        return _in_place(jax.tree.map(_wide, pull_back(jnp.ones_like(value))[0]), trained)

    def zeros() -> Variables:
        return _in_place(
            jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _wide(leaf).dtype), trained), trained
        )

    return (sums, jax.lax.cond(differentiate, gradients, zeros)), outputs


def _over_micro_batches(
    one: Callable[[Batch], tuple[tuple[LossSums, Variables], Outputs]],
    batch: Batch,
    trained: Variables,
    number: int,
) -> tuple[tuple[LossSums, Variables], Outputs]:
    """Sums over all rows; micro-batch i takes rows i, i + number, ..., so that none has to move."""
    if number == 1:
        return one(batch)
    rows = {
        name: array.reshape(-1, number, *array.shape[1:]).swapaxes(0, 1)
        for name, array in batch.items()
    }

    def add(total: Any, rows: Batch) -> tuple[Any, Outputs]:
        summed, outputs = one(rows)
        (sums, gradients) = jax.tree.map(jnp.add, total, summed)
        return (sums, _in_place(gradients, trained)), outputs

    shapes, _ = jax.eval_shape(one, {name: array[0] for name, array in rows.items()})
    sums, gradients = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, outputs = jax.lax.scan(add, (sums, _in_place(gradients, trained)), rows)
    return total, {
        name: array.swapaxes(0, 1).reshape(-1, *array.shape[2:]) for name, array in outputs.items()
    }


def _in_place(gradients: Variables, trained: Mapping[str, Any]) -> Variables:
    """Gradients lie where their parameters do, so that none is ever held whole."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return gradients
    specs = jax.tree_util.tree_map_with_path(
        lambda path, _: sharding.parameter_spec(sharding.path_name(path)), trained
    )
    return jax.lax.with_sharding_constraint(gradients, specs)


def _wide(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
