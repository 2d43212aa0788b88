"""What reads the trunk: next-token logits, or one score a token."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from huatuo_jax import sharding
from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig
from huatuo_jax.backbone.products import linear

# Finite, so that probability * logit of a padded row is 0 and not NaN; bfloat16 holds it.
PADDED_LOGIT = -1e30
_SMALLEST_NORM = 1e-12


class LmHead(nn.Module):
    """Logits over the vocabulary, with a kernel of its own."""

    cfg: BackboneConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, hidden_BTD: jax.Array) -> jax.Array:
        """Logits `[B, T, V]`; those of padded rows are `PADDED_LOGIT`."""
        cfg = self.cfg
        kernel_DV = self.param(
            "kernel",
            nn.initializers.normal(cfg.initializer_range),
            (cfg.hidden_size, cfg.padded_vocab_size),
            self.compute.param_dtype,
        )
        return project_to_vocabulary(hidden_BTD, kernel_DV, cfg, self.compute)


class ScoreHead(nn.Module):
    """One number a token (a reward or a value), in the output dtype throughout."""

    cfg: BackboneConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, hidden_BTD: jax.Array) -> jax.Array:
        """Scores `[B, T]`."""
        dtype = self.compute.output_dtype
        kernel_D1 = self.param(
            "kernel",
            nn.initializers.normal(self.cfg.initializer_range),
            (self.cfg.hidden_size, 1),
            self.compute.param_dtype,
        )
        return (hidden_BTD.astype(dtype) @ kernel_D1.astype(dtype))[..., 0]


def project_to_vocabulary(
    hidden_BTD: jax.Array, kernel_DV: jax.Array, cfg: BackboneConfig, compute: ComputeConfig
) -> jax.Array:
    """Logits from the trunk's output and a head, padded vocabulary rows masked.

    Args:
        hidden_BTD: output of the trunk.
        kernel_DV: the head, or the embedding's transpose.
        cfg: says whether columns are scaled to unit length (NormHead, Baichuan 2,
            arXiv 2309.10305 section 2.5).
        compute: dtypes; products are accumulated in `output_dtype`.

    Returns:
        `[B, T, V]` in `output_dtype`.
    """
    if cfg.norm_head:
        wide_DV = kernel_DV.astype(jnp.promote_types(kernel_DV.dtype, jnp.float32))
        square_1V = jnp.square(wide_DV).sum(axis=0, keepdims=True)
        # Bounded before the root, whose derivative at a padded row of zeros would be infinite.
        kernel_DV = wide_DV / jnp.sqrt(jnp.maximum(square_1V, _SMALLEST_NORM**2))
    (logits_BTV,) = linear(
        hidden_BTD.astype(compute.compute_dtype),
        kernel_DV.astype(compute.compute_dtype),
        1,
        compute.output_dtype,
    )
    logits_BTV = sharding.constrain(logits_BTV, "logits_BTV")
    if cfg.padded_vocab_size == cfg.vocab_size:
        return logits_BTV
    real_V = jnp.arange(cfg.padded_vocab_size) < cfg.vocab_size
    return jnp.where(real_V[None, None, :], logits_BTV, PADDED_LOGIT)
