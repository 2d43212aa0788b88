"""What a run releases: written, read back and compared in the host's memory."""

import pathlib

import jax
import numpy as np
import pytest

from huatuo_jax import sharding
from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import init_params
from huatuo_jax.checkpoint import convert, models, verify
from huatuo_jax.rlaif import export
from huatuo_jax.rlaif.config import ExportConfig
from tests.rlaif.tiny import BACKBONE, TOKENIZER

HOST = 5  # The device that stands for the host's CPU: no other of the eight may hold a weight.


@pytest.fixture
def cfg(tmp_path):
    for seed, (name, head) in enumerate({"policy": "lm", "reward": "score"}.items()):
        params = init_params(jax.random.key(seed), BACKBONE, ComputeConfig(), head=head)
        models.save_orbax(
            params, BACKBONE, tmp_path / name, head=head, source_folder=pathlib.Path(TOKENIZER)
        )
    return ExportConfig(policy=str(tmp_path / "policy"), reward=str(tmp_path / "reward"))


@pytest.fixture
def places(monkeypatch):
    """The devices of every model that is loaded."""
    found, load_params = [], models.load_params

    def load(*arguments, **keywords):
        params = load_params(*arguments, **keywords)
        found.append({device for leaf in jax.tree.leaves(params) for device in leaf.devices()})
        return params

    host = sharding.make_mesh(devices=jax.devices()[HOST : HOST + 1])
    monkeypatch.setattr(sharding, "host_mesh", lambda: host)
    for module in (convert, models, verify):
        monkeypatch.setattr(module, "load_params", load)
    return found


def test_an_export_needs_the_memory_of_the_host_alone(cfg, places, tmp_path):
    found = export.run_export(cfg, tmp_path / "export")
    for name in ("policy", "reward"):
        params = models.load_params(models.find_model(tmp_path / name))
        assert found[name]["weights"] == sum(leaf.size for leaf in jax.tree.leaves(params))
        assert found[name]["transformers"]["num_tokens"] > 0  # It was compared.
        assert places.pop() != {jax.devices()[HOST]}, "what this very test has read"
    # Each is written, compared with what it came from, and with transformers.
    assert places == 2 * 4 * [{jax.devices()[HOST]}]


def test_an_export_that_differs_is_refused(cfg, places, monkeypatch, tmp_path):
    load_params = models.load_params

    def load(model, **keywords):
        params = load_params(model, **keywords)
        if model.form == "hugging_face":
            params["final_norm"]["scale"] += np.float32(1e-7)
        return params

    monkeypatch.setattr(models, "load_params", load)
    with pytest.raises(ValueError, match="export/policy: written, but its weights are not those"):
        export.run_export(cfg, tmp_path / "export")
