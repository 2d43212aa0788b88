"""The parts of a layer (projection, norm, self-attention, feed-forward) and the model's heads."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from huatuo_jax.backbone import attention, positions
from huatuo_jax.backbone.blockwise_attention import Trees
from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig
from huatuo_jax.backbone.lora import LoraConfig, add_update, shared_with_adapters
from huatuo_jax.backbone.matmul import Recomputed, cut, linear, linear_by_output
from huatuo_jax.core import sharding

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
# Attention as a function of a layer's own queries, keys and values, which returns each token's
# output and anything that the layer returns beside it (a cache, say). Decoding passes its own.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
# Finite, so that probability * logit of a padded row is 0 and not NaN; bfloat16 can represent it.
PADDED_LOGIT = -1e30
# The name of a projection's kernel whose dimensions lie as `matmul.by_output` puts them.
KERNEL_BY_OUTPUT = "kernel_by_output"
_SMALLEST_NORM = 1e-12


class Rows(NamedTuple):
    """Data of packed rows that every layer needs: segments, rotations and trees.

    Attributes:
        segment_ids_BT: int32, or None for one segment a row.
        cos_BTH: cosine of the rotations, `[B, T, H / 2]`; None without rotary positions.
        sin_BTH: their sine.
        trees: of rows of trees; None where no sequences share tokens.
        places_BP: of the tokens whose output the last layer computes; None for all of them.
    """

    segment_ids_BT: jax.Array | None
    cos_BTH: jax.Array | None
    sin_BTH: jax.Array | None
    trees: Trees | None = None
    places_BP: jax.Array | None = None

    def wanted(self, array_BTX: jax.Array) -> jax.Array:
        """Returns what an array `[B, T, ...]` holds for the tokens whose output is wanted."""
        if self.places_BP is None:
            return array_BTX
        index = self.places_BP.reshape(self.places_BP.shape + (1,) * (array_BTX.ndim - 2))
        return jnp.take_along_axis(array_BTX, index, axis=1)


class Projection(nn.Module):
    """A linear map over the last dimensions of its inputs, computed in `compute_dtype`.

    Attributes:
        num_contracted: number of last dimensions of the inputs, and first ones of the kernel, that
            are summed over.
        kernel_shape: of the parameter `kernel`.
        has_bias: add the parameter `bias`.
        parts: indices at which the outputs' dimension `parts_dim` is cut.
        parts_dim: that dimension, counted from the end.
    """

    num_contracted: int
    kernel_shape: tuple[int, ...]
    has_bias: bool
    cfg: BackboneConfig
    compute: ComputeConfig
    parts: tuple[int, ...] = ()
    parts_dim: int = -1

    @nn.compact
    def __call__(self, inputs: jax.Array | Recomputed) -> list[jax.Array]:
        """Returns the parts of the outputs; one without cuts."""
        inputs = Recomputed.of(inputs)
        dtype, init = self.compute.compute_dtype, nn.initializers
        if self.has_variable("params", KERNEL_BY_OUTPUT):
            turned = self.get_variable("params", KERNEL_BY_OUTPUT)
            whole = linear_by_output(inputs.value(), turned, None, self.num_contracted, dtype)
            return self._with_bias(self._cut(whole))
        kernel = self.param(
            "kernel",
            init.normal(self.cfg.initializer_range),
            self.kernel_shape,
            self.compute.param_dtype,
        )

        def multiply(*cuts: Any) -> tuple[jax.Array, ...]:
            return linear(inputs, kernel, None, self.num_contracted, dtype, *cuts)

        # The smaller array is cut. For many tokens that is the kernel: a product for each part
        # keeps the gradients of the parts separate, otherwise concatenated over all tokens.
        num_tokens = math.prod(inputs.sources[0].shape[:2])
        if num_tokens > math.prod(kernel.shape[: self.num_contracted]):
            outputs = [*multiply(self.parts, self.parts_dim)]
        else:
            outputs = self._cut(*multiply())
        return self._with_bias(outputs)

    def _with_bias(self, outputs: list[jax.Array]) -> list[jax.Array]:
        if not self.has_bias:
            return outputs
        shape = self.kernel_shape[self.num_contracted :]
        bias = self.param("bias", nn.initializers.zeros, shape, self.compute.param_dtype)
        return [
            part + jnp.expand_dims(added, (0, 1))
            for part, added in zip(
                outputs, self._cut(bias.astype(self.compute.compute_dtype)), strict=True
            )
        ]

    def _cut(self, array: jax.Array) -> list[jax.Array]:
        return cut(array, self.parts, self.parts_dim)


class Norm(nn.Module):
    """RMS norm or layer norm over the last dimension, in at least float32.

    Attributes:
        kind: `rms`, or `layer`, which subtracts the mean and has a bias.
    """

    kind: str
    cfg: BackboneConfig
    compute: ComputeConfig

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Normalises the inputs; the result has their dtype."""
        return self.recomputed(inputs).value()

    @nn.compact
    def recomputed(self, inputs: jax.Array) -> Recomputed:
        """Returns the same for a product, whose backward pass keeps the inputs of the norm."""
        width, param_dtype = inputs.shape[-1:], self.compute.param_dtype
        weights = [self.param("scale", nn.initializers.ones, width, param_dtype)]
        if self.kind == "layer":
            weights.append(self.param("bias", nn.initializers.zeros, width, param_dtype))
        normalise = functools.partial(_normalise, kind=self.kind, eps=self.cfg.norm_eps)
        return Recomputed(normalise, (inputs, *weights))


class SelfAttention(nn.Module):
    """Causal self-attention with fused projections.

    The fused kernel is `[D, K, M]`: each key/value head's block of M = (N / K + 2) H columns holds
    its queries, its key and its value, so that a tensor axis splits it at heads.
    """

    cfg: BackboneConfig
    compute: ComputeConfig
    lora: LoraConfig | None

    @nn.compact
    def __call__(
        self, hidden_BTD: jax.Array | Recomputed, rows: Rows, attend: Attend | None = None
    ) -> tuple[jax.Array, Any]:
        """Returns attention's addition to the residual stream, and the result of `attend`.

        The addition is `[B, T, D]`. Without `attend` the rows attend to themselves, and its result
        is None.
        """
        cfg, compute = self.cfg, self.compute
        q_BTNH, k_BTKH, v_BTKH = self._heads(hidden_BTD)
        if cfg.qk_norm:
            q_BTNH = Norm("rms", cfg, compute, name="query_norm")(q_BTNH)
            k_BTKH = Norm("rms", cfg, compute, name="key_norm")(k_BTKH)
        if rows.cos_BTH is not None and rows.sin_BTH is not None:
            q_BTNH = positions.rotate(q_BTNH, rows.cos_BTH, rows.sin_BTH)
            k_BTKH = positions.rotate(k_BTKH, rows.cos_BTH, rows.sin_BTH)
        q_BTNH = sharding.constrain(q_BTNH, "heads_BTNH")
        k_BTKH = sharding.constrain(k_BTKH, "heads_BTNH")
        v_BTKH = sharding.constrain(v_BTKH, "heads_BTNH")
        returned: Any = None
        if self.is_initializing():  # Parameters do not depend on it, and it asks for the devices.
            attended_BTNH = q_BTNH
        elif attend is None:
            attended_BTNH = attend_to_rows(q_BTNH, k_BTKH, v_BTKH, rows, cfg, compute)
            attended_BTNH = rows.wanted(attended_BTNH)
        else:
            attended_BTNH, returned = attend(q_BTNH, k_BTKH, v_BTKH)
        (output_BTD,) = Projection(
            2,
            (cfg.num_heads, cfg.head_dim, cfg.hidden_size),
            cfg.output_bias,
            cfg,
            compute,
            name="output",
        )(attended_BTNH)
        return add_update(self, self.lora, "output", attended_BTNH, output_BTD), returned

    def _heads(self, hidden_BTD: jax.Array | Recomputed) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries, keys and values, adapters included."""
        cfg, head_dim = self.cfg, self.cfg.head_dim
        block = (cfg.queries_per_kv_head + 2) * head_dim
        q, k, v = Projection(
            1,
            (cfg.hidden_size, cfg.num_kv_heads, block),
            cfg.qkv_bias,
            cfg,
            self.compute,
            parts=(block - 2 * head_dim, block - head_dim),
            name="qkv",
        )(hidden_BTD)
        q = q.reshape(*q.shape[:2], cfg.num_heads, head_dim)
        return (
            add_update(self, self.lora, "query", hidden_BTD, q),
            add_update(self, self.lora, "key", hidden_BTD, k),
            add_update(self, self.lora, "value", hidden_BTD, v),
        )


def attend_to_rows(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    rows: Rows,
    cfg: BackboneConfig,
    compute: ComputeConfig,
) -> jax.Array:
    """Computes the model's causal attention of rows to themselves, `[B, T, N, H]`."""
    return attention.attend(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        segment_ids_BT=rows.segment_ids_BT,
        sliding_window=cfg.sliding_window,
        alibi_slopes_N=slopes(cfg),
        kernel=compute.kernel,
        query_chunk=compute.query_chunk,
        trees=rows.trees,
    )


def slopes(cfg: BackboneConfig) -> jax.Array | None:
    """Returns ALiBi's slopes `[N]`, or None for a model without."""
    return jnp.asarray(positions.alibi_slopes(cfg.num_heads)) if cfg.position == "alibi" else None


class FeedForward(nn.Module):
    """`down(activation(gate) * up)`, or `down(activation(up))` where it is not gated."""

    cfg: BackboneConfig
    compute: ComputeConfig
    lora: LoraConfig | None

    @nn.compact
    def __call__(self, hidden_BTD: jax.Array | Recomputed) -> jax.Array:
        """Returns the feed-forward's addition to the residual stream, `[B, T, D]`."""
        cfg = self.cfg
        activated = functools.partial(_activate, ACTIVATIONS[cfg.activation])
        sources = self._gate_and_up(hidden_BTD) if cfg.gated_mlp else (self._up(hidden_BTD),)
        wide_BTF = shared_with_adapters(Recomputed(activated, sources), self.lora)
        shape = (cfg.intermediate_size, cfg.hidden_size)
        down = Projection(1, shape, cfg.mlp_bias, cfg, self.compute, name="down")
        (output_BTD,) = down(wide_BTF)
        return add_update(self, self.lora, "down", wide_BTF, output_BTD)

    def _gate_and_up(self, hidden_BTD: jax.Array | Recomputed) -> tuple[jax.Array, jax.Array]:
        cfg = self.cfg
        gate_BT1F, up_BT1F = Projection(
            1,
            (cfg.hidden_size, 2, cfg.intermediate_size),
            cfg.mlp_bias,
            cfg,
            self.compute,
            parts=(1,),
            parts_dim=-2,
            name="gate_up",
        )(hidden_BTD)
        return (
            add_update(self, self.lora, "gate", hidden_BTD, gate_BT1F[:, :, 0]),
            add_update(self, self.lora, "up", hidden_BTD, up_BT1F[:, :, 0]),
        )

    def _up(self, hidden_BTD: jax.Array | Recomputed) -> jax.Array:
        cfg = self.cfg
        shape = (cfg.hidden_size, cfg.intermediate_size)
        up = Projection(1, shape, cfg.mlp_bias, cfg, self.compute, name="up")
        (up_BTF,) = up(hidden_BTD)
        return add_update(self, self.lora, "up", hidden_BTD, up_BTF)


class Head(NamedTuple):
    """The kernel of the logits, made once for any number of products.

    It is `[D, V]`, or by output `[V, D]`: so is the embedding's table where that is the head, and
    neither the table nor its gradient is copied into another layout.

    Attributes:
        kernel: receives the gradient.
        multiplied: the same in the compute dtype.
    """

    kernel: jax.Array
    multiplied: jax.Array


class LmHead(nn.Module):
    """The head's kernel, where it is not the embedding's table."""

    cfg: BackboneConfig
    compute: ComputeConfig

    @property
    def is_by_output(self) -> bool:
        """Tells whether the variables hold the kernel as `KERNEL_BY_OUTPUT`."""
        return self.has_variable("params", KERNEL_BY_OUTPUT)

    @nn.compact
    def __call__(self) -> jax.Array:
        """Returns the kernel `[D, V]`, or `[V, D]` where it is held by output."""
        if self.is_by_output:
            kernel_VD: jax.Array = self.get_variable("params", KERNEL_BY_OUTPUT)
            return kernel_VD
        return self.param(
            "kernel",
            nn.initializers.normal(self.cfg.initializer_range),
            (self.cfg.hidden_size, self.cfg.padded_vocab_size),
            self.compute.param_dtype,
        )


class ScoreHead(nn.Module):
    """One number for each token (a reward or a value), in the output dtype throughout."""

    cfg: BackboneConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, hidden_BTD: jax.Array) -> jax.Array:
        """Returns scores `[B, T]`."""
        dtype = self.compute.output_dtype
        kernel_D1 = self.param(
            "kernel",
            nn.initializers.normal(self.cfg.initializer_range),
            (self.cfg.hidden_size, 1),
            self.compute.param_dtype,
        )
        return (hidden_BTD.astype(dtype) @ kernel_D1.astype(dtype))[..., 0]


def head_of(
    kernel: jax.Array,
    cfg: BackboneConfig,
    compute: ComputeConfig,
    *,
    gather: bool,
    by_output: bool,
) -> Head:
    """Makes a head of a kernel.

    Args:
        kernel: the parameter, or the embedding's table where they are tied.
        cfg: with `norm_head`, each token's weights are scaled to unit length (NormHead, Baichuan 2,
            arXiv 2309.10305 section 2.5).
        compute: gives the dtype of products.
        gather: the shards of the mesh axis `fsdp`, for products in a loop.
        by_output: the kernel is `[V, D]`.
    """
    kernel = _with_unit_length(kernel, cfg, width_dim=1 if by_output else 0)
    multiplied = kernel.astype(compute.compute_dtype)
    if gather:
        multiplied = sharding.constrain(multiplied, "table_VD" if by_output else "head_DV")
    # Else a loop would add up gradients of zeros for it.
    return Head(kernel, jax.lax.stop_gradient(multiplied))


def project_to_vocabulary(
    hidden_BTD: jax.Array,
    head: Head,
    cfg: BackboneConfig,
    compute: ComputeConfig,
    *,
    by_output: bool,
) -> jax.Array:
    """Returns logits from the trunk's output and a head, padded vocabulary rows masked.

    Args:
        hidden_BTD: output of the trunk.
        head: of `head_of`.
        cfg: gives the size of the vocabulary.
        compute: dtypes; products are accumulated in `output_dtype`.
        by_output: the head is `[V, D]`.

    Returns:
        `[B, T, V]` in `output_dtype`; those of padded rows are `PADDED_LOGIT`.
    """
    hidden_BTD = hidden_BTD.astype(compute.compute_dtype)
    if by_output:
        logits_BTV = linear_by_output(hidden_BTD, *head, 1, compute.output_dtype)
    else:
        (logits_BTV,) = linear(hidden_BTD, *head, 1, compute.output_dtype)
    logits_BTV = sharding.constrain(logits_BTV, "logits_BTV")
    if cfg.padded_vocab_size == cfg.vocab_size:
        return logits_BTV
    real_V = jnp.arange(cfg.padded_vocab_size) < cfg.vocab_size
    return jnp.where(real_V[None, None, :], logits_BTV, PADDED_LOGIT)


def _with_unit_length(kernel: jax.Array, cfg: BackboneConfig, *, width_dim: int) -> jax.Array:
    """Returns the head's kernel, scaled along its width to unit length where the model does so."""
    if not cfg.norm_head:
        return kernel
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    square = jnp.square(wide).sum(axis=width_dim, keepdims=True)
    # Bounded before the root, whose derivative at a padded row of zeros would be infinite.
    return wide / jnp.sqrt(jnp.maximum(square, _SMALLEST_NORM**2))


def _normalise(
    inputs: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None = None,
    *,
    kind: str,
    eps: float,
) -> jax.Array:
    """Computes a norm of kind `kind`; the result has the dtype of the inputs."""
    wide = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
    if kind == "layer":
        wide = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(wide).mean(axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(variance + eps)
    lead = tuple(range(inputs.ndim - 1))
    scaled = normed * jnp.expand_dims(scale.astype(wide.dtype), lead)
    if bias is not None:
        scaled = scaled + jnp.expand_dims(bias.astype(wide.dtype), lead)
    return scaled.astype(inputs.dtype)


def _activate(
    activation: Callable[[jax.Array], jax.Array],
    gate_BTF: jax.Array,
    up_BTF: jax.Array | None = None,
) -> jax.Array:
    """Returns `activation(gate) * up`, or without `up` the activation alone."""
    wide_BTF = activation(gate_BTF)
    return sharding.constrain(wide_BTF if up_BTF is None else wide_BTF * up_BTF, "mlp_BTF")
