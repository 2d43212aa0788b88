"""One process writes the clinic of a run; the others wait, and find it whole."""

import pytest

from tests.multi_host.processes import Processes


@pytest.mark.slow
def test_the_first_process_writes_the_clinic_and_the_others_find_it(tmp_path):
    arguments = (tmp_path / "run",)
    with Processes(tmp_path / "logs", "run_clinic.py", arguments, count=2) as processes:
        codes = processes.wait()
        logs = [processes.log(index) for index in range(2)]
    assert codes == [0, 0], logs
    assert all("found 15 of 15" in log for log in logs), logs
