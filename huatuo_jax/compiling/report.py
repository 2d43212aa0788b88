"""Compiles a program for a slice, and reports its figures as lines of text and as JSON."""

import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax

from huatuo_jax.compiling import hlo
from huatuo_jax.compiling.costs import (
    Costs,
    Roofline,
    costs_of,
    cudnn_calls,
    roofline,
    seconds_of,
    splash_calls,
)
from huatuo_jax.compiling.hardware import Slice
from huatuo_jax.compiling.hlo import Collective, Instruction, Module, Total
from huatuo_jax.compiling.programs import Program
from huatuo_jax.core.sharding import path_name
from huatuo_jax.training.programs import GIB, Memory, TooLarge, memory_of, shard_of

_COUNTS = ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"))
_SECONDS = ((1.0, " s"), (1e-3, " ms"), (1e-6, " us"), (1e-9, " ns"))
_BYTES = ((float(GIB), " GiB"), (float(1 << 20), " MiB"), (float(1 << 10), " KiB"), (1.0, " B"))
_NUM_BUFFERS = 8


def count(number: float) -> str:
    """Formats FLOPs and the like: `1.2 T`, `34 G`."""
    return _scaled(number, _COUNTS, otherwise=f"{number:.3g}")


def duration(seconds: float) -> str:
    """Formats seconds: `12.3 s`, `45 us`."""
    return _scaled(seconds, _SECONDS, otherwise=f"{seconds:.3g} s")


def size(num_bytes: float) -> str:
    """Formats bytes: `1.2 GiB`, `34 MiB`."""
    return _scaled(num_bytes, _BYTES, otherwise=f"{num_bytes:.3g} B")


def gib(num_bytes: float) -> str:
    """Formats bytes as a number of GiB, `1.20`, for sums with the unit at the end."""
    number = num_bytes / GIB
    return f"{number:.2f}" if number >= 0.005 or not number else f"{number:.1g}"


def share(part: float) -> str:
    """Formats a share: `45%`, `0.12%`."""
    return f"{part:.0%}" if part >= 0.1 or not part else f"{100 * part:.2g}%"


def rate(number: float) -> str:
    """Formats a number per second: `12,345`, `0.12`."""
    return f"{number:,.0f}" if number >= 10 or not number else f"{number:.2g}"


class Buffer(NamedTuple):
    """An array in a device's memory: its origin, shape and bytes."""

    what: str
    shape: str
    num_bytes: int


def largest_arguments(arguments: Any, number: int) -> list[Buffer]:
    """Returns the largest of a program's arguments, by their path."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(arguments):
        shape, size = shard_of(leaf)
        found.append(Buffer(path_name(path), f"{leaf.dtype}{list(shape)}", size))
    return sorted(found, key=lambda buffer: -buffer.num_bytes)[:number]


def largest_values(module: Module, number: int) -> list[Buffer]:
    """Returns the largest of a program's own values, by their origin in the Python program."""
    found: dict[tuple[str, str], Buffer] = {}
    for place in module.places:
        if place.fused:
            continue
        for one in place.computation.instructions.values():
            for buffer in _values(one):
                found.setdefault((buffer.what, buffer.shape), buffer)
    return sorted(found.values(), key=lambda buffer: -buffer.num_bytes)[:number]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    """A compiled program and its figures.

    Attributes:
        program: the program.
        seconds: of tracing and compiling.
        memory: of a device.
        costs: of a device, counted from the program.
        compiler_flops: FLOPs of a device by the compiler's `cost_analysis`; None where it gives
            none, as on GPUs.
        collectives: by kind and mesh axes.
        roofline: the shortest possible time.
        splash: names of splash attention's kernels in it.
        cudnn: names of cuDNN's.
        stacked_gathers: gathers of the parameters of all layers, outside of the layer loop.
        arguments: the largest ones.
        values: the largest that it makes.
        advice: changes that would help where it does not fit.
        listed_on: empty; see `Misfit`.
    """

    program: Program
    seconds: float
    memory: Memory
    costs: Costs
    compiler_flops: float | None
    collectives: list[Total]
    roofline: Roofline
    splash: list[str]
    cudnn: list[str]
    stacked_gathers: list[Collective]
    arguments: list[Buffer]
    values: list[Buffer]
    advice: list[str]
    listed_on: str = ""

    @property
    def fits(self) -> bool:
        """Returns True if a device can hold it beside everything else that the stage holds."""
        return self.memory.total <= self.memory.capacity

    @property
    def attention_kernel(self) -> str | None:
        """Returns the kernel of the rows' attention to themselves; None without such attention."""
        if not self.program.attends:
            return None
        if self.cudnn:
            return f"cudnn ({len(self.cudnn)} kernels)"
        return f"splash ({len(self.splash)} kernels)" if self.splash else "xla"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Misfit:
    """A program that the compiler refuses, as it does not fit.

    Attributes:
        program: the program.
        seconds: until it was refused.
        message: the compiler's.
        arguments: the largest ones.
        values: the largest that it makes, if it was compiled for a chip with enough memory.
        listed_on: that chip in words; empty for none.
        advice: changes that would help.
    """

    program: Program
    seconds: float
    message: str
    arguments: list[Buffer]
    values: list[Buffer]
    listed_on: str
    advice: list[str]
    fits: bool = False


def compile_program(program: Program, of: Slice) -> Analysis | Misfit:
    """Compiles a program and counts its costs.

    Raises:
        ValueError: it does not compile, for another reason than its size.
    """
    started = time.perf_counter()
    arguments = largest_arguments(program.arguments, _NUM_BUFFERS)
    try:
        compiled = program.compile()
    except TooLarge as error:
        return Misfit(
            program=program,
            seconds=time.perf_counter() - started,
            message=str(error),
            arguments=arguments,
            values=[],
            listed_on="",
            advice=[],
        )
    seconds = time.perf_counter() - started
    text = compiled.as_text()
    assert text is not None
    module = hlo.parse(text)
    found = hlo.collectives_of(module, program.mesh, num_layers=program.backbone.num_layers)
    timed = [(one, one.runs * seconds_of(one, of, program.mesh)) for one in found]
    costs = costs_of(module)
    reported: Any = compiled.cost_analysis()
    return Analysis(
        program=program,
        seconds=seconds,
        memory=memory_of(compiled, beside=program.beside, capacity=of.chip.usable_memory),
        costs=costs,
        # None on a GPU; no FLOPs for a program that only moves arrays.
        compiler_flops=None if reported is None else float(reported.get("flops", 0.0)),
        collectives=hlo.by_kind_and_axes(timed),
        roofline=roofline(
            costs,
            interconnect_s=sum(needed for _, needed in timed),
            model_flops=program.model_flops,
            of=of,
        ),
        splash=splash_calls(module),
        cudnn=cudnn_calls(module),
        stacked_gathers=hlo.gathers_of_stacked_layers(found, program.stacked_shapes),
        arguments=arguments,
        values=largest_values(module, _NUM_BUFFERS),
        advice=[],
    )


def slice_fields(of: Slice) -> dict[str, Any]:
    """Returns the slice and the figures of its chips, as JSON."""
    chip = of.chip
    return {
        "topology": of.name,
        "num_slices": of.num_slices,
        "devices": len(of.devices),
        "devices_per_chip": chip.devices,
        "usable_memory_bytes_per_device": chip.usable_memory,
        "peak_bf16_flops_per_chip": chip.peak_flops,
        "memory_bytes_per_s_per_chip": chip.memory_bandwidth,
        "link_bytes_per_s_one_way": chip.link_bandwidth,
    }


def fields(found: Analysis | Misfit) -> dict[str, Any]:
    """Returns a program's figures as JSON."""
    program = found.program
    common = {
        "program": program.name,
        "does": program.does,
        "mesh": dict(program.mesh.shape),
        "tokens": program.tokens,
        "fits": found.fits,
        "compile_s": round(found.seconds, 1),
        "advice": found.advice,
        "largest_arguments": _buffers(found.arguments),
        "largest_values": _buffers(found.values),
    }
    if isinstance(found, Misfit):
        return {**common, "compiler_says": found.message, "listed_on": found.listed_on}
    memory, costs, bound = found.memory, found.costs, found.roofline
    return {
        **common,
        "memory_bytes_per_device": {**memory._asdict(), "total": memory.total},
        "flops": {
            "model_all_devices": program.model_flops,
            "compiled_per_device": costs.flops,
            "compiled_matmul_per_device": costs.matmul_flops,
            "compiled_attention_per_device": costs.attention_flops,
            "compiler_cost_analysis_per_device": found.compiler_flops,
        },
        "memory_traffic_bytes_per_device": costs.memory_bytes,
        "loops_of_unknown_length": costs.unknown_loops,
        "collectives": [
            {**total._asdict(), "axes": list(total.axes)} for total in found.collectives
        ],
        "roofline": {
            "compute_s": bound.compute_s,
            "memory_s": bound.memory_s,
            "interconnect_s": bound.interconnect_s,
            "binds": bound.binds,
            "step_s": bound.bound_s,
            "utilisation": bound.utilisation,
            "utilisation_without_overlap": bound.utilisation * bound.bound_s / bound.sum_s,
            "tokens_per_s": program.tokens / bound.bound_s,
        },
        "attention_kernel": found.attention_kernel,
        "splash_calls": found.splash,
        "cudnn_calls": found.cudnn,
        "gathers_of_all_layers": [
            f"{one.kind} {list(one.dims)} over {'x'.join(one.axes)}: {one.op_name}"
            for one in found.stacked_gathers
        ],
    }


def lines(found: Analysis | Misfit) -> Iterator[str]:
    """Yields a program's figures as lines of text."""
    program = found.program
    axes = " x ".join(f"{axis}={size}" for axis, size in program.mesh.shape.items())
    yield f"{program.name}: {program.does}, on {axes}; compiled in {found.seconds:.0f} s"
    if isinstance(found, Misfit):
        yield f"  does NOT fit: {found.message}"
    else:
        yield from _figures(found)
    if not found.fits:
        yield from _largest("arguments", found.arguments)
        yield from _largest("values" + found.listed_on, found.values)
        yield "  what would help:"
        yield from (f"    - {line}" for line in found.advice)


def _scaled(number: float, units: tuple[tuple[float, str], ...], *, otherwise: str) -> str:
    """Formats a number in the largest unit that gives at least 1."""
    for one, name in units:
        if abs(number) >= one:
            return f"{number / one:.3g}{name}"
    return otherwise


def _values(one: Instruction) -> Iterable[Buffer]:
    if one.opcode in ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional"):
        return
    for shape in one.shapes:
        if shape.in_hbm:
            what = one.op_name or one.name
            yield Buffer(what, f"{shape.dtype}{list(shape.dims)}", shape.num_bytes)


def _figures(found: Analysis) -> Iterator[str]:
    memory, costs, bound, program = found.memory, found.costs, found.roofline, found.program
    parts = {
        "arguments": memory.arguments,
        "temporaries": memory.temporaries,
        "outputs": memory.outputs,
        "code": memory.code,
        "held beside": memory.beside,
    }
    shown = " + ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
    verdict = "fits" if found.fits else "does NOT fit"
    yield (
        f"  memory       {memory.total / GIB:.2f} of {memory.capacity / GIB:.2f} GiB a device: "
        f"{verdict} ({shown})"
    )
    ours = program.model_flops / program.mesh.size
    yield (
        f"  FLOPs        {count(ours)} a device by formula, {count(costs.flops)} "
        f"compiled (with recomputation; {count(costs.attention_flops)} attention)"
        + _by_compiler(found.compiler_flops)
    )
    if not found.collectives:
        yield "  collectives  none"
    heading = "collectives"
    for total in found.collectives:
        yield (
            f"  {heading:<12} {total.kind} over {'+'.join(total.axes)}: {total.runs} x, "
            f"{size(total.payload)}, {duration(total.seconds)}"
        )
        heading = ""
    parts_s = {
        "compute": bound.compute_s,
        "memory": bound.memory_s,
        "interconnect": bound.interconnect_s,
    }
    times = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts_s.items())
    yield f"  roofline     {times}: {bound.binds} binds{_speed(found)}"
    if program.attends:
        yield f"  attention    {found.attention_kernel}"
    number = len(found.stacked_gathers)
    yield f"  layers       {number} gathers of the parameters of all layers outside of their loop"
    if costs.unknown_loops:
        yield f"  loops        {costs.unknown_loops} of unknown length, counted once"


def _speed(found: Analysis) -> str:
    """Returns a program's utilisation and speed; nothing for one that only moves arrays."""
    if not found.program.tokens:
        return ""
    bound = found.roofline
    return (
        f"; utilisation at most {share(bound.utilisation)}, "
        f"{rate(found.program.tokens / bound.bound_s)} tokens/s"
    )


def _by_compiler(flops: float | None) -> str:
    if flops is None:
        return ""
    return f", {count(flops)} by cost_analysis, which counts loops once"


def _largest(name: str, buffers: list[Buffer]) -> Iterator[str]:
    if buffers:
        yield f"  largest {name}, GiB a device:"
    for buffer in buffers:
        yield f"    {gib(buffer.num_bytes):>6}  {buffer.shape:<32} {buffer.what}"


def _buffers(buffers: list[Buffer]) -> list[dict[str, Any]]:
    return [buffer._asdict() for buffer in buffers]
