"""Writing a `config.json` of transformers: what a backbone is called there."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from huatuo_jax.backbone.config import BackboneConfig, RopeConfig
from huatuo_jax.backbone.transformer import Head
from huatuo_jax.checkpoint.hf_config import from_hugging_face

_ARCHITECTURES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "bloom": "Bloom",
}
# Fields of a source's config that outlive a change of layout.
_TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def exported_layout(cfg: BackboneConfig) -> str:
    """The `model_type` a backbone is exported as: Baichuan-7B is a LLaMA with fused weights."""
    if cfg.family in ("baichuan", "baichuan2"):
        return "llama" if cfg.family == "baichuan" and cfg.position == "rope" else "baichuan"
    return cfg.family


def to_hugging_face(
    cfg: BackboneConfig,
    *,
    head: Head,
    dtype: np.dtype,
    source: Mapping[str, Any] | None = None,
    tokens: Mapping[str, Any] | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """The `config.json` under which transformers and vLLM load an exported backbone.

    A source's config is passed on with its own fields, changed only where the export differs.
    Rotary settings that it gives in the words of transformers 5 alone (`rope_parameters`) stand
    there in those of transformers 4 too (`rope_theta`, `rope_scaling`), which would take the
    default angles otherwise; one that is made here has both.

    Args:
        cfg: the backbone.
        head: `score` makes it a sequence classifier with one label.
        dtype: of the exported weights.
        source: the config the model came with, if it came from Hugging Face.
        tokens: BOS, EOS and pad ids for a config that is made without one.
        pad_token_id: for `score`: an id that never occurs in text, since transformers reads the
            score at the last id that is not it.

    Raises:
        ValueError: the family has no sequence classifier in transformers, `score` without a pad
            id, or the backbone is something its family's config has no words for.
    """
    layout = exported_layout(cfg)
    if source is not None and source.get("model_type") == layout:
        config = dict(source)
    else:
        config = _fresh(cfg, layout) | dict(tokens or {})
        config |= {name: source[name] for name in _TOKEN_FIELDS if source and name in source}
    if config.get("rope_parameters") is not None:
        config |= _in_words_of_4(config["rope_parameters"])
    if head == "score":
        config |= _score_fields(layout, pad_token_id)
    _check_says_the_same(config, cfg, layout)
    # `torch_dtype` is transformers 4's name, which 5 reads too; a source's config that says no
    # dtype is left so: transformers then takes that of the weights.
    if source is None or "torch_dtype" in config:
        return config | {"torch_dtype": str(dtype)}
    return config | ({"dtype": str(dtype)} if "dtype" in config else {})


def _check_says_the_same(config: Mapping[str, Any], cfg: BackboneConfig, layout: str) -> None:
    """Raise where the layout has no words for what the backbone is."""
    said = from_hugging_face(config)
    lost = [
        f"{field.name}={getattr(cfg, field.name)!r} (config.json: {getattr(said, field.name)!r})"
        for field in dataclasses.fields(cfg)
        if field.name not in ("family", "vocab_multiple")
        and getattr(cfg, field.name) != getattr(said, field.name)
    ]
    if lost:
        raise ValueError(f"model_type {layout!r} cannot express {', '.join(lost)}")


def _score_fields(layout: str, pad_token_id: int | None) -> dict[str, Any]:
    if layout not in _ARCHITECTURES:
        raise ValueError(
            f"transformers has no sequence classifier for model_type {layout!r}: keep the reward "
            "model in its Orbax directory"
        )
    if pad_token_id is None:
        raise ValueError(
            "pad_token_id=None: a reward model is exported with a pad id that never occurs in text"
        )
    return {
        "architectures": [f"{_ARCHITECTURES[layout]}ForSequenceClassification"],
        "num_labels": 1,
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
        "pad_token_id": pad_token_id,
    }


def _fresh(cfg: BackboneConfig, layout: str) -> dict[str, Any]:
    """A config from nothing but the backbone."""
    if layout == "bloom":
        return _bloom(cfg)
    if layout not in _ARCHITECTURES:
        raise ValueError(
            f"a {cfg.family!r} model has its own code: its export needs the config.json it came "
            "with"
        )
    config: dict[str, Any] = {
        "architectures": [f"{_ARCHITECTURES[layout]}ForCausalLM"],
        "model_type": layout,
        "hidden_act": "silu",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "max_position_embeddings": cfg.max_positions,
        "rms_norm_eps": cfg.norm_eps,
        "initializer_range": cfg.initializer_range,
        "tie_word_embeddings": cfg.tie_embeddings,
        **_rope(cfg.rope),
    }
    if layout == "llama":
        config |= {"attention_bias": cfg.qkv_bias, "mlp_bias": cfg.mlp_bias}
    elif layout == "mistral":
        config |= {"sliding_window": cfg.sliding_window}
    else:
        windowed = cfg.sliding_window is not None
        config |= {"use_sliding_window": windowed, "sliding_window": cfg.sliding_window}
        config |= {"max_window_layers": 0 if windowed else cfg.num_layers}
    return config | ({"attention_bias": cfg.qkv_bias} if layout == "qwen3" else {})


def _bloom(cfg: BackboneConfig) -> dict[str, Any]:
    return {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "n_layer": cfg.num_layers,
        "n_head": cfg.num_heads,
        "seq_length": cfg.max_positions,
        "layer_norm_epsilon": cfg.norm_eps,
        "initializer_range": cfg.initializer_range,
        "tie_word_embeddings": cfg.tie_embeddings,
    }


def _in_words_of_4(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` that say what `rope_parameters` does.

    Without a theta there it is left out here as well: one beside it is the config's own.
    """
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    is_default = scaling.get("rope_type", scaling.get("type", "default")) == "default"
    fields: dict[str, Any] = {"rope_scaling": None if is_default else scaling}
    return fields | {name: value for name, value in parameters.items() if name == "rope_theta"}


def _rope(rope: RopeConfig | None) -> dict[str, Any]:
    """Rotary settings in transformers 5's words; those of 4 follow from them."""
    assert rope is not None
    scaling: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": rope.rope_type}
    if rope.rope_type == "default":
        return {"rope_parameters": scaling}
    scaling["factor"] = rope.factor
    if rope.rope_type in ("yarn", "llama3"):
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    if rope.rope_type == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
    if rope.rope_type == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        optional = ("attention_factor", "mscale", "mscale_all_dim")
        scaling |= {n: getattr(rope, n) for n in optional if getattr(rope, n) is not None}
        scaling["truncate"] = rope.truncate
    return {"rope_parameters": scaling}
