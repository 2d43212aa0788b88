import dataclasses
import json

import jax.numpy as jnp
import pytest

from huatuo_jax.backbone.config import PRESETS, BackboneConfig, ComputeConfig, RopeConfig

TINY = BackboneConfig(
    family="llama",
    vocab_size=90,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
)


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_comes_back_from_json_as_it_was(name):
    cfg = PRESETS[name]
    assert BackboneConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_an_unknown_field_is_named():
    with pytest.raises(ValueError, match="BackboneConfig has no field num_experts, top_k"):
        BackboneConfig.from_dict({**TINY.to_dict(), "top_k": 2, "num_experts": 8})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "gpt2"}, "BackboneConfig.family='gpt2' is not one of"),
        ({"norm": "batch"}, "BackboneConfig.norm='batch' is not one of"),
        ({"activation": "relu"}, "BackboneConfig.activation='relu' is not one of"),
        ({"position": "learned"}, "BackboneConfig.position='learned' is not one of"),
        ({"num_layers": 0}, "BackboneConfig.num_layers=0 must be above 0"),
        ({"vocab_size": -1}, "BackboneConfig.vocab_size=-1 must be above 0"),
        ({"sliding_window": 0}, "BackboneConfig.sliding_window=0 must be above 0"),
        ({"norm_eps": 0.0}, "BackboneConfig.norm_eps=0.0 must be above 0"),
        ({"num_kv_heads": 3}, "BackboneConfig.num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"rope": None}, "position='rope' with rope=None"),
        ({"position": "alibi"}, "position='alibi' with rope=RopeConfig"),
        ({"head_dim": 7}, "BackboneConfig.head_dim=7 must be even to rotate"),
        ({"norm_head": True, "tie_embeddings": True}, "norm_head=True needs tie_embeddings=False"),
    ],
)
def test_a_backbone_that_cannot_be_says_which_field(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_type": "longrope"}, "RopeConfig.rope_type='longrope' is not one of"),
        ({"theta": 0.0}, "RopeConfig.theta=0.0 must be above 0"),
        ({"rope_type": "linear", "factor": -2.0}, "RopeConfig.factor=-2.0 must be above 0"),
        ({"rope_type": "yarn"}, "original_max_positions=None: rope_type='yarn' needs"),
        ({"rope_type": "dynamic"}, "original_max_positions=None: rope_type='dynamic' needs"),
        (
            {"rope_type": "llama3", "original_max_positions": 8192, "low_freq_factor": 4.0},
            "RopeConfig.low_freq_factor=4.0 must be below high_freq_factor=4.0",
        ),
    ],
)
def test_rotary_settings_that_cannot_be_say_which_field(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"remat": "half"}, "ComputeConfig.remat='half' is not one of"),
        ({"kernel": "flash"}, "ComputeConfig.kernel='flash' is not one of"),
        ({"query_chunk": 0}, "ComputeConfig.query_chunk=0 must be above 0"),
        ({"output_dtype": jnp.bfloat16}, "log-probabilities need at least float32"),
        ({"output_dtype": "float16"}, "log-probabilities need at least float32"),
    ],
)
def test_a_computation_that_cannot_be_says_which_field(fields, message):
    with pytest.raises(ValueError, match=message):
        ComputeConfig(**fields)


@pytest.mark.parametrize(
    ("vocab_size", "multiple", "padded"),
    [(90, 128, 128), (128, 128, 128), (129, 128, 256), (90, 1, 90), (91, 8, 96)],
)
def test_the_vocabulary_is_padded_to_the_next_multiple(vocab_size, multiple, padded):
    cfg = dataclasses.replace(TINY, vocab_size=vocab_size, vocab_multiple=multiple)
    assert cfg.padded_vocab_size == padded


def test_only_dynamic_angles_past_their_original_length_depend_on_other_tokens():
    rope = RopeConfig(rope_type="dynamic", factor=2.0, original_max_positions=64)
    dynamic = dataclasses.replace(TINY, rope=rope)
    dynamic.require_fixed_angles(64, purpose="packing")
    with pytest.raises(ValueError, match="packing to 65 tokens .* use length <= 64"):
        dynamic.require_fixed_angles(65, purpose="packing")
    others = [dataclasses.replace(rope, rope_type=kind) for kind in ("default", "linear", "yarn")]
    for other in (*others, dataclasses.replace(rope, rope_type="llama3")):
        dataclasses.replace(TINY, rope=other).require_fixed_angles(10_000, purpose="packing")
    alibi = dataclasses.replace(TINY, rope=None, position="alibi")
    alibi.require_fixed_angles(10_000, purpose="packing")
