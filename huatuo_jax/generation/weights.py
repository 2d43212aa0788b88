"""Weights for the engine: on its mesh, in its dtype, with layers stacked or split.

Kernels of split layers lie as `backbone.matmul.by_output` puts them, under the name
`backbone.layers.KERNEL_BY_OUTPUT`.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig
from huatuo_jax.backbone.layers import KERNEL_BY_OUTPUT
from huatuo_jax.backbone.matmul import by_output, store_as_computed
from huatuo_jax.core import sharding
from huatuo_jax.core.sharding import MeshConfig

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
    """Moves and casts the variables for generation; arrays that need neither are not copied.

    Args:
        variables: `{"params": ..., "lora": ...}` with stacked layers, on any mesh.
        cfg: the backbone.
        compute: gives the dtype.
        mesh: devices to move to; None moves nothing.
        cast: to the compute dtype once, rather than in every step.
        split_layers: make a tuple of the stacked layers, which copies and turns them.

    Raises:
        ValueError: a parameter that no partition rule knows, or that the mesh does not divide.
    """
    variables = that_are_read(variables)
    wanted = stored_shapes(variables, cfg, compute) if cast else variables
    if mesh is None:
        variables = jax.tree.map(_cast, variables, _dtypes(wanted))
    else:
        places = sharding.parameter_shardings(variables, mesh)
        variables = jax.tree.map(_moved, variables, _dtypes(wanted), places)
    return _split(variables, cfg, mesh) if split_layers else variables


def mesh_for(cfg: BackboneConfig, wanted: MeshConfig, mesh: Mesh, *, field: str) -> Mesh:
    """Divides the devices of a mesh for generation, and checks it before weights are loaded.

    Args:
        cfg: the backbone.
        wanted: the mesh's axes.
        mesh: its devices.
        field: the config field, for messages.

    Raises:
        ValueError: the axes do not multiply to the devices, or do not divide the model.
    """
    try:
        found = wanted.over(mesh)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
    divided = {
        "tensor": {
            "key/value heads": cfg.num_kv_heads,
            "rows of vocabulary": cfg.padded_vocab_size,
            "feed-forward dimensions": cfg.intermediate_size,
        },
        "fsdp": {"dimensions of width": cfg.hidden_size},
    }
    for axis, sizes in divided.items():
        for name, size in sizes.items():
            if size % found.shape[axis]:
                raise ValueError(
                    f"{field}: {axis}={found.shape[axis]} must divide the model's {size} {name}"
                )
    return found


@functools.cache  # So that nothing is recompiled for the next iteration's weights.
def moving(place: NamedSharding, dtype: DTypeLike) -> Any:
    """Returns the jitted function that casts an array and moves it to a sharding.

    The cast comes first, so that fewer bytes travel. The array must be on the same devices, in
    their order. It takes one array at a time: a program of all would hold several temporarily.
    """
    return jax.jit(functools.partial(_on_its_way, dtype=dtype, to=place), out_shardings=place)


def stored_shapes(variables: Variables, cfg: BackboneConfig, compute: ComputeConfig) -> Variables:
    """Returns the shapes and dtypes of variables that are cast once."""
    cast = functools.partial(
        store_as_computed, dtype=compute.compute_dtype, keep_lm_head=cfg.norm_head
    )
    return jax.eval_shape(cast, variables)


def that_are_read(variables: Variables) -> Variables:
    """Selects the variables that generation reads."""
    return {
        name: {part: value for part, value in tree.items() if part != "score_head"}
        for name, tree in variables.items()
        if name in ("params", "lora")
    }


def _on_its_way(leaf: jax.Array, *, dtype: DTypeLike, to: NamedSharding) -> jax.Array:
    """Casts an array, and shards it further along dimensions that will be replicated.

    Otherwise the compiler gathers the whole array on every device and then cuts it. From this
    sharding it exchanges parts, then gathers what each device keeps.
    """
    shards = sharding.batch_shards(to.mesh)
    spec = (
        sharding.BATCH_AXES if axes == "fsdp" and size % shards == 0 else axes
        for size, axes in zip(leaf.shape, to.spec, strict=True)
    )
    return jax.lax.with_sharding_constraint(_cast(leaf, dtype), NamedSharding(to.mesh, P(*spec)))


def _moved(leaf: Any, dtype: Any, place: NamedSharding) -> jax.Array:
    """Returns an array in a dtype with a sharding.

    `jax.device_put` would do, but between two meshes of one process it moves arrays that are
    resharded through the host's memory, in full width.
    """
    found = leaf.sharding if isinstance(leaf, jax.Array) else None
    if isinstance(found, NamedSharding):
        if found.mesh == place.mesh and found.is_equivalent_to(place, leaf.ndim):
            return _cast(leaf, dtype)
        if found.mesh.devices.flatten().tolist() == place.mesh.devices.flatten().tolist():
            return moving(place, dtype)(leaf)
    return jax.device_put(_cast(leaf, dtype), place)


def _cast(leaf: Any, dtype: Any) -> Any:
    return leaf if leaf.dtype == dtype else leaf.astype(dtype)


def _dtypes(tree: Variables) -> Variables:
    return jax.tree.map(lambda leaf: leaf.dtype, tree)


def _split(variables: Variables, cfg: BackboneConfig, mesh: Mesh | None) -> Variables:
    """Returns layers as a tuple of trees instead of one stacked tree, and kernels turned."""
    stacked = {name: tree["layers"] for name, tree in variables.items()}
    layers = [_layer(stacked, np.int32(index), mesh=mesh) for index in range(cfg.num_layers)]
    split = {
        name: {**tree, "layers": tuple(one[name] for one in layers)}
        for name, tree in variables.items()
    }
    if not cfg.tie_embeddings:
        split["params"]["lm_head"] = _turned_head(variables["params"]["lm_head"], mesh=mesh)
    return split


@functools.partial(jax.jit, static_argnames="mesh")
def _turned_head(head: Variables, *, mesh: Mesh | None) -> Variables:
    kernel_VD = by_output(head["kernel"], 1)
    return {KERNEL_BY_OUTPUT: _constrained(kernel_VD, "lm_head/kernel", mesh, turned=1)}


@functools.partial(jax.jit, static_argnames="mesh")
def _layer(stacked: Variables, index: jax.Array, *, mesh: Mesh | None) -> Variables:
    """Returns one layer by itself, compiled once for all layers and all loads of their shapes."""

    def placed(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name, turned = _inside(path), 0
        leaf = jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)
        if name.endswith("/kernel"):
            turned = 2 if name == "attention/output/kernel" else 1
            leaf = by_output(leaf, turned)
        return _constrained(leaf, f"layers/{name}", mesh, turned=turned)

    return _renamed(jax.tree_util.tree_map_with_path(placed, stacked))


def _constrained(leaf: jax.Array, path: str, mesh: Mesh | None, *, turned: int) -> jax.Array:
    """Returns a parameter in its place on the mesh, its first `turned` dimensions now the last.

    Of a stacked parameter's path the leaf is one layer.
    """
    if mesh is None:
        return leaf
    spec = sharding.parameter_spec(path)[-leaf.ndim :]
    return jax.lax.with_sharding_constraint(
        leaf, NamedSharding(mesh, P(*spec[turned:], *spec[:turned]))
    )


def _renamed(tree: Variables) -> Variables:
    """Returns the tree with `KERNEL_BY_OUTPUT` for the name of each kernel."""
    return {
        KERNEL_BY_OUTPUT if name == "kernel" else name: (
            _renamed(part) if isinstance(part, dict) else part
        )
        for name, part in tree.items()
    }


def _inside(path: tuple[Any, ...]) -> str:
    """Returns the path inside a layer, without the collection's name."""
    return sharding.path_name(path[1:])
