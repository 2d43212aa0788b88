"""Compiles a config's programs for TPUs or GPUs without one, and sweeps settings of its stages.

Compiling shows if each program fits in memory, and how fast it can be at best. A sweep tries
micro-batches and rematerialisation: which fit, and which allow the highest speed.
"""

import dataclasses
import importlib.metadata
import json
import math
import pathlib
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from huatuo_jax.backbone.config import Remat
from huatuo_jax.compiling import report
from huatuo_jax.compiling.hardware import Slice, open_slice, prepare_environment
from huatuo_jax.compiling.programs import Program, TrainingConfig, programs_of
from huatuo_jax.compiling.report import Analysis, Misfit, compile_program
from huatuo_jax.core import sharding
from huatuo_jax.core.config import replaced
from huatuo_jax.core.files import as_path, write_file
from huatuo_jax.recipe.config import RlaifConfig, StagesConfig
from huatuo_jax.training.micro_batch import advice, largest_that_fits, micro_batch_sizes, usable
from huatuo_jax.training.programs import GIB

# From the least computation to the least memory.
REMAT: tuple[Remat, ...] = ("none", "outputs", "dots", "full")

_SWEPT = ("update", "policy_pass")  # The program of a stage with the most activations.
_PACKAGES = ("jax", "jaxlib", "flax", "optax")
_ROOMY = "v5p"  # Has much memory, to list the values of a program that does not fit elsewhere.

ASSUMES = (
    "rows are full and of one segment, and all of their tokens are scored; in the roofline "
    "computation, memory and interconnect overlap entirely, each at its published peak"
)


class Choice(NamedTuple):
    """Settings of a stage, and the result of compiling it with them.

    Attributes:
        micro_batch_size: rows of a micro-batch, on all devices together.
        remat: see `backbone.config.ComputeConfig`.
        result: of the stage's program.
    """

    micro_batch_size: int
    remat: Remat
    result: Analysis | Misfit

    @property
    def step_s(self) -> float:
        """Returns the shortest possible seconds of a step; infinite if it does not fit."""
        if isinstance(self.result, Misfit) or not self.result.fits:
            return math.inf
        return self.result.roofline.bound_s

    def fields(self) -> dict[str, Any]:
        """Returns the choice as JSON."""
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
        """Returns the choice as a line of text."""
        settings = f"micro_batch_size={self.micro_batch_size:<5} remat={self.remat:<8}"
        if isinstance(self.result, Misfit):
            return f"  {settings} does NOT fit: {self.result.message}"
        bound, memory = self.result.roofline, self.result.memory
        return (
            f"  {settings} {memory.total / GIB:.2f} GiB"
            f"{'' if self.result.fits else ', does NOT fit'}, at best {bound.bound_s:.3g} s a "
            f"step ({bound.binds} binds, utilisation {report.share(bound.utilisation)})"
        )


def sweep(
    programs: Callable[[int | None, Remat | None], list[Program]],
    compiled: Callable[[Program], Analysis | Misfit],
    tell: Callable[[str], None],
) -> list[Choice]:
    """Tries a stage's settings, skipping those larger than one that does not fit.

    Args:
        programs: makes the stage's programs for a micro-batch and a rematerialisation; None for its
            own.
        compiled: compiles a program.
        tell: called with a line for each.
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
    """Yields micro-batches that divide a step's rows, of 1, 2, 4 and so on for each device."""
    per_device = 1
    while shards * per_device <= rows:
        if rows % (shards * per_device) == 0:
            yield shards * per_device
        per_device *= 2


def recommended(found: Iterable[Choice]) -> Choice | None:
    """Returns the fastest fitting choice, of equals the one with the least memory, or None."""
    fitting = [choice for choice in found if choice.result.fits]

    def rank(choice: Choice) -> tuple[float, int]:
        assert isinstance(choice.result, Analysis)
        return choice.step_s, choice.result.memory.total

    return min(fitting, key=rank, default=None)


def with_settings(
    config: TrainingConfig, stage: str, micro_batch_size: int | None, remat: Remat | None
) -> TrainingConfig:
    """Returns the config with these settings of a stage; None leaves one unchanged."""
    changes: dict[str, object] = {}
    if micro_batch_size is not None:
        changes[f"{stage}.micro_batch_size"] = micro_batch_size
    if remat is not None:
        changes[f"{stage}.compute.remat"] = remat
    return replaced(config, changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """The devices and the stages to compile for.

    Attributes:
        topology: of the slice.
        num_slices: number of slices.
        stages: some of the config's; none for all.
        preset: the architecture of models that no stage makes; None reads their configs.
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
        cfg: the devices and the stages.
        tell: called with lines of text as soon as a program is compiled.

    Returns:
        All figures, as JSON; `fits` is true if every program fits.

    Raises:
        ValueError: an invalid topology or config, or its compiler is not installed.
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
        cfg: the devices and the stages.
        tell: called with lines of text.

    Returns:
        The choices tried and the recommended ones, as JSON; `fits` is true if every stage has
        settings that fit.

    Raises:
        ValueError: an invalid topology or config, or its compiler is not installed.
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
    """Writes the figures of `compile_config`."""
    write_file(as_path(path), json.dumps(figures, ensure_ascii=False, indent=2) + "\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(CompileConfig):
    """Compiles a config for TPUs or GPUs without one: memory, FLOPs and the highest possible speed.

    Uses shapes alone: no weight and no data is read. Needs the extra of the hardware, but no such
    hardware: pip install 'huatuo_jax[tpu]' or 'huatuo_jax[cuda]'. Exit code 1: something does not
    fit; the output then names the fields that would help.

    Attributes:
        topology: chip and slice, as v5e:8x8; or GPUs of a host, h100:8.
        num_slices: slices or hosts, joined by their network.
        stages: some of the config's stages; none for all that train.
        preset: architecture in place of a model's directory.
        output: JSON file of all figures.
        sweep: try micro-batches and remat, and recommend the best.
    """

    output: str | None = None
    sweep: bool = False


def main(flags: Flags, config: StagesConfig | RlaifConfig) -> None:
    """Compiles, prints and writes the figures."""
    compiled = sweep_config if flags.sweep else compile_config
    figures = compiled(config, flags, lambda line: print(line, flush=True))
    if flags.output is not None:
        write_json(flags.output, figures)
        print(f"written: {flags.output}")
    sys.exit(0 if figures["fits"] else 1)


def _swept(programs: list[Program]) -> Program:
    return next(one for one in programs if one.name.split("/")[1] in _SWEPT)


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
    """Returns the config with `micro_batch_size=auto` resolved as a run on the slice would.

    Where nothing fits it is the smallest, whose program then shows what is too large.

    Returns:
        The config, and the results of the programs compiled for it, by the program's name.
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
            + ("which do not fit either" if found is None else "as a run here would take")
        )
        settled |= trial.results[size]
        config = with_settings(config, stage, size, None)
    return config, settled


@dataclasses.dataclass(frozen=True)
class _Trial:
    """Compiles a stage with different micro-batches.

    Attributes:
        config: with the stage.
        cfg: names this stage alone.
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
    """Returns the result, with advice where it does not fit."""
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
    """Returns three factors of a power of two, as equal as possible, in the order of v5p slices.

    The largest comes last, but ones come after the others: 2x2x4 and 2x2x1.
    """
    power = math.log2(size)
    first, second = 2 ** int(power // 3), 2 ** int((power + 1) // 3)
    factors = (first, second, size // (first * second))
    return tuple(sorted(factors, reverse=1 in factors))
