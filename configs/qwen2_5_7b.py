"""The whole recipe on Qwen2.5-7B, with the chat template that its tokenizer brings.

    python launch/train.py --config=configs/qwen2_5_7b.py --workdir=runs/qwen2_5_7b \
        --config.judge.model=JUDGE

Base model: Qwen2.5-7B; `--config.sft.model.directory=DIR` takes it from a folder. Data, judge and
settings: see `configs/huatuogpt_7b.py`; only base model and template differ.
Hardware: a TPU slice v5e:8x8 (v5e-64); docs/hardware.md has what a chip holds.
"""

from huatuo_jax.recipe.config import RlaifConfig
from huatuo_jax.recipe.paper import paper_recipe


def get_config() -> RlaifConfig:
    """Returns all stages and their settings."""
    # It has four key/value heads.
    return paper_recipe("Qwen/Qwen2.5-7B", template="tokenizer", tensor=4)
