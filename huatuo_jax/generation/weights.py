"""Weights as the engine reads them: on its mesh, in the dtype it computes in."""

import functools
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from huatuo_jax import sharding
from huatuo_jax.backbone.casting import store_as_computed
from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig

Variables = dict[str, Any]


def place(
    variables: Variables,
    cfg: BackboneConfig,
    compute: ComputeConfig,
    *,
    mesh: Mesh | None,
    cast: bool,
    split_layers: bool,
) -> Variables:
    """The variables where and as generation reads them; what already is so is not copied.

    Args:
        variables: `{"params": ..., "lora": ...}` with stacked layers.
        cfg: the backbone.
        compute: gives the dtype.
        mesh: where to; None leaves every array where it is.
        cast: to the compute dtype once, rather than in every step.
        split_layers: make a tuple of the stacked layers, which copies them.

    Raises:
        ValueError: a parameter that no partition rule knows, or that the mesh does not divide.
    """
    variables = that_are_read(variables)
    if mesh is not None:
        variables = jax.device_put(variables, sharding.parameter_shardings(variables, mesh))
    if cast:
        variables = store_as_computed(variables, compute.compute_dtype, keep_lm_head=cfg.norm_head)
    return _split(variables, cfg, mesh) if split_layers else variables


def that_are_read(variables: Variables) -> Variables:
    """Those that generation has a use for."""
    return {
        name: {part: value for part, value in tree.items() if part != "score_head"}
        for name, tree in variables.items()
        if name in ("params", "lora")
    }


def _split(variables: Variables, cfg: BackboneConfig, mesh: Mesh | None) -> Variables:
    """Layers as a tuple of trees instead of one stacked tree."""
    stacked = {name: tree["layers"] for name, tree in variables.items()}
    layers = _unstacked(stacked, num_layers=cfg.num_layers, mesh=mesh)
    return {
        name: {**tree, "layers": tuple(one[name] for one in layers)}
        for name, tree in variables.items()
    }


@functools.partial(jax.jit, static_argnames=("num_layers", "mesh"))
def _unstacked(stacked: Variables, *, num_layers: int, mesh: Mesh | None) -> tuple[Variables, ...]:
    """Each layer for itself, compiled once for all loads of the same shapes."""

    def cut(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if mesh is None:
            return leaf
        spec = P(*sharding.parameter_spec(f"layers/{_inside(path)}")[1:])
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    def layer(index: int) -> Variables:
        one = jax.tree.map(lambda leaf: leaf[index], stacked)
        return jax.tree_util.tree_map_with_path(cut, one)

    return tuple(layer(index) for index in range(num_layers))


def _inside(path: tuple[Any, ...]) -> str:
    """The path inside a layer, without the collection's name."""
    return sharding.path_name(path[1:])
