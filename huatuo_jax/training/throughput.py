"""How fast a run is: tokens per second, and the share of the device's peak that the model uses.

Model-FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B) is the floating-point operations that
the model's mathematics asks for, over what the devices could do in that time:

    FLOPs of a step = 6 P t  +  6 P_head s  +  12 L N H a
    utilisation     = FLOPs of a step / (seconds * devices * peak FLOPs per second)

where t is the number of tokens that are not padding and P the parameters of the layers' matrix
products (no embedding lookup, norms or biases); s is the number of scored tokens, as the head reads
no others, and P_head its parameters; a is the number of (query, key) pairs that causality and
segments leave, the sum of `position + 1` over all tokens. The 6 is 2 FLOPs a multiply-add, once
forward and twice backward; the 12 is the same for the two products of attention. What
rematerialisation computes again does not count, nor does padding: both lower the utilisation. With
adapters the gradients of frozen weights are not computed, and 6 becomes 4; the adapters' own
products are left out as small.
"""

import dataclasses
import time

import jax

from huatuo_jax.backbone.config import BackboneConfig

# Peak of dense bfloat16 matrix products per device in FLOPs/s, by jax's name for it, as published
# by the makers. A TPU v2 or v3 device is one of its chip's two cores.
PEAK_FLOPS: dict[str, float] = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """The device's peak in FLOPs per second; None where it is not known, as on a CPU."""
    return PEAK_FLOPS.get(device.device_kind)


@dataclasses.dataclass(frozen=True)
class ModelFlops:
    """The parts of the formula that belong to the model.

    Attributes:
        layers: parameters P of the layers' matrix products.
        head: parameters P_head of the head.
        attention: L N H.
        per_parameter: 6, or 4 where the layers are frozen.
    """

    layers: int
    head: int
    attention: int
    per_parameter: int = 6

    @classmethod
    def of(cls, cfg: BackboneConfig, *, adapters_only: bool = False) -> "ModelFlops":
        """The parts for a backbone with a language-model head."""
        heads = cfg.num_heads + 2 * cfg.num_kv_heads
        attention = cfg.hidden_size * cfg.head_dim * (heads + cfg.num_heads)
        mlp = cfg.hidden_size * cfg.intermediate_size * (3 if cfg.gated_mlp else 2)
        return cls(
            layers=cfg.num_layers * (attention + mlp),
            head=cfg.hidden_size * cfg.vocab_size,
            attention=cfg.num_layers * cfg.num_heads * cfg.head_dim,
            per_parameter=4 if adapters_only else 6,
        )

    def of_step(self, *, tokens: float, scored_tokens: float, attended_pairs: float) -> float:
        """The FLOPs of a step with so many tokens, scored tokens and (query, key) pairs."""
        products = self.layers * tokens + self.head * scored_tokens
        return self.per_parameter * products + 12 * self.attention * attended_pairs

    def of_forward(self, *, tokens: float, scored_tokens: float, attended_pairs: float) -> float:
        """The FLOPs of a forward pass alone: a third of a step in which everything is trained."""
        return (
            dataclasses.replace(self, per_parameter=6).of_step(
                tokens=tokens, scored_tokens=scored_tokens, attended_pairs=attended_pairs
            )
            / 3
        )


class StepClock:
    """Splits the time of steps into waiting for data and computing."""

    def __init__(self) -> None:
        """Starts it."""
        self._since = time.perf_counter()
        self._waited_s = 0.0

    def restart(self) -> None:
        """Leaves what was done since the last step (an evaluation, a save) out of the next one."""
        self._since = time.perf_counter()
        self._waited_s = 0.0

    def add_wait(self, seconds: float) -> None:
        """Adds time spent waiting for data."""
        self._waited_s += seconds

    def step(self) -> tuple[float, float]:
        """Ends a step and begins the next one: the seconds it took, and those it waited."""
        now = time.perf_counter()
        took, waited = now - self._since, self._waited_s
        self._since, self._waited_s = now, 0.0
        return max(took, 1e-9), min(waited, took)
