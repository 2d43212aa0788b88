"""A model that is compiled in a minute: what tests of compiling share."""

from ml_collections import ConfigDict

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.sft import SftConfig
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig
from huatuo_jax.training.initial_model import ComputeSection, ModelConfig
from huatuo_jax.training.optimizer import OptimizerConfig
from huatuo_jax.training.sections import to_section

BACKBONE = BackboneConfig(
    family="llama",
    vocab_size=2048,
    hidden_size=512,
    intermediate_size=1408,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=128,
    max_positions=512,
)


def small_sft(**changed):
    """A config as `launch/compile.py` takes it; fields are changed by their path."""
    sft = SftConfig(
        model=ModelConfig(backbone=BACKBONE, tokenizer="none"),
        data=DataConfig(sources=(SourceConfig(name="none", paths=("none",)),), row_length=512),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        batch_size=32,
        micro_batch_size=16,
        compute=ComputeSection(compute_dtype="bfloat16", remat="full"),
    )
    config = ConfigDict({"stages": ("sft",), "sft": to_section(sft)})
    config.update_from_flattened_dict(changed)
    return config


def get_config():
    """As a config file has it."""
    return small_sft()
