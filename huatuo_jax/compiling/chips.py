"""What a TPU chip can do at best, as its maker publishes it.

Memory, peak and bandwidths are those of the tables "System architecture" of the Cloud TPU
documentation (cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, /tpu7x, read in 2025). Of the
interconnect they give both directions of all links of a chip together (v4 and v5p: one direction,
in Gbps); here it is one link in one direction. Which axes of a slice close to a ring follows "How
to Scale Your Model" (jax-ml.github.io/scaling-book/tpus): those of 16 chips where the pod is a
16 x 16 torus, those of a multiple of 4 where it is made of 4 x 4 x 4 cubes.
"""

import dataclasses

from huatuo_jax.training.programs import GIB
from huatuo_jax.training.throughput import PEAK_FLOPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of chip.

    Attributes:
        name: as topologies are named, `v5e`.
        memory: bytes of HBM.
        peak_flops: of dense bfloat16 matrix products, a second.
        memory_bandwidth: of the HBM, bytes a second.
        link_bandwidth: of one link to a neighbour, in one direction, bytes a second.
        network_bandwidth: of a chip's share of its host's network, which joins slices, bytes a
            second.
        ring_multiple: an axis of a slice is a ring where its length is a multiple of this.
        devices: that jax sees in a chip; they share everything above evenly.
        dims: of a topology's name.
        options: of the topology, as libtpu wants them.
        switched: whether each sends to all others of its slice through switches, and no axis of a
            slice is of any matter.
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
        """Bytes of HBM for the programs of a device of jax's; libtpu keeps a quarter GiB."""
        return self.memory // self.devices - GIB // 4


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            memory=32 * GIB,
            peak_flops=PEAK_FLOPS["TPU v4"],
            memory_bandwidth=1200e9,
            link_bandwidth=50e9,
            network_bandwidth=3.125e9,
            ring_multiple=4,
            dims=3,
            # The two cores of a chip are one device.
            options=(("chip_config_name", "megacore"),),
            example="v4:4x4x4",
        ),
        Chip(
            name="v5e",
            memory=16 * GIB,
            peak_flops=PEAK_FLOPS["TPU v5e"],
            memory_bandwidth=819e9,
            link_bandwidth=50e9,
            network_bandwidth=3.125e9,
            ring_multiple=16,
            example="v5e:8x8",
        ),
        Chip(
            name="v5p",
            memory=95 * GIB,
            peak_flops=PEAK_FLOPS["TPU v5p"],
            memory_bandwidth=2765e9,
            link_bandwidth=100e9,
            network_bandwidth=6.25e9,
            ring_multiple=4,
            dims=3,
            example="v5p:4x4x4",
        ),
        Chip(
            name="v6e",
            memory=32 * GIB,
            peak_flops=PEAK_FLOPS["TPU v6e"],
            memory_bandwidth=1638e9,
            link_bandwidth=100e9,
            network_bandwidth=12.5e9,
            ring_multiple=16,
            example="v6e:8x8",
        ),
        Chip(
            name="tpu7x",
            memory=192 * GIB,
            peak_flops=2307e12,
            memory_bandwidth=7380e9,
            link_bandwidth=100e9,
            network_bandwidth=12.5e9,
            ring_multiple=4,
            devices=2,
            dims=3,
            example="tpu7x:4x4x4",
        ),
    )
}
