"""Reads a `config.json` of transformers as a backbone's config, and writes it.

A field either affects the forward pass, and then it is read or refused, or it is listed here as one
that does not. There is no third kind: an unknown field may be the one that matters.
"""

import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from huatuo_jax.backbone.config import BackboneConfig, RopeConfig
from huatuo_jax.backbone.transformer import Head

# Fields of transformers that do not affect the forward pass: bookkeeping, generation, dropout
# (which this project leaves off), and how the original was trained.
_IRRELEVANT_FIELDS = frozenset(
    """_name_or_path _from_model_config architectures auto_map attention_dropout
    attention_softmax_in_fp32 attn_pdrop bad_words_ids begin_suppress_tokens bias_dropout_fusion
    bos_token_id chunk_size_feed_forward classifier_dropout cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout id2label
    initializer_range is_decoder is_encoder_decoder label2id length_penalty masked_softmax_fusion
    max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences offset_alibi output_attentions output_hidden_states output_past
    output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    seq_length skip_bias_add skip_bias_add_qkv suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class tokenizer_file top_k top_p torch_dtype
    transformers_version typical_p unk_token_id use_bfloat16 use_cache use_return_dict
    max_sequence_length""".split()
)
# Fields of other tools and people: how the model was made, by whom, and how transformers is to run
# it. They are skipped with one warning, as these names are no standard.
_BOOKKEEPING_FIELDS = frozenset(
    """_attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _commit_hash _experts_implementation _flash_attn_2_enabled _unsloth_version
    attn_implementation author authors auto_class axolotl_version base_model base_model_name
    base_model_name_or_path citation copyright created_at created_by creation_date custom_generate
    custom_pipelines dataset dataset_name datasets date description finetuned_from flash_attention
    gradient_checkpointing_kwargs homepage keys_to_ignore_at_inference language languages
    library_name license license_link license_name loss_type mergekit_version metadata model_card
    model_creator model_id model_name name neftune_noise_alpha nemo_version organization paper
    peft_version pipeline_tag release_date summary tags tasks title training_args
    training_arguments transformers.js_config trl_version unsloth_fixed unsloth_version url
    use_flash_attention use_flash_attention_2 use_flash_attn version""".split()
)

_YARN_FIELDS = (
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
)

_ARCHITECTURES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "bloom": "Bloom",
}
# Fields of a source's config that are kept when the layout changes.
_TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
logger = logging.getLogger(__name__)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns a JSON object from a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; a Hugging Face model folder has one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object, not {type(content).__name__}")
    return content


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object as transformers does: indented, one field a line."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def from_hugging_face(
    config: Mapping[str, Any], *, ignored: Collection[str] = ()
) -> BackboneConfig:
    """Returns the backbone that a `config.json` describes.

    Args:
        config: its content.
        ignored: unknown fields that do not matter, by the user's word.

    Raises:
        ValueError: the model type is unknown, a field has an unsupported value, or a field that is
            read here is to be ignored.
    """
    model_type = str(config.get("model_type"))
    if model_type not in _READERS:
        raise ValueError(
            f"config.json: model_type={model_type!r} is not supported; known: {', '.join(_READERS)}"
        )
    fields = _Fields(config)
    try:
        cfg = _READERS[model_type](fields)
    except TypeError as error:
        raise ValueError(f"config.json: a field has the wrong type ({error})") from error
    fields.expect("is_causal", True)
    fields.refuse_rest(ignored)
    return cfg


def is_score_model(config: Mapping[str, Any]) -> bool:
    """Returns whether a `config.json` is of a model with a score (sequence classification).

    It has one label; or two, and its score is the difference of their logits, second less first,
    so that 1 / (1 + exp(-score)) is the probability of the second.

    Raises:
        ValueError: it has more labels.
    """
    names = config.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in names):
        return False
    labels = config.get("num_labels", len(config.get("id2label", {"0": "", "1": ""})))
    if labels not in (1, 2):
        raise ValueError(f"config.json: a model with a score has 1 or 2 labels, this has {labels}")
    return True


def exported_layout(cfg: BackboneConfig) -> str:
    """Returns the exported `model_type` of a backbone: Baichuan-7B becomes a LLaMA."""
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
    """Returns the `config.json` under which transformers and vLLM load an exported backbone.

    A source's config keeps its own fields, changed only where the export differs. Rotary settings
    that it has in the form of transformers 5 alone (`rope_parameters`) are written in that of
    transformers 4 too (`rope_theta`, `rope_scaling`), which would use the default angles otherwise;
    a new config has both.

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
            id, or the family's config has no field for a setting of the backbone.
    """
    layout = exported_layout(cfg)
    if source is not None and source.get("model_type") == layout:
        config = dict(source)
    else:
        config = _fresh(cfg, layout) | dict(tokens or {})
        config |= {name: source[name] for name in _TOKEN_FIELDS if source and name in source}
    if config.get("rope_parameters") is not None:
        config |= _legacy_rope(config["rope_parameters"])
    if head == "score":
        config |= _score_fields(layout, pad_token_id)
    _check_expresses(config, cfg, layout)
    # `torch_dtype` is transformers 4's name, which 5 reads too; a source's config without a dtype
    # stays so: transformers then takes that of the weights.
    if source is None or "torch_dtype" in config:
        return config | {"torch_dtype": str(dtype)}
    return config | ({"dtype": str(dtype)} if "dtype" in config else {})


class _Fields:
    """The fields of a `config.json`; each is taken once, and the rest must not matter."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._left = dict(config)
        self._read: set[str] = set()
        self._model_type = config["model_type"]

    def take(self, name: str, *otherwise: Any) -> Any:
        """Returns a field's value, or the default if it is absent or null; no default: required."""
        self._read.add(name)
        value = self._left.pop(name, None)
        if value is not None:
            return value
        if not otherwise:
            raise ValueError(f"config.json: {name} is missing for {self._model_type!r}")
        return otherwise[0]

    def take_nullable(self, name: str, absent: Any) -> Any:
        """Returns a field's value, null included; `absent` only if it is not there."""
        self._read.add(name)
        return self._left.pop(name, absent)

    def expect(self, name: str, supported: Any) -> None:
        """Refuses any value but the supported one, which is also the default."""
        value = self.take(name, supported)
        if value != supported:
            raise ValueError(
                f"config.json: {name}={value!r} is not supported for {self._model_type!r}, "
                f"only {supported!r}"
            )

    def refuse_rest(self, ignored: Collection[str]) -> None:
        """Raises ValueError for fields that were not taken and may matter."""
        if taken := sorted(self._read.intersection(ignored)):
            raise ValueError(
                f"ignore_config_fields: {', '.join(taken)} of config.json cannot be ignored, the "
                f"model is computed by it; edit the file if it is wrong"
            )
        given = {
            name: value
            for name, value in self._left.items()
            if name not in _IRRELEVANT_FIELDS and value is not None and value is not False
        }
        skipped = sorted(_BOOKKEEPING_FIELDS.intersection(given))
        if skipped:
            _warn_once(
                "config.json: ignored, as they do not change what the model computes: "
                f"{', '.join(skipped)}"
            )
        unknown = {
            name: value
            for name, value in given.items()
            if name not in _BOOKKEEPING_FIELDS and name not in ignored
        }
        if unknown:
            listed = ", ".join(f"{name}={value!r}" for name, value in sorted(unknown.items()))
            raise ValueError(
                f"config.json: not supported for model_type {self._model_type!r}: {listed}; if "
                "they cannot change what the model computes, name them in ignore_config_fields (a "
                "field of the model's section in a config, a flag of the commands)"
            )


@functools.lru_cache
def _warn_once(line: str) -> None:
    logger.warning("%s", line)


def _llama(fields: _Fields, *, default_head_dim: int | None = None) -> dict[str, Any]:
    """Reads the fields of LLaMA and its relatives: RMS norm, gated SiLU, rotary positions."""
    fields.expect("hidden_act", "silu")
    hidden_size, num_heads = fields.take("hidden_size"), fields.take("num_attention_heads")
    max_positions = fields.take("max_position_embeddings")
    return {
        "vocab_size": fields.take("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": fields.take("intermediate_size"),
        "num_layers": fields.take("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": fields.take("num_key_value_heads", num_heads),
        "head_dim": fields.take("head_dim", default_head_dim or hidden_size // num_heads),
        "max_positions": max_positions,
        "norm_eps": fields.take("rms_norm_eps"),
        "rope": _rope(fields, max_positions),
        "tie_embeddings": fields.take("tie_word_embeddings", False),
        "initializer_range": fields.take("initializer_range", 0.02),
    }


def _plain_llama(fields: _Fields) -> BackboneConfig:
    bias, mlp_bias = fields.take("attention_bias", False), fields.take("mlp_bias", False)
    return BackboneConfig(
        family="llama",
        **_llama(fields),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=mlp_bias,
    )


def _mistral(fields: _Fields) -> BackboneConfig:
    # transformers' own default; Mistral 0.2 and later write null for no window.
    window = fields.take_nullable("sliding_window", 4096)
    return BackboneConfig(family="mistral", **_llama(fields), sliding_window=window)


def _qwen2(fields: _Fields) -> BackboneConfig:
    shared = _llama(fields)
    window = _qwen_window(fields, shared["num_layers"])
    return BackboneConfig(family="qwen2", **shared, qkv_bias=True, sliding_window=window)


def _qwen3(fields: _Fields) -> BackboneConfig:
    shared, bias = _llama(fields, default_head_dim=128), fields.take("attention_bias", False)
    return BackboneConfig(
        family="qwen3",
        **shared,
        qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        sliding_window=_qwen_window(fields, shared["num_layers"]),
    )


def _qwen_window(fields: _Fields, num_layers: int) -> int | None:
    """Returns the window of all layers; refuses one of some layers only."""
    window = fields.take("sliding_window", None)
    first = fields.take("max_window_layers", 28)
    wanted = fields.take("use_sliding_window", False) and window is not None
    kinds = ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)]
    kinds = fields.take("layer_types", kinds if wanted else ["full_attention"] * num_layers)
    if set(kinds) == {"full_attention"}:
        return None
    if set(kinds) != {"sliding_attention"} or not wanted:
        raise ValueError(
            f"config.json: layer_types={sorted(set(kinds))} with use_sliding_window={wanted}, "
            f"max_window_layers={first} is not supported: all layers must attend alike"
        )
    return window


def _baichuan(fields: _Fields) -> BackboneConfig:
    """Reads the fields of Baichuan and Baichuan 2, which share a model type.

    The 7B models are rotary and have `max_position_embeddings`; the 13B models are ALiBi and have
    `model_max_length`. Baichuan 2 has its own vocabulary size or the field `z_loss_weight`.
    """
    fields.expect("hidden_act", "silu")
    vocab_size, num_heads = fields.take("vocab_size"), fields.take("num_attention_heads")
    hidden_size, length = fields.take("hidden_size"), fields.take("max_position_embeddings", None)
    trained_length = fields.take("model_max_length", 4096)
    second = vocab_size == 125_696 or fields.take_nullable("z_loss_weight", None) is not None
    fields.expect("tie_word_embeddings", False)
    return BackboneConfig(
        family="baichuan2" if second else "baichuan",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.take("intermediate_size"),
        num_layers=fields.take("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        max_positions=length or trained_length,
        norm_eps=fields.take("rms_norm_eps", 1e-6),
        position="rope" if length else "alibi",
        rope=RopeConfig() if length else None,
        norm_head=second,
        initializer_range=fields.take("initializer_range", 0.02),
    )


def _bloom(fields: _Fields) -> BackboneConfig:
    for name in ("apply_residual_connection_post_layernorm", "slow_but_exact"):
        fields.expect(name, False)
    hidden_size = fields.take("n_embed", None) or fields.take("hidden_size")
    fields.expect("n_inner", 4 * hidden_size)
    num_layers = fields.take("n_layer", None) or fields.take("num_hidden_layers")
    num_heads = fields.take("n_head", None) or fields.take("num_attention_heads")
    # Published configs repeat the sizes under a second name.
    fields.expect("hidden_size", hidden_size)
    fields.expect("num_hidden_layers", num_layers)
    fields.expect("num_attention_heads", num_heads)
    return BackboneConfig(
        family="bloom",
        vocab_size=fields.take("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        max_positions=fields.take("seq_length", 2048),
        norm="layer",
        norm_eps=fields.take("layer_norm_epsilon", 1e-5),
        activation="gelu_tanh",
        gated_mlp=False,
        position="alibi",
        rope=None,
        embedding_norm=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_embeddings=fields.take("tie_word_embeddings", True),
        initializer_range=fields.take("initializer_range", 0.02),
    )


def _rope(fields: _Fields, max_positions: int) -> RopeConfig:
    """Reads rotary settings, in the form of transformers 5 or that of 4."""
    theta = fields.take("rope_theta", None)
    outer_original = fields.take("original_max_position_embeddings", None)
    legacy, settings = fields.take("rope_scaling", None), fields.take("rope_parameters", None)
    _check_same_angles(theta, legacy, settings)
    settings = dict(settings or legacy or {})
    kind = settings.pop("rope_type", None) or settings.get("type") or "default"
    settings.pop("type", None)
    if settings.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json: partial_rotary_factor must be 1 for this model type")
    chosen: dict[str, Any] = {
        "rope_type": kind,
        "theta": settings.pop("rope_theta", theta or 10_000.0),
    }
    inner_original = settings.pop("original_max_position_embeddings", None)
    if kind == "dynamic":
        chosen["original_max_positions"] = max_positions
    elif kind in ("yarn", "llama3"):
        chosen["original_max_positions"] = outer_original or inner_original or max_positions
    known = {
        "default": (),
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": _YARN_FIELDS,
    }
    if kind not in known:
        raise ValueError(f"config.json: rope_type={kind!r} is not supported; known: {list(known)}")
    for name in known[kind]:
        value = settings.pop(name, None)
        if value is not None:
            chosen[name] = value
    if kind == "yarn" and "factor" not in chosen:
        chosen["factor"] = max_positions / chosen["original_max_positions"]
    if kind != "default" and "factor" not in chosen:
        raise ValueError(f"config.json: rope_type={kind!r} needs a factor")
    if settings:
        raise ValueError(f"config.json: rope_type={kind!r} does not take {sorted(settings)}")
    return RopeConfig(**chosen)


def _check_same_angles(
    theta: float | None, legacy: Mapping[str, Any] | None, settings: Mapping[str, Any] | None
) -> None:
    """Refuses two differing forms of the rotary settings, as each version reads its own."""
    if not settings:
        return
    old = _one_spelling(legacy or {}) if legacy else {}
    old |= {} if theta is None else {"rope_theta": theta}
    new = _one_spelling(settings)
    if any(old[name] != new[name] for name in old.keys() & new.keys()):
        raise ValueError(
            f"config.json: rope_parameters={dict(settings)!r} differs from "
            f"rope_theta={theta!r} with rope_scaling={legacy!r}; remove the wrong one"
        )


def _one_spelling(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in settings.items() if value is not None}
    kind = found.pop("type", "default")
    return {"rope_type": kind, **found}


_READERS: Mapping[str, Callable[[_Fields], BackboneConfig]] = {
    "llama": _plain_llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "bloom": _bloom,
    "baichuan": _baichuan,
}


def _check_expresses(config: Mapping[str, Any], cfg: BackboneConfig, layout: str) -> None:
    """Raises ValueError if the layout has no field for a setting of the backbone."""
    written = from_hugging_face(config)
    lost = [
        f"{field.name}={getattr(cfg, field.name)!r} (config.json: {getattr(written, field.name)!r})"
        for field in dataclasses.fields(cfg)
        if field.name not in ("family", "vocab_multiple")
        and getattr(cfg, field.name) != getattr(written, field.name)
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
    """Returns a new config for a backbone without a source config."""
    if layout == "bloom":
        return _bloom_fields(cfg)
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
        **_rope_fields(cfg.rope),
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


def _bloom_fields(cfg: BackboneConfig) -> dict[str, Any]:
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


def _legacy_rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `rope_theta` and `rope_scaling` that are equal to `rope_parameters`.

    Without a theta in them it is left out here too, as the config may have its own.
    """
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    is_default = scaling.get("rope_type", scaling.get("type", "default")) == "default"
    fields: dict[str, Any] = {"rope_scaling": None if is_default else scaling}
    return fields | {name: value for name, value in parameters.items() if name == "rope_theta"}


def _rope_fields(rope: RopeConfig | None) -> dict[str, Any]:
    """Returns rotary settings in the form of transformers 5, from which that of 4 follows."""
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
