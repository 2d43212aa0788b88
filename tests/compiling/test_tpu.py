"""A small model compiled for a TPU slice by the command, on a machine without one."""

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.compiling.small import (
    BACKBONE,
    ROOT,
    compile_small,
    environment,
    figures_of,
    matmul_flops_per_token,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs libtpu (huatuo_jax[tpu])"
    ),
]

ROWS, LENGTH = 32, 512


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    found = figures_of("v5e:2x2", tmp_path_factory.mktemp("compiled") / "figures.json")
    (program,) = found["programs"]
    return program


def test_attention_is_splash(figures):
    kernels = " ".join(figures["splash_calls"])
    assert all(f"splash_mha_{kind}" in kernels for kind in ("fwd", "dq", "dkv"))


def test_no_parameters_of_all_layers_are_gathered_outside_of_the_layer_loop(figures):
    assert figures["gathers_of_all_layers"] == []


def test_matrix_products_are_those_of_forward_recomputation_and_backward(figures):
    cfg = BACKBONE
    heads = cfg.num_heads + 2 * cfg.num_kv_heads
    qkv = cfg.hidden_size * heads * cfg.head_dim
    output = cfg.num_heads * cfg.head_dim * cfg.hidden_size
    gate_up, down = (n * cfg.hidden_size * cfg.intermediate_size for n in (2, 1))
    tokens = ROWS * LENGTH
    assert figures["flops"]["compiled_matmul_per_device"] == matmul_flops_per_token() * tokens / 4
    model = cfg.num_layers * 6 * (qkv + output + gate_up + down)
    model += 6 * cfg.hidden_size * cfg.vocab_size
    pairs = ROWS * LENGTH * (LENGTH + 1) / 2
    attention = 12 * cfg.num_layers * cfg.num_heads * cfg.head_dim * pairs
    assert figures["flops"]["model_all_devices"] == model * tokens + attention
    # The kernels run 11 products where the formula counts 6: the forward pass has 2 and runs twice,
    # and the backward pass, which counts 4, computes scores twice and their gradient too.
    assert figures["flops"]["compiled_attention_per_device"] == attention / 4 * (2 + 2 + 3 + 4) / 6


def test_arguments_are_weights_and_two_moments(figures):
    cfg = BACKBONE
    heads = 2 * (cfg.num_heads + cfg.num_kv_heads)
    layer = cfg.hidden_size * (heads * cfg.head_dim + 3 * cfg.intermediate_size + 2)
    parameters = cfg.num_layers * layer + cfg.hidden_size * (2 * cfg.vocab_size + 1)
    arguments = figures["memory_bytes_per_device"]["arguments"]
    assert arguments == pytest.approx(3 * 4 * parameters / 4, rel=0.02)


def test_what_is_too_large_ends_with_its_buffers_advice_and_code_1():
    found = compile_small(
        "--topology=v5e:2x2",
        "--config.sft.batch_size=4096",
        "--config.sft.micro_batch_size=4096",
        "--config.sft.compute.remat=none",
    )
    assert found.returncode == 1
    assert "does NOT fit" in found.stdout and "largest arguments" in found.stdout
    assert "config.sft.compute.remat='full'" in found.stdout
    assert "config.sft.micro_batch_size=4" in found.stdout


def test_a_single_chip_is_compiled_for(tmp_path):
    found = figures_of("v5e:1x1", tmp_path / "figures.json")
    assert found["slice"]["devices"] == 1 and found["fits"]


def test_a_decode_step_reads_weights_and_cache_once_and_copies_neither():
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiling.run_decode", "v5e:2x4"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["needed"] < found["moved"] < 1.1 * found["needed"]
