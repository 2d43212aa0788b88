"""Compile a config for TPUs or GPUs without one: does it fit, and how fast can it be at best?"""

import dataclasses
import sys

from huatuo_jax.compiling.command import CompileConfig, compile_config, sweep_config, write_json
from huatuo_jax.rlaif.config import RlaifConfig
from huatuo_jax.stages import StagesConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Compile a config for TPUs or GPUs without one: does it fit, and how fast can it be at best?

    From shapes alone: no weight and no data is read. Needs the extra of the hardware, and none of
    it: pip install 'huatuo_jax[tpu]' or 'huatuo_jax[cuda]'. Exit code 1: something does not fit;
    the fields that would help are named then.

    Attributes:
        topology: chip and slice, as v5e:8x8; or GPUs of a host, h100:8.
        num_slices: slices or hosts, joined by their network.
        stages: some of the config's stages; none for all that train.
        preset: architecture in place of a model's directory.
        output: JSON file of all figures.
        sweep: try micro-batches and remat, and recommend some.
    """

    topology: str
    num_slices: int = 1
    stages: tuple[str, ...] = ()
    preset: str | None = None
    output: str | None = None
    sweep: bool = False


def main(flags: Flags, config: StagesConfig | RlaifConfig) -> None:
    """Compile, print, write."""
    cfg = CompileConfig(
        topology=flags.topology,
        num_slices=flags.num_slices,
        stages=flags.stages,
        preset=flags.preset,
    )
    compiled = sweep_config if flags.sweep else compile_config
    figures = compiled(config, cfg, lambda line: print(line, flush=True))
    if flags.output is not None:
        write_json(flags.output, figures)
        print(f"written: {flags.output}")
    sys.exit(0 if figures["fits"] else 1)
