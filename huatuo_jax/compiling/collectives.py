"""What a compiled program sends between chips: kinds, bytes, mesh axes, and whether it is in place.

A collective stands in the program once and runs as often as the loops around it. Which mesh axes it
goes over follows from the devices of its groups. An all-gather that the compiler has cut into
pieces, to multiply while it travels, shows as collective-permutes.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from huatuo_jax.compiling.hlo import Computation, Instruction, Module, Place

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_ON_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(?\[?([\d,]+)\]?\)?)? ?\{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One of them.

    Attributes:
        kind: one of `KINDS`.
        axes: of the mesh, that its groups go over.
        group: devices that take part, numbered as the mesh has them; the first group.
        runs: how many in a step.
        payload: bytes of the whole array that a group holds after (all-gather) or before (all
            others) it; of a collective-permute, what one device sends.
        op_name: where in the Python program it comes from.
        in_layer_loop: whether it stands in the loop over layers.
        dims: of the array that it gives.
    """

    kind: str
    axes: tuple[str, ...]
    group: tuple[int, ...]
    runs: int
    payload: int
    op_name: str
    in_layer_loop: bool
    dims: tuple[int, ...]

    @property
    def bytes_sent(self) -> float:
        """What each device sends, at the least that any algorithm needs, in one run."""
        others = (len(self.group) - 1) / len(self.group)
        if self.kind == "all-reduce":
            return 2 * self.payload * others
        if self.kind in ("all-gather", "reduce-scatter", "collective-broadcast"):
            return self.payload * others
        if self.kind == "collective-permute":
            return self.payload
        return self.payload * others / len(self.group)  # All-to-all: of one device's part.


def collectives_of(module: Module, mesh: Mesh, *, num_layers: int) -> list[Collective]:
    """All that a program runs.

    Args:
        module: the program.
        mesh: that it was compiled for.
        num_layers: trips of the loop over layers.
    """
    loops = layer_loops(module.places, num_layers)
    found: dict[object, Collective] = {}
    for place in module.places:
        inside = any(loop.body in loops for loop in place.loops)
        for one in place.computation.instructions.values():
            kind = one.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            # The pieces of an overlapped collective share a channel.
            channel = _CHANNEL.search(one.attributes)
            key = (one.name if channel is None else channel[1], place.loops)
            group = _group(one, mesh)
            if key not in found and len(group) > 1:
                found[key] = _collective(kind, one, place, group, mesh, inside)
    return list(found.values())


def layer_loops(places: Iterable[Place], num_layers: int) -> set[str]:
    """The bodies of the loops over layers: of those with as many trips, the inner ones."""
    paths = {place.loops for place in places}
    inner, outer = set(), set()
    for path in paths:
        matching = [loop.body for loop in path if loop.trips == num_layers]
        inner |= set(matching[-1:])
        outer |= set(matching[:-1])
    return inner - outer


def gathers_of_stacked_layers(
    found: Iterable[Collective], stacked: Collection[tuple[int, ...]]
) -> list[Collective]:
    """All-gathers outside of the layer loop that give parameters of all layers at once.

    Args:
        found: the program's collectives.
        stacked: shapes of the stacked parameters, the layers' dimension first; of one layer they
            would be gathered inside the loop, where they live for one turn.
    """
    num_layers = {shape[0] for shape in stacked}
    matrices = [math.prod(shape) for shape in stacked if len(shape) > 2]
    least = min(matrices, default=0) // 2
    return [
        one
        for one in found
        if one.kind in ("all-gather", "collective-permute")
        and not one.in_layer_loop
        and num_layers & set(one.dims)
        and math.prod(one.dims) >= least > 0
    ]


class Total(NamedTuple):
    """Collectives of one kind over the same axes.

    Attributes:
        kind: one of `KINDS`.
        axes: of the mesh.
        runs: in a step.
        payload: bytes, see `Collective`, of all runs.
        bytes_sent: by each device in all runs.
        seconds: that they take at least.
    """

    kind: str
    axes: tuple[str, ...]
    runs: int
    payload: int
    bytes_sent: float
    seconds: float


def by_kind_and_axes(timed: Iterable[tuple[Collective, float]]) -> list[Total]:
    """Sums over collectives of the same kind and axes, the longest first.

    Args:
        timed: each with the seconds of all its runs.
    """
    totals: dict[tuple[str, tuple[str, ...]], Total] = {}
    for one, seconds in timed:
        before = totals.get((one.kind, one.axes), Total(one.kind, one.axes, 0, 0, 0.0, 0.0))
        totals[one.kind, one.axes] = before._replace(
            runs=before.runs + one.runs,
            payload=before.payload + one.runs * one.payload,
            bytes_sent=before.bytes_sent + one.runs * one.bytes_sent,
            seconds=before.seconds + seconds,
        )
    return sorted(totals.values(), key=lambda total: -total.seconds)


def _collective(
    kind: str, one: Instruction, place: Place, group: tuple[int, ...], mesh: Mesh, inside: bool
) -> Collective:
    payload = sum(shape.num_bytes for shape in place.computation.operand_shapes(one))
    if kind in ("all-gather", "all-to-all"):
        payload *= len(group)
    if kind == "all-reduce" and _is_scattered(place.computation, one):
        kind = "reduce-scatter"
    return Collective(
        kind=kind,
        axes=_axes(group, mesh),
        group=group,
        runs=place.runs,
        payload=payload,
        op_name=one.op_name,
        in_layer_loop=inside,
        dims=max((shape.dims for shape in one.shapes), key=math.prod),
    )


def _is_scattered(computation: Computation, one: Instruction) -> bool:
    """Whether a fusion keeps this device's part only: a reduce-scatter, as TPUs run it."""
    root = computation.root
    return root.opcode == "dynamic-slice" and one.name in root.operands


def _group(one: Instruction, mesh: Mesh) -> tuple[int, ...]:
    """The first of its groups; of a collective-permute, the devices that its pairs link up."""
    text = one.attributes
    if pairs := _PAIRS.search(text):
        return _linked(_lists(pairs[1]))
    if listed := _LISTED.search(text):
        return _lists(listed[1])[0]
    if iota := _IOTA.search(text):
        shape, dims = (tuple(map(int, iota[index].split(","))) for index in (1, 2))
        order = range(len(dims)) if iota[3] is None else map(int, iota[3].split(","))
        numbers = np.arange(math.prod(dims)).reshape(dims).transpose(*order).reshape(shape)
        return tuple(numbers.reshape(-1, shape[-1])[0].tolist())
    if on_mesh := _ON_MESH.search(text):
        return _group_on_mesh(*on_mesh.groups())
    return tuple(range(mesh.size))


def _group_on_mesh(axes: str, devices: str | None, over: str) -> tuple[int, ...]:
    """The group of a mesh of the compiler's own, over some of its axes or parts of axes.

    An axis in parts is written `'axis':(4)2`: of size 2, with 4 steps of what is left before it.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    numbers = np.arange(math.prod(sizes.values()))
    if devices:
        numbers = np.array([int(one) for one in devices.split(",")])
    dims, chosen = [], []
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over)
    for name, size in sizes.items():
        parts = sorted(
            (int(before or 1), int(part or size)) for axis, before, part in wanted if axis == name
        )
        done = 1
        for before, part in parts:
            dims += [before // done, part]
            chosen.append(len(dims) - 1)
            done = before * part
        dims.append(size // done)
    grid = np.moveaxis(numbers.reshape(dims), chosen, range(len(chosen)))
    return tuple(sorted(grid.reshape(math.prod(dims[dim] for dim in chosen), -1)[:, 0].tolist()))


def _lists(text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, one.split(","))) for one in re.findall(r"\{([\d,]+)\}", text)]


def _linked(pairs: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The devices that a chain of pairs from the first source reaches."""
    target = {source: to for source, to in pairs if source != to}
    if not target:
        return ()
    reached = [next(iter(target))]
    while (following := target.get(reached[-1])) is not None and following not in reached:
        reached.append(following)
    return tuple(reached)


def _axes(group: tuple[int, ...], mesh: Mesh) -> tuple[str, ...]:
    """The axes along which the devices of a group differ."""
    places = np.unravel_index(np.array(group), tuple(mesh.shape.values()))
    return tuple(
        axis for axis, indices in zip(mesh.shape, places, strict=True) if len(set(indices)) > 1
    )
