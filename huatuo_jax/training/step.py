"""An optimizer step as a stage runs it, and as a compiler takes it that has no devices."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from huatuo_jax import sharding
from huatuo_jax.training.optimizer import Optimizer
from huatuo_jax.training.programs import StageProgram
from huatuo_jax.training.state import TrainState
from huatuo_jax.training.update import LossFunction, compile_update, make_update


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


def make_step(
    loss: LossFunction,
    optimizer: Optimizer,
    state: TrainState,
    mesh: Mesh,
    *,
    num_micro_batches: int,
) -> Step:
    """The step of an abstract state; see `update.make_update` for the other arguments."""
    update = make_update(loss, optimizer, num_micro_batches=num_micro_batches)
    compiled = compile_update(update, state, mesh)
    return Step(loss, optimizer, state, compiled, num_micro_batches)


def update_program(
    stage: str, step: Step, batch: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> StageProgram:
    """The update of a stage as a program of its own.

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
    """Shapes and shardings of so many rows like this one."""
    place = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *array.shape), array.dtype, sharding=place)
        for name, array in row.items()
    }
