"""What a transformer is (`BackboneConfig`) and how it is computed (`ComputeConfig`)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

import jax.numpy as jnp
from jax.typing import DTypeLike

Family = Literal["llama", "mistral", "qwen2", "qwen3", "bloom", "baichuan", "baichuan2"]
RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3"]
Remat = Literal["none", "full", "dots", "outputs"]
Kernel = Literal["auto", "xla", "cudnn", "splash"]


def _check_choices(cfg: Any) -> None:
    """Raise for any field declared as a Literal that holds something else."""
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
    """Raise unless the mapping has exactly the fields of a dataclass."""
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
        low_freq_factor: `llama3`: wavelengths above original / this are scaled in full.
        high_freq_factor: `llama3`: wavelengths below original / this are left alone.
        beta_fast: `yarn`: rotations above which a dimension is left alone.
        beta_slow: `yarn`: rotations below which a dimension is interpolated in full.
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
        """Raise ValueError for a field that cannot be."""
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
    """One decoder-only transformer, told apart by its features.

    Attributes:
        family: whose Hugging Face layout the weights go back to.
        vocab_size: rows of the embedding that stand for tokens.
        vocab_multiple: the embedding is padded to a multiple of this, so that any usual tensor
            axis divides it; padded rows never receive probability and are not exported.
        hidden_size: width D of the residual stream.
        intermediate_size: width F of the feed-forward layer.
        num_layers: number L of layers.
        num_heads: number N of query heads.
        num_kv_heads: number K of key/value heads; each serves N / K query heads.
        head_dim: width H of a head.
        max_positions: context length the model is meant for.
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
        """Raise ValueError for a field that cannot be."""
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
        """V: `vocab_size` rounded up to a multiple of `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def queries_per_kv_head(self) -> int:
        """How many query heads read one key/value head."""
        return self.num_heads // self.num_kv_heads

    def require_fixed_angles(self, length: int, *, purpose: str) -> None:
        """Raise ValueError where `purpose` needs a token's angles not to depend on other tokens.

        Under `dynamic` rotary scaling the longest position of a batch sets every token's angles as
        soon as it passes the original length: packed rows and cached keys would then be wrong.

        Args:
            length: tokens a row can hold.
            purpose: what needs it, for the message ("packing").
        """
        rope = self.rope
        if rope and rope.rope_type == "dynamic" and length > (rope.original_max_positions or 0):
            raise ValueError(
                f"{purpose} to {length} tokens does not work with rope_type='dynamic' past its "
                f"original {rope.original_max_positions}: angles would depend on the batch; "
                f"use length <= {rope.original_max_positions}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "BackboneConfig":
        """The config that `to_dict` gave; ValueError names fields that are unknown or missing."""
        _check_names(cls, fields)
        rope = fields["rope"]
        if rope is not None:
            _check_names(RopeConfig, rope)
        return cls(**{**fields, "rope": None if rope is None else RopeConfig(**rope)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a backbone is computed; changing it changes rounding and speed, never the model.

    Attributes:
        param_dtype: dtype fresh parameters are made in (float32 where they are trained).
        compute_dtype: dtype of matrix products and of the residual stream.
        output_dtype: dtype of logits and scores, at least float32.
        remat: what the backward pass recomputes inside a layer: `none` saves everything, `full`
            saves only the layer's input, `dots` saves the results of matrix products with weights,
            `outputs` saves those of the attention and feed-forward blocks.
        kernel: the attention kernel, `auto` for the fit one of the platform of the mesh in use.
        query_chunk: queries at a time in the XLA attention; more where a row would take over 16
            chunks.
    """

    param_dtype: DTypeLike = jnp.float32
    compute_dtype: DTypeLike = jnp.float32
    output_dtype: DTypeLike = jnp.float32
    remat: Remat = "none"
    kernel: Kernel = "auto"
    query_chunk: int = 256

    def __post_init__(self) -> None:
        """Raise ValueError for a field that cannot be."""
        _check_choices(self)
        _check_positive(self, ("query_chunk",))
        if jnp.finfo(self.output_dtype).bits < 32:
            raise ValueError(
                f"ComputeConfig.output_dtype={self.output_dtype!r}: log-probabilities need at "
                "least float32"
            )
