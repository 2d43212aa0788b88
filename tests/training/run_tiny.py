"""A process that trains the tiny model, to be killed: `run_tiny.py WORKDIR SECONDS_PER_BATCH`."""

import os
import sys

# The same arithmetic in every process, on one device.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = ""

from huatuo_jax.training.loop import INTERRUPTED_EXIT_CODE, Interrupted, LoopConfig
from tests.training.tiny import run_tiny

if __name__ == "__main__":
    if "://" in sys.argv[1]:
        from tests.bucket_server import repeat_at_once

        repeat_at_once()
    try:
        run_tiny(
            sys.argv[1],
            num_steps=44,
            seconds_each=float(sys.argv[2]),
            loop=LoopConfig(evaluate_every=5, checkpoint_every=4, tensorboard=False),
        )
    except Interrupted as stopped:
        print(stopped)
        sys.exit(INTERRUPTED_EXIT_CODE)
