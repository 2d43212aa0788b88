"""HuatuoGPT-13B: the whole recipe on Ziya-LLaMA-13B (arXiv 2305.15075).

    python launch/train.py --config=configs/huatuogpt_13b.py --workdir=runs/huatuogpt_13b \
        --config.judge.model=JUDGE

Base model: Ziya-LLaMA-13B-Pretrain-v1; `--config.sft.model.directory=DIR` takes it from a folder.
Where weights are published as a delta, the base is added first:

    python launch/convert.py --source=DELTA --delta_base=LLAMA_13B --target=DIR

Data, judge and settings: see `configs/huatuogpt_7b.py`; the paper tells no others for this size.
Hardware: a TPU slice v5p:2x2x4 (v5p-32); docs/hardware.md has what a device holds.
"""

from huatuo_jax.recipe.config import RlaifConfig
from huatuo_jax.recipe.paper import paper_recipe


def get_config() -> RlaifConfig:
    """Returns all stages and their settings."""
    return paper_recipe("IDEA-CCNL/Ziya-LLaMA-13B-Pretrain-v1")
