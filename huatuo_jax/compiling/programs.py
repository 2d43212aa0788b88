"""A program of a stage: a jitted function as the stage makes it, and the shapes it is given."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.sharding import path_name
from huatuo_jax.training.programs import StageProgram

Devices = Sequence[jax.Device]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program(StageProgram):
    """A program, and what its work is measured by.

    Attributes:
        does: a call, in words.
        backbone: of its model.
        tokens: that a call works on.
        model_flops: what the mathematics asks of a call, on all devices together.
    """

    does: str
    backbone: BackboneConfig
    tokens: int
    model_flops: float

    @classmethod
    def of(cls, program: StageProgram, **measured: Any) -> "Program":
        """A stage's program with the other attributes."""
        given = {one.name: getattr(program, one.name) for one in dataclasses.fields(StageProgram)}
        return cls(**given, **measured)

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
