"""HuatuoGPT-7B with adapters (LoRA) on a single GPU of 80 GB: the whole recipe on Baichuan-7B.

    python launch/train.py --config=configs/huatuogpt_7b_lora.py --workdir=runs/huatuogpt_7b_lora \
        --config.judge.model=JUDGE

Base model, data and judge: see `configs/huatuogpt_7b.py`. Adapters of rank 64 on every projection
of the layers; weights stay as they are, in 16 bits. Rates and rank are choices of this project
(`huatuo_jax/recipe/paper.py`), not the paper's, which trains all weights.
Hardware: an H100, with 16 answers of PPO at once; docs/hardware.md has what it holds. Fine-tuning
alone fits a GPU of 24 GB, a row at a time (17.3 GiB):
`--config.stages=sft --config.sft.micro_batch_size=1`.
"""

from huatuo_jax.backbone.lora import LoraConfig
from huatuo_jax.recipe.config import RlaifConfig
from huatuo_jax.recipe.paper import paper_recipe, with_adapters


def get_config() -> RlaifConfig:
    """Returns all stages and their settings."""
    recipe = paper_recipe("baichuan-inc/Baichuan-7B", tensor=1)
    lora = LoraConfig(rank=64, alpha=128.0)
    return with_adapters(recipe, lora, rows_at_once=4, slots=16)
