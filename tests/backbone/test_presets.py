import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from huatuo_jax.backbone.config import PRESETS, BackboneConfig, ComputeConfig, preset
from huatuo_jax.backbone.transformer import abstract_params, count_parameters
from huatuo_jax.checkpoint.models import architecture_of
from huatuo_jax.core import sharding
from huatuo_jax.hf.config import from_hugging_face, to_hugging_face

COMPUTE = ComputeConfig()

# As published: the sum over the tensors of each release, tied heads counted once.
PUBLISHED_COUNTS = {
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
    "llama_33b": 32_528_943_616,
    "llama_65b": 65_285_660_672,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3.1_8b": 8_030_261_248,
    "llama3.2_1b": 1_235_814_400,
    "llama3.2_3b": 3_212_749_824,
    "yi_6b": 6_061_035_520,
    "yi_34b": 34_388_917_248,
    "mistral_7b": 7_241_732_096,
    "qwen2_0.5b": 494_032_768,
    "qwen2_1.5b": 1_543_714_304,
    "qwen2_7b": 7_615_616_512,
    "qwen2.5_0.5b": 494_032_768,
    "qwen2.5_1.5b": 1_543_714_304,
    "qwen2.5_3b": 3_085_938_688,
    "qwen2.5_7b": 7_615_616_512,
    "qwen2.5_14b": 14_770_033_664,
    "qwen2.5_32b": 32_763_876_352,
    "qwen2.5_72b": 72_706_203_648,
    "qwen3_0.6b": 596_049_920,
    "qwen3_1.7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "bloom_560m": 559_214_592,
    "bloomz_560m": 559_214_592,
    "bloom_1b1": 1_065_314_304,
    "bloom_1b7": 1_722_408_960,
    "bloom_3b": 3_002_557_440,
    "bloom_7b1": 7_069_016_064,
    "bloomz_7b1": 7_069_016_064,
    "baichuan_7b": 7_000_559_616,
    "baichuan_13b": 13_264_901_120,
    "baichuan2_7b": 7_505_973_248,
    "baichuan2_13b": 13_896_668_160,
    "huatuogpt_7b": 7_000_559_616,
}

# Two key/value heads cannot be split over four devices.
TWO_KV_HEADS = {"qwen2_0.5b", "qwen2_1.5b", "qwen2.5_0.5b", "qwen2.5_1.5b", "qwen2.5_3b"}


def pod_mesh() -> AbstractMesh:
    return AbstractMesh((1, 16, 4), sharding.AXES, (AxisType.Auto,) * 3)


@functools.cache
def abstract(name: str) -> dict[str, Any]:
    return abstract_params(preset(name), COMPUTE)


def transformers_config(cfg: BackboneConfig) -> transformers.PreTrainedConfig:
    """The same architecture in transformers' words; Baichuan-7B is a LLaMA there."""
    if cfg.family == "bloom":
        return transformers.BloomConfig(
            vocab_size=cfg.vocab_size,
            hidden_size=cfg.hidden_size,
            n_layer=cfg.num_layers,
            n_head=cfg.num_heads,
        )
    class_of = {
        "llama": transformers.LlamaConfig,
        "baichuan": transformers.LlamaConfig,
        "baichuan2": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }[cfg.family]
    return class_of(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        tie_word_embeddings=cfg.tie_embeddings,
    )


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_presets_have_exactly_the_published_parameter_counts(name):
    cfg = preset(name)
    assert cfg.padded_vocab_size == cfg.vocab_size, "padded rows would be counted"
    assert count_parameters(abstract(name)) == PUBLISHED_COUNTS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_count_as_transformers_own_models_do(name):
    # Two layers tell as much as eighty, and the published counts above hold the number of layers.
    cfg = dataclasses.replace(preset(name), num_layers=2)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers_config(cfg))
    assert count_parameters(abstract_params(cfg, COMPUTE)) == model.num_parameters()


@pytest.mark.parametrize("name", sorted(set(PRESETS) - TWO_KV_HEADS))
def test_presets_split_over_a_pod_almost_evenly(name):
    params = abstract(name)
    shardings = sharding.parameter_shardings(params, pod_mesh())
    held = jax.tree.map(lambda leaf, s: math.prod(s.shard_shape(leaf.shape)), params, shardings)
    # Norms and some biases are held whole by each of the 64 chips.
    assert sum(jax.tree.leaves(held)) < 1.05 * count_parameters(params) / 64


@pytest.mark.parametrize("name", ["llama_7b", "bloom_560m", "baichuan2_13b", "qwen3_0.6b"])
def test_reward_models_match_their_partition_rules_on_a_pod(name):
    params = abstract_params(preset(name), COMPUTE, head="score")
    shardings = sharding.parameter_shardings(params, pod_mesh())
    assert shardings["score_head"]["kernel"].spec == PartitionSpec("fsdp", None)
    assert "lm_head" not in params


@pytest.mark.parametrize("name", sorted(TWO_KV_HEADS))
def test_two_key_value_heads_do_not_split_over_four_devices_and_the_error_says_so(name):
    cfg = preset(name)
    params = abstract(name)
    with pytest.raises(ValueError) as caught:
        sharding.parameter_shardings(params, pod_mesh())
    message = str(caught.value)
    assert "parameter 'layers/attention/" in message and "dimension 1 of" in message
    assert f" is {2 if cfg.num_heads % 4 == 0 else cfg.num_heads}, " in message
    assert "axis 'tensor' of size 4 does not divide" in message
    halved = AbstractMesh((1, 16, 2), sharding.AXES, (AxisType.Auto,) * 3)
    sharding.parameter_shardings(params, halved)


# What the published `config.json` of each says, apart from what is the class's own default.
PUBLISHED_QWEN3 = {
    "Qwen/Qwen3-0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-8B": {
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "max_window_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}


@pytest.mark.parametrize("name", PUBLISHED_QWEN3)
def test_qwen3s_published_config_is_its_preset_and_comes_out_of_it_again(name):
    published = transformers.Qwen3Config(
        **PUBLISHED_QWEN3[name],
        vocab_size=151_936,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        rms_norm_eps=1e-6,
        rope_theta=1_000_000,
        attention_bias=False,
    )
    cfg = from_hugging_face(published.to_dict())
    assert cfg == architecture_of(name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(published)
    assert count_parameters(abstract_params(cfg, COMPUTE)) == model.num_parameters()
    made = transformers.Qwen3Config(**to_hugging_face(cfg, head="lm", dtype=np.dtype("float32")))
    assert from_hugging_face(made.to_dict()) == cfg
    fields = (*PUBLISHED_QWEN3[name], "vocab_size", "num_key_value_heads", "head_dim")
    fields += ("rms_norm_eps", "max_position_embeddings", "rope_parameters")
    same = {one for one in fields if getattr(made, one) == getattr(published, one)}
    assert same >= set(fields) - {"max_window_layers"}  # Of sliding windows, which there are none.


def test_an_unknown_preset_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="'llama9_1b'.*llama_7b.*huatuogpt_13b"):
        preset("llama9_1b")


def test_huatuogpt_stands_on_baichuan_and_ziya():
    assert preset("huatuogpt_7b") == preset("baichuan_7b")
    assert preset("huatuogpt_13b") == preset("ziya_llama_13b")
    assert preset("ziya_llama_13b").vocab_size == 39_424


def test_presets_carry_the_details_that_no_count_shows():
    assert preset("llama_7b").norm_eps == 1e-6 and preset("llama_65b").norm_eps == 1e-5
    assert preset("llama2_70b").norm_eps == 1e-5 and preset("llama2_70b").max_positions == 4096
    assert preset("llama3_8b").rope.theta == 500_000.0
    assert preset("llama3.1_70b").rope.factor == 8.0
    assert preset("llama3.2_1b").rope.factor == 32.0
    assert preset("llama3.2_1b").head_dim == 64
    assert preset("yi_6b").rope.theta == 5_000_000.0
    assert preset("mistral_7b").sliding_window == 4096
    assert preset("qwen2.5_7b").rope.theta == 1_000_000.0 and preset("qwen2.5_7b").qkv_bias
    assert preset("qwen2.5_7b").norm_eps == 1e-6 and preset("qwen2.5_14b").norm_eps == 1e-5
    assert preset("qwen3_0.6b").qk_norm and preset("qwen3_0.6b").head_dim == 128
    assert preset("bloom_7b1").rope is None and preset("baichuan_13b").rope is None
    assert preset("baichuan_7b").rope is not None and preset("baichuan2_7b").rope is not None
    assert preset("baichuan2_13b").norm_head and preset("baichuan2_13b").position == "alibi"
