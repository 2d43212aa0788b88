"""A run that was killed or stopped ends as an unbroken one: parameters, metrics, data order."""

import re
import signal

import jax
import numpy as np
import pytest

from huatuo_jax.checkpoint.orbax_files import COMMITTED
from huatuo_jax.checkpoint.store import CheckpointStore, saved_steps
from huatuo_jax.core import sharding
from huatuo_jax.core.files import as_path
from huatuo_jax.training.loop import LoopConfig, train
from huatuo_jax.training.metrics import is_time_field, read_rows
from tests.killing import Stage, assert_identical, kill, wait_for
from tests.training.tiny import arrays_of, run_tiny, tiny_job

NUM_STEPS = 44
SFT = Stage(module="tests.training.run_tiny", name="sft", num_steps=NUM_STEPS)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    SFT.finish(workdir)
    arrays, rows, texts = SFT.result(workdir)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, NUM_STEPS + 1))
    assert [row["step"] for row in rows if "eval/loss" in row] == [
        *range(5, NUM_STEPS, 5),
        NUM_STEPS,
    ]
    assert int(arrays["['step']"]) == NUM_STEPS
    return arrays, rows, texts


def _num_rows(workdir):
    path = workdir / "sft" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def _kill(workdir, moments, *, seed, seconds_each=0.06):
    SFT.kill_at_random_moments(
        workdir, moments, seed=seed, seconds_each=seconds_each, within=0.25, spare=5
    )


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_an_unbroken_one(unbroken, tmp_path):
    _kill(tmp_path, 2, seed=1)
    assert "resumes from the checkpoint" in SFT.finish(tmp_path)
    assert_identical(SFT.result(tmp_path), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_a_run_killed_at_ten_random_moments_ends_as_an_unbroken_one(unbroken, tmp_path, seed):
    """Five moments in a run, as each has to move on; two runs."""
    _kill(tmp_path, 5, seed=seed)
    SFT.finish(tmp_path)
    assert_identical(SFT.result(tmp_path), unbroken)


def test_a_run_in_a_bucket_resumes_there_and_ends_as_on_a_disk(bucket, tmp_path):
    place = as_path("gs://bucket/runs/tiny")
    loop = LoopConfig(evaluate_every=2, checkpoint_every=2, keep_checkpoints=2)
    expected = run_tiny(tmp_path, num_steps=6, loop=loop)
    with pytest.raises(ZeroDivisionError):
        run_tiny(place, num_steps=6, loop=loop, failing_at=3)
    found = run_tiny(place, num_steps=6, loop=loop)
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == array.tobytes() for name, array in expected.items())
    assert saved_steps(place / "sft" / "checkpoints") == [4, 6]
    assert _rows(place) == _rows(tmp_path) != []
    assert any("tfevents" in name for name in bucket.files("bucket"))


def _rows(workdir):
    return [
        {name: value for name, value in row.items() if not is_time_field(name)}
        for row in read_rows(workdir / "sft" / "metrics.jsonl")
    ]


@pytest.mark.slow
def test_a_run_in_a_bucket_killed_at_random_moments_ends_as_on_a_disk(
    unbroken, bucket, monkeypatch
):
    """The server answers 503 to one request in five."""
    bucket.failing = 0.2
    place = as_path("gs://bucket/run")
    marker = re.compile(rf"run/sft/checkpoints/(\d+)/{COMMITTED}")

    def newest(*_):
        """Asks the server itself: a request might fail, or come late."""
        found = map(marker.fullmatch, bucket.files("bucket"))
        return max((int(one[1]) for one in found if one), default=0)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "newest", newest)
        _kill(place, 5, seed=4, seconds_each=0.15)
    assert "resumes from the checkpoint" in SFT.finish(place)
    assert bucket.failures > 100
    bucket.failing = 0.0
    assert_identical(SFT.result(place), unbroken)


@pytest.mark.slow
def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(unbroken, tmp_path):
    process = SFT.start(tmp_path, seconds_each=0.02)
    checkpoints = SFT.checkpoints(tmp_path)

    def saving():
        return any(
            "tmp" in path.name and path.name.startswith("8")
            for path in (checkpoints.iterdir() if checkpoints.is_dir() else ())
        )

    wait_for(saving, process)
    kill(process)
    if SFT.newest(tmp_path) == 4:  # The save may have been over before the kill came.
        assert "resumes from the checkpoint of step 4" in SFT.finish(tmp_path)
    else:
        SFT.finish(tmp_path)
    assert_identical(SFT.result(tmp_path), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_saves_and_goes_on_later(unbroken, tmp_path, number):
    stopped_at = SFT.stop(tmp_path, number, seconds_each=0.1, when=lambda: _num_rows(tmp_path) >= 2)
    assert 2 <= stopped_at < NUM_STEPS
    assert f"checkpoint of step {stopped_at}" in SFT.finish(tmp_path)
    assert_identical(SFT.result(tmp_path), unbroken)


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
