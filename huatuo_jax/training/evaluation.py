"""Held-out data through a model: sums over all of it, then numbers."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from huatuo_jax import sharding
from huatuo_jax.training.loop import LocalBatch, put_on_mesh
from huatuo_jax.training.state import TrainState, Variables
from huatuo_jax.training.update import Batch

Sums = Mapping[str, np.ndarray]


def make_evaluate(
    sums: Callable[[Variables, Batch], dict[str, jax.Array]],
    batches: Callable[[], Iterable[LocalBatch]],
    report: Callable[[Sums], dict[str, float]],
    mesh: Mesh,
) -> Callable[[TrainState], dict[str, float]]:
    """The function that evaluates a state; see `make_measure`."""
    measure = make_measure(sums, batches, report, mesh)
    return lambda state: measure(state.variables)


def make_measure(
    sums: Callable[[Variables, Batch], dict[str, jax.Array]],
    batches: Callable[[], Iterable[LocalBatch]],
    report: Callable[[Sums], dict[str, float]],
    mesh: Mesh,
) -> Callable[[Variables], dict[str, float]]:
    """The function that evaluates a model's variables.

    Args:
        sums: pure; sums over a batch.
        batches: all of the held-out data, once, from its beginning.
        report: makes numbers of the sums over all batches, which are taken in float64.
        mesh: where variables and batches lie.
    """
    compiled = jax.jit(sums, out_shardings=jax.NamedSharding(mesh, jax.P()))

    def measure(variables: Variables) -> dict[str, float]:
        totals: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((), np.float64))
        with jax.set_mesh(mesh):
            for batch in batches():
                on_devices = compiled(variables, put_on_mesh(batch, mesh))
                for name, value in on_devices.items():
                    totals[name] = totals[name] + np.asarray(value, np.float64)
        return report(totals)

    return measure


def check_rows(rows: int, *, name: str, mesh: Mesh) -> None:
    """Raise ValueError unless the mesh can divide so many rows evenly."""
    shards = sharding.batch_shards(mesh)
    if rows < 1 or rows % shards:
        axes = " x ".join(sharding.BATCH_AXES)
        raise ValueError(
            f"{name}={rows} rows must be a multiple of the {shards} shards of the mesh ({axes})"
        )
