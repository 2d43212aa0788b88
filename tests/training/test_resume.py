"""A run that was killed or stopped ends as an unbroken one: parameters, metrics, data order."""

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

from huatuo_jax import sharding
from huatuo_jax.checkpoint.store import CheckpointStore
from huatuo_jax.training.loop import LoopConfig, train
from huatuo_jax.training.metrics import is_time_field, read_rows
from huatuo_jax.training.preemption import INTERRUPTED_EXIT_CODE
from tests.training.tiny import arrays_of, run_tiny, tiny_job

ROOT = pathlib.Path(__file__).parents[2]
NUM_STEPS = 44


def _start(workdir, *, seconds_each=0.02):
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.run_tiny", str(workdir), str(seconds_each)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish(workdir):
    process = _start(workdir, seconds_each=0.0)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def _result(workdir):
    """Everything that must be equal: the last checkpoint's arrays and the metrics but for time."""
    checkpoints = workdir / "sft" / "checkpoints"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.restore(checkpoints / str(NUM_STEPS) / "state")
    arrays = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    rows = [
        {name: value for name, value in row.items() if not is_time_field(name)}
        for row in read_rows(workdir / "sft" / "metrics.jsonl")
    ]
    return arrays, rows


def _assert_identical(found, expected):
    arrays, rows = found
    expected_arrays, expected_rows = expected
    assert rows == expected_rows
    assert arrays.keys() == expected_arrays.keys()
    for path, array in expected_arrays.items():
        assert array.tobytes() == arrays[path].tobytes(), path


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    _finish(workdir)
    arrays, rows = _result(workdir)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, NUM_STEPS + 1))
    assert [row["step"] for row in rows if "eval/loss" in row] == [
        *range(5, NUM_STEPS, 5),
        NUM_STEPS,
    ]
    assert int(arrays["['step']"]) == NUM_STEPS
    return arrays, rows


def _wait_for(condition, process, *, seconds=240):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until, "the run did not come to that point"
        time.sleep(0.002)


def _num_rows(workdir):
    path = workdir / "sft" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def _kill_at_random_moments(workdir, moments, *, seed):
    """Kills the run so often, each time within two of its saves after it made a new one."""
    draw = random.Random(seed)
    checkpoints = workdir / "sft" / "checkpoints"
    for _ in range(moments):
        before = _newest(checkpoints) or 0
        assert before < NUM_STEPS - 4, "the run is nearly over: give each batch more time"
        process = _start(workdir, seconds_each=0.06)
        _wait_for(lambda before=before: (_newest(checkpoints) or 0) > before, process)
        time.sleep(draw.uniform(0.0, 0.25))
        process.kill()
        process.wait()
        process.stdout.close()


def _newest(checkpoints):
    if not checkpoints.is_dir():
        return None
    return max(
        (int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()), default=None
    )


def test_a_run_killed_at_random_moments_ends_as_an_unbroken_one(unbroken, tmp_path):
    _kill_at_random_moments(tmp_path, 2, seed=1)
    assert "goes on from the checkpoint" in _finish(tmp_path)
    _assert_identical(_result(tmp_path), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_a_run_killed_at_ten_random_moments_ends_as_an_unbroken_one(unbroken, tmp_path, seed):
    """Five moments in a run, as each has to move on; two runs."""
    _kill_at_random_moments(tmp_path, 5, seed=seed)
    _finish(tmp_path)
    _assert_identical(_result(tmp_path), unbroken)


def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(unbroken, tmp_path):
    process = _start(tmp_path)
    checkpoints = tmp_path / "sft" / "checkpoints"

    def saving():
        return any(
            "tmp" in path.name and path.name.startswith("8")
            for path in (checkpoints.iterdir() if checkpoints.is_dir() else ())
        )

    _wait_for(saving, process)
    process.kill()
    process.wait()
    process.stdout.close()
    if _newest(checkpoints) == 4:  # The save may have been over before the kill came.
        assert "goes on from the checkpoint of step 4" in _finish(tmp_path)
    else:
        _finish(tmp_path)
    _assert_identical(_result(tmp_path), unbroken)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_run_that_is_told_to_stop_saves_and_goes_on_later(unbroken, tmp_path, number):
    process = _start(tmp_path, seconds_each=0.1)
    _wait_for(lambda: _num_rows(tmp_path) >= 2, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED_EXIT_CODE, output
    assert "run the same command again to go on" in output
    stopped_at = _newest(tmp_path / "sft" / "checkpoints")
    assert 2 <= stopped_at < NUM_STEPS
    assert f"checkpoint of step {stopped_at}" in _finish(tmp_path)
    _assert_identical(_result(tmp_path), unbroken)


class _Stop(Exception):
    pass


@pytest.mark.slow
def test_a_run_that_goes_on_on_another_mesh_agrees_to_rounding(tmp_path):
    loop = LoopConfig(evaluate_every=4, checkpoint_every=3, tensorboard=False)
    first = sharding.make_mesh(data=1, fsdp=2, tensor=1, devices=jax.devices()[:2])
    second = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.default_matmul_precision("highest"):
        expected = run_tiny(tmp_path / "unbroken", mesh=first, loop=loop, num_steps=9)

        job = tiny_job(tmp_path / "moved", mesh=first, num_steps=9)
        batches = job.batches
        original = type(batches).__next__

        def next_or_stop(self):
            if self is batches and self.get_state()["next"] == 6:
                raise _Stop
            return original(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(batches), "__next__", next_or_stop)
            with pytest.raises(_Stop):
                train(job, loop)
        with CheckpointStore(job.directory.checkpoints, read_only=True) as store:
            assert store.latest_step() == 6
        state, _ = train(tiny_job(tmp_path / "moved", mesh=second, num_steps=9), loop)
    found = arrays_of(state)
    for path, array in expected.items():
        if path.startswith("trained/"):
            difference = np.linalg.norm(found[path] - array)
            assert difference <= 1e-5 * np.linalg.norm(array), path
