"""Reading config.json: what is ignored, what is refused, and what the user may ignore."""

import logging

import pytest

from huatuo_jax.hf import config as hf_config
from huatuo_jax.hf.config import from_hugging_face
from tests.hf import tiny_checkpoints

BOOKKEEPING = {
    "_attn_implementation_autoset": True,
    "unsloth_fixed": True,
    "unsloth_version": "2025.3.19",
    "license": "apache-2.0",
    "tags": ["medical"],
    "model_name": "tiny",
}


@pytest.fixture
def config():
    return tiny_checkpoints.config_of("llama").to_dict()


def test_bookkeeping_is_ignored_with_one_warning(config, caplog):
    hf_config._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        found = [from_hugging_face(config | BOOKKEEPING) for _ in range(3)]
    assert found == 3 * [from_hugging_face(config)]
    (line,) = [record.getMessage() for record in caplog.records if "ignored" in record.message]
    assert all(name in line for name in BOOKKEEPING)


@pytest.mark.parametrize(
    "field",
    [
        {"quantization_config": {"bits": 4}},
        {"quantization": {"bits": 4}},
        {"logit_scale": 0.1},
        {"attention_multiplier": 2.0},
        {"is_causal": False},
    ],
)
def test_what_may_change_the_mathematics_is_refused(config, field):
    with pytest.raises(ValueError, match=f"config.json: .*{next(iter(field))}="):
        from_hugging_face(config | field)


def test_the_user_may_ignore_what_is_unknown_and_nothing_that_is_read(config):
    unknown = {"hospital": "third", "ward": 7}
    assert from_hugging_face(config | unknown, ignored=unknown) == from_hugging_face(config)
    with pytest.raises(ValueError, match=r"not supported for model_type 'llama': ward=7; if"):
        from_hugging_face(config | unknown, ignored=("hospital",))
    with pytest.raises(ValueError, match="rms_norm_eps of config.json cannot be ignored"):
        from_hugging_face(config, ignored=("rms_norm_eps",))


@pytest.mark.parametrize(
    "old",
    [
        {"rope_theta": 500_000.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 7.0}},
    ],
)
def test_two_spellings_of_the_rotary_settings_that_differ_are_refused(config, old):
    with pytest.raises(ValueError, match="differs from"):
        from_hugging_face(config | old)
    same = {"rope_theta": config["rope_parameters"]["rope_theta"], "rope_scaling": None}
    assert from_hugging_face(config | same) == from_hugging_face(config)
