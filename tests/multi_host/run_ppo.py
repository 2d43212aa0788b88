"""One process of PPO on the tiny world: `run_ppo.py WORKDIR SECONDS_EACH FIELD=NUMBER ...`.

Each rollout waits for SECONDS_EACH. Fields are those of the mesh; with `rollout_` before their
names, of the mesh that answers are generated on.
"""

import sys
import time

from huatuo_jax.core import distributed
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.training.loop import INTERRUPTED_EXIT_CODE, Interrupted
from tests.multi_host.arguments import run
from tests.ppo.tiny import Table, config, run_tiny, table

NUM_ITERATIONS = 6
NUM_ANSWERS = 8
ROLLOUT = "rollout_"


class SlowTable(Table):
    """Gives a killer time to come."""

    seconds_each = 0.0

    def scores(self, answers):
        time.sleep(self.seconds_each)
        return super().scores(answers)


@distributed.joined()
def main(arguments):
    workdir, seconds_each, *fields = arguments
    sizes = {name: int(size) for name, size in (one.split("=") for one in fields)}
    of_rollout = {name: size for name, size in sizes.items() if name.startswith(ROLLOUT)}
    mesh = MeshConfig(**{name: sizes[name] for name in sizes.keys() - of_rollout.keys()})
    other = {name.removeprefix(ROLLOUT): size for name, size in of_rollout.items()}
    scorer = SlowTable(table(longest=3).rewards)
    scorer.seconds_each = float(seconds_each)
    settings = config(
        num_iterations=NUM_ITERATIONS,
        rollout={"num_prompts": NUM_ANSWERS, "mesh": MeshConfig(**other) if other else None},
        target_kl_per_sequence=0.05,
        score={"scale": "running"},
        loop={"checkpoint_every": 2, "samples_per_iteration": NUM_ANSWERS},
    )
    try:
        run_tiny(settings, workdir, scorer=scorer, mesh=mesh.make())
    except Interrupted as stopped:
        print(stopped, flush=True)
        sys.exit(INTERRUPTED_EXIT_CODE)


if __name__ == "__main__":
    run(main)
