"""FLOPs and memory traffic of a compiled program on one device, and the roofline they give.

They are counted from the program's text, each instruction as often as its loops run it (the
compiler's own `cost_analysis()` counts the body of a loop once). Every value is written to memory
once and read once by each instruction that uses it, unless it lies in on-chip memory; the inside of
a fusion costs no memory traffic. Slices and updates count for the bytes that they move.

Calls of kernels that the compiler did not write are counted by formula: splash attention (Pallas)
on TPUs; cuDNN's attention and cuBLAS' matrix products on GPUs. Compiled without a GPU, a program's
products are Triton's, which are `dot`s within fusions: cuBLAS is used where it is faster, which
only a GPU can tell.

In the roofline, computation, memory traffic and communication between chips overlap entirely: the
longest of the three is a lower bound of the time (Williams et al. 2009). A collective over chips
along axes of the slice uses both directions of each axis that is a ring, and one direction of a
line; groups over several slices first divide the work among the chips of a slice, and each then
sends its part through its host's network. Through switches, as GPUs have them, a device sends at
its link's rate to any other; additions inside NVLink's switches are not modelled.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from jax.sharding import Mesh

from huatuo_jax.compiling.hardware import Slice
from huatuo_jax.compiling.hlo import KINDS, Collective, Computation, Instruction, Module, Shape

_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_PALLAS = "tpu_custom_call"
_CUDNN_ATTENTION = "__cudnn$fmha"
_CUBLAS = ("__cublas$gemm", "__cublas$lt$matmul")
# Number of matrix products of a block of queries with a block of keys, or of the same size, in each
# of splash attention's kernels: scores and outputs; scores, their gradient, the queries'; those and
# the gradients of keys and values. cuDNN's backward pass is one kernel: scores once, and four.
_SPLASH_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
_FLOATS = ("bf16", "f16", "f32")
_CUDNN_FORWARD, _CUDNN_BACKWARD = 2, 5
_CONTRACTED_IN_KERNEL = re.compile(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]')
# Instructions that move nothing: their values are those of others, or nothing at run time.
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
# Instructions that write into an operand in place -> the index of the operand written there.
_OVERWRITES = {"dynamic-update-slice": 1, "scatter": 2}
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
# TPU7x: its two halves are joined six times as fast as by a link (Cloud TPU documentation, page
# TPU7x). No other chip in the table has two devices.
_LINKS_INSIDE_A_CHIP = 6


def splash_calls(module: Module) -> list[str]:
    """Lists the names of splash attention's kernels among the program's instructions."""
    return sorted(one.name for one in _calls(module) if _is_splash(one))


def cudnn_calls(module: Module) -> list[str]:
    """Lists the names of cuDNN's attention kernels among the program's instructions."""
    return sorted(one.name for one in _calls(module) if _target(one).startswith(_CUDNN_ATTENTION))


def attention_flops(one: Instruction, computation: Computation) -> float:
    """Counts the FLOPs of a causal attention kernel's call; 0 for other calls."""
    if _target(one).startswith(_CUDNN_ATTENTION):
        is_backward = _target(one).endswith("Backward")
        # Their first value has the queries' shape: outputs, or the queries' gradient.
        return _attention(_CUDNN_BACKWARD if is_backward else _CUDNN_FORWARD, one.shapes[0].dims)
    if _target(one) != _PALLAS:
        return 0.0
    products = next((n for name, n in _SPLASH_PRODUCTS.items() if one.name.startswith(name)), 0)
    # The first operands may be blocks of the mask, which are integers. A batch of 1 is dropped.
    queries = next(
        (
            shape.dims
            for shape in computation.operand_shapes(one)
            if shape.dtype in _FLOATS and len(shape.dims) in (3, 4)
        ),
        None,
    )
    if queries is None:
        return 0.0
    return _attention(products, (1,) * (4 - len(queries)) + queries)


def cublas_flops(one: Instruction, computation: Computation) -> float:
    """Counts two FLOPs for each multiply-add of a call of cuBLAS; 0 for other calls."""
    if _target(one) not in _CUBLAS:
        return 0.0
    found = _CONTRACTED_IN_KERNEL.search(one.attributes)
    assert found is not None, one.attributes
    lhs = computation.operand_shapes(one)[0].dims
    contracted = math.prod(lhs[int(dim)] for dim in re.findall(r"\d+", found[1]))
    return 2.0 * math.prod(one.shapes[0].dims) * contracted


class Costs(NamedTuple):
    """The costs of one device in a step.

    Attributes:
        matmul_flops: of matrix products that the compiler made.
        attention_flops: of splash attention's kernels or cuDNN's, their causal half.
        memory_bytes: bytes read and written.
        unknown_loops: loops with an unknown trip count, which counts as 1.
    """

    matmul_flops: float
    attention_flops: float
    memory_bytes: float
    unknown_loops: int

    @property
    def flops(self) -> float:
        """Returns the sum of both FLOPs."""
        return self.matmul_flops + self.attention_flops


def costs_of(module: Module) -> Costs:
    """Counts the costs of a program."""
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
    """Counts two FLOPs for each multiply-add of a matrix product; 0 for other instructions."""
    if one.opcode == "dot":
        lhs, found = computation.operand_shapes(one)[0], _CONTRACTED.search(one.attributes)
        dims = [int(dim) for dim in found[1].split(",") if dim] if found else []
        return 2.0 * math.prod(one.shapes[0].dims) * math.prod(lhs.dims[dim] for dim in dims)
    if one.opcode == "convolution":
        return _convolution_flops(one, *computation.operand_shapes(one)[:2])
    return cublas_flops(one, computation)


def moved_bytes(one: Instruction, computation: Computation, module: Module) -> float:
    """Returns the bytes of main memory that an instruction outside of fusions reads and writes."""
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


class Roofline(NamedTuple):
    """The shortest possible seconds of a step.

    Attributes:
        compute_s: matrix products and attention at the chip's peak.
        memory_s: memory traffic.
        interconnect_s: all collectives, one after the other.
        utilisation: model FLOPs over the chips' peak FLOPs in the longest of these.
    """

    compute_s: float
    memory_s: float
    interconnect_s: float
    utilisation: float

    @property
    def bound_s(self) -> float:
        """Returns the longest of the three."""
        return max(self.compute_s, self.memory_s, self.interconnect_s)

    @property
    def sum_s(self) -> float:
        """Returns the sum of the three, as if none overlapped another."""
        return self.compute_s + self.memory_s + self.interconnect_s

    @property
    def binds(self) -> str:
        """Returns the name of the longest."""
        seconds = {
            "compute": self.compute_s,
            "memory": self.memory_s,
            "interconnect": self.interconnect_s,
        }
        return max(seconds, key=lambda name: seconds[name])


def roofline(costs: Costs, *, interconnect_s: float, model_flops: float, of: Slice) -> Roofline:
    """Computes the roofline of a program.

    Args:
        costs: of one device.
        interconnect_s: seconds of its collectives, see `seconds_of`.
        model_flops: FLOPs of the model by formula, on all devices together.
        of: the chips.
    """
    peak = of.chip.peak_flops / of.chip.devices
    found = Roofline(
        compute_s=costs.flops / peak,
        memory_s=costs.memory_bytes / (of.chip.memory_bandwidth / of.chip.devices),
        interconnect_s=interconnect_s,
        utilisation=0.0,
    )
    return found._replace(utilisation=model_flops / (len(of.devices) * peak * found.bound_s))


def seconds_of(one: Collective, of: Slice, mesh: Mesh) -> float:
    """Returns the shortest possible seconds of one run of a collective."""
    devices = [mesh.devices.flat[number] for number in one.group]
    slices = {_slice_index(device, of) for device in devices}
    if len(slices) == 1:
        return one.bytes_sent / _bandwidth(one, devices, of)
    per_slice = len(devices) // len(slices)
    first = min(slices)
    here = tuple(
        number
        for number, device in zip(one.group, devices, strict=True)
        if _slice_index(device, of) == first
    )
    across = dataclasses.replace(
        one, group=tuple(range(len(slices))), payload=one.payload // per_slice
    )
    network_s = across.bytes_sent / of.chip.network_bandwidth * of.chip.devices
    if per_slice == 1:
        return network_s
    return network_s + seconds_of(dataclasses.replace(one, group=here), of, mesh)


def _attention(products: int, queries_BNTH: tuple[int, ...]) -> float:
    batch, heads, length, width = queries_BNTH
    return products * 2.0 * batch * heads * (length * (length + 1) / 2) * width


def _calls(module: Module) -> set[Instruction]:
    return {
        one
        for place in module.places
        for one in place.computation.instructions.values()
        if one.opcode == "custom-call"
    }


def _is_splash(one: Instruction) -> bool:
    return _target(one) == _PALLAS and one.name.startswith("splash")


def _target(one: Instruction) -> str:
    found = _TARGET.search(one.attributes) if one.opcode == "custom-call" else None
    return found[1] if found else ""


def _convolution_flops(one: Instruction, lhs: Shape, rhs: Shape) -> float:
    """Counts the FLOPs of a matrix product as TPUs run it, a convolution, without padding."""
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
    """Counts pairs of an output and a window position that meet an input rather than padding."""
    if size == 1 and low == 0 and lhs_dilation == 1:
        return wanted
    end = (given - 1) * lhs_dilation
    count = 0
    for place in range(size):
        for output in range(wanted):
            at = output * stride + place * rhs_dilation - low
            count += 0 <= at <= end and at % lhs_dilation == 0
    return count


def _received(one: Instruction) -> tuple[Shape, ...]:
    """Returns the results of a collective; one that only starts may list its operands before."""
    number = len(one.operands)
    return one.shapes[number : 2 * number] or one.shapes[:number]


def _fusion_bytes(one: Instruction, computation: Computation, module: Module) -> float:
    """Returns the bytes of a fusion's outputs, and of the parts of its operands that it reads."""
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
    """Returns the parameters in the order of their numbers."""
    found = [one for one in inside.instructions.values() if one.opcode == "parameter"]
    return sorted(found, key=_parameter_number)


def _parameter_number(parameter: Instruction) -> int:
    assert parameter.number is not None, parameter.name
    return parameter.number


def _read_inside(parameter: Instruction, inside: Computation, module: Module) -> int:
    """Returns the bytes of a parameter that a fusion, and those inside it, read."""
    names, read = {parameter.name}, 0
    for one in inside.instructions.values():  # In order: a bitcast comes before its users.
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
    """Returns the bytes that a slice moves out of main memory and into it."""
    (output,), (operand,) = list(outputs), list(operands)
    return float(output.num_bytes * (output.in_hbm + operand.in_hbm))


def _in_hbm(shapes: Iterable[Shape]) -> float:
    return float(sum(shape.num_bytes for shape in shapes if shape.in_hbm))


def _slice_index(device: Any, of: Slice) -> int:
    """Returns the index of a device's slice, or of its host for GPUs."""
    if of.chip.switched:
        return int(device.process_index)
    return getattr(device, "slice_index", None) or 0


def _bandwidth(one: Collective, devices: list[Any], of: Slice) -> float:
    """Returns the bytes a second that each device of a group can send into it."""
    chip = of.chip
    if chip.switched:
        return chip.link_bandwidth
    places = {tuple(device.coords) for device in devices}
    cores = len(devices) / len(places)
    if len(places) == 1:
        return _LINKS_INSIDE_A_CHIP * chip.link_bandwidth
    ways = []
    for dim, length in enumerate(of.shape):
        span = len({place[dim] for place in places})
        if span > 1:
            is_ring = span == length and length % chip.ring_multiple == 0
            ways.append(2 if is_ring else 1)
    if one.kind == "collective-permute":
        # One neighbour each; through a plane of chips there is always a ring.
        ways = [2 if len(ways) > 1 else ways[0]]
    # The links belong to a chip: they serve its devices together, or this group and its twin.
    return sum(ways) * chip.link_bandwidth * cores / chip.devices
