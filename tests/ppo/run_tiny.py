"""A process that runs PPO on the tiny world, to be killed: `run_tiny.py WORKDIR SECONDS_EACH`."""

import os
import sys

# The same arithmetic in every process, on one device.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

import time

from huatuo_jax.training.loop import INTERRUPTED_EXIT_CODE, Interrupted
from tests.ppo.tiny import NUM_ITERATIONS, Table, config, run_tiny, table


class SlowTable(Table):
    """Gives a killer time to come."""

    seconds_each = 0.0

    def scores(self, answers):
        time.sleep(self.seconds_each)
        return super().scores(answers)


if __name__ == "__main__":
    scorer = SlowTable(table(longest=3).rewards)
    scorer.seconds_each = float(sys.argv[2])
    settings = config(
        num_iterations=NUM_ITERATIONS,
        target_kl_per_sequence=0.05,
        score={"scale": "running"},
        value={"warmup_iterations": 2},
        stop_at_kl=1e-3,
        loop={"checkpoint_every": 3},
    )
    try:
        run_tiny(settings, sys.argv[1], scorer=scorer)
    except Interrupted as stopped:
        print(stopped)
        sys.exit(INTERRUPTED_EXIT_CODE)
