"""Reads a compiled program's text (HLO): computations, instructions, trip counts and collectives.

Only what is counted is read: shapes, operands, calls, and the trip counts of loops, which are the
constant that a loop's condition compares its counter with.

A collective appears in the program once and runs as often as the loops around it. The mesh axes it
goes over follow from the devices of its groups. An all-gather that the compiler has cut into
pieces, to multiply while it travels, appears as collective-permutes.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

_ELEMENT = re.compile(r"\bindex=(\d+)")
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
# The part after the bracket names the cores that a computation runs on, if not the main ones.
_END = re.compile(r'\}(, execution_thread="[^"]*")?$')
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.-]+)")
_BITS = re.compile(r"[a-z]+(\d+)")
_CALLS = re.compile(
    r"(calls|body|condition|to_apply|true_computation|false_computation)=%([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')

_FAST_MEMORY = "S("  # Any memory space but 0 is not the HBM.
KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_OF_SHARDS = ("all-gather", "all-to-all")  # Their operand is a part of what they work on.
_CHANNEL = re.compile(r"channel_id=(\d+)")
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_ON_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(?\[?([\d,]+)\]?\)?)? ?\{([^}]*)\}"
)
# Between TPU slices data goes by the hosts, on behalf of a collective.
_BETWEEN_SLICES = re.compile(
    r'_xla_host_transfer_rendezvous="([^"]*)".*_xla_megascale_transfer_type="([A-Z_]+)"'
)
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")


class Shape(NamedTuple):
    """The shape of an array.

    Attributes:
        dtype: HLO's name of it.
        dims: on one device.
        in_hbm: it lies in the device's main memory.
    """

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def num_bytes(self) -> int:
        """Returns the bytes, without the padding of tiles."""
        found = _BITS.match(self.dtype)
        bits = 8 if self.dtype == "pred" else int(found[1]) if found else 0
        return math.prod(self.dims) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: of its value.
        opcode: the operation.
        shapes: of the value, several for a tuple.
        operands: names of values.
        attributes: the rest of the line.
        is_root: its computation returns it.
        number: a parameter's number, or the value of an integer constant.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool
    number: int | None

    @property
    def op_name(self) -> str:
        """Returns its origin in the Python program, or an empty text."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    def called(self, kind: str) -> str | None:
        """Returns the computation that it calls as its `body`, `condition`, `calls`, ..."""
        return next((name for key, name in _CALLS.findall(self.attributes) if key == kind), None)


@dataclasses.dataclass(frozen=True)
class Computation:
    """A computation: its instructions in order, by name."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """Returns the instruction whose value the computation returns."""
        return next(one for one in reversed(self.instructions.values()) if one.is_root)

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        """Returns the arrays among an instruction's operands, without tuples."""
        found = (self.instructions[name] for name in instruction.operands)
        return [one.shapes[0] for one in found if len(one.shapes) == 1]


class Loop(NamedTuple):
    """A loop around a computation; `trips` is None where it is unknown."""

    body: str
    trips: int | None


class Place(NamedTuple):
    """One call path of a computation.

    Attributes:
        computation: the computation.
        loops: the loops around it, the outermost first.
        fused: it is the inside of a fusion, whose values do not reach memory.
    """

    computation: Computation
    loops: tuple[Loop, ...]
    fused: bool

    @property
    def runs(self) -> int:
        """Returns how often it runs; a loop of unknown length counts once."""
        return math.prod(loop.trips or 1 for loop in self.loops)


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program on one device."""

    computations: dict[str, Computation]
    entry: Computation

    @functools.cached_property
    def places(self) -> list[Place]:
        """Lists all computations that run, once for each call path.

        Every branch of a condition counts as run.
        """
        return list(self._below(self.entry, (), False))

    def _below(
        self, computation: Computation, loops: tuple[Loop, ...], fused: bool
    ) -> Iterator[Place]:
        yield Place(computation, loops, fused)
        for one in computation.instructions.values():
            if one.opcode == "while":
                body = one.called("body")
                assert body is not None
                inside = (*loops, Loop(body, self._trips(one)))
                yield from self._below(self.computations[body], inside, fused)
                continue
            names = []
            if one.opcode == "conditional":
                found = _BRANCHES.search(one.attributes)
                names = _NAME.findall(found[1]) if found else []
                names += [
                    name for key in ("true", "false") if (name := one.called(f"{key}_computation"))
                ]
            elif one.opcode in ("fusion", "async-start", "call", "call-start"):
                names = [name for key in ("calls", "to_apply") if (name := one.called(key))]
            for name in names:
                yield from self._below(
                    self.computations[name], loops, fused or one.opcode == "fusion"
                )

    def _trips(self, loop: Instruction) -> int | None:
        """Returns the trip count: the smallest bound in the condition over the counter's step."""
        name = loop.called("condition")
        assert name is not None
        bounds: list[int] = []
        waiting = [self.computations[name]]
        while waiting:
            computation = waiting.pop()
            for one in computation.instructions.values():
                if inner := one.called("calls"):
                    waiting.append(self.computations[inner])
                if one.opcode == "constant" and one.shapes[0].dtype in ("s32", "u32"):
                    bounds += [one.number] if one.number else []
        return -(-min(bounds) // self._step(loop)) if bounds else None

    def _step(self, loop: Instruction) -> int:
        """Returns the counter's step in a trip: 2 where the compiler has merged two trips."""
        condition, body = (
            self.computations[loop.called(key) or ""] for key in ("condition", "body")
        )
        if condition.root.opcode != "compare":
            return 1
        found = _ELEMENT.search(condition.instructions[condition.root.operands[0]].attributes)
        if found is None or body.root.opcode != "tuple":
            return 1
        raised = body.instructions[body.root.operands[int(found[1])]]
        if raised.opcode != "add":
            return 1
        numbers = (body.instructions[name].number for name in raised.operands)
        return next((number for number in numbers if number), 1)


def parse(text: str) -> Module:
    """Parses `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in _whole_lines(text):
        if current is None:
            if header := _HEADER.match(line):
                current = Computation(header[2], {})
                computations[header[2]] = current
                entry = current if header[1] else entry
        elif _END.match(line):
            current = None
        elif found := _INSTRUCTION.match(line):
            one = _instruction(found[2], found[3], is_root=bool(found[1]))
            current.instructions[one.name] = one
    assert entry is not None, "a program has an entry"
    return Module(computations, entry)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """A collective operation.

    Attributes:
        kind: one of `KINDS`.
        axes: the mesh axes of its groups.
        group: devices of the first group, numbered as in the mesh.
        runs: number of runs in a step.
        payload: bytes of the whole array that a group holds after (all-gather) or before (all
            others) it; for a collective-permute, the bytes that one device sends.
        op_name: its origin in the Python program.
        in_layer_loop: it is inside the loop over layers.
        dims: of the resulting array.
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
        """Returns the least bytes that each device sends in one run, by any algorithm."""
        others = (len(self.group) - 1) / len(self.group)
        if self.kind == "all-reduce":
            return 2 * self.payload * others
        if self.kind in ("all-gather", "reduce-scatter", "collective-broadcast"):
            return self.payload * others
        if self.kind == "collective-permute":
            return self.payload
        return self.payload * others / len(self.group)  # All-to-all: of one device's part.


def collectives_of(module: Module, mesh: Mesh, *, num_layers: int) -> list[Collective]:
    """Returns all collectives that a program runs.

    Args:
        module: the program.
        mesh: the mesh it was compiled for.
        num_layers: trips of the loop over layers.
    """
    loops = layer_loops(module.places, num_layers)
    found: dict[object, Collective] = {}
    for place in module.places:
        inside = any(loop.body in loops for loop in place.loops)
        for one in place.computation.instructions.values():
            kind = one.opcode.removesuffix("-start")
            between = _BETWEEN_SLICES.search(one.attributes) if kind == "send" else None
            if between is not None:
                key = (between[1], place.loops)
                found.setdefault(key, _between_slices(between[2], one, place, mesh, inside))
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
    """Returns the bodies of the loops over layers: of those with as many trips, the inner ones."""
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
    """Returns all-gathers outside of the layer loop of parameters of all layers.

    Args:
        found: the program's collectives.
        stacked: shapes of the stacked parameters, the layers' dimension first; those of one layer
            would be gathered inside the loop, where they live for one trip.
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
    """The sum of collectives of one kind over the same axes.

    Attributes:
        kind: one of `KINDS`.
        axes: of the mesh.
        runs: number of runs in a step.
        payload: bytes, see `Collective`, of all runs.
        bytes_sent: by each device in all runs.
        seconds: shortest possible time.
    """

    kind: str
    axes: tuple[str, ...]
    runs: int
    payload: int
    bytes_sent: float
    seconds: float


def by_kind_and_axes(timed: Iterable[tuple[Collective, float]]) -> list[Total]:
    """Sums collectives of the same kind and axes, the longest first.

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


def _whole_lines(text: str) -> list[str]:
    """Returns the lines, joined where the metadata of a kernel continues in the next one."""
    lines: list[str] = []
    for line in text.splitlines():
        if (
            lines
            and lines[-1].startswith("  ")
            and line
            and line[0] != " "
            and not _END.match(line)
        ):
            lines[-1] += line
        else:
            lines.append(line)
    return lines


def _instruction(name: str, text: str, *, is_root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shapes, rest = _shapes(text[:end]), text[end:].strip()
    start = rest.index("(")
    stop = _closing(rest, start)
    arguments, opcode = rest[start + 1 : stop], rest[:start]
    return Instruction(
        name,
        opcode,
        shapes,
        tuple(_NAME.findall(arguments)),
        rest[stop + 1 :],
        is_root,
        # A constant's value and a parameter's number take the place of operands.
        int(arguments) if arguments.isdecimal() else None,
    )


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(
            dtype,
            tuple(int(dim.lstrip("<=")) for dim in dims.split(",") if dim),
            _FAST_MEMORY not in layout,
        )
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def _closing(text: str, start: int) -> int:
    """Returns the index of the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] == "(":
            depth += 1
        elif text[index] == ")":
            depth -= 1
            if not depth:
                return index
    raise AssertionError(f"unbalanced: {text[:200]}")


def _collective(
    kind: str, one: Instruction, place: Place, group: tuple[int, ...], mesh: Mesh, inside: bool
) -> Collective:
    payload = sum(shape.num_bytes for shape in place.computation.operand_shapes(one))
    if kind in _OF_SHARDS:
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


def _between_slices(
    transfer: str, one: Instruction, place: Place, mesh: Mesh, inside: bool
) -> Collective:
    """Returns the collective that an array is sent to the other slices for."""
    kind = transfer.lower().replace("_", "-")
    if kind not in KINDS:
        raise ValueError(f"{one.name}: {transfer} between slices is not known")
    first, *_ = mesh.devices.flat
    group = tuple(
        index
        for index, device in enumerate(mesh.devices.flat)
        if (*device.coords, device.core_on_chip) == (*first.coords, first.core_on_chip)
    )
    sent = place.computation.operand_shapes(one)[0]
    return Collective(
        kind=kind,
        axes=_axes(group, mesh),
        group=group,
        runs=place.runs,
        payload=sent.num_bytes * (len(group) if kind in _OF_SHARDS else 1),
        op_name=one.op_name,
        in_layer_loop=inside,
        dims=sent.dims,
    )


def _is_scattered(computation: Computation, one: Instruction) -> bool:
    """Returns True if a fusion keeps this device's part only: a reduce-scatter on TPUs."""
    root = computation.root
    return root.opcode == "dynamic-slice" and one.name in root.operands


def _group(one: Instruction, mesh: Mesh) -> tuple[int, ...]:
    """Returns the first of its groups, or the devices linked by a collective-permute's pairs."""
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
    """Returns the group of a mesh of the compiler's own, over some axes or parts of axes.

    A part of an axis is written `'axis':(4)2`: its size is 2, and the parts before it have size 4.
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
    """Returns the devices that a chain of pairs from the first source reaches."""
    target = {source: to for source, to in pairs if source != to}
    if not target:
        return ()
    reached = [next(iter(target))]
    while (following := target.get(reached[-1])) is not None and following not in reached:
        reached.append(following)
    return tuple(reached)


def _axes(group: tuple[int, ...], mesh: Mesh) -> tuple[str, ...]:
    """Returns the axes along which the devices of a group differ."""
    places = np.unravel_index(np.array(group), tuple(mesh.shape.values()))
    return tuple(
        axis for axis, indices in zip(mesh.shape, places, strict=True) if len(set(indices)) > 1
    )
