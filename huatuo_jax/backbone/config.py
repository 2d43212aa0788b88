"""A transformer's architecture and how it is computed, with presets of published models.

A preset follows the model's own `config.json`. Where a family has base and instruction-tuned
releases that differ in `norm_eps` or `max_positions`, it is the base release's.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin

import jax.numpy as jnp
from jax.typing import DTypeLike

Family = Literal["llama", "mistral", "qwen2", "qwen3", "bloom", "baichuan", "baichuan2"]
RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3"]
Remat = Literal["none", "full", "dots", "outputs"]
Kernel = Literal["auto", "xla", "cudnn", "splash"]


def _check_choices(cfg: Any) -> None:
    """Raises ValueError for a field declared as a Literal that holds another value."""
    for field in dataclasses.fields(cfg):
        if get_origin(field.type) is Literal:
            value, choices = getattr(cfg, field.name), get_args(field.type)
            if value not in choices:
                raise ValueError(
                    f"{type(cfg).__name__}.{field.name}={value!r} is not one of {list(choices)}"
                )


def _check_positive(cfg: Any, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(cfg, name)
        if value is not None and value <= 0:
            raise ValueError(f"{type(cfg).__name__}.{name}={value!r} must be above 0")


def _check_names(cls: type, fields: Mapping[str, Any]) -> None:
    """Raises ValueError unless the mapping has exactly the fields of a dataclass."""
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}")
    if missing := sorted(known - set(fields)):
        raise ValueError(f"{cls.__name__} lacks field {', '.join(missing)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) and its extensions to long contexts.

    Attributes:
        rope_type: `default`; `linear` (position interpolation, arXiv 2306.15595); `dynamic` (NTK
            scaling by the longest position of the batch); `yarn` (arXiv 2309.00071); `llama3`
            (the frequency-dependent scaling of Llama 3.1).
        theta: base of the geometric series of wavelengths.
        factor: how many times longer the context gets; 1 for `default`.
        original_max_positions: the context length of pre-training (`dynamic`, `yarn`, `llama3`).
        low_freq_factor: `llama3`: wavelengths above original / this are fully scaled.
        high_freq_factor: `llama3`: wavelengths below original / this are not scaled.
        beta_fast: `yarn`: rotations above which a dimension is not interpolated.
        beta_slow: `yarn`: rotations below which a dimension is fully interpolated.
        attention_factor: `yarn`: scale of cosine and sine; None takes the paper's value.
        mscale: `yarn`: numerator's weight in that value where both weights are given.
        mscale_all_dim: `yarn`: denominator's weight in that value.
        truncate: `yarn`: round the range of interpolated dimensions to whole ones.
    """

    rope_type: RopeType = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        """Validates the fields."""
        _check_choices(self)
        _check_positive(self, ("theta", "factor", "beta_fast", "beta_slow", "attention_factor"))
        _check_positive(self, ("original_max_positions", "low_freq_factor", "high_freq_factor"))
        if self.rope_type in ("dynamic", "yarn", "llama3") and not self.original_max_positions:
            raise ValueError(
                f"RopeConfig.original_max_positions={self.original_max_positions!r}: "
                f"rope_type={self.rope_type!r} needs the context length of pre-training"
            )
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"RopeConfig.low_freq_factor={self.low_freq_factor!r} must be below "
                f"high_freq_factor={self.high_freq_factor!r}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The architecture of a decoder-only transformer.

    Attributes:
        family: the Hugging Face family in whose layout the weights are exported.
        vocab_size: rows of the embedding that are tokens.
        vocab_multiple: the embedding is padded to a multiple of this, so that any usual tensor
            axis divides it; padded rows never receive probability and are not exported.
        hidden_size: width D of the residual stream.
        intermediate_size: width F of the feed-forward layer.
        num_layers: number L of layers.
        num_heads: number N of query heads.
        num_kv_heads: number K of key/value heads; each serves N / K query heads.
        head_dim: width H of a head.
        max_positions: the model's context length.
        norm: `rms` (arXiv 1910.07467) or `layer` (with bias).
        norm_eps: added to the variance.
        activation: `silu` or `gelu_tanh`.
        gated_mlp: feed-forward is `down(activation(gate) * up)` rather than `down(activation(up))`.
        position: `rope` or `alibi` (arXiv 2108.12409).
        rope: rotary settings; None under ALiBi.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it.
        embedding_norm: normalise the embedding's output (BLOOM).
        qkv_bias: bias on the query, key and value projections.
        output_bias: bias on the attention's output projection.
        mlp_bias: bias on the feed-forward projections.
        qk_norm: RMS norm over each query and key head (Qwen3).
        tie_embeddings: the head is the embedding's transpose.
        norm_head: rows of the head are scaled to unit length (NormHead, Baichuan 2).
        initializer_range: standard deviation of fresh weights.
    """

    family: Family
    vocab_size: int
    vocab_multiple: int = 128
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    activation: Literal["silu", "gelu_tanh"] = "silu"
    gated_mlp: bool = True
    position: Literal["rope", "alibi"] = "rope"
    rope: RopeConfig | None = RopeConfig()
    sliding_window: int | None = None
    embedding_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    norm_head: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        """Validates the fields."""
        _check_choices(self)
        sizes = ("vocab_size", "vocab_multiple", "hidden_size", "intermediate_size", "num_layers")
        heads = ("num_heads", "num_kv_heads", "head_dim", "max_positions", "sliding_window")
        _check_positive(self, (*sizes, *heads, "norm_eps"))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"BackboneConfig.num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if (self.position == "rope") != (self.rope is not None):
            raise ValueError(
                f"BackboneConfig.position={self.position!r} with rope={self.rope!r}: "
                "rotary models have rotary settings, ALiBi models have rope=None"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"BackboneConfig.head_dim={self.head_dim} must be even to rotate")
        if self.norm_head and self.tie_embeddings:
            raise ValueError("BackboneConfig.norm_head=True needs tie_embeddings=False")

    @property
    def padded_vocab_size(self) -> int:
        """Returns V: `vocab_size` rounded up to a multiple of `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def queries_per_kv_head(self) -> int:
        """Returns the number of query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    def require_fixed_angles(self, length: int, *, purpose: str) -> None:
        """Raises ValueError if a token's angles depend on other tokens, where they must not.

        Under `dynamic` rotary scaling the longest position of a batch sets every token's angles as
        soon as it passes the original length: packed rows and cached keys would then be wrong.

        Args:
            length: tokens of a row at most.
            purpose: the reason why they must not, for the message ("packing").
        """
        rope = self.rope
        if rope and rope.rope_type == "dynamic" and length > (rope.original_max_positions or 0):
            raise ValueError(
                f"{purpose} to {length} tokens does not work with rope_type='dynamic' past its "
                f"original {rope.original_max_positions}: angles would depend on the batch; "
                f"use length <= {rope.original_max_positions}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "BackboneConfig":
        """Returns the config that `to_dict` gave; ValueError names unknown or missing fields."""
        _check_names(cls, fields)
        rope = fields["rope"]
        if rope is not None:
            _check_names(RopeConfig, rope)
        return cls(**{**fields, "rope": None if rope is None else RopeConfig(**rope)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """The computation of a backbone: it affects rounding and speed, never the model.

    Attributes:
        param_dtype: dtype of fresh parameters (float32 where they are trained).
        compute_dtype: dtype of matrix products and of the residual stream.
        output_dtype: dtype of logits and scores, at least float32.
        remat: rematerialisation inside a layer: for the backward pass `none` saves the results of
            products and of attention, `full` only the layer's input, `dots` the results of
            products with weights, `outputs` those of the attention and feed-forward blocks.
        kernel: the attention kernel; `auto` takes a suitable one for the mesh's platform.
        query_chunk: tokens of a block in the XLA attention, which computes a block of queries and
            keys where one sees the other: small blocks skip more. At most on a CPU; accelerators
            take at least 256.
    """

    param_dtype: DTypeLike = jnp.float32
    compute_dtype: DTypeLike = jnp.float32
    output_dtype: DTypeLike = jnp.float32
    remat: Remat = "none"
    kernel: Kernel = "auto"
    query_chunk: int = 64

    def __post_init__(self) -> None:
        """Validates the fields."""
        _check_choices(self)
        _check_positive(self, ("query_chunk",))
        if jnp.finfo(self.output_dtype).bits < 32:
            raise ValueError(
                f"ComputeConfig.output_dtype={self.output_dtype!r}: log-probabilities need at "
                "least float32"
            )


_LLAMA_7B = BackboneConfig(
    family="llama",
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    max_positions=2048,
    norm_eps=1e-6,
)


def _resized(
    base: BackboneConfig,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    **changes: Any,
) -> BackboneConfig:
    """Returns the base at another size; without a `head_dim`, heads share the width evenly."""
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_heads if num_kv_heads is None else num_kv_heads,
        "head_dim": hidden_size // num_heads,
    }
    return replace(base, **{**sizes, **changes})


def _llama3_rope(factor: float) -> RopeConfig:
    return RopeConfig(rope_type="llama3", theta=5e5, factor=factor, original_max_positions=8192)


# LLaMA, arXiv 2302.13971. Its 33B model is often called 30B.
_LLAMA_13B = _resized(_LLAMA_7B, 5120, 13_824, 40, 40)
# Llama 2, arXiv 2307.09288.
_LLAMA2: dict[str, Any] = {"max_positions": 4096, "norm_eps": 1e-5}
# Llama 3, arXiv 2407.21783.
_LLAMA3_8B = replace(
    _resized(_LLAMA_7B, 4096, 14_336, 32, 32, 8, norm_eps=1e-5, max_positions=8192),
    vocab_size=128_256,
    rope=RopeConfig(theta=5e5),
)
_LLAMA3_70B = _resized(_LLAMA3_8B, 8192, 28_672, 80, 64, 8)
_LLAMA31: dict[str, Any] = {"max_positions": 131_072, "rope": _llama3_rope(8.0)}
_LLAMA32: dict[str, Any] = {**_LLAMA31, "rope": _llama3_rope(32.0), "tie_embeddings": True}
# Yi, arXiv 2403.04652.
_YI_6B = replace(
    _resized(_LLAMA_7B, 4096, 11_008, 32, 32, 4, norm_eps=1e-5, max_positions=4096),
    vocab_size=64_000,
    rope=RopeConfig(theta=5e6),
)
# Mistral 7B v0.1, arXiv 2310.06825.
_MISTRAL_7B = replace(
    _resized(_LLAMA_7B, 4096, 14_336, 32, 32, 8, norm_eps=1e-5, max_positions=32_768),
    family="mistral",
    sliding_window=4096,
)
# Qwen2, arXiv 2407.10671, and Qwen2.5, arXiv 2412.15115: the small ones tie their embeddings.
_QWEN2_7B = replace(
    _resized(_LLAMA_7B, 3584, 18_944, 28, 28, 4, max_positions=131_072),
    family="qwen2",
    vocab_size=152_064,
    qkv_bias=True,
    rope=RopeConfig(theta=1e6),
)
_QWEN2_SMALL = replace(_QWEN2_7B, vocab_size=151_936, tie_embeddings=True)
_QWEN2_0_5B = _resized(_QWEN2_SMALL, 896, 4864, 24, 14, 2)
_QWEN2_1_5B = _resized(_QWEN2_SMALL, 1536, 8960, 28, 12, 2)
# Qwen3, arXiv 2505.09388.
_QWEN3_8B = replace(
    _resized(_LLAMA_7B, 4096, 12_288, 36, 32, 8, head_dim=128, max_positions=40_960),
    family="qwen3",
    vocab_size=151_936,
    qk_norm=True,
    rope=RopeConfig(theta=1e6),
)
_QWEN3_SMALL = replace(_QWEN3_8B, tie_embeddings=True)
# BLOOM, arXiv 2211.05100, and BLOOMZ, arXiv 2211.01786.
_BLOOM_7B1 = replace(
    _resized(_LLAMA_7B, 4096, 16_384, 30, 32),
    family="bloom",
    vocab_size=250_880,
    norm="layer",
    norm_eps=1e-5,
    activation="gelu_tanh",
    gated_mlp=False,
    position="alibi",
    rope=None,
    embedding_norm=True,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    tie_embeddings=True,
)
# Baichuan has no paper; Baichuan 2 is arXiv 2309.10305.
_BAICHUAN_7B = replace(_LLAMA_7B, family="baichuan", vocab_size=64_000, max_positions=4096)
_BAICHUAN_13B = _resized(_BAICHUAN_7B, 5120, 13_696, 40, 40, position="alibi", rope=None)
_BAICHUAN2: dict[str, Any] = {"family": "baichuan2", "vocab_size": 125_696, "norm_head": True}
_ZIYA_13B = replace(_LLAMA_13B, vocab_size=39_424)

_BLOOMS = {
    "560m": _resized(_BLOOM_7B1, 1024, 4096, 24, 16),
    "1b1": _resized(_BLOOM_7B1, 1536, 6144, 24, 16),
    "1b7": _resized(_BLOOM_7B1, 2048, 8192, 24, 16),
    "3b": _resized(_BLOOM_7B1, 2560, 10_240, 30, 32),
    "7b1": _BLOOM_7B1,
}

PRESETS: dict[str, BackboneConfig] = {
    "llama_7b": _LLAMA_7B,
    "llama_13b": _LLAMA_13B,
    "llama_33b": _resized(_LLAMA_7B, 6656, 17_920, 60, 52),
    "llama_65b": _resized(_LLAMA_7B, 8192, 22_016, 80, 64, norm_eps=1e-5),
    "llama2_7b": replace(_LLAMA_7B, **_LLAMA2),
    "llama2_13b": replace(_LLAMA_13B, **_LLAMA2),
    "llama2_70b": _resized(_LLAMA_7B, 8192, 28_672, 80, 64, 8, **_LLAMA2),
    "llama3_8b": _LLAMA3_8B,
    "llama3_70b": _LLAMA3_70B,
    "llama3.1_8b": replace(_LLAMA3_8B, **_LLAMA31),
    "llama3.1_70b": replace(_LLAMA3_70B, **_LLAMA31),
    "llama3.2_1b": _resized(_LLAMA3_8B, 2048, 8192, 16, 32, 8, **_LLAMA32),
    "llama3.2_3b": _resized(_LLAMA3_8B, 3072, 8192, 28, 24, 8, **_LLAMA32),
    "ziya_llama_13b": _ZIYA_13B,
    "yi_6b": _YI_6B,
    "yi_34b": _resized(_YI_6B, 7168, 20_480, 60, 56, 8),
    "mistral_7b": _MISTRAL_7B,
    "qwen2_0.5b": _QWEN2_0_5B,
    "qwen2_1.5b": _QWEN2_1_5B,
    "qwen2_7b": _QWEN2_7B,
    "qwen2.5_0.5b": replace(_QWEN2_0_5B, max_positions=32_768),
    "qwen2.5_1.5b": _QWEN2_1_5B,
    "qwen2.5_3b": _resized(_QWEN2_SMALL, 2048, 11_008, 36, 16, 2, max_positions=32_768),
    "qwen2.5_7b": _QWEN2_7B,
    "qwen2.5_14b": _resized(_QWEN2_7B, 5120, 13_824, 48, 40, 8, norm_eps=1e-5),
    "qwen2.5_32b": _resized(_QWEN2_7B, 5120, 27_648, 64, 40, 8, norm_eps=1e-5),
    "qwen2.5_72b": _resized(_QWEN2_7B, 8192, 29_568, 80, 64, 8, norm_eps=1e-5),
    "qwen3_0.6b": _resized(_QWEN3_SMALL, 1024, 3072, 28, 16, 8, head_dim=128),
    "qwen3_1.7b": _resized(_QWEN3_SMALL, 2048, 6144, 28, 16, 8, head_dim=128),
    "qwen3_4b": _resized(_QWEN3_SMALL, 2560, 9728, 36, 32, 8, head_dim=128),
    "qwen3_8b": _QWEN3_8B,
    "qwen3_14b": _resized(_QWEN3_8B, 5120, 17_408, 40, 40, 8, head_dim=128),
    "qwen3_32b": _resized(_QWEN3_8B, 5120, 25_600, 64, 64, 8, head_dim=128),
    **{f"bloom_{size}": cfg for size, cfg in _BLOOMS.items()},
    **{f"bloomz_{size}": cfg for size, cfg in _BLOOMS.items()},
    "baichuan_7b": _BAICHUAN_7B,
    "baichuan_13b": _BAICHUAN_13B,
    "baichuan2_7b": replace(_BAICHUAN_7B, **_BAICHUAN2),
    "baichuan2_13b": replace(_BAICHUAN_13B, **_BAICHUAN2),
    # The bases HuatuoGPT was trained from (arXiv 2305.15075).
    "huatuogpt_7b": _BAICHUAN_7B,
    "huatuogpt_13b": _ZIYA_13B,
}


def preset(name: str) -> BackboneConfig:
    """Returns a published architecture.

    Args:
        name: family and size, as `llama3.1_8b` or `huatuogpt_7b`; a key of `PRESETS`.

    Raises:
        ValueError: no preset has this name; lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
