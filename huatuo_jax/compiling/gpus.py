"""What a GPU can do at best, and the description of it that XLA compiles for without one.

Peak, memory bandwidth and NVLink are those of NVIDIA's data sheets "H100 Tensor Core GPU" and "H200
Tensor Core GPU", form factor SXM: 989 TFLOP/s of dense bfloat16, and 900 GB/s of NVLink in both
directions together; and "L4 Tensor Core GPU", half of the TFLOP/s that it prints for sparse
matrices. Memory is what the driver tells of such a card, not what is printed on it (of an H200 in
whole GiB); of cards sold as 24 GB an L4 has the least. The network is that of the DGX H100 and H200
user guides: one port of 400 Gb/s a GPU; an L4 has PCIe alone, 4.0 with 16 lanes. The limits of a
kernel are those of the compute capability in the CUDA C++ Programming Guide.
"""

import dataclasses
import importlib.metadata
import re

from huatuo_jax.compiling.chips import Chip
from huatuo_jax.training.programs import GIB
from huatuo_jax.training.throughput import PEAK_FLOPS

PLUGIN = "jax-cuda13-plugin"
CUDNN = "nvidia-cudnn-cu13"
_RUNTIME = "nvidia-cuda-runtime"

# As docker/Dockerfile.gpu sets XLA_PYTHON_CLIENT_MEM_FRACTION; the rest is NCCL's and cuDNN's.
_SHARE_OF_PROGRAMS = 0.92


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(Chip):
    """A kind of GPU; its slice is a host, whose GPUs reach each other through switches.

    Attributes:
        device_kind: as the driver names it.
        per_host: GPUs that NVLink joins.
        clock_ghz: of its cores at most.
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
        """Bytes of memory for programs: what jax takes of it as `docker/Dockerfile.gpu` runs."""
        return int(_SHARE_OF_PROGRAMS * self.memory)

    def target(self) -> str:
        """A GpuTargetConfigProto of XLA's as text, with the versions of CUDA that are installed.

        Raises:
            importlib.metadata.PackageNotFoundError: they are not.
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


def _version(package: str) -> str:
    numbers = re.findall(r"\d+", importlib.metadata.version(package))
    return " ".join(
        f"{name}: {number}"
        for name, number in zip(("major", "minor", "patch"), numbers, strict=False)
    )


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
