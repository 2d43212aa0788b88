"""One process of a tiny fine-tuning: `run_sft.py WORKDIR CACHE ROWS SECONDS_EACH FIELD=NUMBER ...`.

Before each step it writes the token ids of its rows to ROWS/PROCESS-STEP.npy and waits for
SECONDS_EACH. Fields are those of the mesh, and `num_steps`.
"""

import os

# The same arithmetic in every process.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_cpu_collective_call_terminate_timeout_seconds=1200"
)
os.environ["NPROC"] = "16"

import pathlib
import sys
import time

import jax
import numpy as np

from huatuo_jax.core import distributed
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.data import SAMPLE_FOLDER
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.sft import SftConfig, run_sft
from huatuo_jax.training import loop
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig
from huatuo_jax.training.initial_model import ModelConfig
from huatuo_jax.training.loop import INTERRUPTED_EXIT_CODE, Interrupted, LoopConfig
from huatuo_jax.training.optimizer import OptimizerConfig
from tests.multi_host.arguments import run
from tests.tiny import BACKBONE

SOURCE = "real_instruction"


def config(cache, *, num_steps, **mesh):
    settings = SftConfig(
        model=ModelConfig(tokenizer=str(SAMPLE_FOLDER / "tokenizer"), backbone=BACKBONE),
        data=DataConfig(
            sources=(
                SourceConfig(
                    name=SOURCE, paths=(str(SAMPLE_FOLDER / f"{SOURCE}.jsonl"),), kind=SOURCE
                ),
            ),
            row_length=256,
            held_out=HeldOutConfig(share=0.1),
            cache=str(cache),
            num_threads=0,
            num_processes=1,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-2, warmup_steps=2),
        num_steps=num_steps,
        batch_size=8,
        mesh=MeshConfig(**mesh),
        loop=LoopConfig(evaluate_every=4, checkpoint_every=4, log_every=1, tensorboard=False),
    )
    return settings


def record_rows(folder, seconds_each):
    put = loop.put_on_mesh
    step = 0

    def recording(batch, mesh):
        nonlocal step
        step += 1
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{jax.process_index()}-{step}.npy", batch["token_ids"])
        time.sleep(seconds_each)
        return put(batch, mesh)

    loop.put_on_mesh = recording


@distributed.joined()
def main(arguments):
    workdir, cache, rows, seconds_each, *fields = arguments
    record_rows(pathlib.Path(rows), float(seconds_each))
    numbers = {name: int(number) for name, number in (field.split("=") for field in fields)}
    try:
        run_sft(config(cache, **numbers), workdir)
    except Interrupted as stopped:
        print(stopped, flush=True)
        sys.exit(INTERRUPTED_EXIT_CODE)


if __name__ == "__main__":
    run(main)
