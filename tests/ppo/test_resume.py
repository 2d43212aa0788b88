"""A run of PPO that was killed or stopped ends bit for bit as an unbroken one."""

import json
import signal

import numpy as np
import pytest

from tests.killing import Stage, assert_identical
from tests.ppo.tiny import NUM_ITERATIONS

PPO = Stage(
    module="tests.ppo.run_tiny", name="ppo", num_steps=NUM_ITERATIONS, texts=("samples.jsonl",)
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    PPO.finish(workdir)
    return PPO.result(workdir)


@pytest.mark.slow
def test_a_checkpoint_holds_all_that_moves(unbroken):
    arrays, rows, texts = unbroken
    samples = texts["samples.jsonl"]
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
    assert {row["ppo/stopped_early"] for row in rows} == {0.0, 1.0}
    assert rows[-1]["ppo/policy_updates"] < 4 * (NUM_ITERATIONS - 2)


def _kill(workdir, moments, *, seed):
    PPO.kill_at_random_moments(workdir, moments, seed=seed, seconds_each=0.1, within=0.3, spare=6)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_an_unbroken_one(unbroken, tmp_path):
    _kill(tmp_path, 3, seed=1)
    assert PPO.newest(tmp_path) < NUM_ITERATIONS
    assert "resumes from the checkpoint of iteration" in PPO.finish(tmp_path)
    assert_identical(PPO.result(tmp_path), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_a_run_killed_at_ten_random_moments_ends_as_an_unbroken_one(unbroken, tmp_path, seed):
    """Five moments in a run, as each has to move on; two runs."""
    _kill(tmp_path, 5, seed=seed)
    PPO.finish(tmp_path)
    assert_identical(PPO.result(tmp_path), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_saves_and_goes_on_later(unbroken, tmp_path, number):
    samples = tmp_path / "ppo" / "samples.jsonl"
    stopped_at = PPO.stop(
        tmp_path,
        number,
        seconds_each=0.2,
        when=lambda: samples.exists() and samples.stat().st_size > 0,
    )
    assert 1 <= stopped_at < NUM_ITERATIONS
    assert f"checkpoint of iteration {stopped_at}" in PPO.finish(tmp_path)
    assert_identical(PPO.result(tmp_path), unbroken)
