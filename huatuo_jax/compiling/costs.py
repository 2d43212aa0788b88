"""What a compiled program does on one device: floating-point operations and bytes of memory.

Counted from the program's text, each instruction as often as its loops run it (the compiler's own
`cost_analysis()` counts the body of a loop once). Every value is written to the memory once and
read once by each instruction that uses it, unless it lies in on-chip memory; the inside of a fusion
costs no memory. What is sliced out of an array, or written into it, counts for what is moved.
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from huatuo_jax.compiling.collectives import KINDS
from huatuo_jax.compiling.hlo import Computation, Instruction, Module, Shape
from huatuo_jax.compiling.kernels import attention_flops, cublas_flops

# They move nothing: their values are others', or nothing at run time.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call call-start "
    "call-done after-all iota partition-id replica-id opt-barrier async-start async-update "
    "async-done copy-done slice-done dynamic-slice-done".split()
) | {f"{kind}-done" for kind in KINDS}
_MOVES_NOTHING = (
    "AllocateBuffer",
    "ConcatBitcast",
    "AssumeGatherIndicesInBound",
    "AsyncCollective",
)
# What they write into stays in its place; which of their operands is written there.
_OVERWRITES = {"dynamic-update-slice": 1, "scatter": 2}
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


class Costs(NamedTuple):
    """Of one device in a step.

    Attributes:
        matmul_flops: of matrix products that the compiler made.
        attention_flops: of splash attention's kernels or cuDNN's, their causal half.
        memory_bytes: read and written.
        unknown_loops: loops whose number of turns could not be told and counts as 1.
    """

    matmul_flops: float
    attention_flops: float
    memory_bytes: float
    unknown_loops: int

    @property
    def flops(self) -> float:
        """Of both."""
        return self.matmul_flops + self.attention_flops


def costs_of(module: Module) -> Costs:
    """Counts a program."""
    matmul = attention = memory = 0.0
    unknown = set()
    for place in module.places:
        unknown |= {loop.body for loop in place.loops if loop.trips is None}
        for one in place.computation.instructions.values():
            matmul += place.runs * product_flops(one, place.computation)
            attention += place.runs * attention_flops(one, place.computation)
            if not place.fused:
                memory += place.runs * moved_bytes(one, place.computation, module)
    return Costs(matmul, attention, memory, len(unknown))


def product_flops(one: Instruction, computation: Computation) -> float:
    """Two for each multiplication and addition of a matrix product; 0 for what is none."""
    if one.opcode == "dot":
        lhs, found = computation.operand_shapes(one)[0], _CONTRACTED.search(one.attributes)
        dims = [int(dim) for dim in found[1].split(",") if dim] if found else []
        return 2.0 * math.prod(one.shapes[0].dims) * math.prod(lhs.dims[dim] for dim in dims)
    if one.opcode == "convolution":
        return _convolution_flops(one, *computation.operand_shapes(one)[:2])
    return cublas_flops(one, computation)


def _convolution_flops(one: Instruction, lhs: Shape, rhs: Shape) -> float:
    """TPUs run every matrix product as a convolution; what falls on padding is not computed."""
    labels = _LABELS.search(one.attributes)
    assert labels is not None, one.attributes
    lhs_labels, rhs_labels, out_labels = labels.groups()
    window = dict(re.findall(r"(size|stride|pad|lhs_dilate|rhs_dilate)=([\dx_-]+)", one.attributes))
    outputs = one.shapes[0].dims
    flops = 2.0 * rhs.dims[rhs_labels.index("i")]  # Of one group.
    flops *= outputs[out_labels.index("b")] * outputs[out_labels.index("f")]
    for number in range(len(lhs_labels) - 2):
        label = str(number)
        size = rhs.dims[rhs_labels.index(label)]
        low = _at(window.get("pad"), number, "0_0").split("_")[0]
        flops *= _positions(
            given=lhs.dims[lhs_labels.index(label)],
            wanted=outputs[out_labels.index(label)],
            size=size,
            low=int(low),
            stride=int(_at(window.get("stride"), number, "1")),
            lhs_dilation=int(_at(window.get("lhs_dilate"), number, "1")),
            rhs_dilation=int(_at(window.get("rhs_dilate"), number, "1")),
        )
    return flops


def _at(sizes: str | None, number: int, absent: str) -> str:
    return absent if sizes is None else sizes.split("x")[number]


def _positions(
    *,
    given: int,
    wanted: int,
    size: int,
    low: int,
    stride: int,
    lhs_dilation: int,
    rhs_dilation: int,
) -> int:
    """Pairs of an output and a place in the window that meet an input and not padding."""
    if size == 1 and low == 0 and lhs_dilation == 1:
        return wanted
    end = (given - 1) * lhs_dilation
    count = 0
    for place in range(size):
        for output in range(wanted):
            at = output * stride + place * rhs_dilation - low
            count += 0 <= at <= end and at % lhs_dilation == 0
    return count


def moved_bytes(one: Instruction, computation: Computation, module: Module) -> float:
    """Bytes of main memory that an instruction outside of fusions reads and writes."""
    if one.opcode in _FREE or any(name in one.attributes for name in _MOVES_NOTHING):
        return 0.0
    operands = computation.operand_shapes(one)
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return _read_and_written(one.shapes[:1], operands[:1])
    if one.opcode == "dynamic-update-slice":
        return 2.0 * _in_hbm(operands[1:2]) if operands[0].in_hbm else 0.0
    if one.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
        target, source = one.shapes[-2 if one.opcode == "copy-start" else 0], operands[0]
        size = min(target.num_bytes, source.num_bytes)
        return float(size * (target.in_hbm + source.in_hbm))
    if one.opcode == "fusion":
        return _fusion_bytes(one, computation, module)
    if one.opcode.removesuffix("-start") in KINDS:
        return _in_hbm(operands) + _in_hbm(_received(one))
    return _in_hbm(operands) + _in_hbm(one.shapes)


def _received(one: Instruction) -> tuple[Shape, ...]:
    """What a collective leaves; one that only starts may list its operands before it."""
    number = len(one.operands)
    return one.shapes[number : 2 * number] or one.shapes[:number]


def _fusion_bytes(one: Instruction, computation: Computation, module: Module) -> float:
    """Outputs, and of each operand what the inside reads of it."""
    inside = _inside(one, module)
    total = 0.0
    for name, parameter in zip(one.operands, _parameters(inside), strict=True):
        outer = computation.instructions[name]
        if len(outer.shapes) == 1 and outer.shapes[0].in_hbm:
            total += _read_inside(parameter, inside, module)
    root = _through_bitcasts(inside.root, inside)
    if root.opcode in _OVERWRITES:
        update = inside.instructions[root.operands[_OVERWRITES[root.opcode]]].shapes[0]
        return total + (update.num_bytes if one.shapes[0].in_hbm else 0)
    return total + _in_hbm(one.shapes)


def _inside(one: Instruction, module: Module) -> Computation:
    name = one.called("calls")
    assert name is not None, one.name
    return module.computations[name]


def _parameters(inside: Computation) -> list[Instruction]:
    """By their number, which stands where others have operands."""
    found = [one for one in inside.instructions.values() if one.opcode == "parameter"]
    return sorted(found, key=_parameter_number)


def _parameter_number(parameter: Instruction) -> int:
    assert parameter.number is not None, parameter.name
    return parameter.number


def _read_inside(parameter: Instruction, inside: Computation, module: Module) -> int:
    """Bytes that a fusion, and those in it, read of one of its parameters."""
    names, read = {parameter.name}, 0
    for one in inside.instructions.values():  # In order: a bitcast stands before its users.
        if names.isdisjoint(one.operands):
            continue
        if one.opcode == "bitcast":
            names.add(one.name)
        elif one.opcode in ("dynamic-slice", "slice", "gather"):
            read += one.shapes[0].num_bytes
        elif one.opcode == "fusion":
            pairs = zip(one.operands, _parameters(_inside(one, module)), strict=True)
            inner = [other for name, other in pairs if name in names]
            read += sum(_read_inside(other, _inside(one, module), module) for other in inner)
        elif one.opcode not in _OVERWRITES or not names.isdisjoint(one.operands[1:]):
            read += parameter.shapes[0].num_bytes
    return min(read, parameter.shapes[0].num_bytes)


def _through_bitcasts(one: Instruction, computation: Computation) -> Instruction:
    while one.opcode == "bitcast":
        one = computation.instructions[one.operands[0]]
    return one


def _read_and_written(outputs: Iterable[Shape], operands: Iterable[Shape]) -> float:
    """What a slice moves: its size, out of the memory where it was there, and into it."""
    (output,), (operand,) = list(outputs), list(operands)
    return float(output.num_bytes * (output.in_hbm + operand.in_hbm))


def _in_hbm(shapes: Iterable[Shape]) -> float:
    return float(sum(shape.num_bytes for shape in shapes if shape.in_hbm))
