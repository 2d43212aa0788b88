"""A small model compiled for GPUs by the command, on a machine without one."""

import importlib.util
import json

import pytest

from tests.compiling.small import BACKBONE, compile_small, figures_of, matmul_flops_per_token

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="needs jax's CUDA plugin (huatuo_jax[cuda]); no GPU",
    ),
]

ROWS, LENGTH, DEVICES = 32, 512, 8


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    return figures_of(f"h100:{DEVICES}", tmp_path_factory.mktemp("compiled") / "figures.json")


def test_attention_is_cudnns(figures):
    (program,) = figures["programs"]
    assert program["attention_kernel"] == "cudnn (3 kernels)"
    assert program["splash_calls"] == []
    assert figures["versions"].keys() >= {"jax-cuda13-plugin", "nvidia-cudnn-cu13"}


def test_matrix_products_are_those_of_forward_recomputation_and_backward(figures):
    cfg = BACKBONE
    flops = figures["programs"][0]["flops"]
    assert flops["compiled_matmul_per_device"] == matmul_flops_per_token() * ROWS * LENGTH / DEVICES
    pairs = ROWS * LENGTH * (LENGTH + 1) / 2
    formula = 12 * cfg.num_layers * cfg.num_heads * cfg.head_dim * pairs / DEVICES
    # Two products forward, which runs twice, and five backward, where the formula counts six.
    assert flops["compiled_attention_per_device"] == formula * (2 + 2 + 5) / 6


def test_the_state_is_written_in_place_of_the_one_that_is_given(figures):
    memory = figures["programs"][0]["memory_bytes_per_device"]
    assert memory["outputs"] < 0.001 * memory["arguments"]


def test_what_is_too_large_ends_with_its_buffers_advice_and_code_1():
    found = compile_small(
        "--topology=h200:1",
        "--config.sft.batch_size=8192",
        "--config.sft.micro_batch_size=8192",
        "--config.sft.compute.remat=none",
    )
    assert found.returncode == 1, found.stderr
    assert "does NOT fit" in found.stdout and "largest values" in found.stdout
    assert "config.sft.compute.remat='full'" in found.stdout


def test_two_hosts_send_through_their_network(figures, tmp_path):
    path = tmp_path / "figures.json"
    found = compile_small(f"--topology=h100:{DEVICES // 2}", "--num_slices=2", f"--output={path}")
    assert found.returncode == 0, found.stderr
    one_host, two_hosts = (
        one["programs"][0]["roofline"]["interconnect_s"]
        for one in (figures, json.loads(path.read_text()))
    )
    assert two_hosts > 1.5 * one_host


def test_a_gpu_of_24_gb_has_cudnns_attention_too(tmp_path):
    found = figures_of("l4:1", tmp_path / "figures.json")
    (program,) = found["programs"]
    assert program["attention_kernel"].startswith("cudnn") and program["fits"]
