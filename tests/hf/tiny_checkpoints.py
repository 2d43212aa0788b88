"""Tiny random checkpoints of every family, made by transformers or by the PyTorch reference."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
import transformers

SIZES = {
    "vocab_size": 131,  # odd, so that rows are padded
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# Name -> (class of config, what differs from SIZES).
TRANSFORMERS_CASES: Mapping[str, tuple[type, Mapping[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "llama_multi_head_tied": (
        transformers.LlamaConfig,
        {"num_key_value_heads": 6, "tie_word_embeddings": True},
    ),
    "llama_one_kv_head_biased": (
        transformers.LlamaConfig,
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "llama_linear": (
        transformers.LlamaConfig,
        {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "llama_dynamic": (
        transformers.LlamaConfig,
        {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "llama_yarn": (transformers.LlamaConfig, {"rope_scaling": YARN}),
    "llama_llama3": (
        transformers.LlamaConfig,
        {"rope_scaling": LLAMA3, "rope_theta": 500_000.0},
    ),
    "mistral": (transformers.MistralConfig, {"sliding_window": 7}),
    "mistral_no_window": (transformers.MistralConfig, {"sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {"rope_theta": 1_000_000.0}),
    "qwen2_window_tied": (
        transformers.Qwen2Config,
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 0,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 24, "num_key_value_heads": 3}),
    "qwen3_biased_yarn": (
        transformers.Qwen3Config,
        {"head_dim": 16, "attention_bias": True, "rope_scaling": YARN},
    ),
    "bloom": (transformers.BloomConfig, {"n_head": 6, "n_layer": 3}),
    "bloom_untied": (
        transformers.BloomConfig,
        {"n_head": 8, "n_layer": 2, "tie_word_embeddings": False},
    ),
}
BLOOM_ONLY = ("n_head", "n_layer")


def config_of(case: str, **further: Any) -> transformers.PretrainedConfig:
    config_class, changes = TRANSFORMERS_CASES[case]
    changes = {**changes, **further}
    sizes = dict(SIZES)
    if config_class is transformers.BloomConfig:
        kept = ("vocab_size", "hidden_size", "pad_token_id", "bos_token_id", "eos_token_id")
        sizes = {name: SIZES[name] for name in kept}
    return config_class(**{**sizes, **changes})


def scatter(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights far from their initial values, biases and norms included."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            centre, width = (1.0, 0.2) if "norm" in name or "ln_f" in name else (0.0, 0.15)
            weight.copy_(centre + width * noise)
    return model


def transformers_model(case: str, head: str = "lm", **further: Any) -> torch.nn.Module:
    config = config_of(case, **further)
    if head == "lm":
        model = transformers.AutoModelForCausalLM.from_config(config)
    else:
        config.num_labels = 1
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    return scatter(model.to(torch.float32)).eval()


def save(model: torch.nn.Module, folder: pathlib.Path, **options: Any) -> pathlib.Path:
    model.save_pretrained(folder, **options)
    return folder


def edit_config(folder: pathlib.Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(config), encoding="utf-8")
