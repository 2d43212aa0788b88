"""The mesh, and the one table of partition rules for parameters and activations.

Axes: `data` replicates parameters, `fsdp` splits parameters and the batch (fully sharded data
parallelism, arXiv 1910.02054), `tensor` splits heads, feed-forward and vocabulary (arXiv
1909.08053). A batch is split over `data` and `fsdp` together.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy.typing as npt
from jax.experimental import mesh_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Every parameter of every family, by the end of its path. Dimensions are written out in the
# comment's letters (see CONTRIBUTING.md: B batch, T time, D width, N query heads, K key and value
# heads, H head width, F feed-forward, V vocabulary, L layers; M = (N / K + 2) H, R the rank of an
# adapter).
PARAMETER_RULES: tuple[tuple[str, P], ...] = (
    ("embedding/table", P("tensor", "fsdp")),  # VD
    ("embedding_norm/(scale|bias)", P(None)),  # D
    ("layers/(attention|mlp)_norm/(scale|bias)", P(None, None)),  # LD
    ("layers/attention/qkv/kernel", P(None, "fsdp", "tensor", None)),  # LDKM
    ("layers/attention/qkv/bias", P(None, "tensor", None)),  # LKM
    ("layers/attention/(query|key)_norm/scale", P(None, None)),  # LH
    ("layers/attention/output/kernel", P(None, "tensor", None, "fsdp")),  # LNHD
    ("layers/attention/output/bias", P(None, None)),  # LD
    ("layers/mlp/gate_up/kernel", P(None, "fsdp", None, "tensor")),  # LD2F
    ("layers/mlp/gate_up/bias", P(None, None, "tensor")),  # L2F
    ("layers/mlp/up/kernel", P(None, "fsdp", "tensor")),  # LDF
    ("layers/mlp/up/bias", P(None, "tensor")),  # LF
    ("layers/mlp/down/kernel", P(None, "tensor", "fsdp")),  # LFD
    ("layers/mlp/down/bias", P(None, None)),  # LD
    ("final_norm/(scale|bias)", P(None)),  # D
    ("lm_head/kernel", P("fsdp", "tensor")),  # DV
    ("score_head/kernel", P("fsdp", None)),  # D1
    # Adapters: `a` leads into the rank, `b` out of it.
    ("layers/(attention/(query|key|value)|mlp/(gate|up))/a", P(None, "fsdp", None)),  # LDR
    ("layers/attention/(query|key|value)/b", P(None, None, "tensor", None)),  # LRNH, LRKH
    ("layers/mlp/(gate|up)/b", P(None, None, "tensor")),  # LRF
    ("layers/attention/output/a", P(None, "tensor", None, None)),  # LNHR
    ("layers/mlp/down/a", P(None, "tensor", None)),  # LFR
    ("layers/(attention/output|mlp/down)/b", P(None, None, "fsdp")),  # LRD
)
_COMPILED_RULES = tuple((re.compile(f"(^|/){rule}$"), spec) for rule, spec in PARAMETER_RULES)

# Activations by name: their sharding is part of the model's contract with the compiler.
ACTIVATION_RULES: Mapping[str, P] = {
    # For the products of a loss in chunks, which would each gather the shards of fsdp.
    "table_VD": P("tensor", None),
    "head_DV": P(None, "tensor"),
    # A lookup by all devices of fsdp, each in its own columns of the table.
    "looked_up_BT": P("data", None),
    "found_BTD": P("data", None, "fsdp"),
    "hidden_BTD": P(BATCH_AXES, None, None),
    "heads_BTNH": P(BATCH_AXES, None, "tensor", None),
    "mlp_BTF": P(BATCH_AXES, None, "tensor"),
    "logits_BTV": P(BATCH_AXES, None, "tensor"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The sizes of the mesh axes, see `make_mesh`.

    Attributes:
        data: mesh axis over which batches are split and parameters are copies; -1 takes the
            devices that are left, as of every axis.
        fsdp: mesh axis over which batches and parameters are split.
        tensor: mesh axis over which heads, feed-forward and vocabulary are split.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """Makes the mesh of these devices, all of them by default.

        Sizes of 1 take the first device, where one process has them all.

        Raises:
            ValueError: the sizes do not multiply to the number of devices.
        """
        if (self.data, self.fsdp, self.tensor) == (1, 1, 1):
            devices = jax.devices() if devices is None else devices
            if len({device.process_index for device in devices}) == 1:
                devices = devices[:1]
        return make_mesh(data=self.data, fsdp=self.fsdp, tensor=self.tensor, devices=devices)

    def over(self, mesh: Mesh) -> Mesh:
        """Makes another mesh of the devices of a mesh, in its order.

        As the order is the same, one program can read arrays of either and write to the other:
        they travel between devices alone, and of several processes none has to hold them. Devices
        that follow each other in a mesh are neighbours in a TPU slice, so are those along `tensor`.

        Raises:
            ValueError: the sizes do not multiply to the number of devices.
        """
        sizes = mesh_sizes(mesh.size, data=self.data, fsdp=self.fsdp, tensor=self.tensor)
        devices = mesh.devices.reshape(tuple(sizes[axis] for axis in AXES))
        return Mesh(devices, AXES, (AxisType.Auto,) * 3)


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """A jitted function with the mesh that it runs on, or is compiled for.

    Attributes:
        jitted: of `jax.jit`.
        mesh: set while it is traced; None leaves things as they are.
    """

    jitted: Any
    mesh: Mesh | None

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Calls the function on its mesh."""
        with self._in_use():
            return self.jitted(*arguments, **keywords)

    def lower(self, *arguments: Any, **keywords: Any) -> jax.stages.Lowered:
        """Lowers the function for arguments or their shapes (`jax.ShapeDtypeStruct`)."""
        with self._in_use():
            return self.jitted.lower(*arguments, **keywords)

    def _in_use(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def platform_in_use() -> str:
    """Returns the platform of the mesh in use (`jax.set_mesh`); jax's own where there is none.

    They differ where a program is compiled for devices that this machine does not have.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def make_mesh(
    *, data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Makes a mesh of `data * fsdp * tensor` devices.

    Several TPU slices are joined by their hosts' network, which is far slower than the links within
    a slice. They divide `data` before `fsdp`, and never `tensor`: of `data` only gradients cross
    the network, of `fsdp` all weights do.

    Args:
        data: replicas of the parameters.
        fsdp: shards of parameters and batch.
        tensor: shards of heads, feed-forward and vocabulary.
        devices: the devices to use, all by default. One of the sizes may be -1: what is left.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or `tensor` would span
            slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(len(devices), data=data, fsdp=fsdp, tensor=tensor)
    if len(devices) > 1 and devices[0].platform == "cpu":
        _compile_anew()
    num_slices = 1
    if devices[0].platform == "tpu":
        num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    shape, types = tuple(sizes[axis] for axis in AXES), (AxisType.Auto,) * 3
    if num_slices == 1:
        return jax.make_mesh(shape, AXES, types, devices=devices)
    across = _slices_across(sizes, num_slices)
    within = tuple(size // part for size, part in zip(shape, across, strict=True))
    placed = mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )
    return Mesh(placed, AXES, types)


def host_mesh() -> Mesh:
    """Makes a mesh of this host's CPU, for work that needs host memory.

    A model of 7B float32 parameters is larger than the memory of most accelerators.

    Raises:
        ValueError: JAX_PLATFORMS excludes the CPU.
    """
    try:
        devices = jax.local_devices(backend="cpu")
    except RuntimeError as error:
        raise ValueError(
            "reading and exporting whole models needs the CPU beside the accelerator: leave "
            "JAX_PLATFORMS unset, or add cpu to it"
        ) from error
    return make_mesh(devices=devices[:1])


def mesh_sizes(num_devices: int, *, data: int, fsdp: int, tensor: int) -> dict[str, int]:
    """Returns the size of each axis of a mesh of so many devices; -1 takes the rest.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = 1
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh.{axis}={size} must be at least 1 (or -1 for what is left)")
        fixed *= 1 if size == -1 else size
    if len(free) > 1:
        raise ValueError(f"only one mesh axis may be -1, not {' and '.join(free)}")
    if free:
        if num_devices % fixed:
            raise ValueError(
                f"mesh.{free[0]}=-1: the other axes take {fixed} devices, which does not divide "
                f"the {num_devices} there are"
            )
        sizes[free[0]] = num_devices // fixed
    total = sizes["data"] * sizes["fsdp"] * sizes["tensor"]
    if total != num_devices:
        wanted = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(
            f"mesh {wanted} needs {total} devices, there are {num_devices}; -1 for one of the axes "
            "takes what there are"
        )
    return sizes


def _slices_across(sizes: Mapping[str, int], num_slices: int) -> tuple[int, int, int]:
    """Returns the number of slices along each axis of a mesh.

    Raises:
        ValueError: `tensor` would span slices.
    """
    across_data = math.gcd(sizes["data"], num_slices)
    across_fsdp = num_slices // across_data
    if sizes["fsdp"] % across_fsdp:
        raise ValueError(
            f"mesh data={sizes['data']}, fsdp={sizes['fsdp']}, tensor={sizes['tensor']} over "
            f"{num_slices} slices: `tensor` would span slices; let data={num_slices}"
        )
    return across_data, across_fsdp, 1


def _compile_anew() -> None:
    """Disables the persistent compilation cache, which is unsafe for several CPU devices.

    A program that XLA:CPU reads from the cache has lost the order of its collectives (jaxlib
    0.10.2): one device waits in an all-gather for others that wait in an all-reduce, for ever.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax caches the setting.


def path_name(path: tuple[Any, ...]) -> str:
    """Joins a tree path into `layers/mlp/down/kernel`, also inside an optimizer's state."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def parameter_spec(path: str) -> P:
    """Returns the partition rule for one parameter.

    Raises:
        ValueError: no rule matches, or more than one: the table must say each parameter once.
    """
    specs = [spec for pattern, spec in _COMPILED_RULES if pattern.search(path)]
    if len(specs) != 1:
        raise ValueError(f"{len(specs)} partition rules match parameter {path!r}, not exactly one")
    return specs[0]


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns the sharding of each parameter of a tree.

    Args:
        tree: nested dict of arrays or `jax.ShapeDtypeStruct`; scalars (step counters of an
            optimizer's state) are replicated.
        mesh: from `make_mesh`, or an abstract mesh.

    Returns:
        The same tree of `NamedSharding`.

    Raises:
        ValueError: a parameter without a rule, or a dimension its axis does not divide.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        if leaf.ndim == 0:
            return NamedSharding(mesh, P())
        name = path_name(path)
        spec = parameter_spec(name)
        _check_divisible(name, leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def abstract_arrays(shapes: Any, places: Any) -> Any:
    """Combines a tree of shapes and a tree of shardings into `jax.ShapeDtypeStruct`."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        places,
    )


def abstract_parameters(shapes: Any, mesh: Mesh) -> Any:
    """Returns parameters' shapes with the shardings of the partition rules."""
    return abstract_arrays(shapes, parameter_shardings(shapes, mesh))


def batch_shards(mesh: Mesh | AbstractMesh | None) -> int:
    """Returns the number of parts into which a mesh splits a batch; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Returns the index of this process's share of a batch, and the number of shares.

    Shares are numbered by their first row. Processes among which no batch axis divides, as where
    `tensor` spans them, hold the same share. Rows of a share need not be neighbours in the batch:
    devices stand in the mesh as their network wants it, and the order of rows changes nothing.

    Raises:
        ValueError: the rows of two processes overlap without being the same.
    """
    rows_of: dict[int, set[int]] = {}
    places = batch_sharding(mesh).devices_indices_map((batch_shards(mesh),))
    device: jax.Device
    for device, (rows,) in places.items():
        row = rows.indices(batch_shards(mesh))[0]
        rows_of.setdefault(device.process_index, set()).add(row)
    shares = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
    if sum(map(len, shares)) != batch_shards(mesh):
        axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise ValueError(
            f"mesh {axes}: hosts would hold overlapping parts of a batch; let `tensor` divide, or "
            "be a multiple of, the devices of a host"
        )
    return shares.index(tuple(sorted(rows_of[jax.process_index()]))), len(shares)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch's rows over `data` and `fsdp`, for arrays of any rank."""
    return NamedSharding(mesh, P(BATCH_AXES))


def put_whole(batch: Mapping[str, npt.NDArray[Any]], mesh: Mesh) -> dict[str, jax.Array]:
    """Shards a batch over the mesh; every process must have all of its rows."""
    place = batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(rows.shape, place, rows.__getitem__)
        for name, rows in batch.items()
    }


def constrain(array: jax.Array, name: str) -> jax.Array:
    """Constrains an activation's sharding on the mesh in use (`jax.set_mesh`), if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return array
    spec = P(
        *(_fitting(axes, dim, mesh) for axes, dim in zip(_spec(name), array.shape, strict=True))
    )
    return jax.lax.with_sharding_constraint(array, spec)


def divides(spec: P, shape: tuple[int, ...]) -> bool:
    """Returns whether the mesh in use divides every dimension; also where there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return True
    return all(dim % _axis_size(axes, mesh) == 0 for axes, dim in zip(spec, shape, strict=True))


def _spec(name: str) -> P:
    assert name in ACTIVATION_RULES, f"no activation rule for {name}"
    return ACTIVATION_RULES[name]


def _fitting(axes: Any, dim: int, mesh: Any) -> Any:
    """Returns the axes, or P.UNCONSTRAINED where they do not divide: the compiler then chooses."""
    return axes if dim % _axis_size(axes, mesh) == 0 else P.UNCONSTRAINED


def _axis_size(axes: Any, mesh: Any) -> int:
    size = 1
    for axis in (axes,) if isinstance(axes, str) else axes or ():
        size *= mesh.shape[axis]
    return size


def _check_divisible(name: str, shape: tuple[int, ...], spec: P, mesh: Any) -> None:
    if len(spec) != len(shape):
        raise ValueError(f"partition rule {spec} for {name!r} does not fit its shape {shape}")
    for dim, axes in enumerate(spec):
        size = _axis_size(axes, mesh)
        if shape[dim] % size:
            raise ValueError(
                f"parameter {name!r}: dimension {dim} of {shape} is {shape[dim]}, which mesh axis "
                f"{axes!r} of size {size} does not divide"
            )
