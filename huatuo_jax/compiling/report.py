"""What is told of compiled programs: lines for a reader, and JSON."""

from collections.abc import Iterator
from typing import Any

from huatuo_jax.compiling import units
from huatuo_jax.compiling.analysis import Analysis, Misfit
from huatuo_jax.compiling.memory import Buffer
from huatuo_jax.compiling.topology import Slice
from huatuo_jax.training.programs import GIB


def slice_fields(of: Slice) -> dict[str, Any]:
    """The slice and what its chips can do, as JSON."""
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
    """A program as JSON."""
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
    """A program for a reader."""
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


def _figures(found: Analysis) -> Iterator[str]:
    memory, costs, bound, program = found.memory, found.costs, found.roofline, found.program
    parts = {
        "arguments": memory.arguments,
        "temporaries": memory.temporaries,
        "outputs": memory.outputs,
        "code": memory.code,
        "held beside": memory.beside,
    }
    shown = " + ".join(f"{name} {units.gib(size)}" for name, size in parts.items() if size)
    verdict = "fits" if found.fits else "does NOT fit"
    yield (
        f"  memory       {memory.total / GIB:.2f} of {memory.capacity / GIB:.2f} GiB a device: "
        f"{verdict} ({shown})"
    )
    ours = program.model_flops / program.mesh.size
    yield (
        f"  FLOPs        {units.count(ours)} a device by formula, {units.count(costs.flops)} "
        f"compiled (recomputation and all; {units.count(costs.attention_flops)} attention)"
        + _by_compiler(found.compiler_flops)
    )
    if not found.collectives:
        yield "  collectives  none"
    heading = "collectives"
    for total in found.collectives:
        yield (
            f"  {heading:<12} {total.kind} over {'+'.join(total.axes)}: {total.runs} x, "
            f"{units.size(total.payload)}, {units.duration(total.seconds)}"
        )
        heading = ""
    parts_s = {
        "compute": bound.compute_s,
        "memory": bound.memory_s,
        "interconnect": bound.interconnect_s,
    }
    times = ", ".join(f"{name} {units.duration(seconds)}" for name, seconds in parts_s.items())
    yield f"  roofline     {times}: {bound.binds} binds{_speed(found)}"
    if program.attends:
        yield f"  attention    {found.attention_kernel}"
    number = len(found.stacked_gathers)
    yield f"  layers       {number} gathers of the parameters of all layers outside of their loop"
    if costs.unknown_loops:
        yield f"  loops        {costs.unknown_loops} of unknown length, counted once"


def _speed(found: Analysis) -> str:
    """What a program computes in its time; of one that only moves things, nothing."""
    if not found.program.tokens:
        return ""
    bound = found.roofline
    return (
        f"; utilisation at most {units.share(bound.utilisation)}, "
        f"{units.rate(found.program.tokens / bound.bound_s)} tokens/s"
    )


def _by_compiler(flops: float | None) -> str:
    if flops is None:
        return ""
    return f", {units.count(flops)} by cost_analysis, which counts loops once"


def _largest(name: str, buffers: list[Buffer]) -> Iterator[str]:
    if buffers:
        yield f"  largest {name}, GiB a device:"
    for buffer in buffers:
        yield f"    {units.gib(buffer.num_bytes):>6}  {buffer.shape:<32} {buffer.what}"


def _buffers(buffers: list[Buffer]) -> list[dict[str, Any]]:
    return [buffer._asdict() for buffer in buffers]
