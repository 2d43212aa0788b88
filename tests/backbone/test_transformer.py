import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from huatuo_jax.backbone import layers
from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig
from huatuo_jax.backbone.transformer import (
    Transformer,
    abstract_params,
    count_parameters,
    init_params,
)
from huatuo_jax.core import sharding
from tests.tiny import GROUPED

COMPUTE = ComputeConfig()
# Compiling takes most of the time here.

LLAMA = GROUPED
MISTRAL = dataclasses.replace(LLAMA, family="mistral", sliding_window=5)
QWEN3 = dataclasses.replace(LLAMA, family="qwen3", qk_norm=True, tie_embeddings=True)
BLOOM = dataclasses.replace(
    LLAMA,
    family="bloom",
    num_kv_heads=4,
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
BAICHUAN2 = dataclasses.replace(
    LLAMA, family="baichuan2", num_kv_heads=4, position="alibi", rope=None, norm_head=True
)
FAMILIES = {cfg.family: cfg for cfg in (LLAMA, MISTRAL, QWEN3, BLOOM, BAICHUAN2)}


@functools.cache
def weights(cfg: BackboneConfig, head: str = "lm") -> dict[str, Any]:
    """Random everywhere: fresh biases and norms would hide a mistake in them."""
    generator = np.random.default_rng(0)
    shapes = abstract_params(cfg, COMPUTE, head=head)
    return jax.tree.map(lambda x: generator.normal(size=x.shape).astype(np.float32) * 0.3, shapes)


def logits_of(params, tokens_BT, segments_BT, *, cfg, compute=COMPUTE):
    """Logits of every token."""
    model = Transformer(cfg, compute)
    hidden_BTD = model.apply({"params": params}, tokens_BT, segment_ids_BT=segments_BT)
    return model.apply({"params": params}, hidden_BTD, method="logits")


score_tokens = jax.jit(logits_of, static_argnames=("cfg", "compute"))


def token_losses(logits_BTV, tokens_BT):
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV[:, :-1], tokens_BT[:, 1:])


def random_tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, LLAMA.vocab_size, shape, dtype=np.int32)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_score_like_separate_rows(family):
    cfg, tokens_BT = FAMILIES[family], random_tokens(1, 20)
    bounds = [(0, 7), (7, 8), (8, 18)]
    segments_BT = np.zeros((1, 20), np.int32)
    for segment, (start, end) in enumerate(bounds):
        segments_BT[:, start:end] = segment + 1
    packed_BTV = score_tokens(weights(cfg), tokens_BT, segments_BT, cfg=cfg)
    for start, end in bounds:
        # The same length again and again compiles once; what follows a segment it cannot see.
        row_BT = np.zeros((1, 20), np.int32)
        row_BT[:, : end - start] = tokens_BT[:, start:end]
        alone_BTV = score_tokens(weights(cfg), row_BT, None, cfg=cfg)[:, : end - start]
        np.testing.assert_allclose(packed_BTV[:, start:end], alone_BTV, atol=1e-5, rtol=1e-5)


@functools.partial(jax.jit, static_argnames=("cfg", "start", "end"))
def embedding_gradient(params, tokens_BT, segments_BT, *, cfg, start, end):
    """Of the logits of tokens `start` to `end`, with respect to every token's embedding."""
    model = Transformer(cfg, COMPUTE)

    def weighted_logits(embedded_BTD):
        hidden_BTD = model.apply(
            {"params": params}, embedded_BTD, segment_ids_BT=segments_BT, method="trunk"
        )
        logits_BTV = model.apply({"params": params}, hidden_BTD, method="logits")
        losses_BT = token_losses(logits_BTV, tokens_BT)
        return losses_BT[:, start:end].sum()

    embedded_BTD = model.apply({"params": params}, tokens_BT, method="embed")
    return jnp.abs(jax.grad(weighted_logits)(embedded_BTD)).max(axis=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_crosses_from_one_segment_to_another(family):
    cfg, tokens_BT = FAMILIES[family], random_tokens(1, 20)
    segments_BT = np.repeat(np.array([[1, 2, 3, 0]], np.int32), 5, axis=1)
    gradient_T = embedding_gradient(weights(cfg), tokens_BT, segments_BT, cfg=cfg, start=5, end=10)[
        0
    ]
    assert np.all(gradient_T[5:10] > 0)
    assert np.all(gradient_T[:5] == 0) and np.all(gradient_T[10:] == 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_comes_from_a_later_token(family):
    cfg, tokens_BT = FAMILIES[family], random_tokens(1, 20)
    gradient_T = embedding_gradient(weights(cfg), tokens_BT, None, cfg=cfg, start=9, end=10)[0]
    # Two layers of a window of five reach back twice four tokens.
    reach = 0 if cfg.sliding_window is None else 9 - cfg.num_layers * (cfg.sliding_window - 1)
    assert np.all(gradient_T[reach:10] > 0)
    assert np.all(gradient_T[:reach] == 0) and np.all(gradient_T[10:] == 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_leaves_real_tokens_as_they_are(family):
    cfg, tokens_BT = FAMILIES[family], random_tokens(2, 9)
    rows_BT, segments_BT = np.zeros((3, 2, 20), np.int32), np.zeros((3, 2, 20), np.int32)
    for place, start in enumerate((0, 4, 11)):
        rows_BT[place, :, start : start + 9], segments_BT[place, :, start : start + 9] = (
            tokens_BT,
            1,
        )
    right, both, left = (
        score_tokens(weights(cfg), rows_BT[place], segments_BT[place], cfg=cfg)[
            :, start : start + 9
        ]
        for place, start in enumerate((0, 4, 11))
    )
    np.testing.assert_allclose(left, right, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(both, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_wanted_tokens_of_a_tree_have_the_output_of_a_row_of_their_branch_alone(family):
    cfg = FAMILIES[family]
    model, variables = Transformer(cfg, COMPUTE), {"params": weights(cfg)}
    tokens_1T = random_tokens(1, 9)  # Three tokens, behind which stand branches of four and two.
    depths_1T = np.array([[0, 1, 2, 3, 4, 5, 6, 3, 4]], np.int32)
    ends_1T = np.array([[9, 9, 9, 7, 7, 7, 7, 9, 9]], np.int32)
    places_1P = np.array([[8, 1, 5]], np.int32)
    found_1PD = jax.jit(functools.partial(model.apply, method="at_places"))(
        variables, tokens_1T, places_1P, positions_BT=depths_1T, subtree_ends_BT=ends_1T
    )
    alone = jax.jit(model.apply)
    first_1TD = alone(variables, tokens_1T[:, :7])
    second_1TD = alone(variables, tokens_1T[:, [0, 1, 2, 7, 8]])
    expected_PD = np.stack([second_1TD[0, 4], first_1TD[0, 1], first_1TD[0, 5]])
    np.testing.assert_allclose(found_1PD[0], expected_PD, atol=1e-5)


def test_positions_given_by_hand_shift_nothing_but_are_heeded():
    tokens_BT = random_tokens(2, 9)
    model, variables = Transformer(LLAMA, COMPUTE), {"params": weights(LLAMA)}
    apply = jax.jit(lambda positions: model.apply(variables, tokens_BT, positions_BT=positions))
    index_BT = np.broadcast_to(np.arange(9, dtype=np.int32)[None], (2, 9))
    # Rotary positions are relative: a common shift changes rounding only, a gap changes the model.
    np.testing.assert_allclose(apply(index_BT + 40), apply(index_BT), atol=2e-5)
    assert not np.allclose(apply(index_BT * 2), apply(index_BT), atol=1e-2)
    default_BTD = jax.jit(lambda: model.apply(variables, tokens_BT))()
    np.testing.assert_allclose(default_BTD, apply(index_BT), atol=1e-6)


@functools.cache
def loss_and_gradient(compute: ComputeConfig):
    def loss(params, tokens_BT):
        return token_losses(
            logits_of(params, tokens_BT, None, cfg=LLAMA, compute=compute), tokens_BT
        ).mean()

    return jax.jit(jax.value_and_grad(loss))(weights(LLAMA), random_tokens(2, 20))


@pytest.mark.parametrize(
    "change",
    [{"remat": "full", "query_chunk": 8}, {"remat": "dots"}, {"remat": "outputs"}],
)
def test_remat_and_chunks_change_nothing_but_rounding(change):
    found = loss_and_gradient(dataclasses.replace(COMPUTE, **change))
    expected = loss_and_gradient(COMPUTE)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6, rtol=1e-5)


def kept(cfg: BackboneConfig, compute: ComputeConfig, tokens_BT: np.ndarray) -> list[Any]:
    """Arrays that a backward pass needs from the forward pass."""
    model = Transformer(cfg, compute)
    _, pullback = jax.eval_shape(
        lambda params: jax.vjp(lambda p: model.apply({"params": p}, tokens_BT).sum(), params),
        weights(cfg),
    )
    return jax.tree.leaves(pullback)


def test_remat_policies_save_less_and_less():
    def saved(remat):
        compute = dataclasses.replace(COMPUTE, remat=remat)
        return sum(leaf.size for leaf in kept(LLAMA, compute, random_tokens(2, 20)))

    assert saved("full") < saved("outputs") < saved("dots") < saved("none")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_keeps_each_product_s_result_once_and_nothing_twice(family, dtype):
    """Norms, rotations, activations and gates are computed again, attention's output kept once."""
    cfg, compute = FAMILIES[family], dataclasses.replace(COMPUTE, compute_dtype=dtype)
    rows, length = cfg.num_layers + 1, 20
    of_weights = {leaf.shape for leaf in jax.tree.leaves(weights(cfg))}
    numbers_a_token = sorted(
        leaf.size / (cfg.num_layers * rows * length)
        for leaf in kept(cfg, compute, random_tokens(rows, length))
        if leaf.shape[:1] == (cfg.num_layers,) and leaf.shape not in of_weights
    )
    queries, keys = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    expected = [cfg.hidden_size, cfg.hidden_size]  # Inputs of both norms.
    expected += [queries, keys, keys, queries, cfg.num_heads]  # Flash attention's.
    expected += [queries, keys] * cfg.qk_norm  # As they were before their norms.
    expected += [cfg.intermediate_size] * (1 + cfg.gated_mlp)
    assert numbers_a_token == sorted(expected)


@pytest.mark.parametrize(
    ("family", "vocab_size"), [("llama", 49), ("bloom", 51), ("baichuan2", 63)]
)
def test_padded_vocabulary_rows_get_no_probability_and_no_gradient(family, vocab_size):
    cfg = dataclasses.replace(FAMILIES[family], vocab_size=vocab_size)
    tokens_BT = random_tokens(2, 9) % vocab_size
    params = dict(weights(cfg))
    # Rows of zeros, as they come from a checkpoint that has no such rows.
    real_V1 = (np.arange(64) < vocab_size)[:, None]
    params["embedding"] = {"table": params["embedding"]["table"] * real_V1}
    if not cfg.tie_embeddings:
        params["lm_head"] = {"kernel": params["lm_head"]["kernel"] * real_V1.T}

    def loss(params):
        logits_BTV = logits_of(params, tokens_BT, None, cfg=cfg)
        return token_losses(logits_BTV, tokens_BT).mean(), logits_BTV

    (value, logits_BTV), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert np.isfinite(value)
    assert logits_BTV.shape == (2, 9, 64)
    assert np.all(logits_BTV[..., vocab_size:] == np.float32(layers.PADDED_LOGIT))
    assert np.all(jax.nn.softmax(logits_BTV)[..., vocab_size:] == 0)
    for gradient in jax.tree.leaves(gradients):
        assert np.all(np.isfinite(gradient))
    assert np.all(gradients["embedding"]["table"][vocab_size:] == 0)
    assert np.any(gradients["embedding"]["table"][:vocab_size] != 0)
    if not cfg.tie_embeddings:
        assert np.all(gradients["lm_head"]["kernel"][:, vocab_size:] == 0)
        assert np.any(gradients["lm_head"]["kernel"][:, :vocab_size] != 0)


@pytest.mark.parametrize("unknown", [-100, -1, 51, 63, 64, 10_000])
def test_an_id_that_is_no_token_gives_nan_and_never_another_row(unknown):
    tokens_BT = np.array([[3, unknown, 50]], np.int32)
    embedded_BTD = Transformer(LLAMA, COMPUTE).apply(
        {"params": weights(LLAMA)}, tokens_BT, method="embed"
    )
    assert np.all(np.isnan(embedded_BTD[0, 1]))
    np.testing.assert_array_equal(embedded_BTD[0, 2], weights(LLAMA)["embedding"]["table"][50])


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_compute_yields_float32_logits_near_the_exact_ones(family):
    cfg, tokens_BT = FAMILIES[family], random_tokens(2, 9)
    compute = dataclasses.replace(COMPUTE, compute_dtype=jnp.bfloat16)
    narrow = score_tokens(weights(cfg), tokens_BT, None, cfg=cfg, compute=compute)
    wide = score_tokens(weights(cfg), tokens_BT, None, cfg=cfg)
    assert narrow.dtype == jnp.float32
    real = np.s_[..., : cfg.vocab_size]
    spread = np.ptp(wide[real])
    assert np.abs(narrow[real] - wide[real]).max() < 0.05 * spread
    hidden_BTD = jax.eval_shape(
        Transformer(cfg, compute).apply, {"params": weights(cfg)}, tokens_BT
    )
    assert hidden_BTD.dtype == jnp.bfloat16


def test_float64_is_kept_throughout():
    with jax.enable_x64(True):
        compute = ComputeConfig(
            param_dtype=jnp.float64, compute_dtype=jnp.float64, output_dtype=jnp.float64
        )
        tokens_BT = random_tokens(1, 9)
        for cfg in (BLOOM, QWEN3):
            params = jax.tree.map(lambda x: x.astype(np.float64), weights(cfg))
            wide = score_tokens(params, tokens_BT, None, cfg=cfg, compute=compute)
            assert wide.dtype == jnp.float64
            np.testing.assert_allclose(
                wide, score_tokens(weights(cfg), tokens_BT, None, cfg=cfg), rtol=1e-3, atol=1e-4
            )


def test_norm_head_scales_rows_to_unit_length():
    tokens_BT, params = random_tokens(1, 9), dict(weights(BAICHUAN2))
    hidden_BTD = jax.jit(Transformer(BAICHUAN2, COMPUTE).apply)({"params": params}, tokens_BT)
    kernel_DV = params["lm_head"]["kernel"]
    expected_BTV = hidden_BTD @ (kernel_DV / np.linalg.norm(kernel_DV, axis=0, keepdims=True))
    logits_BTV = score_tokens(params, tokens_BT, None, cfg=BAICHUAN2)
    np.testing.assert_allclose(logits_BTV[..., :51], expected_BTV[..., :51], atol=1e-5)


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not():
    tied, untied = weights(QWEN3), weights(LLAMA)
    assert "lm_head" not in tied and untied["lm_head"]["kernel"].shape == (16, 64)
    hidden_BTD = np.random.default_rng(2).normal(size=(1, 3, 16)).astype(np.float32)
    for cfg, kernel_DV in ((QWEN3, tied["embedding"]["table"].T), (LLAMA, None)):
        params = weights(cfg)
        kernel_DV = params["lm_head"]["kernel"] if kernel_DV is None else kernel_DV
        logits_BTV = Transformer(cfg, COMPUTE).apply(
            {"params": params}, hidden_BTD, method="logits"
        )
        np.testing.assert_allclose(
            logits_BTV[..., :51], (hidden_BTD @ kernel_DV)[..., :51], atol=1e-5
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_head_gives_one_float32_number_a_token(family):
    cfg, params = FAMILIES[family], weights(FAMILIES[family], "score")
    assert "lm_head" not in params
    model = Transformer(cfg, dataclasses.replace(COMPUTE, compute_dtype=jnp.bfloat16))
    hidden_BTD = jnp.ones((2, 9, 16), jnp.bfloat16)
    scores_BT = model.apply({"params": params}, hidden_BTD, method="scores")
    assert scores_BT.shape == (2, 9) and scores_BT.dtype == jnp.float32
    np.testing.assert_allclose(scores_BT, params["score_head"]["kernel"].sum(), rtol=1e-5)


@pytest.mark.parametrize("kernel", ["xla", "splash", "cudnn", "auto"])
def test_fresh_parameters_do_not_depend_on_the_attention_kernel(kernel):
    compute = dataclasses.replace(COMPUTE, kernel=kernel, compute_dtype=jnp.bfloat16)
    assert abstract_params(LLAMA, compute) == abstract_params(LLAMA, COMPUTE)


def test_fresh_parameters_are_normal_but_for_norms_and_biases():
    cfg = dataclasses.replace(
        BLOOM, hidden_size=64, intermediate_size=96, vocab_size=512, initializer_range=0.02
    )
    params = jax.jit(lambda key: init_params(key, cfg, COMPUTE))(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        kind = path[-1].key
        if kind in ("kernel", "table"):
            # Four standard errors of an estimate from `size` numbers.
            assert abs(leaf.std() / 0.02 - 1) < 4 / np.sqrt(2 * leaf.size), path
            assert abs(leaf.mean()) < 4 * 0.02 / np.sqrt(leaf.size), path
        else:
            assert np.all(leaf == (1.0 if kind == "scale" else 0.0)), path
    first, second = params["layers"]["mlp"]["up"]["kernel"]
    assert not np.allclose(first, second), "layers must not start alike"


def test_parameters_are_a_plain_dict_that_jax_and_optax_take_as_it_is():
    params = jax.jit(lambda key: init_params(key, LLAMA, COMPUTE))(jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(abstract_params(LLAMA, COMPUTE))
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        node = params
        for key in path:
            assert type(node) is dict
            node = node[key.key]
    optimizer, tokens_BT = optax.adam(1e-2), random_tokens(4, 12)

    def loss(params):
        return token_losses(logits_of(params, tokens_BT, None, cfg=LLAMA), tokens_BT).mean()

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(20):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]


def test_parameters_are_counted_by_hand():
    # Embedding and head, two layers of norms, attention and feed-forward, the final norm.
    width, hidden = 16, 24
    attention = width * (4 + 2 + 2) * 6 + 4 * 6 * width
    layer = 2 * width + attention + 3 * width * hidden
    assert count_parameters(weights(LLAMA)) == 2 * 64 * width + 2 * layer + width
    assert count_parameters(weights(LLAMA, "score")) == 64 * width + 2 * layer + width + width


def test_shapes_of_parameters_are_made_without_asking_for_the_devices(monkeypatch):
    """Several processes join before jax looks for devices, which it does only once."""
    monkeypatch.setattr(sharding, "platform_in_use", lambda: pytest.fail("asked"))
    for dtype in ("float32", "bfloat16"):
        for head in ("lm", "score"):
            shapes = abstract_params(GROUPED, ComputeConfig(compute_dtype=dtype), head=head)
            assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
