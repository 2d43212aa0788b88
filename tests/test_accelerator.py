"""The benchmark of accelerators does its work on any device, at the smallest size."""

import json
import math
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def benchmark(*flags):
    return subprocess.run(
        [sys.executable, "benchmarks/accelerator.py", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_every_part_is_measured_and_written(tmp_path):
    sizes = "--length=256 --rows=4 --rows_at_once=2 --slots=4 --repeats=2".split()
    done = benchmark("--sizes=tiny", *sizes, f"--output={tmp_path / 'found.json'}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["versions"]["jax"] and found["date"]
    trained, decoded = found["sft/tiny"], found["decode/tiny"]
    assert abs(trained["loss"] - math.log(512)) < 0.1  # Of random tokens, none of which it knows.
    assert trained["tokens_per_s"] * trained["seconds_a_step"] == pytest.approx(4 * 256)
    # A step's weights (but for the table) in 16 bits, and 4 answers' keys and values of 2 layers
    # with 2 heads of 8; the first round of 8 tokens is that of the prompts.
    weights = 2 * (2 * (2 * 32 + 32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 64) + 32 + 32 * 512)
    positions = 4 * (128 + 127 - (127 - 8) / 2)
    assert decoded["bytes_a_step"] == pytest.approx(weights + positions * (2 * 2 * 2 * 8 * 2 + 4))
    attention = found["attention/tiny"]
    assert max(attention["own_largest_difference"]) < 0.01


def test_an_unknown_part_is_named():
    done = benchmark("--parts=dpo")
    assert done.returncode != 0 and "dpo/1b" in done.stdout + done.stderr
