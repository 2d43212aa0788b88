"""A TPU slice, or a host of GPUs, that is not there: its devices, to compile for."""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from huatuo_jax.compiling.chips import CHIPS, Chip
from huatuo_jax.compiling.gpus import CUDNN, GPUS, PLUGIN, Gpu

_NAME = re.compile(r"(\w+):(\d+(?:x\d+)*)")
_KINDS: dict[str, Chip] = {**CHIPS, **GPUS}


class Slice(NamedTuple):
    """The devices of one or several slices; a host of GPUs is one, too.

    Attributes:
        name: of the topology, `v5e:8x8` or `h100:8`.
        chip: of which kind they are.
        shape: chips along each axis of a slice.
        num_slices: joined by their hosts' network.
        devices: of jax's, which can be compiled for and nothing else.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    num_slices: int
    devices: Sequence[jax.Device]

    @property
    def compilers(self) -> tuple[str, ...]:
        """The packages that hold the compiler and what it links in."""
        return (PLUGIN, CUDNN) if isinstance(self.chip, Gpu) else ("libtpu",)


def prepare_environment() -> None:
    """Lets jax compile on a machine without devices; to be called before it makes an array.

    jax itself runs on the CPU, libtpu does not look for a TPU's metadata (nor complains that some
    are missing), and another process may have it loaded at the same time.
    """
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    jax.config.update("jax_platforms", "cpu")  # JAX_PLATFORMS was read when jax was imported.


def open_slice(name: str, *, num_slices: int = 1) -> Slice:
    """The devices of a topology.

    Args:
        name: kind of chip and chips along each axis, `v5e:8x8`; of a GPU, how many a host has.
        num_slices: slices of that form, or hosts.

    Raises:
        ValueError: there is no such topology, or its compiler is not installed.
    """
    chip, shape = _parsed(name)
    if num_slices < 1:
        raise ValueError(f"num_slices={num_slices} must be at least 1")
    if isinstance(chip, Gpu):
        return Slice(name, chip, shape, num_slices, _gpus(chip, shape[0], num_slices))
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ValueError(
            "compiling for a TPU needs libtpu: pip install 'huatuo_jax[tpu]' (no TPU is needed)"
        )
    options: dict[str, object] = dict(chip.options)
    if num_slices > 1:
        options["num_slices"] = num_slices
    if 1 in shape[:2]:
        # A host has 2 x 2 chips to libtpu; such a slice, as a single chip, is less than that.
        options["chips_per_host_bounds"] = (*(min(size, 2) for size in shape[:2]), 1)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (RuntimeError, ValueError) as error:  # jax's own errors are RuntimeErrors.
        raise ValueError(
            f"topology={name!r}: libtpu knows no such slice ({_first_line(error)}); {_known()}"
        ) from error
    return Slice(name, chip, shape, num_slices, found.devices)


def _gpus(gpu: Gpu, number: int, num_hosts: int) -> Sequence[jax.Device]:
    if importlib.util.find_spec(PLUGIN.replace("-", "_")) is None:
        raise ValueError(
            f"compiling for a GPU needs {PLUGIN}: pip install 'huatuo_jax[cuda]' (no GPU is needed)"
        )
    found = topologies.get_topology_desc(
        platform="cuda",
        target_config=gpu.target(),
        topology=f"{num_hosts}x1x{number}",  # Partitions, hosts of one, GPUs of a host.
    )
    return found.devices


def _parsed(name: str) -> tuple[Chip, tuple[int, ...]]:
    found = _NAME.fullmatch(name)
    if found is None or found[1] not in _KINDS:
        raise ValueError(f"topology={name!r} is not known; {_known()}")
    chip, shape = _KINDS[found[1]], tuple(int(size) for size in found[2].split("x"))
    if len(shape) != chip.dims or min(shape) < 1:
        raise ValueError(
            f"topology={name!r}: a slice of {chip.name} has {_axes(chip)}, as {chip.example}; "
            f"{_known()}"
        )
    if isinstance(chip, Gpu) and shape[0] > chip.per_host:
        raise ValueError(
            f"topology={name!r}: a host has at most {chip.per_host} of these; num_slices is the "
            "number of hosts"
        )
    return chip, shape


def _known() -> str:
    examples = ", ".join(f"{chip.example} ({_axes(chip)})" for chip in _KINDS.values())
    return f"the kinds are {', '.join(_KINDS)}; written as {examples}"


def _axes(chip: Chip) -> str:
    return "GPUs of a host" if isinstance(chip, Gpu) else f"{chip.dims} axes"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
