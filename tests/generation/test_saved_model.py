import json

import pytest

from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.generation.requests import SamplingConfig
from huatuo_jax.generation.saved_model import open_saved_model


@pytest.fixture()
def told(model_folder, tmp_path):
    """The model's default sampling beside a generation config."""
    saved = open_saved_model(str(model_folder), head="lm", mesh=MeshConfig(data=-1, fsdp=1))

    def sampling(**fields):
        for path in model_folder.iterdir():
            if path.is_file():
                (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / "generation_config.json").write_text(json.dumps(fields), encoding="utf-8")
        object.__setattr__(saved.info, "folder", tmp_path)
        return saved.default_sampling()

    return sampling


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, {"temperature": 0.0}),
        ({"temperature": 0.7, "top_p": 0.9, "do_sample": False}, {"temperature": 0.0}),
        ({"repetition_penalty": 1.1}, {"temperature": 0.0, "repetition_penalty": 1.1}),
        ({"max_new_tokens": 9}, {"temperature": 0.0, "max_new_tokens": 9}),
        ({"do_sample": True}, {"top_k": 50}),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": None},
            {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
        ),
    ],
)
def test_default_sampling_is_that_of_transformers_on_the_same_file(told, fields, wanted):
    assert told(**fields) == SamplingConfig(**wanted)


def test_a_generation_config_that_cannot_be_is_named(told):
    with pytest.raises(ValueError, match=r"generation_config.json: .*temperature=-1 must be"):
        told(do_sample=True, temperature=-1)
    with pytest.raises(ValueError, match=r"generation_config.json: top_p='much' must be a number"):
        told(do_sample=True, top_p="much")
