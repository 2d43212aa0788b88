"""Counting in programs that XLA compiled for the CPU, against figures worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.compiling import hlo
from huatuo_jax.compiling.costs import costs_of
from huatuo_jax.compiling.hlo import (
    Collective,
    collectives_of,
    gathers_of_stacked_layers,
    layer_loops,
)
from huatuo_jax.core.sharding import make_mesh
from tests.core.test_sharding import Chip

NUM_LAYERS, ROWS, WIDTH = 5, 16, 64


def stack(hidden_BD, kernels_LDD):
    def layer(hidden_BD, kernel_DD):
        return jnp.tanh(hidden_BD @ kernel_DD), None

    return jax.lax.scan(layer, hidden_BD, kernels_LDD)[0]


def gathered_at_once(hidden_BD, kernels_LDD):
    everywhere = jax.NamedSharding(jax.sharding.get_abstract_mesh(), jax.P())
    return stack(hidden_BD, jax.lax.with_sharding_constraint(kernels_LDD, everywhere))


@functools.cache
def compiled_on(function, data, fsdp, tensor):
    """The text of a program with rows over the batch axes and kernels over fsdp."""
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    rows = jax.ShapeDtypeStruct(
        (ROWS, WIDTH), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    )
    kernels = jax.ShapeDtypeStruct(
        (NUM_LAYERS, WIDTH, WIDTH),
        jnp.float32,
        sharding=jax.NamedSharding(mesh, jax.P(None, "fsdp")),
    )
    with jax.set_mesh(mesh):
        jitted = jax.jit(function, out_shardings=jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        return mesh, hlo.parse(jitted.lower(rows, kernels).compile().as_text())


def test_a_loops_products_count_as_often_as_it_turns():
    _, module = compiled_on(stack, 1, 8, 1)
    costs = costs_of(module)
    assert costs.matmul_flops == NUM_LAYERS * 2 * (ROWS // 8) * WIDTH * WIDTH
    assert costs.unknown_loops == 0


def test_kernels_gathered_in_the_layer_loop_are_counted_there():
    mesh, module = compiled_on(stack, 1, 8, 1)
    (gather,) = collectives_of(module, mesh, num_layers=NUM_LAYERS)
    assert (gather.kind, gather.axes, gather.runs) == ("all-gather", ("fsdp",), NUM_LAYERS)
    assert gather.payload == WIDTH * WIDTH * 4
    assert gather.bytes_sent == WIDTH * WIDTH * 4 * 7 / 8
    assert gather.in_layer_loop
    assert not gathers_of_stacked_layers([gather], [(NUM_LAYERS, WIDTH, WIDTH)])


def test_kernels_of_all_layers_gathered_at_once_are_found():
    mesh, module = compiled_on(gathered_at_once, 1, 8, 1)
    found = collectives_of(module, mesh, num_layers=NUM_LAYERS)
    (gather,) = gathers_of_stacked_layers(found, [(NUM_LAYERS, WIDTH, WIDTH)])
    assert gather.dims == (NUM_LAYERS, WIDTH, WIDTH)
    assert (gather.runs, gather.payload) == (1, NUM_LAYERS * WIDTH * WIDTH * 4)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("{{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("{{0,2,4,6},{1,3,5,7}}", ("data", "fsdp")),
        ("{}", ("data", "fsdp", "tensor")),
    ],
)
def test_a_group_of_devices_tells_its_mesh_axes(groups, axes):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    text = GROUPED.replace("GROUPS", f"replica_groups={groups}")
    (found,) = collectives_of(hlo.parse(text), mesh, num_layers=2)
    assert found.axes == axes


def test_of_two_loops_with_as_many_turns_the_inner_is_the_layers():
    module = hlo.parse(NESTED)
    assert layer_loops(module.places, 2) == {"layers"}
    assert layer_loops(module.places, 3) == set()


def test_pieces_of_an_overlapped_collective_count_once():
    mesh = make_mesh(fsdp=4, devices=jax.devices()[:4])
    (gather,) = collectives_of(hlo.parse(NESTED), mesh, num_layers=2)
    assert (gather.kind, gather.runs, gather.in_layer_loop) == ("all-gather", 4, True)


@pytest.mark.parametrize(
    ("groups", "wanted"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", (0, 1, 4, 5)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", tuple(range(8))),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)2}", (0, 4)),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}", (0, 1, 2, 3)),
        ("replica_groups={}", tuple(range(8))),
    ],
)
def test_groups_are_read_in_every_notation(groups, wanted):
    text = GROUPED.replace("GROUPS", groups)
    (found,) = collectives_of(hlo.parse(text), make_mesh(), num_layers=2)
    assert found.group == wanted


def test_a_chain_of_permutes_is_a_group():
    text = GROUPED.replace("all-reduce", "collective-permute").replace(
        "GROUPS", "source_target_pairs={{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}"
    )
    mesh = make_mesh(fsdp=4, tensor=2)
    (found,) = collectives_of(hlo.parse(text), mesh, num_layers=2)
    assert (found.group, found.axes) == ((0, 2, 4, 6), ("fsdp",))
    assert found.bytes_sent == 4 * 8 * 4


@pytest.mark.parametrize(
    ("data", "transfer", "kind", "axes", "payload"),
    [
        (2, "ALL_REDUCE", "all-reduce", ("data",), 8 * 4),
        (1, "ALL_GATHER", "all-gather", ("fsdp",), 2 * 8 * 4),
    ],
)
def test_what_hosts_send_between_slices_is_counted(data, transfer, kind, axes, payload):
    chips = [Chip(*place) for place in np.ndindex(2, 4, 4)]
    mesh = make_mesh(data=data, devices=chips)
    module = hlo.parse(BETWEEN_SLICES.replace("TRANSFER", transfer))
    within, between = collectives_of(module, mesh, num_layers=2)
    assert (between.kind, between.axes, between.payload) == (kind, axes, payload)
    assert [mesh.devices.flat[index].slice_index for index in between.group] == [0, 1]
    assert len({mesh.devices.flat[index].coords for index in between.group}) == 1
    assert (within.kind, within.group) == ("all-reduce", (0, 1, 2, 3))


def test_an_unknown_transfer_between_slices_is_refused():
    chips = [Chip(*place) for place in np.ndindex(2, 4, 4)]
    module = hlo.parse(BETWEEN_SLICES.replace("TRANSFER", "TELEPORT"))
    with pytest.raises(ValueError, match="TELEPORT between slices is not known"):
        collectives_of(module, make_mesh(data=2, devices=chips), num_layers=2)


def test_an_all_reduce_that_keeps_a_part_is_a_reduce_scatter():
    mesh = make_mesh(fsdp=4, devices=jax.devices()[:4])
    (found,) = collectives_of(hlo.parse(SCATTERED), mesh, num_layers=2)
    assert (found.kind, found.payload) == ("reduce-scatter", 8 * 16 * 4)
    assert found.bytes_sent == 8 * 16 * 4 * 3 / 4


@pytest.mark.parametrize(
    ("shape", "line", "flops"),
    [
        # As TPUs write a product of [8, 16] and [16, 32].
        ("f32[8,32]{1,0}", "convolution(%a, %b), dim_labels=bf_io->bf", 2 * 8 * 16 * 32),
        # Two rows of two products: the window slides over what is padded with one row of zeros on
        # either side, and meets four pairs of rows, not six.
        (
            "f32[1,3,32]{2,1,0}",
            "convolution(%c, %d), window={size=2 pad=1_1}, dim_labels=b0f_0io->b0f",
            4 * 2 * 1 * 16 * 32,
        ),
    ],
)
def test_products_are_counted_without_padding(shape, line, flops):
    module = hlo.parse(PRODUCT.replace("LINE", line).replace("SHAPE", shape))
    assert costs_of(module).matmul_flops == flops


def test_memory_counts_slices_and_leaves_on_chip_values_out():
    costs = costs_of(hlo.parse(SLICED))
    kernel = 64 * 64 * 4
    # The fusion reads one layer's kernel of five and writes a sum; the copy stays on the chip.
    assert costs.memory_bytes == kernel + 4


def test_a_kernels_metadata_may_go_on_in_the_next_line():
    module = hlo.parse(KERNEL.replace("TYPE", "bf16[2,4,256,128]{3,2,1,0:T(8,128)(2,1)}"))
    assert list(module.entry.instructions) == ["q", "splash_mha_fwd_segmented.1", "after"]
    assert costs_of(module).attention_flops == 2 * 2 * 2 * 4 * (256 * 257 / 2) * 128


@pytest.mark.parametrize(
    ("blocks", "queries", "batch"),
    [
        ("s8[4,1,1]", "bf16[2,4,256,128]", 2),
        ("s8[4,1,1]", "bf16[4,256,128]", 1),
        ("s32[1,4,256,128]", "f32[4,256,128]", 1),
    ],
)
def test_a_kernels_queries_are_its_first_floats_with_or_without_a_batch(blocks, queries, batch):
    module = hlo.parse(MASKED.replace("BLOCKS", blocks).replace("QUERIES", queries))
    per_row = 2 * 2 * 4 * (256 * 257 / 2) * 128
    assert costs_of(module).attention_flops == batch * per_row


def test_memory_counts_what_a_fusion_in_a_fusion_slices_and_what_is_scattered():
    costs = costs_of(hlo.parse(NESTED_SLICE))
    # One layer's kernel of five and the row read, eight numbers written over others.
    assert costs.memory_bytes == (64 * 64 + 64) * 4 + 64 * 4 + 8 * 4 + 4 + 8 * 4


def test_what_is_sent_depends_on_the_kind():
    def sent(kind, payload=800):
        return Collective(
            kind=kind,
            axes=("fsdp",),
            group=(0, 1, 2, 3),
            runs=1,
            payload=payload,
            op_name="",
            in_layer_loop=False,
            dims=(200,),
        ).bytes_sent

    assert sent("all-gather") == sent("reduce-scatter") == 600
    assert sent("all-reduce") == 1200
    assert sent("collective-permute") == 800
    assert sent("all-to-all") == 150  # Three quarters of a device's own 200.


def test_what_runs_on_other_cores_is_read_and_ends_where_it_ends():
    module = hlo.parse(OFFLOADED)
    assert set(module.computations) == {"elsewhere", "after", "main"}
    assert [one.opcode for one in module.computations["elsewhere"].instructions.values()] == [
        "parameter",
        "copy",
    ]
    # Read and written by the copy, by the sum; starting it moves nothing.
    assert costs_of(module).memory_bytes == 4 * 8


@pytest.mark.parametrize(("step", "turns"), [(1, 5), (2, 3), (5, 1)])
def test_a_loop_whose_counter_goes_in_steps_has_fewer_turns(step, turns):
    module = hlo.parse(STEPPED.replace("STEP", str(step)))
    assert {loop.trips for place in module.places for loop in place.loops} == {turns}


BETWEEN_SLICES = """HloModule between_slices

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %sum = f32[8]{0} all-reduce(%p), channel_id=2, replica_groups={{0,1,2,3}}
  %after = token[] after-all()
  %send = (f32[8]{0}, u32[], token[]) send(%sum, %after), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_target="{1,2}x{0:3}",\
_xla_megascale_transfer_type="TRANSFER"}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %recv = (f32[8]{0}, u32[], token[]) recv(%after), channel_id=3, is_host_transfer=true
  %received = (f32[8]{0}, token[]) recv-done(%recv), channel_id=3, is_host_transfer=true
  ROOT %result = f32[8]{0} get-tuple-element(%received), index=0
}
"""

NESTED = """HloModule nested

%piece (p0: f32[2]) -> f32[8] {
  %p0 = f32[2]{0} parameter(0)
  ROOT %all-gather.1 = f32[8]{0} all-gather(%p0), channel_id=7, replica_groups={{0,1,2,3}}
}

%rest (p1: f32[2]) -> f32[8] {
  %p1 = f32[2]{0} parameter(0)
  ROOT %all-gather.2 = f32[8]{0} all-gather(%p1), channel_id=7, replica_groups={{0,1,2,3}}
}

%inner_below (s0: (s32[], f32[2])) -> pred[] {
  %s0 = (s32[], f32[2]{0}) parameter(0)
  %i0 = s32[] get-tuple-element(%s0), index=0
  %n0 = s32[] constant(2)
  ROOT %lt0 = pred[] compare(%i0, %n0), direction=LT
}

%layers (s1: (s32[], f32[2])) -> (s32[], f32[2]) {
  %s1 = (s32[], f32[2]{0}) parameter(0)
  %x1 = f32[2]{0} get-tuple-element(%s1), index=1
  %start = f32[8]{0} fusion(%x1), kind=kCustom, calls=%piece
  %done = f32[8]{0} fusion(%x1), kind=kCustom, calls=%rest
  ROOT %t1 = (s32[], f32[2]{0}) tuple(%s1, %x1)
}

%micro_batches (s2: (s32[], f32[2])) -> (s32[], f32[2]) {
  %s2 = (s32[], f32[2]{0}) parameter(0)
  ROOT %w2 = (s32[], f32[2]{0}) while(%s2), condition=%inner_below, body=%layers
}

ENTRY %main (p: f32[2]) -> (s32[], f32[2]) {
  %p = f32[2]{0} parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], f32[2]{0}) tuple(%zero, %p)
  ROOT %w = (s32[], f32[2]{0}) while(%t), condition=%inner_below, body=%micro_batches
}
"""

OFFLOADED = """HloModule offloaded

%elsewhere (q: f32[2]) -> f32[2] {
  %q = f32[2]{0} parameter(0)
  ROOT %copied = f32[2]{0} copy(%q)
}, execution_thread="sparsecore"

%after (r: f32[2]) -> f32[2] {
  %r = f32[2]{0} parameter(0)
  ROOT %twice = f32[2]{0} add(%r, %r)
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  %start = ((f32[2]{0}), f32[2]{0}, u32[]{:S(8)}) call-start(%p), to_apply=%elsewhere
  %done = f32[2]{0} call-done(%start)
  ROOT %sum = f32[2]{0} fusion(%done), kind=kLoop, calls=%after
}
"""

STEPPED = """HloModule stepped

%below (s0: (f32[2], s32[])) -> pred[] {
  %s0 = (f32[2]{0}, s32[]) parameter(0)
  %i0 = s32[] get-tuple-element(%s0), index=1
  %n0 = s32[] constant(5)
  ROOT %lt0 = pred[] compare(%i0, %n0), direction=LT
}

%turn (s1: (f32[2], s32[])) -> (f32[2], s32[]) {
  %s1 = (f32[2]{0}, s32[]) parameter(0)
  %x1 = f32[2]{0} get-tuple-element(%s1), index=0
  %i1 = s32[] get-tuple-element(%s1), index=1
  %by = s32[] constant(STEP)
  %next = s32[] add(%i1, %by)
  ROOT %t1 = (f32[2]{0}, s32[]) tuple(%x1, %next)
}

ENTRY %main (p: f32[2]) -> (f32[2], s32[]) {
  %p = f32[2]{0} parameter(0)
  %zero = s32[] constant(0)
  %t = (f32[2]{0}, s32[]) tuple(%p, %zero)
  ROOT %w = (f32[2]{0}, s32[]) while(%t), condition=%below, body=%turn
}
"""

GROUPED = """HloModule grouped

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %sum = f32[4,8]{1,0} all-reduce(%p), channel_id=1, GROUPS, use_global_device_ids=true
}
"""

SCATTERED = """HloModule scattered

%all-reduce-scatter (input: f32[8,16]) -> f32[2,16] {
  %input = f32[8,16]{1,0} parameter(0)
  %all-reduce.1 = f32[8,16]{1,0} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3}}
  %zero = u32[] constant(0)
  ROOT %part = f32[2,16]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={2,16}
}

ENTRY %main (p: f32[8,16]) -> f32[2,16] {
  %p = f32[8,16]{1,0} parameter(0)
  ROOT %out = f32[2,16]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter
}
"""

PRODUCT = """HloModule product

ENTRY %main (a: f32[8,16], b: f32[16,32], c: f32[1,2,16], d: f32[2,16,32]) -> f32[] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,32]{1,0} parameter(1)
  %c = f32[1,2,16]{2,1,0} parameter(2)
  %d = f32[2,16,32]{2,1,0} parameter(3)
  ROOT %product = SHAPE LINE
}
"""

SLICED = """HloModule sliced

%inside (i: s32[], stacked: f32[5,64,64]) -> f32[] {
  %i = s32[] parameter(0)
  %stacked = f32[5,64,64]{2,1,0} parameter(1)
  %none = s32[] constant(0)
  %one = f32[1,64,64]{2,1,0} dynamic-slice(%stacked, %i, %none, %none)
  ROOT %sum = f32[] reduce(%one, %none), dimensions={0,1,2}
}

ENTRY %main (index: s32[], kernels: f32[5,64,64], small: f32[8]) -> f32[] {
  %index = s32[]{:S(2)} parameter(0)
  %kernels = f32[5,64,64]{2,1,0:T(8,128)} parameter(1)
  %small = f32[8]{0:T(128)S(1)} parameter(2)
  %copied = f32[8]{0:T(128)S(1)} copy(%small)
  ROOT %sum.1 = f32[]{:T(128)} fusion(%index, %kernels), kind=kLoop, calls=%inside
}
"""

KERNEL = """HloModule kernel

ENTRY %main (q: bf16[2,4,256,128]) -> bf16[2,4,256,128] {
  %q = TYPE parameter(0)
  %splash_mha_fwd_segmented.1 = TYPE custom-call(%q), custom_call_target="tpu_custom_call", m={x={
"block_q":"512"
}}, metadata={op_name="jit(step)/layers/attention"}
  ROOT %after = TYPE copy(%splash_mha_fwd_segmented.1)
}
"""

MASKED = """HloModule masked

ENTRY %main (m: BLOCKS, q: QUERIES) -> QUERIES {
  %m = BLOCKS parameter(0)
  %q = QUERIES parameter(1)
  ROOT %splash_mha_fwd.1 = QUERIES custom-call(%m, %q, %q), custom_call_target="tpu_custom_call"
}
"""

NESTED_SLICE = """HloModule nested_slice

%cut (j: s32[], all: f32[5,64,64]) -> f32[64,64] {
  %all = f32[5,64,64]{2,1,0} parameter(1)
  %j = s32[] parameter(0)
  %none = s32[] constant(0)
  %one = f32[1,64,64]{2,1,0} dynamic-slice(%all, %j, %none, %none)
  ROOT %square = f32[64,64]{1,0} bitcast(%one)
}

%times (i: s32[], stacked: f32[5,64,64], row: f32[64]) -> f32[64] {
  %i = s32[] parameter(0)
  %stacked = f32[5,64,64]{2,1,0} parameter(1)
  %row = f32[64]{0} parameter(2)
  %same = f32[5,64,64]{2,1,0} bitcast(%stacked)
  %kernel = f32[64,64]{1,0} fusion(%i, %same), kind=kLoop, calls=%cut
  ROOT %product = f32[64]{0} dot(%row, %kernel), lhs_contracting_dims={0}, rhs_contracting_dims={0}
}

%second (old: f32[], added: f32[]) -> f32[] {
  %old = f32[] parameter(0)
  ROOT %added = f32[] parameter(1)
}

%put (pool: f32[1000], where: s32[1], new: f32[8]) -> f32[1000] {
  %pool = f32[1000]{0} parameter(0)
  %where = s32[1]{0} parameter(1)
  %new = f32[8]{0} parameter(2)
  ROOT %scattered = f32[1000]{0} scatter(%pool, %where, %new), to_apply=%second
}

ENTRY %main (index: s32[], kernels: f32[5,64,64], x: f32[64], pool: f32[1000]) -> f32[1000] {
  %index = s32[]{:S(2)} parameter(0)
  %kernels = f32[5,64,64]{2,1,0} parameter(1)
  %x = f32[64]{0} parameter(2)
  %pool.1 = f32[1000]{0} parameter(3)
  %at = s32[1]{0} parameter(4)
  %new.1 = f32[8]{0} parameter(5)
  %y = f32[64]{0} fusion(%index, %kernels, %x), kind=kOutput, calls=%times
  ROOT %after = f32[1000]{0} fusion(%pool.1, %at, %new.1), kind=kCustom, calls=%put
}
"""
