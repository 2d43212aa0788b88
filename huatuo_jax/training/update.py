"""One optimizer step as a pure function: gradients of all micro-batches, then one update."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from huatuo_jax import sharding
from huatuo_jax.training.optimizer import Optimizer, clip_by_norm, schedule_position
from huatuo_jax.training.state import TrainState, Variables, join

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


class LossSums(NamedTuple):
    """What a loss function returns: sums, so that those of micro-batches add up.

    Attributes:
        loss: summed over what it is taken of (trained tokens, comparisons).
        num_terms: how many those are; `loss / num_terms` of a whole step is minimised.
        others: more sums, for metrics.
    """

    loss: jax.Array
    num_terms: jax.Array
    others: dict[str, jax.Array]


LossFunction = Callable[[Variables, Batch], LossSums]
Update = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_update(loss: LossFunction, optimizer: Optimizer, *, num_micro_batches: int) -> Update:
    """The pure `update(state, batch) -> state, metrics`.

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
    """The optimizer step of `make_update`, from the gradients of the summed loss.

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
    changes, opt_state = optimizer.transformation.update(
        clip_by_norm(gradients, norm, optimizer.cfg.clip_norm), state.opt_state, state.trained
    )
    new = (optax.apply_updates(state.trained, changes), opt_state)
    old = (state.trained, state.opt_state)
    trained, opt_state = jax.tree.map(lambda a, b: jnp.where(applied, a, b), new, old)
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
    """The update under one `jax.jit`: shards in, shards out, the old state's memory reused.

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


def _gradients(
    loss: LossFunction, state: TrainState, batch: Batch, num_micro_batches: int
) -> tuple[LossSums, Variables]:
    """Sums over the whole batch, and the gradient of its summed loss, in at least float32."""

    def summed(trained: Variables, rows: Batch) -> tuple[jax.Array, LossSums]:
        sums = loss(join(trained, state.frozen), rows)
        return sums.loss, sums

    differentiate = jax.value_and_grad(summed, has_aux=True)

    def wide_gradients(rows: Batch) -> tuple[LossSums, Variables]:
        (_, sums), gradients = differentiate(state.trained, rows)
        return sums, jax.tree.map(
            lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), gradients
        )

    if num_micro_batches == 1:
        return wide_gradients(batch)

    def add(total: Any, rows: Batch) -> tuple[Any, None]:
        return _in_place(jax.tree.map(jnp.add, total, wide_gradients(rows)), state), None

    micro_batches = {name: _micro_batches(rows, num_micro_batches) for name, rows in batch.items()}
    shapes = jax.eval_shape(wide_gradients, jax.tree.map(lambda rows: rows[0], micro_batches))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, _in_place(zeros, state), micro_batches)
    return total


def _micro_batches(rows: jax.Array, number: int) -> jax.Array:
    """Rows `[B, ...]` as `[number, B / number, ...]`.

    Micro-batch i takes rows i, i + number, ...: each device then divides the rows it has, and none
    has to move.
    """
    assert rows.shape[0] % number == 0, f"{rows.shape[0]} rows in {number} micro-batches"
    return rows.reshape(-1, number, *rows.shape[1:]).swapaxes(0, 1)


def _in_place(total: tuple[LossSums, Variables], state: TrainState) -> tuple[LossSums, Variables]:
    """Gradient sums lie where their parameters do, so that none is ever held whole."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return total
    sums, gradients = total
    specs = jax.tree_util.tree_map_with_path(
        lambda path, _: sharding.parameter_spec(sharding.path_name(path)), state.trained
    )
    return sums, jax.lax.with_sharding_constraint(gradients, specs)


def _count(state: TrainState, *, is_empty: jax.Array, is_finite: jax.Array) -> Metrics:
    """The state's counters after a step; an empty batch ends no row of failures."""
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
