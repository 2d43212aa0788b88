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
Hardware, as `launch/compile.py` found it (all cards: docs/hardware.md): on a TPU slice v5e:8x8 a
chip holds 6.3 GiB of its 15.75 in fine-tuning, 6.2 with the reward model and 8.5 in PPO.
Fine-tuning reaches a utilisation of 78 % at most, 234,000 tokens/s: 71 minutes for a billion
tokens, and no less. An iteration of PPO takes 12 s at least, all 400 of them under an hour and a
half. On a host of 8 H100s: 29.8, 44.3 and 47.2 GiB of 72.8; 79 %, 148,000 tokens/s; 19 s. On
v5p:2x2x2 (v5p-16): 36.5, 58.1 and 52.2 of 94.8; 78 %, 68,000 tokens/s; 33 s. Real runs take longer:
count on twice that. Where there is memory to spare, the products of a layer can be kept rather than
computed again: with `--config.sft.compute.remat=dots --config.sft.micro_batch_size=32` 8 H100s hold
40.9 GiB and may reach 97 %, 182,000 tokens/s.
"""

from huatuo_jax.recipe.config import RlaifConfig
from huatuo_jax.recipe.paper import paper_recipe


def get_config() -> RlaifConfig:
    """Returns all stages and their settings."""
    return paper_recipe("baichuan-inc/Baichuan-7B")
