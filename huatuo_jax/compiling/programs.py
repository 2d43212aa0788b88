"""A program of a stage: a jitted function as the stage makes it, and the shapes it is given."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.sharding import OnMesh, path_name

Devices = Sequence[jax.Device]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One of them.

    Attributes:
        name: `STAGE/FUNCTION`.
        does: a call, in words.
        function: jitted.
        arguments: abstract, with shardings.
        beside: other abstract arrays that the stage holds meanwhile.
        mesh: of the devices.
        backbone: of its model.
        rows: of a call.
        rows_at_once: of them, that go through the model together.
        tokens: that a call works on.
        model_flops: what the mathematics asks of a call, on all devices together.
        attends: whether rows attend to themselves in it, by the attention kernel.
    """

    name: str
    does: str
    function: OnMesh
    arguments: tuple[Any, ...]
    beside: Any = ()
    mesh: Mesh
    backbone: BackboneConfig
    rows: int
    rows_at_once: int
    tokens: int
    model_flops: float
    attends: bool = True

    @property
    def stage(self) -> str:
        """The section of the config that it belongs to."""
        return self.name.split("/")[0]

    def lower(self) -> jax.stages.Lowered:
        """Trace it."""
        return self.function.lower(*self.arguments)

    @property
    def stacked_shapes(self) -> set[tuple[int, ...]]:
        """Shapes of the arguments that hold the parameters of all layers."""
        leaves = jax.tree_util.tree_leaves_with_path(self.arguments)
        return {
            leaf.shape
            for path, leaf in leaves
            if "/layers/" in path_name(path) and leaf.shape[:1] == (self.backbone.num_layers,)
        }


def attended_pairs(cfg: BackboneConfig, *, rows: int, length: int) -> float:
    """Pairs of query and key in rows that are full and of one segment."""
    window = min(cfg.sliding_window or length, length)
    return rows * (window * (window + 1) / 2 + (length - window) * window)
