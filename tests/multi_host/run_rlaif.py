"""One process of the tiny recipe: `run_rlaif.py DATA WORKDIR`."""

import dataclasses
import pathlib
import sys

from huatuo_jax.core import distributed
from huatuo_jax.generation.samples import SamplesConfig
from huatuo_jax.recipe.recipe import run_rlaif
from huatuo_jax.training.loop import INTERRUPTED_EXIT_CODE, Interrupted
from tests.multi_host.arguments import run
from tests.recipe.tiny import tiny_recipe


@distributed.joined()
def main(arguments):
    data, workdir = map(pathlib.Path, arguments)
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
    run(main)
