import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig
from huatuo_jax.backbone.layers import Projection
from huatuo_jax.backbone.matmul import Recomputed, by_output, linear, linear_by_output
from huatuo_jax.core import sharding


def _random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize(
    ("einsum", "inputs", "kernel", "num_contracted"),
    [
        ("BTD,DF->BTF", (2, 3, 4), (4, 5), 1),
        ("BTD,DKM->BTKM", (2, 3, 4), (4, 2, 3), 1),
        ("BTNH,NHD->BTD", (2, 3, 2, 4), (2, 4, 5), 2),
    ],
)
def test_a_product_and_its_gradients_equal_einsum(einsum, inputs, kernel, num_contracted):
    with jax.enable_x64(True):
        inputs, kernel = jnp.asarray(_random(*inputs)), jnp.asarray(_random(*kernel, seed=1))

        def found(x, w):
            return jnp.sin(linear(x, w, None, num_contracted, jnp.float64)[0])

        def expected(x, w):
            return jnp.sin(jnp.einsum(einsum, x, w))

        value, pull = jax.vjp(found, inputs, kernel)
        reference, pull_reference = jax.vjp(expected, inputs, kernel)
        np.testing.assert_allclose(value, reference, rtol=1e-12)
        for one, other in zip(pull(value), pull_reference(value), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-12)


def test_gradients_of_16_bit_weights_are_16_bit():
    inputs, kernel = jnp.ones((1, 2, 4), jnp.bfloat16), jnp.ones((4, 3), jnp.bfloat16)
    outputs, pull = jax.vjp(lambda x, w: linear(x, w, None, 1, jnp.float32)[0], inputs, kernel)
    assert outputs.dtype == jnp.float32
    assert [gradient.dtype for gradient in pull(outputs)] == [jnp.bfloat16, jnp.bfloat16]


def test_a_kernel_made_once_is_multiplied_and_the_wide_one_has_the_gradient():
    inputs, kernel = jnp.asarray(_random(2, 3, 4), jnp.bfloat16), jnp.asarray(_random(4, 5))
    kernel = kernel.astype(jnp.float32)
    made = kernel.astype(jnp.bfloat16)
    outputs, pull = jax.vjp(lambda x, w: linear(x, w, made, 1, jnp.float32)[0], inputs, kernel)
    alone, pull_alone = jax.vjp(lambda x, w: linear(x, w, None, 1, jnp.float32)[0], inputs, made)
    np.testing.assert_array_equal(outputs, alone)
    (to_inputs, to_kernel), (to_inputs_alone, to_made) = pull(outputs), pull_alone(outputs)
    assert to_kernel.dtype == jnp.float32
    # Not rounded on the way: to the dtype of the product it is the same.
    np.testing.assert_array_equal(to_kernel.astype(jnp.bfloat16), to_made)
    np.testing.assert_array_equal(to_inputs, to_inputs_alone)


def _gated_and_scaled(gate, up, scale):
    return jax.nn.silu(gate) * up * scale[None, None]


def test_recomputed_inputs_have_the_gradients_of_their_formula():
    """All sources receive them, and the kernel is cut."""
    with jax.enable_x64(True):
        sources = [jnp.asarray(_random(2, 3, 4, seed=seed)) for seed in range(2)]
        sources += [jnp.asarray(_random(4, seed=2))]
        kernel = jnp.asarray(_random(4, 5, seed=3))

        def found(kernel, *sources):
            inputs = Recomputed(_gated_and_scaled, sources)
            parts = linear(inputs, kernel, None, 1, jnp.float64, (2,))
            return jnp.sin(jnp.concatenate(parts, axis=-1))

        def expected(kernel, *sources):
            return jnp.sin(jnp.einsum("BTD,DF->BTF", _gated_and_scaled(*sources), kernel))

        np.testing.assert_allclose(found(kernel, *sources), expected(kernel, *sources), rtol=1e-12)
        value, pull = jax.vjp(found, kernel, *sources)
        _, pull_expected = jax.vjp(expected, kernel, *sources)
        for one, other in zip(pull(value), pull_expected(value), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


def test_many_tokens_and_few_are_projected_alike():
    """Parts come from a cut kernel where there are more tokens than inputs, else cut outputs."""
    cfg = BackboneConfig(
        family="llama",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        max_positions=8,
    )
    layer = Projection(1, (8, 2, 6), True, cfg, ComputeConfig(), parts=(2, 5))
    hidden_BTD = jnp.asarray(_random(3, 8, 8), jnp.float32)
    variables = layer.init(jax.random.key(0), hidden_BTD)
    variables["params"]["bias"] = jnp.asarray(_random(2, 6), jnp.float32)
    many = layer.apply(variables, hidden_BTD)
    assert [part.shape[-1] for part in many] == [2, 3, 1]
    few = [layer.apply(variables, hidden_BTD[:, t : t + 1]) for t in range(8)]
    for index, part in enumerate(many):
        alone = jnp.concatenate([step[index] for step in few], axis=1)
        np.testing.assert_allclose(part, alone, atol=1e-6)


@pytest.mark.parametrize("rows", [(3, 1), (1, 64), (13, 5)], ids=["step", "few", "many"])
@pytest.mark.parametrize("num_contracted", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kernel_turned_by_outputs_gives_the_same(rows, num_contracted, dtype):
    x_key, w_key = jax.random.split(jax.random.key(3))
    contracted = (6, 5)[:num_contracted]
    inputs = jax.random.normal(x_key, (*rows, *contracted), dtype)
    kernel = jax.random.normal(w_key, (*contracted, 2, 7), dtype)
    turned = by_output(kernel, num_contracted)
    assert turned.shape == (2, 7, *contracted)
    found, pull = jax.vjp(
        lambda x, w: linear_by_output(x, w, None, num_contracted, jnp.float32), inputs, turned
    )
    expected, pull_expected = jax.vjp(
        lambda x, w: linear(x, w, None, num_contracted, jnp.float32)[0], inputs, kernel
    )
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    gradient = jax.random.normal(jax.random.key(4), found.shape)
    (to_inputs, to_turned), (to_inputs_there, to_kernel) = pull(gradient), pull_expected(gradient)
    assert (to_inputs.dtype, to_turned.dtype) == (inputs.dtype, kernel.dtype)
    # Those of bfloat16 are rounded to its 8 bits.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.02, "atol": 0.05}
    for one, other in (
        (to_inputs, to_inputs_there),
        (to_turned, by_output(to_kernel, num_contracted)),
    ):
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), **tolerance)


def test_a_turned_kernel_made_once_is_multiplied_and_the_wide_one_has_the_gradient():
    inputs, kernel = jnp.asarray(_random(2, 3, 4), jnp.bfloat16), jnp.asarray(_random(5, 4))
    kernel = kernel.astype(jnp.float32)
    made = kernel.astype(jnp.bfloat16)

    outputs, pull = jax.vjp(
        lambda x, w: linear_by_output(x, w, made, 1, jnp.float32), inputs, kernel
    )
    alone, pull_alone = jax.vjp(
        lambda x, w: linear_by_output(x, w, None, 1, jnp.float32), inputs, made
    )
    np.testing.assert_array_equal(outputs, alone)
    (to_inputs, to_kernel), (to_inputs_alone, to_made) = pull(outputs), pull_alone(outputs)
    assert to_kernel.dtype == jnp.float32
    # Not rounded on the way: to the dtype of the product it is the same.
    np.testing.assert_array_equal(to_kernel.astype(jnp.bfloat16), to_made)
    np.testing.assert_array_equal(to_inputs, to_inputs_alone)


@pytest.mark.parametrize(
    ("product", "inputs", "kernel", "num_contracted"),
    [
        (linear, (2, 96, 32), (32, 2, 24), 1),
        (linear, (2, 96, 4, 8), (4, 8, 48), 2),
        (linear_by_output, (2, 96, 32), (48, 32), 1),
    ],
)
def test_a_kernel_has_its_gradient_on_cpu_without_copies_of_tokens(
    product, inputs, kernel, num_contracted
):
    # Of one layer of several, as the backward pass of a scan reads its inputs.
    stacked, kernel = jnp.ones((3, *inputs)), jnp.ones(kernel)

    def gradient(stacked, kernel, layer, outputs_gradient):
        inputs = jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)
        outputs, pull = jax.vjp(
            lambda w: product(inputs, w, None, num_contracted, "float32"), kernel
        )
        return pull(jax.tree.map(lambda out: outputs_gradient.reshape(out.shape), outputs))

    outputs_gradient = jnp.ones((2, 96, 48))
    text = jax.jit(gradient).lower(stacked, kernel, 1, outputs_gradient).compile().as_text()
    sizes = [
        math.prod(map(int, shape.split(",")))
        for shape in re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
    ]
    assert all(size <= kernel.size for size in sizes), text


@pytest.mark.parametrize(("platform", "sums"), [("cpu", "float32"), ("tpu", "bfloat16")])
def test_products_of_16_bits_have_the_sums_that_the_platform_takes(monkeypatch, platform, sums):
    monkeypatch.setattr(sharding, "platform_in_use", lambda: platform)

    def both(inputs, kernel, turned):
        outputs, pull = jax.vjp(lambda x, w: linear(x, w, None, 1, x.dtype)[0], inputs, kernel)
        same, pull_same = jax.vjp(
            lambda x, w: linear_by_output(x, w, None, 1, x.dtype), inputs, turned
        )
        return pull(outputs), pull_same(same), outputs

    arguments = [jnp.ones(shape, jnp.bfloat16) for shape in ((2, 3, 4), (4, 5), (5, 4))]
    traced = jax.make_jaxpr(both)(*arguments)
    assert {str(leaf.dtype) for leaf in traced.out_avals} == {"bfloat16"}
    products = [eqn for eqn in _equations(traced.jaxpr) if eqn.primitive.name == "dot_general"]
    assert len(products) == 6
    assert {str(eqn.outvars[0].aval.dtype) for eqn in products} == {sums}


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from _equations(inner)
