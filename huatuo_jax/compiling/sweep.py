"""Other micro-batches and rematerialisation for a stage: which fit, and which allows the most."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from huatuo_jax import sharding
from huatuo_jax.backbone.config import Remat
from huatuo_jax.compiling import units
from huatuo_jax.compiling.analysis import Analysis, Misfit
from huatuo_jax.compiling.programs import Program
from huatuo_jax.compiling.stages import TrainingConfig
from huatuo_jax.config import replaced
from huatuo_jax.training.programs import GIB

# From what computes least to what holds least.
REMAT: tuple[Remat, ...] = ("none", "outputs", "dots", "full")

_SWEPT = ("update", "policy_pass")  # The program of a stage that holds most activations.


class Choice(NamedTuple):
    """Settings of a stage, and what came of compiling it with them.

    Attributes:
        micro_batch_size: rows at once, on all devices together.
        remat: see `backbone.config.ComputeConfig`.
        result: of the stage's program.
    """

    micro_batch_size: int
    remat: Remat
    result: Analysis | Misfit

    @property
    def step_s(self) -> float:
        """A step at best; endless where it does not fit."""
        if isinstance(self.result, Misfit) or not self.result.fits:
            return math.inf
        return self.result.roofline.bound_s

    def fields(self) -> dict[str, Any]:
        """As JSON."""
        fields = {"micro_batch_size": self.micro_batch_size, "remat": self.remat}
        if isinstance(self.result, Misfit):
            return {**fields, "fits": False, "compiler_says": self.result.message}
        bound, memory = self.result.roofline, self.result.memory
        return {
            **fields,
            "fits": self.result.fits,
            "total_bytes_per_device": memory.total,
            "step_s": bound.bound_s,
            "binds": bound.binds,
            "utilisation": bound.utilisation,
        }

    def line(self) -> str:
        """For a reader."""
        settings = f"micro_batch_size={self.micro_batch_size:<5} remat={self.remat:<8}"
        if isinstance(self.result, Misfit):
            return f"  {settings} does NOT fit: {self.result.message}"
        bound, memory = self.result.roofline, self.result.memory
        return (
            f"  {settings} {memory.total / GIB:.2f} GiB"
            f"{'' if self.result.fits else ', does NOT fit'}, at best {bound.bound_s:.3g} s a "
            f"step ({bound.binds} binds, utilisation {units.share(bound.utilisation)})"
        )


def sweep(
    programs: Callable[[int | None, Remat | None], list[Program]],
    compiled: Callable[[Program], Analysis | Misfit],
    tell: Callable[[str], None],
) -> list[Choice]:
    """Tries a stage's settings; what is larger than something that does not fit is left out.

    Args:
        programs: of the stage with a micro-batch and a rematerialisation; None for its own.
        compiled: a program.
        tell: given a line for each.
    """
    first = _swept(programs(None, None))
    rows, shards = first.rows, sharding.batch_shards(first.mesh)
    found = []
    for remat in REMAT:
        for micro_batch in micro_batches(rows, shards):
            choice = Choice(micro_batch, remat, compiled(_swept(programs(micro_batch, remat))))
            tell(choice.line())
            found.append(choice)
            if not choice.result.fits:
                break
    return found


def micro_batches(rows: int, shards: int) -> Iterator[int]:
    """Rows at once that divide a step's: each device has 1, 2, 4 and so on of them."""
    per_device = 1
    while shards * per_device <= rows:
        if rows % (shards * per_device) == 0:
            yield shards * per_device
        per_device *= 2


def recommended(found: Iterable[Choice]) -> Choice | None:
    """The fastest at best; of equals the one that holds least. None where none fits."""
    fitting = [choice for choice in found if choice.result.fits]

    def rank(choice: Choice) -> tuple[float, int]:
        assert isinstance(choice.result, Analysis)
        return choice.step_s, choice.result.memory.total

    return min(fitting, key=rank, default=None)


def with_settings(
    config: TrainingConfig, stage: str, micro_batch_size: int | None, remat: Remat | None
) -> TrainingConfig:
    """The config with these settings of a stage; None leaves one as it is."""
    changes: dict[str, object] = {}
    if micro_batch_size is not None:
        changes[f"{stage}.micro_batch_size"] = micro_batch_size
    if remat is not None:
        changes[f"{stage}.compute.remat"] = remat
    return replaced(config, changes)


def _swept(programs: list[Program]) -> Program:
    return next(one for one in programs if one.name.split("/")[1] in _SWEPT)
