"""A run of PPO that was killed or stopped ends bit for bit as an unbroken one."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from huatuo_jax.training.metrics import is_time_field, read_rows
from huatuo_jax.training.preemption import INTERRUPTED_EXIT_CODE
from tests.ppo.tiny import NUM_ITERATIONS

ROOT = pathlib.Path(__file__).parents[2]


def _start(workdir, *, seconds_each):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.ppo.run_tiny", str(workdir), str(seconds_each)],
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish(workdir):
    process = _start(workdir, seconds_each=0.0)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


def _checkpoints(workdir):
    return workdir / "ppo" / "checkpoints"


def _newest(workdir):
    folder = _checkpoints(workdir)
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    return max(steps, default=0)


def _result(workdir):
    """All that must be equal: the last checkpoint's arrays, metrics but for time, samples."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.restore(_checkpoints(workdir) / str(NUM_ITERATIONS) / "state")
    arrays = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    rows = [
        {name: value for name, value in row.items() if not is_time_field(name)}
        for row in read_rows(workdir / "ppo" / "metrics.jsonl")
    ]
    samples = (workdir / "ppo" / "samples.jsonl").read_text(encoding="utf-8")
    return arrays, rows, samples


def _assert_identical(found, expected):
    arrays, rows, samples = found
    expected_arrays, expected_rows, expected_samples = expected
    assert rows == expected_rows
    assert samples == expected_samples
    assert arrays.keys() == expected_arrays.keys()
    for path, array in expected_arrays.items():
        assert array.tobytes() == arrays[path].tobytes(), path


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    _finish(workdir)
    return _result(workdir)


def test_a_checkpoint_holds_all_that_moves(unbroken):
    arrays, rows, samples = unbroken
    assert [row["step"] for row in rows] == list(range(1, NUM_ITERATIONS + 1))
    assert len(samples.splitlines()) == 2 * NUM_ITERATIONS
    assert json.loads(samples.splitlines()[-1])["step"] == NUM_ITERATIONS
    assert int(arrays["['iteration']"]) == NUM_ITERATIONS
    assert int(arrays["['next_prompt']"]) == 8 * NUM_ITERATIONS
    assert int(arrays["['scores']['count']"]) == 8 * NUM_ITERATIONS
    assert float(arrays["['kl_coef']"]) != np.float32(0.1)
    for role in ("policy", "value"):
        moments = [
            array for path, array in arrays.items() if path.startswith(f"['{role}']['opt_state']")
        ]
        assert any(np.any(array) for array in moments if array.ndim)
    values = [path for path in arrays if path.startswith("['value']") and "score_head" in path]
    assert values
    assert len({row["ppo/kl_coef"] for row in rows}) > 3


def _wait_for(condition, process, *, seconds=600):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until, "the run did not come to that point"
        time.sleep(0.005)


def _kill_at_random_moments(workdir, moments, *, seed):
    """Kills the run so often, each time within some iterations after it made a new checkpoint."""
    draw = random.Random(seed)
    for _ in range(moments):
        before = _newest(workdir) if _checkpoints(workdir).is_dir() else 0
        assert before <= NUM_ITERATIONS - 6, "the run is nearly over: give it more time"
        process = _start(workdir, seconds_each=0.1)

        def moved(before=before):
            return _checkpoints(workdir).is_dir() and _newest(workdir) > before

        _wait_for(moved, process)
        time.sleep(draw.uniform(0.0, 0.3))
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_an_unbroken_one(unbroken, tmp_path):
    _kill_at_random_moments(tmp_path, 3, seed=1)
    assert _newest(tmp_path) < NUM_ITERATIONS
    assert "goes on from the checkpoint of iteration" in _finish(tmp_path)
    _assert_identical(_result(tmp_path), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_a_run_killed_at_ten_random_moments_ends_as_an_unbroken_one(unbroken, tmp_path, seed):
    """Five moments in a run, as each has to move on; two runs."""
    _kill_at_random_moments(tmp_path, 5, seed=seed)
    _finish(tmp_path)
    _assert_identical(_result(tmp_path), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_saves_and_goes_on_later(unbroken, tmp_path, number):
    process = _start(tmp_path, seconds_each=0.2)
    metrics = tmp_path / "ppo" / "samples.jsonl"
    _wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == INTERRUPTED_EXIT_CODE, output
    assert "run the same command again to go on" in output
    stopped_at = _newest(tmp_path)
    assert 1 <= stopped_at < NUM_ITERATIONS
    assert f"checkpoint of iteration {stopped_at}" in _finish(tmp_path)
    _assert_identical(_result(tmp_path), unbroken)
