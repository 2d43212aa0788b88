"""The peak figures of TPU chips and GPUs, and slices of them to compile for without having any.

TPUs: memory, peak and bandwidths are those of the tables "System architecture" of the Cloud TPU
documentation (cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, /tpu7x, read in 2025). Of the
interconnect they give both directions of all links of a chip together (v4 and v5p: one direction,
in Gbps); here it is one link in one direction. Which axes of a slice close to a ring follows "How
to Scale Your Model" (jax-ml.github.io/scaling-book/tpus): those of 16 chips where the pod is a
16 x 16 torus, those of a multiple of 4 where it is made of 4 x 4 x 4 cubes.

GPUs: peak, memory bandwidth and NVLink are those of NVIDIA's data sheets "H100 Tensor Core GPU" and
"H200 Tensor Core GPU", form factor SXM: 989 TFLOP/s of dense bfloat16, and 900 GB/s of NVLink in
both directions together; and "L4 Tensor Core GPU", half of the TFLOP/s that it prints for sparse
matrices. Memory is the driver's figure for such a card, not the printed one (of an H200 in whole
GiB); of cards sold as 24 GB an L4 has the least. The network is that of the DGX H100 and H200 user
guides: one port of 400 Gb/s a GPU; an L4 has PCIe alone, 4.0 with 16 lanes. The limits of a kernel
are those of the compute capability in the CUDA C++ Programming Guide.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from huatuo_jax.training.metrics import PEAK_FLOPS
from huatuo_jax.training.programs import GIB

PLUGIN = "jax-cuda13-plugin"
CUDNN = "nvidia-cudnn-cu13"
_RUNTIME = "nvidia-cuda-runtime"
# As docker/Dockerfile.gpu sets XLA_PYTHON_CLIENT_MEM_FRACTION; the rest is NCCL's and cuDNN's.
_SHARE_OF_PROGRAMS = 0.92
_NAME = re.compile(r"(\w+):(\d+(?:x\d+)*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of chip.

    Attributes:
        name: its name in topologies, `v5e`.
        memory: bytes of HBM.
        peak_flops: of dense bfloat16 matrix products, a second.
        memory_bandwidth: of the HBM, bytes a second.
        link_bandwidth: of one link to a neighbour, in one direction, bytes a second.
        network_bandwidth: of a chip's share of its host's network, which joins slices, bytes a
            second.
        ring_multiple: an axis of a slice is a ring if its length is a multiple of this.
        devices: jax devices of a chip; they share everything above evenly.
        dims: number of axes in a topology's name.
        options: libtpu's options of the topology.
        switched: each sends to all others of its slice through switches, whatever the axes.
        example: the name of a topology.
    """

    name: str
    memory: int
    peak_flops: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    ring_multiple: int
    devices: int = 1
    dims: int = 2
    options: tuple[tuple[str, str], ...] = ()
    switched: bool = False
    example: str

    @property
    def usable_memory(self) -> int:
        """Returns a device's bytes of HBM for programs; libtpu keeps a quarter GiB."""
        return self.memory // self.devices - GIB // 4


def _tpu(
    name: str,
    memory_gib: int,
    memory_gb_per_s: float,
    link_gb_per_s: float,
    network_gb_per_s: float,
    *,
    dims: int,
    **more: Any,
) -> Chip:
    """Returns a TPU chip of pods that are a 16 x 16 torus (2 axes) or 4 x 4 x 4 cubes (3 axes)."""
    peak_flops = more.pop("peak_flops", None) or PEAK_FLOPS[f"TPU {name}"]
    return Chip(
        name=name,
        memory=memory_gib * GIB,
        peak_flops=peak_flops,
        memory_bandwidth=memory_gb_per_s * 1e9,
        link_bandwidth=link_gb_per_s * 1e9,
        network_bandwidth=network_gb_per_s * 1e9,
        ring_multiple=16 if dims == 2 else 4,
        dims=dims,
        example=f"{name}:{'8x8' if dims == 2 else '4x4x4'}",
        **more,
    )


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        # The two cores of a v4 chip are one device.
        _tpu("v4", 32, 1200, 50, 3.125, dims=3, options=(("chip_config_name", "megacore"),)),
        _tpu("v5e", 16, 819, 50, 3.125, dims=2),
        _tpu("v5p", 95, 2765, 100, 6.25, dims=3),
        _tpu("v6e", 32, 1638, 100, 12.5, dims=2),
        _tpu("tpu7x", 192, 7380, 100, 12.5, dims=3, peak_flops=2307e12, devices=2),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(Chip):
    """A kind of GPU; its slice is a host, whose GPUs reach each other through switches.

    Attributes:
        device_kind: the driver's name of it.
        per_host: GPUs that NVLink joins.
        clock_ghz: highest clock of its cores.
        compute_capability: as a proto's text.
        num_cores: streaming multiprocessors.
        l2_cache: bytes.
        threads_per_core: at most.
        shared_memory: bytes of a multiprocessor; a block can have one KiB less.
    """

    device_kind: str
    per_host: int = 8
    clock_ghz: float = 1.98
    compute_capability: str = "major: 9 feature_extension: ACCELERATED_FEATURES"
    num_cores: int = 132
    l2_cache: int = 50 << 20
    threads_per_core: int = 2048
    shared_memory: int = 228 << 10
    ring_multiple: int = 1
    dims: int = 1
    switched: bool = True

    @property
    def usable_memory(self) -> int:
        """Returns the bytes for programs: jax's share of memory in `docker/Dockerfile.gpu`."""
        return int(_SHARE_OF_PROGRAMS * self.memory)

    def target(self) -> str:
        """Returns XLA's GpuTargetConfigProto as text, with the installed versions of CUDA.

        Raises:
            importlib.metadata.PackageNotFoundError: CUDA is not installed.
        """
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.device_kind}"
            dnn_version_info {{ {_version(CUDNN)} }}
            runtime_version {{ {_version(_RUNTIME)} }}
            gpu_device_info {{
              cuda_compute_capability {{ {self.compute_capability} }}
              core_count: {self.num_cores}
              fpus_per_core: 128
              clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory}
              memory_bandwidth: {int(self.memory_bandwidth)}
              l2_cache_size: {self.l2_cache}
              threads_per_warp: 32
              threads_per_block_limit: 1024
              threads_per_core_limit: {self.threads_per_core}
              thread_dim_limit_x: 1024
              thread_dim_limit_y: 1024
              thread_dim_limit_z: 64
              block_dim_limit_x: {2**31 - 1}
              block_dim_limit_y: {2**16 - 1}
              block_dim_limit_z: {2**16 - 1}
              shared_memory_per_block: {48 << 10}
              shared_memory_per_block_optin: {self.shared_memory - 1024}
              shared_memory_per_core: {self.shared_memory}
              registers_per_block_limit: {1 << 16}
              registers_per_core_limit: {1 << 16}
            }}
        """


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="h100",
            device_kind="NVIDIA H100 80GB HBM3",
            memory=84_942_979_072,
            peak_flops=PEAK_FLOPS["NVIDIA H100 80GB HBM3"],
            memory_bandwidth=3350e9,
            link_bandwidth=450e9,
            network_bandwidth=50e9,
            example="h100:8",
        ),
        Gpu(
            name="h200",
            device_kind="NVIDIA H200",
            memory=139 * GIB,
            peak_flops=PEAK_FLOPS["NVIDIA H200"],
            memory_bandwidth=4800e9,
            link_bandwidth=450e9,
            network_bandwidth=50e9,
            example="h200:8",
        ),
        Gpu(
            name="l4",
            device_kind="NVIDIA L4",
            per_host=1,
            clock_ghz=2.04,
            compute_capability="major: 8 minor: 9",
            num_cores=58,
            l2_cache=48 << 20,
            threads_per_core=1536,
            shared_memory=100 << 10,
            memory=23_034 << 20,
            peak_flops=PEAK_FLOPS["NVIDIA L4"],
            memory_bandwidth=300e9,
            link_bandwidth=32e9,
            network_bandwidth=12.5e9,
            example="l4:1",
        ),
    )
}
_KINDS: dict[str, Chip] = {**CHIPS, **GPUS}


class Slice(NamedTuple):
    """The devices of one or several slices; a host of GPUs counts as one.

    Attributes:
        name: of the topology, `v5e:8x8` or `h100:8`.
        chip: their kind.
        shape: chips along each axis of a slice.
        num_slices: number of slices, joined by their hosts' network.
        devices: jax devices, which can be compiled for but not used.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    num_slices: int
    devices: Sequence[jax.Device]

    @property
    def compilers(self) -> tuple[str, ...]:
        """Returns the packages that hold the compiler and the libraries it links."""
        return (PLUGIN, CUDNN) if isinstance(self.chip, Gpu) else ("libtpu",)


def prepare_environment() -> None:
    """Lets jax compile on a machine without devices; call it before jax makes an array.

    jax itself runs on the CPU, libtpu does not look for a TPU's metadata (nor complains that some
    are missing), and another process may have it loaded at the same time.
    """
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    jax.config.update("jax_platforms", "cpu")  # JAX_PLATFORMS was read when jax was imported.


def open_slice(name: str, *, num_slices: int = 1) -> Slice:
    """Opens the devices of a topology.

    Args:
        name: kind of chip and chips along each axis, `v5e:8x8`; for GPUs, their number in a host.
        num_slices: slices of that shape, or hosts.

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
        # A host of libtpu has 2 x 2 chips; such a slice, as a single chip, is smaller.
        options["chips_per_host_bounds"] = (*(min(size, 2) for size in shape[:2]), 1)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (RuntimeError, ValueError) as error:  # jax's own errors are RuntimeErrors.
        raise ValueError(
            f"topology={name!r}: unknown to libtpu ({_first_line(error)}); {_known()}"
        ) from error
    return Slice(name, chip, shape, num_slices, found.devices)


def _version(package: str) -> str:
    numbers = re.findall(r"\d+", importlib.metadata.version(package))
    return " ".join(
        f"{name}: {number}"
        for name, number in zip(("major", "minor", "patch"), numbers, strict=False)
    )


def _gpus(gpu: Gpu, number: int, num_hosts: int) -> Sequence[jax.Device]:
    if importlib.util.find_spec(PLUGIN.replace("-", "_")) is None:
        raise ValueError(
            f"compiling for a GPU needs {PLUGIN}: pip install 'huatuo_jax[cuda]' (no GPU is needed)"
        )
    try:
        found = topologies.get_topology_desc(
            platform="cuda",
            target_config=gpu.target(),
            topology=f"{num_hosts}x1x{number}",  # Partitions, hosts of one, GPUs of a host.
        )
    except (NotImplementedError, RuntimeError) as error:  # What jax raises without the plugin.
        raise ValueError(f"{PLUGIN} did not start: {_first_line(error)}") from error
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
