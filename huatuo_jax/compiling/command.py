"""Compiling a config for a slice that is not there: programs in, figures out."""

import dataclasses
import importlib.metadata
import json
import math
import pathlib
import resource
from collections.abc import Callable, Sequence
from typing import Any

import jax

from huatuo_jax.atomic import write_file
from huatuo_jax.backbone.config import Remat
from huatuo_jax.compiling import report
from huatuo_jax.compiling.analysis import Analysis, Misfit, compile_program
from huatuo_jax.compiling.programs import Program
from huatuo_jax.compiling.stages import TrainingConfig, programs_of
from huatuo_jax.compiling.sweep import recommended, sweep, with_settings
from huatuo_jax.compiling.topology import Slice, open_slice, prepare_environment
from huatuo_jax.training.advice import advice
from huatuo_jax.training.micro_batch import largest_that_fits, micro_batch_sizes, usable

_PACKAGES = ("jax", "jaxlib", "flax", "optax")
_ROOMY = "v5p"  # A chip of much memory, to list the values of what does not fit elsewhere.

ASSUMES = (
    "rows are full and of one segment, and all of their tokens are scored; the roofline lets "
    "computing, memory and interconnect overlap entirely, each at its published peak"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """What is compiled.

    Attributes:
        topology: of the slice.
        num_slices: of them.
        stages: some of the config's; none for all.
        preset: the architecture of models that no stage makes; None looks at their configs.
    """

    topology: str
    num_slices: int = 1
    stages: tuple[str, ...] = ()
    preset: str | None = None


def compile_config(
    config: TrainingConfig, cfg: CompileConfig, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Compiles the programs of a config's stages.

    Args:
        config: as `launch/train.py` takes it.
        cfg: for what.
        tell: given lines for a reader, as soon as a program is compiled.

    Returns:
        All figures, as JSON; `fits` says whether every program does.

    Raises:
        ValueError: a topology or a config that cannot be, or its compiler is not installed.
    """
    prepare_environment()
    of = open_slice(cfg.topology, num_slices=cfg.num_slices)
    config, compiled = _settled(config, cfg, of, tell)
    found = []
    for program in _programs(config, cfg, of.devices):
        result = compiled.get(program.name) or compile_program(program, of)
        result = _with_advice(result, config, cfg, of)
        for line in report.lines(result):
            tell(line)
        found.append(result)
    return {
        **_heading(of),
        "fits": all(result.fits for result in found),
        "host_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "programs": [report.fields(result) for result in found],
    }


def sweep_config(
    config: TrainingConfig, cfg: CompileConfig, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Tries micro-batches and rematerialisation for each stage of a config.

    Args:
        config: as `launch/train.py` takes it.
        cfg: for what.
        tell: given lines for a reader.

    Returns:
        What was tried and what is recommended, as JSON; `fits` says whether every stage has
        settings that fit.

    Raises:
        ValueError: a topology or a config that cannot be, or its compiler is not installed.
    """
    prepare_environment()
    of = open_slice(cfg.topology, num_slices=cfg.num_slices)
    stages = dict.fromkeys(program.stage for program in _programs(config, cfg, of.devices))
    found = {}
    for stage in stages:
        tell(f"{stage}:")
        one_stage = dataclasses.replace(cfg, stages=(stage,))

        def programs(
            micro_batch: int | None,
            remat: Remat | None,
            stage: str = stage,
            one_stage: CompileConfig = one_stage,
        ) -> list[Program]:
            changed = with_settings(config, stage, micro_batch, remat)
            return _programs(changed, one_stage, of.devices)

        tried = sweep(programs, lambda program: compile_program(program, of), tell)
        best = recommended(tried)
        tell(f"  recommended: {'none fits' if best is None else best.line().strip()}")
        found[stage] = {
            "tried": [choice.fields() for choice in tried],
            "recommended": None if best is None else best.fields(),
        }
    return {
        **_heading(of),
        "fits": all(one["recommended"] is not None for one in found.values()),
        "sweep": found,
    }


def write_json(path: str | pathlib.Path, figures: dict[str, Any]) -> None:
    """Writes what `compile_config` found."""
    write_file(pathlib.Path(path), json.dumps(figures, ensure_ascii=False, indent=2) + "\n")


def _heading(of: Slice) -> dict[str, Any]:
    return {
        "slice": report.slice_fields(of),
        "versions": {
            name: importlib.metadata.version(name) for name in (*_PACKAGES, *of.compilers)
        },
        "assumes": ASSUMES,
    }


def _programs(
    config: TrainingConfig, cfg: CompileConfig, devices: Sequence[jax.Device]
) -> list[Program]:
    return programs_of(config, devices, stages=cfg.stages, architecture=cfg.preset)


def _settled(
    config: TrainingConfig, cfg: CompileConfig, of: Slice, tell: Callable[[str], None]
) -> tuple[TrainingConfig, dict[str, Analysis | Misfit]]:
    """The config with what a run on the slice takes where `micro_batch_size` is `auto`.

    Where nothing fits it is the smallest, whose program then shows what is too large.

    Returns:
        The config, and what was compiled of it meanwhile, by the program's name.
    """
    settled: dict[str, Analysis | Misfit] = {}
    firsts = {one.stage: one for one in _programs(config, cfg, of.devices) if one.in_micro_batches}
    for stage, first in firsts.items():
        if getattr(config, stage).micro_batch_size != "auto":
            continue
        trial = _Trial(config, dataclasses.replace(cfg, stages=(stage,)), of)
        sizes = micro_batch_sizes(first.rows, first.mesh)
        found = largest_that_fits(sizes, trial.fits)
        size = sizes[-1] if found is None else found
        tell(
            f"{stage}: micro_batch_size=auto: {size} of {first.rows} rows at once, "
            + ("and not even so many fit" if found is None else "as a run here would take")
        )
        settled |= trial.results[size]
        config = with_settings(config, stage, size, None)
    return config, settled


@dataclasses.dataclass(frozen=True)
class _Trial:
    """Compiles a stage with one micro-batch and another.

    Attributes:
        config: with the stage.
        cfg: that asks for it alone.
        of: the slice.
        results: by micro-batch and program.
    """

    config: TrainingConfig
    cfg: CompileConfig
    of: Slice
    results: dict[int, dict[str, Analysis | Misfit]] = dataclasses.field(default_factory=dict)

    def fits(self, size: int) -> bool:
        found = self.results[size] = {}
        config = with_settings(self.config, self.cfg.stages[0], size, None)
        for program in _programs(config, self.cfg, self.of.devices):
            if not program.in_micro_batches:
                continue
            result = found[program.name] = compile_program(program, self.of)
            if isinstance(result, Misfit) or result.memory.total > usable(result.memory.capacity):
                return False
        return True


def _with_advice(
    result: Analysis | Misfit, config: TrainingConfig, cfg: CompileConfig, of: Slice
) -> Analysis | Misfit:
    """The result, with what would help where it does not fit."""
    if result.fits:
        return result
    program = result.program
    lines = advice(program, getattr(config, program.stage), capacity=of.chip.usable_memory)
    if isinstance(result, Analysis) or of.chip.switched:
        return dataclasses.replace(result, advice=lines)
    roomy = open_slice(f"{_ROOMY}:{'x'.join(map(str, _cube(len(of.devices))))}")
    twins = _programs(config, cfg, roomy.devices)
    twin = next(one for one in twins if one.name == program.name)
    listed = compile_program(twin, roomy)
    if isinstance(listed, Misfit):
        return dataclasses.replace(result, advice=lines)
    return dataclasses.replace(
        result,
        advice=lines,
        values=listed.values,
        listed_on=f" (as compiled for {roomy.name}, which has the memory)",
    )


def _cube(size: int) -> tuple[int, int, int]:
    """Three factors of a power of two as near to each other as can be, in the order of v5p slices.

    The largest is the last, but ones come after the others: 2x2x4 and 2x2x1.
    """
    power = math.log2(size)
    first, second = 2 ** int(power // 3), 2 ** int((power + 1) // 3)
    factors = (first, second, size // (first * second))
    return tuple(sorted(factors, reverse=1 in factors))
