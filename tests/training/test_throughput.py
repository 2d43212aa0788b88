"""The FLOPs formula against counts by hand and against XLA's own."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from huatuo_jax.backbone.config import ComputeConfig, preset
from huatuo_jax.backbone.transformer import Transformer, abstract_params, count_parameters
from huatuo_jax.training.metrics import ModelFlops, peak_flops
from huatuo_jax.training.wall_time import StepClock
from tests.training.tiny import TINY


@pytest.mark.parametrize("name", ["llama_7b", "qwen2.5_0.5b", "bloom_560m", "mistral_7b"])
def test_matrix_parameters_are_all_but_embedding_norms_and_biases(name):
    cfg = dataclasses.replace(preset(name), vocab_multiple=1)
    params = abstract_params(cfg, ComputeConfig())
    kernels = sum(
        count_parameters(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params["layers"])
        if path[-1].key == "kernel"
    )
    flops = ModelFlops.of(cfg)
    assert flops.layers == kernels
    assert flops.head == cfg.vocab_size * cfg.hidden_size


def test_a_step_by_hand():
    flops = ModelFlops(layers=100, head=10, attention=4)
    assert flops.of_step(tokens=7, scored_tokens=3, attended_pairs=28) == (
        6 * (100 * 7 + 10 * 3) + 12 * 4 * 28
    )
    frozen = dataclasses.replace(flops, per_parameter=4)
    assert frozen.of_step(tokens=1, scored_tokens=0, attended_pairs=0) == 400


def test_the_forward_pass_is_a_third_of_what_xla_counts():
    """One layer (XLA counts a scanned one once); attention over all pairs, as XLA computes it."""
    cfg = dataclasses.replace(TINY, num_layers=1, vocab_size=96, hidden_size=128, head_dim=32)
    model, tokens = Transformer(cfg), jnp.zeros((2, 16), jnp.int32)

    def forward(params):
        hidden = model.apply({"params": params}, tokens)
        return model.apply({"params": params}, hidden, method="logits")

    params = abstract_params(cfg, ComputeConfig())
    counted = jax.jit(forward).lower(params).compile().cost_analysis()["flops"]
    formula = ModelFlops.of(cfg).of_step(tokens=32, scored_tokens=32, attended_pairs=2 * 16 * 16)
    assert formula / 3 == pytest.approx(counted, rel=0.1)


def test_a_device_without_a_known_peak_has_none():
    assert peak_flops(jax.devices("cpu")[0]) is None
    assert peak_flops(types.SimpleNamespace(device_kind="TPU v4")) == 275e12


def test_the_clock_never_waits_longer_than_the_step():
    clock = StepClock()
    clock.add_wait(1e6)
    took, waited = clock.step()
    assert 0 < took < 1e3 and waited == took
    _, waited = clock.step()
    assert waited == 0.0
