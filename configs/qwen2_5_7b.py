"""The whole recipe on Qwen2.5-7B, with the chat template that its tokenizer brings.

    python launch/train.py --config=configs/qwen2_5_7b.py --workdir=runs/qwen2_5_7b \
        --config.judge.model=JUDGE

Base model: Qwen2.5-7B; `--config.sft.model.directory=DIR` takes it from a folder. Data, judge and
settings: see `configs/huatuogpt_7b.py`; only base model and template differ.
Hardware, as `launch/compile.py` found it (all cards: docs/hardware.md): on a TPU slice v5e:8x8 a
chip holds 10.0 GiB of its 15.75 in fine-tuning, 10.2 with the reward model and 12.6 in PPO.
Fine-tuning reaches a utilisation of 79 % at most, 229,000 tokens/s: 73 minutes for a billion
tokens, and no less. An iteration of PPO takes 13 s at least.
"""

from huatuo_jax.recipe.config import RlaifConfig
from huatuo_jax.recipe.paper import paper_recipe


def get_config() -> RlaifConfig:
    """Returns all stages and their settings."""
    # It has four key/value heads.
    return paper_recipe("Qwen/Qwen2.5-7B", template="tokenizer", tensor=4)
