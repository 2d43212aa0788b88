"""The least time that a program can take on its chips, and what sets it.

Computing, reading and writing memory, and sending between chips overlap at best entirely: the
longest of the three is a bound from below (Williams et al. 2009). Sending: a collective over chips
that lie along axes of the slice goes both ways round each of those that is a ring, and one way
where it is a line; groups over several slices first divide the work among the chips of a slice, and
each then sends its part through its host's network. Through switches, as GPUs have them, a device
sends at its link's rate to any other; that NVLink's switches can add numbers up is left out.
"""

import dataclasses
from typing import Any, NamedTuple

from jax.sharding import Mesh

from huatuo_jax.compiling.collectives import Collective
from huatuo_jax.compiling.costs import Costs
from huatuo_jax.compiling.topology import Slice

# Of TPU7x: its two halves are joined by something six times as fast as a link (Cloud TPU
# documentation, page TPU7x). No other chip in the table has two devices.
_LINKS_INSIDE_A_CHIP = 6


class Roofline(NamedTuple):
    """Seconds of a step at best.

    Attributes:
        compute_s: matrix products and attention at the chip's peak.
        memory_s: its memory's traffic.
        interconnect_s: all collectives, one after the other.
        utilisation: model FLOPs over what the chips could do in the longest of these.
    """

    compute_s: float
    memory_s: float
    interconnect_s: float
    utilisation: float

    @property
    def bound_s(self) -> float:
        """The longest."""
        return max(self.compute_s, self.memory_s, self.interconnect_s)

    @property
    def sum_s(self) -> float:
        """All three, as if none overlapped another."""
        return self.compute_s + self.memory_s + self.interconnect_s

    @property
    def binds(self) -> str:
        """Which that is."""
        seconds = {
            "compute": self.compute_s,
            "memory": self.memory_s,
            "interconnect": self.interconnect_s,
        }
        return max(seconds, key=lambda name: seconds[name])


def roofline(costs: Costs, *, interconnect_s: float, model_flops: float, of: Slice) -> Roofline:
    """The bound of a program.

    Args:
        costs: of one device.
        interconnect_s: what its collectives take, see `seconds_of`.
        model_flops: what the mathematics asks of all devices together.
        of: the chips.
    """
    peak = of.chip.peak_flops / of.chip.devices
    found = Roofline(
        compute_s=costs.flops / peak,
        memory_s=costs.memory_bytes / (of.chip.memory_bandwidth / of.chip.devices),
        interconnect_s=interconnect_s,
        utilisation=0.0,
    )
    return found._replace(utilisation=model_flops / (len(of.devices) * peak * found.bound_s))


def seconds_of(one: Collective, of: Slice, mesh: Mesh) -> float:
    """How long one run of a collective takes at least."""
    devices = [mesh.devices.flat[number] for number in one.group]
    slices = {_slice_index(device, of) for device in devices}
    if len(slices) == 1:
        return one.bytes_sent / _bandwidth(one, devices, of)
    per_slice = len(devices) // len(slices)
    first = min(slices)
    here = tuple(
        number
        for number, device in zip(one.group, devices, strict=True)
        if _slice_index(device, of) == first
    )
    across = dataclasses.replace(
        one, group=tuple(range(len(slices))), payload=one.payload // per_slice
    )
    network_s = across.bytes_sent / of.chip.network_bandwidth * of.chip.devices
    if per_slice == 1:
        return network_s
    return network_s + seconds_of(dataclasses.replace(one, group=here), of, mesh)


def _slice_index(device: Any, of: Slice) -> int:
    """Which of the slices, or hosts of GPUs, a device is in."""
    if of.chip.switched:
        return int(device.process_index)
    return getattr(device, "slice_index", None) or 0


def _bandwidth(one: Collective, devices: list[Any], of: Slice) -> float:
    """Bytes a second that each device of a group can send into it."""
    chip = of.chip
    if chip.switched:
        return chip.link_bandwidth
    places = {tuple(device.coords) for device in devices}
    cores = len(devices) / len(places)
    if len(places) == 1:
        return _LINKS_INSIDE_A_CHIP * chip.link_bandwidth
    ways = []
    for dim, length in enumerate(of.shape):
        span = len({place[dim] for place in places})
        if span > 1:
            is_ring = span == length and length % chip.ring_multiple == 0
            ways.append(2 if is_ring else 1)
    if one.kind == "collective-permute":
        # One neighbour each; through a plane of chips there is always a ring.
        ways = [2 if len(ways) > 1 else ways[0]]
    # The links are a chip's: they serve its devices together, or this group and its twin.
    return sum(ways) * chip.link_bandwidth * cores / chip.devices
