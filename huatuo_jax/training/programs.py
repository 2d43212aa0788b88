"""A compiled program of a stage, and the device memory that it takes."""

import dataclasses
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from huatuo_jax.core import distributed
from huatuo_jax.core.sharding import OnMesh

GIB = 1 << 30
MEMORY_VARIABLE = "HUATUO_DEVICE_MEMORY_GIB"

_TOO_LARGE = re.compile(r"RESOURCE_EXHAUSTED|[Rr]an out of memory")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageProgram:
    """A jitted function of a stage, and the shapes it is given.

    Attributes:
        name: `STAGE/FUNCTION`.
        function: jitted.
        arguments: abstract, with shardings.
        beside: other abstract arrays that the stage holds meanwhile.
        mesh: of the devices.
        rows: of a call, as `micro_batch_size` counts them: several short ones may be one in it.
        rows_at_once: of them, that go through the model together.
        attends: whether rows attend to themselves in it, by the attention kernel.
        in_micro_batches: whether `micro_batch_size` decides how many go together.
    """

    name: str
    function: OnMesh
    arguments: tuple[Any, ...]
    beside: Any = ()
    mesh: Mesh
    rows: int
    rows_at_once: int
    attends: bool = True
    in_micro_batches: bool = False

    @property
    def stage(self) -> str:
        """The section of the config that it belongs to."""
        return self.name.split("/")[0]

    def lower(self) -> jax.stages.Lowered:
        """Traces it."""
        return self.function.lower(*self.arguments)

    def compile(self) -> jax.stages.Compiled:
        """Compiles it; a later call with such arguments finds it compiled.

        Raises:
            TooLarge: the compiler refuses it, as it does not fit the device.
            ValueError: it cannot be compiled, for another reason.
        """
        try:
            return self.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if not _TOO_LARGE.search(str(error)):
                raise ValueError(f"{self.name} cannot be compiled: {error}") from error
            first_line = str(error).strip().splitlines()[0]
            raise TooLarge(first_line.removeprefix("RESOURCE_EXHAUSTED: ")) from error


class TooLarge(Exception):
    """A program does not fit the device that it is compiled for."""


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


def memory_of(compiled: jax.stages.Compiled, *, beside: Any, capacity: int) -> Memory:
    """Reads a compiled program's memory, as the compiler counted it.

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
    """Counts the bytes of abstract arrays on each device, without the padding of tiles."""
    return sum(shard_of(leaf)[1] for leaf in jax.tree.leaves(tree))


def shard_of(leaf: Any) -> tuple[tuple[int, ...], int]:
    """Returns the shape and the bytes of an abstract array on one device."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return tuple(shape), math.prod(shape) * leaf.dtype.itemsize


def device_memory(mesh: Mesh) -> int | None:
    """Returns each device's bytes for arrays and programs; the same in all processes.

    HUATUO_DEVICE_MEMORY_GIB overrides it, as where other programs use the devices too.

    Returns:
        The least of any device; None where they do not tell, as CPUs do not.

    Raises:
        ValueError: the variable is not a number above 0.
    """
    told = [
        one for one in distributed.gather("device memory", _own_memory(mesh)) if one is not None
    ]
    return min(told, default=None)


def _own_memory(mesh: Mesh) -> int | None:
    """Returns the least memory of this process's devices."""
    if (text := os.environ.get(MEMORY_VARIABLE)) is not None:
        return _bytes_in(text)
    found = []
    for device in mesh.local_devices:
        # A host's memory is shared by its virtual devices and by everything else that runs there.
        statistics = None if device.platform == "cpu" else device.memory_stats()
        if statistics is None or "bytes_limit" not in statistics:
            return None
        found.append(int(statistics["bytes_limit"]))
    return min(found, default=None)


def _bytes_in(text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise ValueError(f"{MEMORY_VARIABLE}={text!r} must be a number of GiB above 0")
    return int(number * GIB)
