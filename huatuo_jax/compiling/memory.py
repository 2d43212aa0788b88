"""The largest of what a compiled program holds in a device's memory."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from huatuo_jax.compiling.hlo import Instruction, Module
from huatuo_jax.sharding import path_name
from huatuo_jax.training.programs import shard_of


class Buffer(NamedTuple):
    """An array in a device's memory: what it is, and its bytes there."""

    what: str
    shape: str
    num_bytes: int


def largest_arguments(arguments: Any, number: int) -> list[Buffer]:
    """The largest of a program's arguments, by their path."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(arguments):
        shape, size = shard_of(leaf)
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
