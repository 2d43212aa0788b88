"""Bounds of time, against figures worked out by hand, for devices that only have places."""

import dataclasses
import types

import numpy as np
import pytest

from huatuo_jax.compiling.costs import Costs, roofline, seconds_of
from huatuo_jax.compiling.hardware import CHIPS, Slice
from huatuo_jax.compiling.hlo import Collective

LINK = CHIPS["v5e"].link_bandwidth


def a_slice(name, shape, *, num_slices=1, cores=1):
    devices = [
        types.SimpleNamespace(coords=list(place), core_on_chip=core, slice_index=number)
        for number in range(num_slices)
        for place in np.ndindex(*shape)
        for core in range(cores)
    ]
    return Slice(name, CHIPS[name], shape, num_slices, devices)


def a_mesh(of):
    """What is asked of a mesh: its devices."""
    devices = np.empty(len(of.devices), object)
    devices[:] = of.devices
    return types.SimpleNamespace(devices=devices)


def gather(group, *, kind="all-gather", payload=1 << 30):
    return Collective(
        kind=kind,
        axes=("fsdp",),
        group=tuple(group),
        runs=1,
        payload=payload,
        op_name="",
        in_layer_loop=True,
        dims=(payload,),
    )


def seconds(of, one):
    return seconds_of(one, of, a_mesh(of))


def test_a_line_of_chips_sends_one_way():
    of = a_slice("v5e", (4, 4))
    sent = (1 << 30) * 3 / 4
    assert seconds(of, gather(range(4))) == pytest.approx(sent / LINK)


def test_a_ring_of_chips_sends_both_ways():
    of = a_slice("v5e", (16, 16))
    sent = (1 << 30) * 15 / 16
    assert seconds(of, gather(range(16))) == pytest.approx(sent / (2 * LINK))


def test_half_of_a_ring_is_a_line():
    of = a_slice("v5e", (16, 16))
    assert seconds(of, gather(range(8))) == pytest.approx((1 << 30) * 7 / 8 / LINK)


def test_a_plane_of_chips_sends_along_both_axes():
    of = a_slice("v5e", (4, 4))
    sent = (1 << 30) * 15 / 16
    assert seconds(of, gather(range(16))) == pytest.approx(sent / (2 * LINK))
    # A permute goes to one neighbour: there is a ring through the plane, and it has two ways.
    permute = gather(range(16), kind="collective-permute")
    assert seconds(of, permute) == pytest.approx((1 << 30) / (2 * LINK))


def test_slices_send_each_chips_part_through_the_network():
    of = a_slice("v5e", (2, 2), num_slices=2)
    within = (1 << 30) * 3 / 4 / (2 * LINK)
    across = (1 << 30) / 4 * (1 / 2) / CHIPS["v5e"].network_bandwidth
    assert seconds(of, gather(range(8))) == pytest.approx(within + across)
    one_of_each = gather((0, 4))
    assert seconds(of, one_of_each) == pytest.approx((1 << 30) / 2 / CHIPS["v5e"].network_bandwidth)


def test_the_halves_of_a_chip_share_its_links():
    of = a_slice("tpu7x", (2, 2, 1), cores=2)
    link, sent = CHIPS["tpu7x"].link_bandwidth, (1 << 30) / 2
    # Devices 0 and 2 are the first halves of neighbours; the second halves do the same meanwhile.
    assert seconds(of, gather((0, 2))) == pytest.approx(sent / (link / 2))
    assert seconds(of, gather((0, 1))) == pytest.approx(sent / (6 * link))


@pytest.mark.parametrize(
    ("costs", "interconnect_s", "binds", "bound_s"),
    [
        (Costs(197e12, 0.0, 0.0, 0), 0.5, "compute", 1.0),
        (Costs(98.5e12, 98.5e12, 2 * 819e9, 0), 0.5, "memory", 2.0),
        (Costs(197e12, 0.0, 819e9, 0), 4.0, "interconnect", 4.0),
    ],
)
def test_the_longest_of_three_binds(costs, interconnect_s, binds, bound_s):
    of = a_slice("v5e", (2, 2))
    found = roofline(costs, interconnect_s=interconnect_s, model_flops=4 * 98.5e12, of=of)
    assert (found.binds, found.bound_s) == (binds, pytest.approx(bound_s))
    # The mathematics asks for half of what a chip can do in a second.
    assert found.utilisation == pytest.approx(0.5 / bound_s)


def test_a_device_has_its_share_of_the_chip():
    whole = dataclasses.replace(CHIPS["tpu7x"], devices=1)
    of = a_slice("tpu7x", (2, 2, 1), cores=2)
    costs = Costs(1e15, 0.0, 1e12, 0)
    half = roofline(costs, interconnect_s=0.0, model_flops=0.0, of=of)
    full = roofline(costs, interconnect_s=0.0, model_flops=0.0, of=of._replace(chip=whole))
    assert half.compute_s == pytest.approx(2 * full.compute_s)
    assert half.memory_s == pytest.approx(2 * full.memory_s)
    assert CHIPS["tpu7x"].usable_memory < whole.usable_memory / 2
