"""A TPU slice that is not there: its devices, to compile for."""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from huatuo_jax.compiling.chips import CHIPS, Chip

_NAME = re.compile(r"(\w+):(\d+(?:x\d+)+)")


class Slice(NamedTuple):
    """The devices of one or several slices.

    Attributes:
        name: of the topology, `v5e:8x8`.
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


def prepare_environment() -> None:
    """Lets libtpu compile on a machine without a TPU; to be called before jax makes an array.

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
        name: kind of chip and chips along each axis, `v5e:8x8`.
        num_slices: slices of that form.

    Raises:
        ValueError: there is no such topology, or libtpu is not installed.
    """
    chip, shape = _parsed(name)
    if num_slices < 1:
        raise ValueError(f"num_slices={num_slices} must be at least 1")
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ValueError(
            "compiling for a TPU needs libtpu: pip install 'huatuo_jax[tpu]' (no TPU is needed)"
        )
    options: dict[str, object] = dict(chip.options)
    if num_slices > 1:
        options["num_slices"] = num_slices
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (RuntimeError, ValueError) as error:  # jax's own errors are RuntimeErrors.
        raise ValueError(
            f"topology={name!r}: libtpu knows no such slice ({_first_line(error)}); {_known()}"
        ) from error
    return Slice(name, chip, shape, num_slices, found.devices)


def _parsed(name: str) -> tuple[Chip, tuple[int, ...]]:
    found = _NAME.fullmatch(name)
    if found is None or found[1] not in CHIPS:
        raise ValueError(f"topology={name!r} is not known; {_known()}")
    chip, shape = CHIPS[found[1]], tuple(int(size) for size in found[2].split("x"))
    if len(shape) != chip.dims or min(shape) < 1:
        raise ValueError(
            f"topology={name!r}: a slice of {chip.name} has {chip.dims} axes, as {chip.example}; "
            f"{_known()}"
        )
    return chip, shape


def _known() -> str:
    examples = ", ".join(f"{chip.example} ({chip.dims} axes)" for chip in CHIPS.values())
    return f"the kinds are {', '.join(CHIPS)}; written as {examples}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
