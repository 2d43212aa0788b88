"""Published architectures by name, as their own `config.json` files describe them.

Where a family has base and instruction-tuned releases that differ in `norm_eps` or
`max_positions`, the base release is meant.
"""

from dataclasses import replace
from typing import Any

from huatuo_jax.backbone.config import BackboneConfig, RopeConfig

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
    """The base at another size; without a `head_dim`, heads share the width out evenly."""
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
_BLOOM_7B1 = BackboneConfig(
    family="bloom",
    vocab_size=250_880,
    hidden_size=4096,
    intermediate_size=16_384,
    num_layers=30,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    max_positions=2048,
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
    """A published architecture.

    Args:
        name: family and size, as `llama3.1_8b` or `huatuogpt_7b`; `PRESETS` has them all.

    Raises:
        ValueError: no preset has this name; lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
