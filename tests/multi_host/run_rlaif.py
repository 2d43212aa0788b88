"""One process of the tiny recipe: `run_rlaif.py DATA WORKDIR`."""

import dataclasses
import pathlib
import sys

from huatuo_jax import command_line, multi_host
from huatuo_jax.generation.samples import SamplesConfig
from huatuo_jax.rlaif.recipe import run_rlaif
from huatuo_jax.training.preemption import INTERRUPTED_EXIT_CODE, Interrupted
from tests.rlaif.tiny import tiny_recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    data: str
    workdir: str


@multi_host.joined()
def main(flags):
    data, workdir = map(pathlib.Path, (flags.data, flags.workdir))
    try:
        cfg = tiny_recipe(data)
        samples = SamplesConfig(num_prompts=2, max_new_tokens=8)
        run_rlaif(
            dataclasses.replace(cfg, sft=dataclasses.replace(cfg.sft, samples=samples)), workdir
        )
    except Interrupted as stopped:
        print(stopped, flush=True)
        sys.exit(INTERRUPTED_EXIT_CODE)


if __name__ == "__main__":
    data, workdir = sys.argv[1:]
    arguments = [f"--data={data}", f"--workdir={workdir}"]
    command_line.run(main, Flags, arguments=arguments)
