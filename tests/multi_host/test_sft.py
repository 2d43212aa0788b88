"""Fine-tuning by several processes: the losses of one, and kills and stops that lose nothing."""

import json
import signal
import socket

import numpy as np
import pytest

from tests.multi_host import metrics
from tests.multi_host.processes import Processes

HOST = socket.gethostname()
NUM_STEPS = 8


class Runs:
    """Runs of the same settings in folders of their own, on one token cache."""

    def __init__(self, folder):
        self.folder = folder

    def start(self, name, *, count, devices=1, seconds_each=0.0, timeout_s=120, attempt=0, **mesh):
        workdir = self.folder / name
        fields = [f"{field}={value}" for field, value in {"num_steps": NUM_STEPS, **mesh}.items()]
        cache, rows = self.folder / "cache", self.folder / f"{name}-rows-{attempt}"
        return Processes(
            self.folder / f"{name}-logs-{attempt}",
            "run_sft.py",
            (workdir, cache, rows, seconds_each, *fields),
            count=count,
            devices=devices,
            timeout_s=timeout_s,
        )

    def finish(self, name, **options):
        with self.start(name, **options) as processes:
            codes = processes.wait()
            assert codes == [0] * len(codes), [processes.log(i) for i in range(len(codes))]
            return [processes.log(index) for index in range(len(codes))]

    def checkpoints(self, name):
        folder = self.folder / name / "sft" / "checkpoints"
        return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())

    def rows(self, name, process, step, attempt=0):
        return np.load(self.folder / f"{name}-rows-{attempt}" / f"{process}-{step}.npy")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("runs"))
    made.finish("one", count=1)
    return made


def assert_same_losses(runs, name, other="one"):
    one, two = (runs.folder / run / "sft" / "metrics.jsonl" for run in (name, other))
    metrics.assert_same(one, two, at_least=5 * NUM_STEPS)


def assert_shards_are_disjoint_and_complete(runs, name, shares):
    """`shares` has the processes that hold each share of the rows."""
    for step in range(1, NUM_STEPS + 1):
        parts = []
        for holders in shares:
            held = [runs.rows(name, process, step) for process in holders]
            for copy in held[1:]:
                np.testing.assert_array_equal(copy, held[0])
            parts.append(held[0])
        np.testing.assert_array_equal(np.concatenate(parts), runs.rows("one", 0, step))


@pytest.mark.slow
def test_two_processes_train_as_one_does(runs):
    logs = runs.finish("two", count=2)
    assert_same_losses(runs, "two")
    assert_shards_are_disjoint_and_complete(runs, "two", [[0], [1]])
    assert f"step {NUM_STEPS}/{NUM_STEPS}" in logs[0]
    assert "step" not in logs[1] and "error" not in logs[1]
    assert json.loads((runs.folder / "two/sft/finished.json").read_text())["step"] == NUM_STEPS
    assert (runs.folder / "two/sft/model/backbone.json").is_file()
    # Found finished, by any number of processes.
    before = (runs.folder / "two/sft/metrics.jsonl").read_bytes()
    runs.finish("two", count=1, attempt=1)
    assert (runs.folder / "two/sft/metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "devices", "mesh", "shares"),
    [
        ("four", 4, 2, {}, [[0], [1], [2], [3]]),
        ("replicas", 2, 2, {"data": 2}, [[0], [1]]),
        # The tensor axis spans both processes: they hold the same rows.
        ("tensor", 2, 1, {"tensor": 2}, [[0, 1]]),
    ],
)
def test_other_meshes_train_as_one_process_does(runs, name, count, devices, mesh, shares):
    runs.finish(name, count=count, devices=devices, **mesh)
    assert_same_losses(runs, name)
    assert_shards_are_disjoint_and_complete(runs, name, shares)


@pytest.mark.slow
def test_sigterm_to_one_of_four_stops_all_at_one_step_and_two_go_on(runs):
    with runs.start("stopped", count=4, seconds_each=1.0) as processes:
        processes.wait_until(lambda: "step 1/" in processes.log(0))
        processes.send(2, signal.SIGTERM)
        assert processes.wait() == [75] * 4, [processes.log(index) for index in range(4)]
        said = {processes.log(index).splitlines()[-1] for index in range(4)}
    assert len(said) == 1
    step = int(said.pop().split()[3])
    assert 1 <= step < NUM_STEPS
    assert runs.checkpoints("stopped")[-1] == step
    logs = runs.finish("stopped", count=2, attempt=1)
    assert f"resumes from the checkpoint of step {step}" in logs[0]
    assert_same_losses(runs, "stopped")


@pytest.mark.slow
def test_a_killed_process_is_named_by_the_others_and_the_run_goes_on(runs):
    with runs.start("killed", count=2, seconds_each=1.0, timeout_s=60) as processes:
        processes.wait_until(lambda: "step 5/" in processes.log(0))
        processes.kill(1)
        assert processes.wait() == [75, -signal.SIGKILL], processes.log(0)
        last = processes.log(0).splitlines()[-1]
    assert last.startswith(f"error: process 1 (host {HOST}) not heard of for 60 s; process 0 stops")
    logs = runs.finish("killed", count=2, attempt=1)
    assert "resumes from the checkpoint of step 4" in logs[0]
    assert_same_losses(runs, "killed")


@pytest.mark.slow
def test_without_process_0_jax_itself_ends_the_others_and_the_run_goes_on(runs):
    with runs.start("headless", count=2, seconds_each=1.0, timeout_s=60) as processes:
        processes.wait_until(lambda: "step 5/" in processes.log(0))
        processes.kill(0)
        codes = processes.wait()
        assert codes[0] == -signal.SIGKILL and codes[1] != 0
        assert "coordination service" in processes.log(1)
    runs.finish("headless", count=2, attempt=1)
    assert_same_losses(runs, "headless")
