"""Chooses the micro-batch size that fits the devices' memory, and advises where none fits."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol, TypeVar, cast

from jax.sharding import Mesh

from huatuo_jax.core import distributed, sharding
from huatuo_jax.core.progress import tell
from huatuo_jax.training.initial_model import ComputeSection, ModelConfig
from huatuo_jax.training.programs import (
    GIB,
    MEMORY_VARIABLE,
    StageProgram,
    TooLarge,
    bytes_on_device,
    device_memory,
    memory_of,
)

MicroBatchSize = int | Literal["auto"] | None
"""Rows that go through a model at once, on all devices together.

`auto` for as many as fit the memory of the devices, None for all.
"""

# Of a device's memory, left free. The compiler counts all that a program holds, but not the
# batches on their way (three at most), the code of the stage's other programs (evaluation,
# samples), or the gaps of an allocator, which places temporaries in one piece.
MARGIN = 0.05


class TrainingSection(Protocol):
    """The settings that all training stages have."""

    @property
    def model(self) -> ModelConfig:
        """The model that is trained."""

    @property
    def compute(self) -> ComputeSection:
        """The computation of a step."""

    @property
    def micro_batch_size(self) -> object:
        """Rows that go through a model at once."""


Section = TypeVar("Section", bound=TrainingSection)
Made = TypeVar("Made")


def check_micro_batch_size(size: object, rows: int, *, name: str) -> None:
    """Raises ValueError for a size that is not valid.

    Args:
        size: of the field `micro_batch_size`.
        rows: that it must divide.
        name: of those, as `batch_size=8`.
    """
    if size is None or size == "auto":
        return
    if not isinstance(size, int):
        raise ValueError(f"micro_batch_size={size!r} must be a whole number, 'auto' or None")
    if size < 1:
        raise ValueError(f"micro_batch_size={size!r} must be at least 1")
    if rows % size:
        raise ValueError(f"micro_batch_size={size} must divide {name}")


def most_rows_at_once(size: MicroBatchSize, rows: int) -> int:
    """Returns the rows that go through a model together; all of them while that is not settled."""
    return size if isinstance(size, int) else rows


def usable(memory: int) -> int:
    """Returns the bytes of a device's memory that a program may take."""
    return int((1 - MARGIN) * memory)


def micro_batch_sizes(rows: int, mesh: Mesh) -> list[int]:
    """Lists the divisors of so many rows that a mesh's shards divide, from the largest."""
    shards = sharding.batch_shards(mesh)
    return [size for size in range(rows, 0, -1) if rows % size == 0 and size % shards == 0]


def size_on_other_devices(
    size: MicroBatchSize, rows: int, mesh: Mesh, *, shards_before: int
) -> MicroBatchSize:
    """Returns the size with which each device holds no more rows than it did on another mesh.

    A run that resumes on fewer devices so takes more micro-batches of fewer rows, and on more
    devices fewer; the optimizer step has the same rows.

    Args:
        size: as it was set for the other mesh; `auto` is left to `settle`.
        rows: that are divided into micro-batches.
        mesh: of now.
        shards_before: shards of the batch on the other mesh.

    Returns:
        The largest size that fits; `size` itself where none does, which `check_rows` refuses.
    """
    shards = sharding.batch_shards(mesh)
    if size == "auto" or shards == shards_before:
        return size
    most = -(-most_rows_at_once(size, rows) // shards_before) * shards
    return next((one for one in micro_batch_sizes(rows, mesh) if one <= most), size)


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Finds the first size that fits, by halving; sizes below one that fits are taken to fit.

    The last one for which `fits` was true is the one that is returned.

    Args:
        sizes: from the largest, which is tried before all others, as it needs no sums of gradients.
        fits: tries one.

    Returns:
        None where not even the smallest does.
    """
    if fits(sizes[0]):
        return sizes[0]
    first, end = 1, len(sizes)
    while first < end:
        middle = (first + end) // 2
        if fits(sizes[middle]):
            end = middle
        else:
            first = middle + 1
    return sizes[end] if end < len(sizes) else None


def settle(
    cfg: Section,
    *,
    stage: str,
    rows: int,
    mesh: Mesh,
    make: Callable[[Section], Made],
    programs: Callable[[Made], Iterable[StageProgram]],
) -> tuple[Section, Made]:
    """Puts a number in the place of `auto`; returns the settings and what is made by them.

    With `auto`, programs are compiled and the largest micro-batch is taken whose programs fit the
    devices' memory, which a line tells. It is the same in all processes, and in a later start on
    the same devices. Where devices do not tell their memory it is all rows.

    Args:
        cfg: the stage's settings.
        stage: its name.
        rows: that are divided into micro-batches.
        mesh: where.
        make: makes what the stage runs, from settings with a number in them.
        programs: those of what was made whose memory depends on the micro-batch.

    Raises:
        ValueError: no micro-batch fits; names the fields that would help.
    """
    if cfg.micro_batch_size != "auto":
        return cfg, make(cfg)
    memory = device_memory(mesh)
    if memory is None:
        if not _is_host(mesh):
            tell(
                f"{stage}: micro_batch_size=auto: all {rows} rows at once, as the devices do not "
                f"tell their memory; {MEMORY_VARIABLE} sets it"
            )
        cfg = _with_size(cfg, rows)
        return cfg, make(cfg)
    search = _Search(cfg, usable(memory), make, programs)
    size = largest_that_fits(micro_batch_sizes(rows, mesh), search.fits)
    shown = f"{usable(memory) / GIB:.3g} GiB (a device's {memory / GIB:.3g} less {MARGIN:.0%})"
    if size is None:
        assert search.refused is not None
        raise ValueError(_nothing_fits(cfg, search.refused, shown, capacity=memory))
    assert search.made is not None
    (made,) = search.made
    tell(
        f"{stage}: micro_batch_size=auto: {size} of {rows} rows at once; {search.largest} takes "
        f"{search.peak / GIB:.3g} GiB of {shown}"
    )
    return _with_size(cfg, size), made


def advice(program: StageProgram, cfg: TrainingSection, *, capacity: int) -> list[str]:
    """Lists the fields that would help, those first that cost least.

    Args:
        program: the one that does not fit.
        cfg: of its stage.
        capacity: bytes of a device.
    """
    name, found = f"config.{program.stage}", []
    given = bytes_on_device((program.arguments, program.beside))
    compute, shards = cfg.compute, sharding.batch_shards(program.mesh)
    if compute.compute_dtype == "float32":
        found.append(f"{name}.compute.compute_dtype='bfloat16' halves activations")
    if program.attends and compute.remat != "full" and not _of_engine(program):
        found.append(
            f"{name}.compute.remat='full' (now {compute.remat!r}) keeps the input of each layer "
            "and computes the rest again"
        )
    if program.attends and program.rows_at_once > shards and not _of_engine(program):
        found.append(
            f"{name}.micro_batch_size={shards} (now {cfg.micro_batch_size}): one row at once "
            "on each device; activations shrink with it, the result stays"
        )
    if _of_engine(program):
        found.append(f"{name}.rollout.slots: fewer answers at once take less cache")
    if given > capacity // 2:
        found.append(
            f"weights, moments and what else is held take {given / GIB:.1f} GiB of each device's "
            f"{capacity / GIB:.0f} before anything is computed: "
            + "; ".join(_smaller_states(name, cfg, program))
        )
    elif program.attends and compute.loss_chunk > 128:
        found.append(f"{name}.compute.loss_chunk=128 (now {compute.loss_chunk}): fewer logits")
    if program.mesh.shape["tensor"] == 1:
        mesh = f"{name}.rollout.mesh" if _of_engine(program) else f"{name}.mesh"
        found.append(
            f"{mesh}.tensor=2 or more splits heads, feed-forward and vocabulary of each row"
        )
    return found


def _of_engine(program: StageProgram) -> bool:
    return program.name.endswith(("move", "decode", "prefill"))


def _smaller_states(name: str, cfg: TrainingSection, program: StageProgram) -> list[str]:
    ways = []
    if program.mesh.shape["data"] > 1:
        ways.append(f"{name}.mesh.data=1 with more fsdp, as data holds copies")
    if cfg.model.lora is None:
        ways.append(f"{name}.model.lora trains adapters, which alone have gradients and moments")
    return [*ways, "or a larger slice"]


def _is_host(mesh: Mesh) -> bool:
    return bool(mesh.devices.flat[0].platform == "cpu")


class _Search:
    """Tries micro-batches.

    Attributes:
        made: by the last settings that fit, alone in a tuple; None where none did.
        largest: the name of its program that holds most.
        peak: bytes that it holds.
        refused: the last program that did not fit, and bytes that it holds or what the compiler
            said.
    """

    def __init__(
        self,
        cfg: Any,
        budget: int,
        make: Callable[[Any], Any],
        programs: Callable[[Any], Iterable[StageProgram]],
    ) -> None:
        self._cfg, self._budget, self._make, self._programs = cfg, budget, make, programs
        self.made: tuple[Any] | None = None
        self.largest, self.peak = "", 0
        self.refused: tuple[StageProgram, int | str] | None = None

    def fits(self, size: int) -> bool:
        made = self._make(_with_size(self._cfg, size))
        largest, most = "", 0
        for program in self._programs(made):
            peak = _peak(program)
            if isinstance(peak, str) or peak > self._budget:
                self.refused = program, peak
                return False
            if peak > most:
                largest, most = program.name, peak
        self.made, self.largest, self.peak = (made,), largest, most
        return True


def _peak(program: StageProgram) -> int | str:
    """Returns a program's bytes on a device, or why the compiler refuses it; in all processes."""
    own: int | str
    try:
        own = memory_of(program.compile(), beside=program.beside, capacity=0).total
    except TooLarge as error:
        own = str(error)
    # Every process compiles, as compilers of several may work together, and all decide alike.
    everywhere = distributed.gather("memory of a program", own)
    refusals = [one for one in everywhere if isinstance(one, str)]
    return refusals[0] if refusals else max(everywhere)


def _with_size(cfg: Section, size: int) -> Section:
    return cast(Section, dataclasses.replace(cast(Any, cfg), micro_batch_size=size))


def _nothing_fits(
    cfg: TrainingSection, refused: tuple[StageProgram, int | str], shown: str, *, capacity: int
) -> str:
    program, peak = refused
    takes = f"the compiler says: {peak}"
    if not isinstance(peak, str):
        takes = f"{program.name} takes {peak / GIB:.3g} GiB of {shown}"
    return (
        f"config.{program.stage}.micro_batch_size='auto': not even one row at a time on each "
        f"device fits: {takes}; what would help: "
        + "; ".join(advice(program, cfg, capacity=capacity))
    )
