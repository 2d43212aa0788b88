"""What a compiled program holds in a device's memory, and what does not fit there."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from huatuo_jax.compiling.hlo import Instruction, Module
from huatuo_jax.sharding import path_name


class Memory(NamedTuple):
    """Bytes on one device while a program runs.

    Attributes:
        arguments: what it is given.
        temporaries: what it makes and lets go of.
        outputs: what it leaves, where that is not in its arguments' place.
        code: the program itself.
        beside: of other states that the stage holds meanwhile.
        capacity: of the device.
    """

    arguments: int
    temporaries: int
    outputs: int
    code: int
    beside: int
    capacity: int

    @property
    def total(self) -> int:
        """All of it together."""
        return self.arguments + self.temporaries + self.outputs + self.code + self.beside


class Buffer(NamedTuple):
    """An array in a device's memory: what it is, and its bytes there."""

    what: str
    shape: str
    num_bytes: int


def memory_of(compiled: jax.stages.Compiled, *, beside: Any, capacity: int) -> Memory:
    """What the compiler counted.

    Args:
        compiled: the program.
        beside: abstract arrays that lie in memory meanwhile and are not its arguments.
        capacity: bytes of a device.
    """
    found = compiled.memory_analysis()
    assert found is not None
    return Memory(
        arguments=found.argument_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        beside=bytes_on_device(beside),
        capacity=capacity,
    )


def bytes_on_device(tree: Any) -> int:
    """Bytes of abstract arrays on each device, without the padding of tiles."""
    return sum(_shard(leaf)[1] for leaf in jax.tree.leaves(tree))


def largest_arguments(arguments: Any, number: int) -> list[Buffer]:
    """The largest of a program's arguments, by their path."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(arguments):
        shape, size = _shard(leaf)
        found.append(Buffer(path_name(path), f"{leaf.dtype}{list(shape)}", size))
    return sorted(found, key=lambda buffer: -buffer.num_bytes)[:number]


def largest_values(module: Module, number: int) -> list[Buffer]:
    """The largest of a program's own values, by the line of the Python program they come from."""
    found: dict[tuple[str, str], Buffer] = {}
    for place in module.places:
        if place.fused:
            continue
        for one in place.computation.instructions.values():
            for buffer in _values(one):
                found.setdefault((buffer.what, buffer.shape), buffer)
    return sorted(found.values(), key=lambda buffer: -buffer.num_bytes)[:number]


def _values(one: Instruction) -> Iterable[Buffer]:
    if one.opcode in ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional"):
        return
    for shape in one.shapes:
        if shape.in_hbm:
            what = one.op_name or one.name
            yield Buffer(what, f"{shape.dtype}{list(shape.dims)}", shape.num_bytes)


def _shard(leaf: Any) -> tuple[tuple[int, ...], int]:
    """The shape and the bytes of an abstract array on one device."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    size = 1
    for dim in shape:
        size *= dim
    return tuple(shape), size * leaf.dtype.itemsize
