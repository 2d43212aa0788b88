"""GPUs that are not there: what is refused, what their programs are counted as, what they send."""

import importlib.util
import types

import numpy as np
import pytest

from huatuo_jax.compiling import hardware, hlo
from huatuo_jax.compiling.costs import costs_of, cudnn_calls, seconds_of, splash_calls
from huatuo_jax.compiling.hardware import GPUS, Slice
from huatuo_jax.compiling.hlo import Collective
from huatuo_jax.training.metrics import PEAK_FLOPS


def gathered(group, num_hosts=1):
    """Seconds for a GiB among GPUs of hosts of four."""
    devices = np.empty(4 * num_hosts, object)
    devices[:] = [
        types.SimpleNamespace(slice_index=0, process_index=host)
        for host in range(num_hosts)
        for _ in range(4)
    ]
    of = Slice("h100:4", GPUS["h100"], (4,), num_hosts, list(devices))
    one = Collective(
        kind="all-gather",
        axes=("fsdp",),
        group=tuple(group),
        runs=1,
        payload=1 << 30,
        op_name="",
        in_layer_loop=True,
        dims=(1 << 30,),
    )
    return seconds_of(one, of, types.SimpleNamespace(devices=devices))


@pytest.mark.parametrize("name", ["h100", "h100:2x4", "h300:8", "h200:0"])
def test_an_unknown_number_of_gpus_lists_the_known_topologies(name):
    with pytest.raises(ValueError, match=r"v5e:8x8 \(2 axes\).*h100:8 \(GPUs of a host\)") as error:
        hardware.open_slice(name)
    assert name in str(error.value)


def test_more_gpus_than_a_host_has_are_several_hosts():
    with pytest.raises(ValueError, match=r"'h100:16': a host has at most 8.*num_slices"):
        hardware.open_slice("h100:16")


def test_without_the_cuda_plugin_one_line_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'huatuo_jax\[cuda\]'") as error:
        hardware.open_slice("h100:8")
    assert "\n" not in str(error.value)


def test_a_cuda_plugin_that_does_not_start_is_named_in_one_line(monkeypatch):
    def refuse(**_):
        raise NotImplementedError("topology not implemented for cuda\nmore")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.2.3")
    monkeypatch.setattr(hardware.topologies, "get_topology_desc", refuse)
    with pytest.raises(ValueError, match="did not start: topology not implemented for cuda$"):
        hardware.open_slice("h100:8")


def test_the_peak_is_that_of_the_kind_of_device_that_jax_names():
    assert {gpu.peak_flops for gpu in GPUS.values()} == {
        PEAK_FLOPS[gpu.device_kind] for gpu in GPUS.values()
    }


def test_any_gpus_of_a_host_send_at_the_links_rate():
    link = GPUS["h100"].link_bandwidth
    assert gathered(range(4)) == pytest.approx((1 << 30) * 3 / 4 / link)
    assert gathered((0, 3)) == pytest.approx((1 << 30) / 2 / link)


def test_hosts_send_each_gpus_part_through_the_network():
    chip = GPUS["h100"]
    within = (1 << 30) * 3 / 4 / chip.link_bandwidth
    across = (1 << 30) / 4 * (1 / 2) / chip.network_bandwidth
    assert gathered(range(8), num_hosts=2) == pytest.approx(within + across)


def test_products_within_fusions_and_of_cublas_count_as_often_as_loops_turn():
    costs = costs_of(hlo.parse(PRODUCTS))
    fused, gemm, batched = 8 * 16 * 32, 8 * 64 * 16, 3 * 8 * 16 * 5
    assert costs.matmul_flops == 2 * (6 * fused + gemm + batched)
    assert (costs.attention_flops, costs.unknown_loops) == (0, 0)


def test_attention_of_cudnn_counts_its_causal_half():
    module = hlo.parse(ATTENTION)
    assert cudnn_calls(module) == ["backward", "forward"]
    assert splash_calls(module) == []
    # Grouped heads: 4 of queries, 2 of keys and values. Two products forward, five backward.
    one_product = 2 * 2 * 4 * (256 * 257 / 2) * 64
    assert costs_of(module).attention_flops == (2 + 5) * one_product


def test_what_a_started_collective_gives_is_written_and_not_its_operand_again():
    costs = costs_of(hlo.parse(STARTED))
    gather = (2 + 8) * 4 + (4 + 16) * 4
    reduce = 2 * 8 * 4
    assert costs.memory_bytes == gather + reduce


PRODUCTS = """HloModule products

%nested (a: bf16[8,16], b: bf16[16,32]) -> bf16[8,32] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,32]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,32]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%below (s0: (s32[], bf16[8,16], bf16[16,32])) -> pred[] {
  %s0 = (s32[], bf16[8,16]{1,0}, bf16[16,32]{1,0}) parameter(0)
  %i0 = s32[] get-tuple-element(%s0), index=0
  %n0 = s32[] constant(6)
  ROOT %lt0 = pred[] compare(%i0, %n0), direction=LT
}

%turn (s1: (s32[], bf16[8,16], bf16[16,32])) -> (s32[], bf16[8,16], bf16[16,32]) {
  %s1 = (s32[], bf16[8,16]{1,0}, bf16[16,32]{1,0}) parameter(0)
  %i1 = s32[] get-tuple-element(%s1), index=0
  %x1 = bf16[8,16]{1,0} get-tuple-element(%s1), index=1
  %y1 = bf16[16,32]{1,0} get-tuple-element(%s1), index=2
  %product = bf16[8,32]{1,0} fusion(%x1, %y1), kind=kCustom, calls=%nested, backend_config={"x":{}}
  ROOT %t1 = (s32[], bf16[8,16]{1,0}, bf16[16,32]{1,0}) tuple(%i1, %x1, %y1)
}

ENTRY %main (p: (s32[], bf16[8,16], bf16[16,32]), c: bf16[16,8], d: bf16[16,64]) -> bf16[8,64] {
  %p = (s32[], bf16[8,16]{1,0}, bf16[16,32]{1,0}) parameter(0)
  %c = bf16[16,8]{1,0} parameter(1)
  %d = bf16[16,64]{1,0} parameter(2)
  %e = bf16[3,8,16]{2,1,0} parameter(3)
  %f = bf16[3,5,16]{2,1,0} parameter(4)
  %w = (s32[], bf16[8,16]{1,0}, bf16[16,32]{1,0}) while(%p), condition=%below, body=%turn
  %b.1 = (f32[3,8,5]{2,1,0}, s8[64]{0}) custom-call(%e, %f), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],\
"rhs_contracting_dimensions":["2"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  ROOT %g.1 = bf16[8,64]{1,0} custom-call(%c, %d), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config": {"dot_dimension_numbers": {\
"lhs_contracting_dimensions": ["0"], "rhs_contracting_dimensions": ["0"]}}}
}
"""

ATTENTION = """HloModule attention

ENTRY %main (q: bf16[2,256,4,64], k: bf16[2,256,2,64]) -> bf16[2,4,256,64] {
  %q = bf16[2,256,4,64]{3,2,1,0} parameter(0)
  %k = bf16[2,256,2,64]{3,2,1,0} parameter(1)
  %other = bf16[2,256,4,64]{3,2,1,0} custom-call(%q), custom_call_target="__cudnn$norm"
  %forward = (bf16[2,4,256,64]{3,1,2,0}, f32[2,4,256]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), \
custom_call_target="__cudnn$fmhaScaleBiasSoftmax"
  %out = bf16[2,4,256,64]{3,1,2,0} get-tuple-element(%forward), index=0
  %sums = f32[2,4,256]{2,1,0} get-tuple-element(%forward), index=1
  %backward = (bf16[2,4,256,64]{3,1,2,0}, bf16[2,2,256,64]{3,1,2,0}, bf16[2,2,256,64]{3,1,2,0}, \
u8[0]{0}) custom-call(%q, %k, %k, %sums, %out, /*index=5*/%out), \
custom_call_target="__cudnn$fmhaScaleBiasSoftmaxBackward"
  ROOT %dq = bf16[2,4,256,64]{3,1,2,0} get-tuple-element(%backward), index=0
}
"""

STARTED = """HloModule started

ENTRY %main (a: f32[2], b: f32[4], c: f32[8]) -> f32[8] {
  %a = f32[2]{0} parameter(0)
  %b = f32[4]{0} parameter(1)
  %c = f32[8]{0} parameter(2)
  %g = ((f32[2]{0}, f32[4]{0}), (f32[8]{0}, f32[16]{0})) all-gather-start(%a, %b), \
replica_groups={{0,1,2,3}}
  %gathered = (f32[8]{0}, f32[16]{0}) all-gather-done(%g)
  %r = f32[8]{0} all-reduce-start(%c), replica_groups={{0,1,2,3}}
  ROOT %reduced = f32[8]{0} all-reduce-done(%r)
}
"""
