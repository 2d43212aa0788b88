"""HuatuoGPT-7B: the whole recipe on Baichuan-7B (arXiv 2305.15075).

    python launch/train.py --config=configs/huatuogpt_7b.py --workdir=runs/huatuogpt_7b \
        --config.judge.model=JUDGE

Fine-tuning alone, which needs no judge: `--config.stages=sft`.
Base model: Baichuan-7B; `--config.sft.model.directory=DIR` takes it from a folder. Data: the
published 226,042 dialogues; `--config.data=FILES` takes others.
Judge: OpenAI's API with the key in OPENAI_API_KEY, its model to be named; another server by
`--config.judge.base_url=URL`. `--config.judge.max_cost=MONEY` bounds what it may cost: 80,000
answers are scored.
Settings: `huatuo_jax/recipe/paper.py` tells which are the paper's. Fine-tuning: rows of 2,048
tokens, 128 a step, learning rate 5e-5 with cosine decay after 5 % warm-up, 3 epochs, AdamW with
weight decay 0.1 off norms and biases, gradients clipped to norm 1, all weights trained, 16-bit
compute, layers recomputed in the backward pass. Different from the paper: rows are packed, so a
step holds more dialogues than 128, and there are fewer steps; `--config.sft.data.packed=False`
gives one dialogue a row.
Hardware: a TPU slice v5e:8x8 (v5e-64) or v5p:2x2x2 (v5p-16), or a host of 8 H100s. What a device
holds, and the least time of fine-tuning and of an iteration of PPO, as `launch/compile.py` found
them, are in docs/hardware.md; real runs take longer: count on twice that. Where there is memory to
spare, the products of a layer can be kept rather than computed again: with
`--config.sft.compute.remat=dots --config.sft.micro_batch_size=32` 8 H100s hold 39.2 GiB each and
may reach a utilisation of 98 %, 185,000 tokens/s.
"""

from huatuo_jax.recipe.config import RlaifConfig
from huatuo_jax.recipe.paper import paper_recipe


def get_config() -> RlaifConfig:
    """Returns all stages and their settings."""
    return paper_recipe("baichuan-inc/Baichuan-7B")
