import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig
from huatuo_jax.backbone.lora import LoraConfig, init_adapters, merge
from huatuo_jax.backbone.transformer import Transformer, abstract_params

COMPUTE = ComputeConfig()
# Compiling takes most of the time here.

GATED = BackboneConfig(
    family="llama",
    vocab_size=32,
    vocab_multiple=16,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    max_positions=64,
)
UNGATED = dataclasses.replace(
    GATED,
    family="bloom",
    num_kv_heads=6,
    norm="layer",
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
UNGATED_TARGETS = ("query", "key", "value", "output", "up", "down")
ALL_TARGETS = (*UNGATED_TARGETS, "gate")

CASES = [
    *[(GATED, (target,)) for target in ALL_TARGETS],
    *[(UNGATED, (target,)) for target in UNGATED_TARGETS],
    (GATED, ALL_TARGETS),
    (UNGATED, UNGATED_TARGETS),
    (GATED, ("value", "query")),
]


def lora_config(targets: tuple[str, ...]) -> LoraConfig:
    return LoraConfig(rank=3, alpha=12.0, targets=targets)


@functools.cache
def weights(cfg: BackboneConfig) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: generator.normal(size=x.shape).astype(np.float32) * 0.3,
        abstract_params(cfg, COMPUTE),
    )


@functools.cache
def fresh_adapters(cfg: BackboneConfig, targets: tuple[str, ...]) -> dict[str, Any]:
    return init_adapters(jax.random.key(0), cfg, lora_config(targets))


def trained_adapters(cfg: BackboneConfig, targets: tuple[str, ...]) -> dict[str, Any]:
    generator = np.random.default_rng(1)
    shapes = jax.eval_shape(
        functools.partial(init_adapters, cfg=cfg, lora=lora_config(targets)), jax.random.key(0)
    )
    return jax.tree.map(lambda x: generator.normal(size=x.shape).astype(np.float32) * 0.2, shapes)


TOKENS_BT = np.random.default_rng(2).integers(0, 32, (2, 11), dtype=np.int32)


def hidden_of(variables: Any, cfg: BackboneConfig, lora: LoraConfig | None) -> jax.Array:
    return Transformer(cfg, COMPUTE, lora).apply(variables, TOKENS_BT)


run = jax.jit(hidden_of, static_argnames=("cfg", "lora"))


def frozen(cfg: BackboneConfig) -> jax.Array:
    return run({"params": weights(cfg)}, cfg, None)


@pytest.mark.parametrize(("cfg", "targets"), CASES[-3:])
def test_fresh_adapters_change_nothing(cfg, targets):
    variables = {"params": weights(cfg), "lora": fresh_adapters(cfg, targets)}
    np.testing.assert_array_equal(run(variables, cfg, lora_config(targets)), frozen(cfg))


@pytest.mark.parametrize(("cfg", "targets"), CASES)
def test_merged_weights_equal_adapted_ones(cfg, targets):
    lora, adapters = lora_config(targets), trained_adapters(cfg, targets)
    adapted = run({"params": weights(cfg), "lora": adapters}, cfg, lora)
    merged = merge(weights(cfg), adapters, cfg, lora)
    np.testing.assert_allclose(run({"params": merged}, cfg, None), adapted, atol=1e-5, rtol=1e-5)
    assert not np.allclose(adapted, frozen(cfg), atol=1e-2), "the adapters do something"


@pytest.mark.parametrize("cfg", [GATED, UNGATED])
def test_the_update_is_alpha_over_rank_times_b_a(cfg):
    """By hand for one query head: group and place of its columns in the fused kernel."""
    adapters = trained_adapters(cfg, ("query",))
    merged = merge(weights(cfg), adapters, cfg, lora_config(("query",)))
    before, after = (
        tree["layers"]["attention"]["qkv"]["kernel"] for tree in (weights(cfg), merged)
    )
    layer, head = 1, 4
    group, place = divmod(head, cfg.num_heads // cfg.num_kv_heads)
    columns = slice(4 * place, 4 * place + 4)
    pair = adapters["layers"]["attention"]["query"]
    np.testing.assert_allclose(
        after[layer, :, group, columns] - before[layer, :, group, columns],
        12.0 / 3 * pair["a"][layer] @ pair["b"][layer, :, head],
        atol=1e-5,
    )
    keys_and_values = slice(4 * (cfg.num_heads // cfg.num_kv_heads), None)
    np.testing.assert_array_equal(after[..., keys_and_values], before[..., keys_and_values])


def test_merging_leaves_the_frozen_weights_and_their_dtype_alone():
    before = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), weights(GATED))
    copy = jax.tree.map(np.array, before)
    adapters = trained_adapters(GATED, ("output", "gate"))
    merged = merge(before, adapters, GATED, lora_config(("output", "gate")))
    for leaf, kept in zip(jax.tree.leaves(before), jax.tree.leaves(copy), strict=True):
        np.testing.assert_array_equal(leaf, kept)
    assert jax.tree.structure(merged) == jax.tree.structure(before)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {np.dtype(jnp.bfloat16)}
    changed = {
        "/".join(key.key for key in path)
        for path, same in jax.tree_util.tree_leaves_with_path(
            jax.tree.map(lambda x, y: bool(jnp.all(x == y)), before, merged)
        )
        if not same
    }
    assert changed == {"layers/attention/output/kernel", "layers/mlp/gate_up/kernel"}


@pytest.mark.parametrize(("cfg", "targets"), CASES[-3:-1])
def test_every_adapter_gets_a_gradient_and_training_starts_at_b(cfg, targets):
    lora = lora_config(targets)

    def loss(adapters):
        hidden_BTD = hidden_of({"params": weights(cfg), "lora": adapters}, cfg, lora)
        return jnp.square(hidden_BTD - 1.0).sum()

    gradient = jax.jit(jax.grad(loss))
    for leaf in jax.tree.leaves(gradient(trained_adapters(cfg, targets))):
        assert np.all(np.linalg.norm(leaf.reshape(cfg.num_layers, -1), axis=1) > 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(fresh_adapters(cfg, targets))):
        assert np.any(leaf != 0) == (path[-1].key == "b"), path


def test_without_the_collection_the_model_is_the_frozen_one():
    lora = lora_config(ALL_TARGETS)
    np.testing.assert_array_equal(run({"params": weights(GATED)}, GATED, lora), frozen(GATED))


def test_fresh_adapters_have_variance_one_over_fan_in_and_b_zero():
    cfg = dataclasses.replace(GATED, hidden_size=256, intermediate_size=512, num_layers=3)
    lora = LoraConfig(rank=8, alpha=8.0)
    adapters = init_adapters(jax.random.key(0), cfg, lora, dtype=jnp.bfloat16)
    fan_in = {"output": cfg.num_heads * cfg.head_dim, "down": 512}
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapters):
        assert leaf.dtype == jnp.bfloat16 and leaf.shape[0] == 3
        if path[-1].key == "b":
            assert np.all(leaf == 0)
        else:
            wanted = fan_in.get(path[-2].key, 256) ** -0.5
            # Four standard errors of an estimate from `size` numbers.
            error = 4 / np.sqrt(2 * leaf.size)
            assert abs(np.asarray(leaf, np.float32).std() / wanted - 1) < error, path


def test_shapes_follow_the_projections():
    shapes = jax.tree.map(jnp.shape, fresh_adapters(GATED, ALL_TARGETS))
    attention, mlp = shapes["layers"]["attention"], shapes["layers"]["mlp"]
    assert attention["query"] == {"a": (2, 16, 3), "b": (2, 3, 6, 4)}
    assert attention["key"] == attention["value"] == {"a": (2, 16, 3), "b": (2, 3, 2, 4)}
    assert attention["output"] == {"a": (2, 6, 4, 3), "b": (2, 3, 16)}
    assert mlp["gate"] == mlp["up"] == {"a": (2, 16, 3), "b": (2, 3, 24)}
    assert mlp["down"] == {"a": (2, 24, 3), "b": (2, 3, 16)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ("query", "q_proj")}, r"LoraConfig.targets has \['q_proj'\]; known are"),
        ({"targets": ()}, "must name each target once"),
        ({"targets": ("up", "up")}, "must name each target once"),
        ({"rank": 0}, "LoraConfig.rank=0 must be at least 1"),
    ],
)
def test_adapters_that_cannot_be_say_why(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**{"rank": 4, "alpha": 8.0, **fields})


def test_a_gate_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="'gate', which family 'bloom' lacks"):
        init_adapters(jax.random.key(0), UNGATED, LoraConfig(rank=4, alpha=8.0))
