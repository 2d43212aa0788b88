"""The whole recipe on Qwen3-0.6B: on one small device, or on a Kaggle TPU.

    python launch/train.py --config=configs/qwen3_0_6b.py --workdir=runs/qwen3_0_6b
    python launch/train.py --config=configs/qwen3_0_6b.py:v5e-8 --workdir=runs/qwen3_0_6b

Hardware: without an argument one device, a Colab TPU (v5e, 16 GB) or a GPU of 24 GB, with adapters
of rank 64 and the weights in 16 bits; with `v5e-8` a Kaggle TPU of eight chips, with all weights
trained. Where a device has more memory, `--config.ppo.rollout.slots`, `--config.answers.slots` and
`--config.evaluation.slots` decode more answers at once, and `--config.sft.micro_batch_size` and
`--config.ppo.micro_batch_size` take more rows. What a device holds, without one:

    python launch/compile.py --config=configs/qwen3_0_6b.py --topology=v5e:1x1
    python launch/compile.py --config=configs/qwen3_0_6b.py --topology=l4:1
    python launch/compile.py --config=configs/qwen3_0_6b.py:v5e-8 --topology=v5e:2x4

Data, prompts and judge: the clinic's, as in `configs/rlaif.py`: no key, and no download but the
model's. `--config.data=FILES` takes dialogues of your own, or
`--config.data=FreedomIntelligence/HuatuoGPT-sft-data-v1` the published ones; then a judge of your
own by `--config.judge.base_url=URL --config.judge.model=NAME`.
Chat template: ChatML. Qwen3's own puts an empty block of thoughts before the last answer alone, so
that conversations cannot be trained in it.
Settings: those of the size in `huatuo_jax/recipe/base_model.py`. PPO takes 200 iterations of 128
prompts; `--config.ppo.num_iterations=20` is a trial of it.
"""

from huatuo_jax.core.config import load_card
from huatuo_jax.recipe.base_model import Hardware, on_hardware
from huatuo_jax.recipe.config import RlaifConfig

SETTINGS = {
    "one": Hardware(trained="adapters", rows_at_once=4, reward_rows_at_once=1, slots=16),
    "v5e-8": Hardware(trained="weights", rows_at_once=16, reward_rows_at_once=8, slots=64),
}


def get_config(hardware: str = "one") -> RlaifConfig:
    """Returns all stages and their settings; the module describes the argument."""
    return on_hardware(
        load_card("rlaif"),
        "Qwen/Qwen3-0.6B",
        template="chatml",
        hardware=hardware,
        settings=SETTINGS,
    )
