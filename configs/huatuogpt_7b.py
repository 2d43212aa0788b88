"""HuatuoGPT-7B's supervised fine-tuning with the paper's settings (arXiv 2305.15075).

    python launch/train.py --config=configs/huatuogpt_7b.py --workdir=runs/huatuogpt_7b

Base model: Baichuan-7B; `--config.sft.model.directory=DIR` takes it from a folder. Data: the
published 226,042 dialogues; `--config.sft.data.sources` takes others.
Settings: rows of 2,048 tokens, 128 a step, learning rate 5e-5 with cosine decay after 5 % warm-up,
3 epochs, AdamW with weight decay 0.1 off norms and biases, gradients clipped to norm 1, all weights
trained, 16-bit compute, layers recomputed in the backward pass. Different from the paper: rows are
packed, so a step holds more dialogues than 128, and there are fewer steps;
`--config.sft.data.packed=False` gives one dialogue a row.
Hardware: 8 GPUs of 80 GB, or a TPU slice v5e:8x8. Weights, gradients and optimizer take 16 bytes a
parameter, 112 GB over all devices.
"""

from ml_collections import ConfigDict

from huatuo_jax.data.held_out import HeldOutConfig
from huatuo_jax.sft import SftConfig
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig
from huatuo_jax.training.initial_model import ComputeSection, ModelConfig
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.optimizer import OptimizerConfig
from huatuo_jax.training.sections import to_section

PUBLISHED = SourceConfig(name="huatuogpt_sft", paths=("FreedomIntelligence/HuatuoGPT-sft-data-v1",))


def get_config() -> ConfigDict:
    """The stages, and the settings of each."""
    sft = SftConfig(
        model=ModelConfig(directory="baichuan-inc/Baichuan-7B"),
        data=DataConfig(
            sources=(PUBLISHED,),
            template="huatuogpt",
            row_length=2048,
            packed=True,
            held_out=HeldOutConfig(share=0.005),
        ),
        optimizer=OptimizerConfig(
            learning_rate=5e-5,
            decay="cosine",
            warmup_share=0.05,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        num_epochs=3,
        batch_size=128,
        micro_batch_size=64,
        compute=ComputeSection(compute_dtype="bfloat16", remat="full", loss_chunk=512),
        loop=LoopConfig(evaluate_every=500, checkpoint_every=500),
    )
    return ConfigDict({"stages": ("sft",), "sft": to_section(sft)})
