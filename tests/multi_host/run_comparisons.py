"""One process of the tiny stages on comparisons: `run_comparisons.py WORKDIR FILE FIELD=NUMBER`.

Fields, any number of them, are those of the mesh.
"""

from huatuo_jax.core import distributed
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.dpo import DpoConfig, run_dpo
from huatuo_jax.preferences.data import ComparisonsConfig, ComparisonSource
from huatuo_jax.reward.config import RewardConfig
from huatuo_jax.reward.stage import run_reward
from huatuo_jax.training.initial_model import ModelConfig
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.optimizer import OptimizerConfig
from tests.multi_host.arguments import run
from tests.preferences.tiny import BACKBONE
from tests.tiny import TOKENIZER

NUM_STEPS = 4


def settings(config, file, **mesh):
    return config(
        model=ModelConfig(backbone=BACKBONE, tokenizer=TOKENIZER),
        data=ComparisonsConfig(
            sources=(ComparisonSource(paths=(file,)),),
            max_length=96,
            row_length=192,
            held_out=HeldOutConfig(share=0.2),
        ),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2, weight_decay=0.0),
        num_steps=NUM_STEPS,
        batch_size=4,
        mesh=MeshConfig(**mesh),
        loop=LoopConfig(evaluate_every=2, checkpoint_every=2, tensorboard=False),
    )


@distributed.joined()
def main(arguments):
    workdir, file, *fields = arguments
    mesh = {name: int(number) for name, number in (field.split("=") for field in fields)}
    run_reward(settings(RewardConfig, file, **mesh), workdir)
    run_dpo(settings(DpoConfig, file, **mesh), workdir)


if __name__ == "__main__":
    run(main)
