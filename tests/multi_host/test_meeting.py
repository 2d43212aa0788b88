"""Three processes that join: they meet, or those that are missing or failed are named."""

import signal
import socket

import pytest

from tests.multi_host.processes import Processes

HOST = socket.gethostname()


def run(folder, what, *, timeout_s):
    (folder / "shared").mkdir()
    with Processes(
        folder / "logs", "run_barrier.py", (what, folder / "shared"), count=3, timeout_s=timeout_s
    ) as processes:
        if what == "late":  # The late one sleeps until it hears that the others have failed.
            processes.wait_until(lambda: "did not come" in processes.log(0) + processes.log(1))
        return processes.wait(), [processes.log(index) for index in range(3)]


def test_processes_meet_and_part(tmp_path):
    codes, logs = run(tmp_path, "together", timeout_s=60)
    assert codes == [0, 0, 0], logs
    assert [log.count("first") for log in logs] == [1, 0, 0]
    assert [log.count("found") for log in logs] == [0, 1, 1]
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["meal"]


@pytest.mark.slow
def test_a_barrier_names_the_missing_process(tmp_path):
    codes, logs = run(tmp_path, "late", timeout_s=5)
    line = f"process 2 (host {HOST}) did not come to 'lunch' within 5 s"
    assert any(log.startswith(f"error: {line}\n") for log in logs)
    assert all(line in log and len(log.splitlines()) == 1 for log in logs), logs
    assert codes[2] == 75 and all(code in (1, 75) for code in codes)


@pytest.mark.slow
def test_a_process_that_is_lost_right_before_a_barrier_ends_a_run_that_can_go_on(tmp_path):
    codes, logs = run(tmp_path, "lost", timeout_s=5)
    assert codes == [75, 75, -signal.SIGKILL], logs
    line = f"error: process 2 (host {HOST}) not heard of for 5 s; "
    assert all(logs[index].startswith(line) for index in (0, 1)), logs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "own", "told"),
    [
        ("failing", "error: the disk of this host is full", "the disk of this host is full"),
        ("broken", "RuntimeError: a bug", "a bug"),
    ],
)
def test_a_process_that_fails_ends_the_others_with_its_error(tmp_path, what, own, told):
    codes, logs = run(tmp_path, what, timeout_s=60)
    assert codes == [75, 75, 1], logs
    assert own in logs[2]
    for index in (0, 1):
        assert logs[index].startswith(f"error: process 2 (host {HOST}) has failed: {told}; ")
        assert len(logs[index].splitlines()) == 1


@pytest.mark.slow
def test_settings_that_differ_are_refused_by_all(tmp_path):
    codes, logs = run(tmp_path, "differing", timeout_s=60)
    line = f"the recipe differs between process 0 (host {HOST}) and process 2 (host {HOST})"
    assert all(code in (1, 75) for code in codes) and 1 in codes
    assert all(line in log and len(log.splitlines()) == 1 for log in logs), logs


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_refused_by_all(tmp_path):
    codes, logs = run(tmp_path, "apart", timeout_s=8)
    assert all(code in (1, 75) for code in codes) and 1 in codes
    line = f"is not shared: process 2 (host {HOST}) does not see"
    assert all(line in log and len(log.splitlines()) == 1 for log in logs), logs
