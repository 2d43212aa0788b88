"""A compiled program's text (HLO), read as computations, instructions and how often each runs.

Only what is counted here is read: shapes, operands, calls, and the trip counts of loops, which are
the constant that a loop's condition compares its counter with.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_ELEMENT = re.compile(r"\bindex=(\d+)")
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
# What follows the bracket says which cores a computation runs on, if not the main ones.
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


class Shape(NamedTuple):
    """An array's.

    Attributes:
        dtype: HLO's name of it.
        dims: on one device.
        in_hbm: whether it lies in the device's main memory.
    """

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def num_bytes(self) -> int:
        """Without the padding of tiles."""
        found = _BITS.match(self.dtype)
        bits = 8 if self.dtype == "pred" else int(found[1]) if found else 0
        return math.prod(self.dims) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line.

    Attributes:
        name: of its value.
        opcode: what it does.
        shapes: of the value, several where it is a tuple.
        operands: names of values.
        attributes: the rest of the line.
        is_root: whether it is what its computation returns.
        number: a parameter's, or the value of a constant that is a whole number.
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
        """Where in the Python program it comes from; empty where nothing is said."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    def called(self, kind: str) -> str | None:
        """The computation that it calls as its `body`, `condition`, `calls`, ..."""
        return next((name for key, name in _CALLS.findall(self.attributes) if key == kind), None)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in order, by name."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """What it returns."""
        return next(one for one in reversed(self.instructions.values()) if one.is_root)

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        """The arrays that an instruction takes; tuples are left out."""
        found = (self.instructions[name] for name in instruction.operands)
        return [one.shapes[0] for one in found if len(one.shapes) == 1]


class Loop(NamedTuple):
    """A loop that something stands in; `trips` is None where it could not be told."""

    body: str
    trips: int | None


class Place(NamedTuple):
    """One way in which a computation is run.

    Attributes:
        computation: the one.
        loops: that it stands in, the outermost first.
        fused: whether it is the inside of a fusion, whose values do not reach the memory.
    """

    computation: Computation
    loops: tuple[Loop, ...]
    fused: bool

    @property
    def runs(self) -> int:
        """How often it is run; a loop of unknown length counts once."""
        return math.prod(loop.trips or 1 for loop in self.loops)


@dataclasses.dataclass(frozen=True)
class Module:
    """A program on one device."""

    computations: dict[str, Computation]
    entry: Computation

    @functools.cached_property
    def places(self) -> list[Place]:
        """All computations that are run, once for each way that leads to them.

        Every branch of a condition is taken to be run.
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
        """The least constant that the condition holds its counter below, by the counter's step."""
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
        """What a turn adds to the counter: 2 where the compiler has put two turns into one."""
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
    """Reads `compiled.as_text()`."""
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


def _whole_lines(text: str) -> list[str]:
    """Lines, put together where the metadata of a kernel goes on in the next one."""
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
        # A constant's value and a parameter's number stand where others have their operands.
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
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] == "(":
            depth += 1
        elif text[index] == ")":
            depth -= 1
            if not depth:
                return index
    raise AssertionError(f"unbalanced: {text[:200]}")
