"""PPO by several processes: the answers and the numbers of one, and stops that lose nothing."""

import json
import signal
import socket

import pytest

from tests.multi_host import metrics
from tests.multi_host.processes import Processes
from tests.multi_host.run_ppo import NUM_ANSWERS, NUM_ITERATIONS

pytestmark = pytest.mark.slow


def start(folder, *, count, seconds_each=0.0, devices=1, timeout_s=120, attempt=0, **mesh):
    arguments = (folder / "run", seconds_each, *(f"{axis}={n}" for axis, n in mesh.items()))
    return Processes(
        folder / f"logs-{attempt}",
        "run_ppo.py",
        arguments,
        count=count,
        devices=devices,
        timeout_s=timeout_s,
    )


def finish(folder, **options):
    """What each process said of a run that it brought to its end."""
    with start(folder, **options) as processes:
        codes = processes.wait()
        logs = [processes.log(index) for index in range(len(codes))]
    assert codes == [0] * len(codes), logs
    return logs


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    finish(folder, count=1)
    return folder


def samples(folder):
    lines = (folder / "run" / "ppo" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == NUM_ITERATIONS * NUM_ANSWERS
    return [json.loads(line) for line in lines]


def assert_same_run(folder, expected):
    found, others = (one / "run" / "ppo" / "metrics.jsonl" for one in (folder, expected))
    metrics.assert_same(found, others, at_least=20 * NUM_ITERATIONS)
    for one, two in zip(samples(folder), samples(expected), strict=True):
        for field, value in two.items():
            same = pytest.approx(value, rel=1e-5, abs=1e-6) if _is_computed(value) else value
            assert one[field] == same, (one["step"], field)


def _is_computed(value):
    return isinstance(value, float)


@pytest.mark.parametrize(
    ("count", "devices", "mesh"), [(2, 1, {}), (2, 1, {"tensor": 2}), (4, 1, {"data": 2})]
)
def test_several_processes_sample_and_train_as_one_does(by_one, tmp_path, count, devices, mesh):
    logs = finish(tmp_path, count=count, devices=devices, **mesh)
    assert_same_run(tmp_path, by_one)
    assert f"step {NUM_ITERATIONS}/{NUM_ITERATIONS}" in logs[0]
    assert not any("ppo:" in log for log in logs[1:])


@pytest.mark.parametrize(
    ("devices", "rollout"),
    [
        (1, {"rollout_fsdp": 1, "rollout_tensor": 2}),
        (2, {"rollout_data": 2, "rollout_fsdp": 1, "rollout_tensor": 2}),
        (2, {"rollout_tensor": 2}),
    ],
)
def test_weights_move_between_processes_to_the_mesh_of_generation(
    by_one, tmp_path, devices, rollout
):
    finish(tmp_path, count=2, devices=devices, **rollout)
    assert_same_run(tmp_path, by_one)


def test_sigterm_to_one_of_two_stops_both_at_one_iteration_and_one_goes_on(by_one, tmp_path):
    with start(tmp_path, count=2, seconds_each=2.0) as processes:
        processes.wait_until(lambda: "step 2/" in processes.log(0))
        processes.send(1, signal.SIGTERM)
        codes = processes.wait()
        said = [processes.log(index) for index in range(2)]
    assert codes == [75, 75], said
    step = int(said[1].splitlines()[-1].split()[3])
    assert 2 <= step < NUM_ITERATIONS and said[0].splitlines()[-1] == said[1].splitlines()[-1]
    logs = finish(tmp_path, count=1, attempt=1)
    assert f"resumes from the checkpoint of iteration {step}" in logs[0]
    assert_same_run(tmp_path, by_one)


def test_a_killed_process_is_named_and_two_others_go_on(by_one, tmp_path):
    with start(tmp_path, count=2, seconds_each=1.0, timeout_s=60) as processes:
        processes.wait_until(lambda: "step 3/" in processes.log(0))
        processes.kill(1)
        assert processes.wait() == [75, -signal.SIGKILL], processes.log(0)
        last = processes.log(0).splitlines()[-1]
    assert f"process 1 (host {socket.gethostname()}) not heard of for 60 s" in last
    assert "resumes from the checkpoint" in finish(tmp_path, count=2, attempt=1)[0]
    assert_same_run(tmp_path, by_one)
