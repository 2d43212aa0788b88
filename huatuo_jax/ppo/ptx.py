"""The loss of supervised fine-tuning beside PPO's: PPO-ptx (InstructGPT, arXiv 2203.02155, eq. 2).

A policy that is trained for a reward alone forgets what the reward does not ask for. So each of its
optimizer steps takes rows of dialogues too, whose order is a function of the seed and the step.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.core import sharding
from huatuo_jax.core.sharding import OnMesh, batch_shards, put_whole
from huatuo_jax.data.batches import Row
from huatuo_jax.training.dialogue_data import DataConfig
from huatuo_jax.training.losses import next_tokens, sum_log_probs
from huatuo_jax.training.update import Batch, LossSums, Outputs, TrainState, Variables

NUMBERS_OF_ROWS = ("token_ids", "segment_ids", "positions", "mask")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PtxConfig:
    """The loss of fine-tuning that is added to the policy's.

    Attributes:
        data: the dialogues, mostly those of fine-tuning.
        coef: weight of their mean loss of a trained token, beside the policy's loss, which is a
            mean too. (The 27.8 of InstructGPT weighs a sum over other batches.)
        batch_size: rows of dialogues beside each optimizer step, on all devices together.
    """

    data: DataConfig
    coef: float = 0.1
    batch_size: int = 8

    def __post_init__(self) -> None:
        """Raises ValueError for a number out of its range."""
        if not 0 < self.coef < float("inf"):
            raise ValueError(f"coef={self.coef!r} must be above 0")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size!r} must be at least 1")

    def check(self, backbone: BackboneConfig, mesh: Mesh) -> None:
        """Raises ValueError where rows do not suit the model or the mesh."""
        name = "config.ppo.ptx"
        if self.data.row_length > backbone.max_positions:
            raise ValueError(
                f"{name}.data.row_length={self.data.row_length} must be at most the model's "
                f"{backbone.max_positions} positions"
            )
        if self.data.packed:
            backbone.require_fixed_angles(self.data.row_length, purpose="packing")
        shards = batch_shards(mesh)
        if self.batch_size % shards:
            raise ValueError(
                f"{name}.batch_size={self.batch_size} must be a multiple of the {shards} shards "
                "of the mesh"
            )


def ptx_row_loss(
    model: Transformer, *, chunk: int
) -> "functools.partial[tuple[LossSums, Outputs]]":
    """Makes the loss of fine-tuning for a pass, without outputs.

    Args:
        model: the policy's.
        chunk: positions of each row whose logits are held at once.
    """
    return functools.partial(_ptx_row_loss, model, chunk)


def _ptx_row_loss(
    model: Transformer, chunk: int, variables: Variables, batch: Batch, kl_coef: jax.Array
) -> tuple[LossSums, Outputs]:
    del kl_coef
    wanted_BT = next_tokens(batch["mask"])
    total, _ = sum_log_probs(model, variables, batch, batch["mask"], chunk=chunk)
    return LossSums(-total, wanted_BT.sum(), {}), {}


def added(
    sums: LossSums, gradients: Variables, ptx: LossSums, of_ptx: Variables, *, coef: float
) -> tuple[LossSums, Variables]:
    """Adds the loss of fine-tuning, so that both are means over terms of their own.

    What comes back is divided by the policy's terms alone, as before.

    Args:
        sums: of the policy's loss.
        gradients: of it.
        ptx: sums of the loss of fine-tuning.
        of_ptx: its gradients.
        coef: its weight.

    Returns:
        The sums, with `ptx_loss` and `ptx_tokens` (unweighted) among the others; and gradients.
    """
    terms = jnp.maximum(ptx.num_terms, 1)
    weight = coef * sums.num_terms.astype(ptx.loss.dtype) / terms.astype(ptx.loss.dtype)
    others = sums.others | {"ptx_loss": ptx.loss, "ptx_tokens": ptx.num_terms}
    whole = LossSums(sums.loss + weight * ptx.loss, sums.num_terms, others)
    return whole, jax.tree.map(
        lambda one, other: one + weight.astype(one.dtype) * other, gradients, of_ptx
    )


def compile_added(state: TrainState, mesh: Mesh, *, coef: float) -> OnMesh:
    """Compiles `added` under one `jax.jit`; both gradients are used up.

    Args:
        state: of the policy, or its abstract form.
        mesh: where it lies.
        coef: see `added`.
    """
    places = sharding.parameter_shardings(state.trained, mesh)
    prefix: Any = (jax.NamedSharding(mesh, jax.P()), places)
    compiled = jax.jit(
        functools.partial(added, coef=coef), out_shardings=prefix, donate_argnums=(1, 3)
    )
    return OnMesh(compiled, mesh)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ptx:
    """The rows and programs that add the loss of fine-tuning to a step.

    Attributes:
        read: a row of the endless order of rows by its number, with `trained_mask`.
        batch_size: rows of a step.
        run_pass: see `trainer.compile_pass`, of `ptx_row_loss`.
        add: see `compile_added`.
        mesh: where everything lies.
    """

    read: Callable[[int], Row]
    batch_size: int
    run_pass: OnMesh
    add: OnMesh
    mesh: Mesh

    def added(
        self, state: TrainState, sums: LossSums, gradients: Variables, *, step: int
    ) -> tuple[LossSums, Variables]:
        """Adds the loss of the rows of a planned step of the run, from 0, to the policy's."""
        rows = [self.read(step * self.batch_size + index) for index in range(self.batch_size)]
        batch = put_whole(laid(rows), self.mesh)
        found = self.run_pass(
            state.trained, state.frozen, batch, jnp.zeros((), jnp.float32), jnp.asarray(True)
        )
        whole: tuple[LossSums, Variables] = self.add(sums, gradients, found.sums, found.gradients)
        return whole


def laid(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Lays rows in a batch as a pass takes it."""
    names = ("token_ids", "segment_ids", "positions", "trained_mask")
    arrays = [np.stack([np.asarray(row[name]) for row in rows]) for name in names]
    return dict(zip(NUMBERS_OF_ROWS, arrays, strict=True))
