"""Low-rank adapters (LoRA, arXiv 2106.09685) beside a frozen backbone.

Adapters are a dict of their own, given to the model as a second collection,
`model.apply({"params": params, "lora": adapters}, ...)`; without it the same model is the frozen
one. Each adapted projection `y = W x` becomes `W x + (alpha / rank) b (a x)`, with `b` zero at the
start. The backbone fuses query, key and value, and gate and up; adapters still name each.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.backbone.matmul import Recomputed, linear

Target = Literal["query", "key", "value", "output", "gate", "up", "down"]

# A target's block in the layer, and the einsums into and out of the rank R.
_PLACES: Mapping[Target, tuple[str, str, str]] = {
    "query": ("attention", "BTD,DR->BTR", "BTR,RNH->BTNH"),
    "key": ("attention", "BTD,DR->BTR", "BTR,RKH->BTKH"),
    "value": ("attention", "BTD,DR->BTR", "BTR,RKH->BTKH"),
    "output": ("attention", "BTNH,NHR->BTR", "BTR,RD->BTD"),
    "gate": ("mlp", "BTD,DR->BTR", "BTR,RF->BTF"),
    "up": ("mlp", "BTD,DR->BTR", "BTR,RF->BTF"),
    "down": ("mlp", "BTF,FR->BTR", "BTR,RD->BTD"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapted projections and the size of their adapters.

    Attributes:
        rank: width R of the bottleneck.
        alpha: the update is scaled by `alpha / rank`.
        targets: the projections adapted, any of `query, key, value, output, gate, up, down`.
    """

    rank: int
    alpha: float
    targets: tuple[Target, ...] = get_args(Target)

    def __post_init__(self) -> None:
        """Validates the fields."""
        if self.rank < 1:
            raise ValueError(f"LoraConfig.rank={self.rank} must be at least 1")
        if unknown := sorted(set(self.targets) - set(_PLACES)):
            raise ValueError(f"LoraConfig.targets has {unknown}; known are {list(_PLACES)}")
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError(f"LoraConfig.targets={self.targets} must name each target once")

    @property
    def scale(self) -> float:
        """Returns the weight of the update."""
        return self.alpha / self.rank


def init_adapters(
    key: jax.Array, cfg: BackboneConfig, lora: LoraConfig, *, dtype: DTypeLike = jnp.float32
) -> dict[str, Any]:
    """Makes fresh adapters, without effect yet: `a` normal with variance 1 / fan-in, `b` zero.

    Args:
        key: PRNG key.
        cfg: the backbone.
        lora: projections and rank.
        dtype: of the adapters.

    Returns:
        Nested dict `{"layers": {"attention": {"query": {"a": LDR, "b": LRNH}, ...}, "mlp": ...}}`.
    """
    places: dict[str, dict[str, Any]] = {}
    for index, target in enumerate(_targets_of(cfg, lora)):
        room, into, out_of = _PLACES[target]
        a_shape = _shape(into.split("->")[0].split(",")[1], cfg, lora)
        b_shape = _shape(out_of.split("->")[0].split(",")[1], cfg, lora)
        fan_in = 1
        for size in a_shape[:-1]:
            fan_in *= size
        a = jax.random.normal(
            jax.random.fold_in(key, index), (cfg.num_layers, *a_shape), dtype=dtype
        )
        b = jnp.zeros((cfg.num_layers, *b_shape), dtype=dtype)
        places.setdefault(room, {})[target] = {"a": a * fan_in**-0.5, "b": b}
    return {"layers": places}


def shared_with_adapters(inputs: Recomputed, lora: LoraConfig | None) -> jax.Array | Recomputed:
    """Returns a projection's inputs as its products read them: kept, where adapters read them too.

    Gradients of all these products are then added up before they pass the function that made the
    inputs; computed again for each of them, a step compiled for TPU moves a quarter more bytes.
    """
    return inputs if lora is None else inputs.value()


def add_update(
    module: nn.Module,
    lora: LoraConfig | None,
    target: Target,
    inputs: jax.Array | Recomputed,
    outputs: jax.Array,
) -> jax.Array:
    """Adds the adapter's update to `outputs` if `module` was applied with one for `target`.

    Args:
        module: the module whose `lora` collection may hold the adapter.
        lora: None for a model without adapters.
        target: the projection.
        inputs: inputs of the projection.
        outputs: outputs of the frozen projection.
    """
    adapter = module.get_variable("lora", target)
    if adapter is None:
        return outputs
    if lora is None:
        raise ValueError(f"adapters for {target!r} were given to a model made without a LoraConfig")
    a, b = adapter["a"], adapter["b"]
    (hidden_BTR,) = linear(inputs, a, None, a.ndim - 1, outputs.dtype)
    (update,) = linear(hidden_BTR, b, None, 1, outputs.dtype)
    return outputs + lora.scale * update


def merge(
    params: Mapping[str, Any], adapters: Mapping[str, Any], cfg: BackboneConfig, lora: LoraConfig
) -> dict[str, Any]:
    """Adds the adapters' updates to the backbone's weights.

    Sums are taken in at least float32 and cast back to each weight's dtype.

    Args:
        params: the frozen backbone.
        adapters: from `init_adapters`, trained.
        cfg: the backbone's config.
        lora: the adapters' config.

    Returns:
        A new nested dict; `params` is unchanged.

    Raises:
        ValueError: a target has no adapter.
    """
    attention, mlp = dict(params["layers"]["attention"]), dict(params["layers"]["mlp"])
    rooms = adapters["layers"]
    if lacking := [t for t in lora.targets if t not in rooms.get(_PLACES[t][0], {})]:
        raise ValueError(f"LoraConfig.targets names {lacking}, for which there are no adapters")
    update = {
        target: lora.scale * _product(target, rooms[_PLACES[target][0]][target])
        for target in lora.targets
    }
    layers, width = cfg.num_layers, cfg.hidden_size

    def part(target: Target, *shape: int) -> jax.Array:
        found = update.get(target)
        if found is None:
            return jnp.zeros((layers, width, *shape), dtype=jnp.float32)
        return found.reshape(layers, width, *shape)

    if {"query", "key", "value"} & set(update):
        heads, head_dim = cfg.num_kv_heads, cfg.head_dim
        parts = [part("query", heads, cfg.queries_per_kv_head * head_dim)]
        parts += [part("key", heads, head_dim), part("value", heads, head_dim)]
        attention["qkv"] = _add(attention["qkv"], jnp.concatenate(parts, axis=-1))
    if "output" in update:
        attention["output"] = _add(attention["output"], update["output"])
    if cfg.gated_mlp and {"gate", "up"} & set(update):
        both = [part("gate", cfg.intermediate_size), part("up", cfg.intermediate_size)]
        mlp["gate_up"] = _add(mlp["gate_up"], jnp.stack(both, axis=2))
    elif "up" in update:
        mlp["up"] = _add(mlp["up"], update["up"])
    if "down" in update:
        mlp["down"] = _add(mlp["down"], update["down"])
    return {**params, "layers": {**params["layers"], "attention": attention, "mlp": mlp}}


def _targets_of(cfg: BackboneConfig, lora: LoraConfig) -> tuple[Target, ...]:
    if "gate" in lora.targets and not cfg.gated_mlp:
        raise ValueError(
            f"LoraConfig.targets names 'gate', which family {cfg.family!r} lacks: leave it out"
        )
    return lora.targets


def _shape(letters: str, cfg: BackboneConfig, lora: LoraConfig) -> tuple[int, ...]:
    sizes = {
        "D": cfg.hidden_size,
        "F": cfg.intermediate_size,
        "N": cfg.num_heads,
        "K": cfg.num_kv_heads,
        "H": cfg.head_dim,
        "R": lora.rank,
    }
    return tuple(sizes[letter] for letter in letters)


def _product(target: Target, adapter: Mapping[str, jax.Array]) -> jax.Array:
    """Returns `a b`, layer axis kept: the update of the whole weight, at least in float32."""
    _, into, out_of = _PLACES[target]
    a_letters, b_letters = into.split("->")[0].split(",")[1], out_of.split("->")[0].split(",")[1]
    dtype = jnp.promote_types(adapter["a"].dtype, jnp.float32)
    return jnp.einsum(
        f"L{a_letters},L{b_letters}->L{a_letters[:-1]}{b_letters[1:]}",
        adapter["a"].astype(dtype),
        adapter["b"].astype(dtype),
        precision="highest",
    )


def _add(weights: Mapping[str, jax.Array], update: jax.Array) -> dict[str, jax.Array]:
    kernel = weights["kernel"]
    return {**weights, "kernel": (kernel.astype(update.dtype) + update).astype(kernel.dtype)}
