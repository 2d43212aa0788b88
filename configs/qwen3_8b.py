"""The whole recipe on Qwen3-8B, on a TPU slice v5e-64 or a host of 8 H100s.

    python launch/train.py --config=configs/qwen3_8b.py --workdir=runs/qwen3_8b \
        --config.judge.model=JUDGE

Base model: Qwen3-8B; `--config.sft.model.directory=DIR` takes it from a folder. Data, judge and
settings: see `configs/huatuogpt_7b.py`.
Chat template: ChatML. Qwen3's own puts an empty block of thoughts before the last answer alone, so
that conversations cannot be trained in it.
Hardware: a TPU slice v5e-64 or a host of 8 H100s. What a device holds, without one:

    python launch/compile.py --config=configs/qwen3_8b.py --topology=v5e:8x8
    python launch/compile.py --config=configs/qwen3_8b.py --topology=h100:8
"""

from huatuo_jax.recipe.config import RlaifConfig
from huatuo_jax.recipe.paper import paper_recipe


def get_config() -> RlaifConfig:
    """Returns all stages and their settings."""
    return paper_recipe("Qwen/Qwen3-8B", template="chatml")
