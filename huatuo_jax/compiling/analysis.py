"""A program compiled for a slice, and all that is told of it."""

import dataclasses
import time
from typing import Any

from huatuo_jax.compiling import collectives as collecting
from huatuo_jax.compiling import hlo
from huatuo_jax.compiling.collectives import Collective, Total
from huatuo_jax.compiling.costs import Costs, costs_of
from huatuo_jax.compiling.kernels import cudnn_calls, splash_calls
from huatuo_jax.compiling.memory import Buffer, largest_arguments, largest_values
from huatuo_jax.compiling.programs import Program
from huatuo_jax.compiling.roofline import Roofline, roofline, seconds_of
from huatuo_jax.compiling.topology import Slice
from huatuo_jax.training.programs import Memory, TooLarge, memory_of

_NUM_BUFFERS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    """A program that was compiled.

    Attributes:
        program: the one.
        seconds: that tracing and compiling took.
        memory: of a device.
        costs: of a device, counted from the program.
        compiler_flops: what the compiler's `cost_analysis` says of a device; None where it says
            nothing, as that of GPUs.
        collectives: by kind and mesh axes.
        roofline: the bound.
        splash: names of splash attention's kernels in it.
        cudnn: names of cuDNN's.
        stacked_gathers: gathers of the parameters of all layers, outside of the layer loop.
        arguments: the largest ones.
        values: the largest that it makes.
        advice: what to change where it does not fit.
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
        """Whether a device can hold it beside what else the stage holds."""
        return self.memory.total <= self.memory.capacity

    @property
    def attention_kernel(self) -> str | None:
        """What rows attend to themselves by; None where they do not."""
        if not self.program.attends:
            return None
        if self.cudnn:
            return f"cudnn ({len(self.cudnn)} kernels)"
        return f"splash ({len(self.splash)} kernels)" if self.splash else "xla"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Misfit:
    """A program that the compiler refuses, as it does not fit.

    Attributes:
        program: the one.
        seconds: until it was refused.
        message: the compiler's.
        arguments: the largest ones.
        values: the largest that it makes, where it was compiled for a chip that holds it.
        listed_on: which chip that was, in words; empty for none.
        advice: what to change.
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
    """Compiles a program and counts what it does.

    Raises:
        ValueError: it cannot be compiled, for another reason than its size.
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
    found = collecting.collectives_of(module, program.mesh, num_layers=program.backbone.num_layers)
    timed = [(one, one.runs * seconds_of(one, of, program.mesh)) for one in found]
    costs = costs_of(module)
    reported: Any = compiled.cost_analysis()
    return Analysis(
        program=program,
        seconds=seconds,
        memory=memory_of(compiled, beside=program.beside, capacity=of.chip.usable_memory),
        costs=costs,
        # Nothing on a GPU; and of a program that only moves things, nothing of products.
        compiler_flops=None if reported is None else float(reported.get("flops", 0.0)),
        collectives=collecting.by_kind_and_axes(timed),
        roofline=roofline(
            costs,
            interconnect_s=sum(needed for _, needed in timed),
            model_flops=program.model_flops,
            of=of,
        ),
        splash=splash_calls(module),
        cudnn=cudnn_calls(module),
        stacked_gathers=collecting.gathers_of_stacked_layers(found, program.stacked_shapes),
        arguments=arguments,
        values=largest_values(module, _NUM_BUFFERS),
        advice=[],
    )
