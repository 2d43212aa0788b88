"""The stages on comparisons, by several processes: the losses, and the files, of one process."""

import json

import pytest

from huatuo_jax.checkpoint.models import find_model
from tests.multi_host import metrics
from tests.multi_host.processes import Processes
from tests.multi_host.run_comparisons import NUM_STEPS
from tests.preferences.tiny import comparisons
from tests.tiny import write_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "comparisons.jsonl", comparisons(40))


def run(file, folder, *, count, **mesh):
    """The folder of a run of both stages."""
    arguments = (folder / "run", file, *(f"{axis}={size}" for axis, size in mesh.items()))
    with Processes(folder / "logs", "run_comparisons.py", arguments, count=count) as processes:
        codes = processes.wait()
        assert codes == [0] * count, [processes.log(index) for index in range(count)]
        assert ": step" in processes.log(0)
        assert not any("reward:" in processes.log(index) for index in range(1, count))
    return folder / "run"


@pytest.fixture(scope="module")
def by_one(file, tmp_path_factory):
    return run(file, tmp_path_factory.mktemp("one"), count=1)


# The second mesh spans both processes with its tensor axis: they hold the same rows.
@pytest.mark.parametrize("mesh", [{}, {"tensor": 2}])
def test_two_processes_learn_comparisons_as_one_does(file, by_one, tmp_path, mesh):
    by_two = run(file, tmp_path, count=2, **mesh)
    for stage, head in (("reward", "score"), ("dpo", "lm")):
        one, two = by_one / stage, by_two / stage
        metrics.assert_same(two / "metrics.jsonl", one / "metrics.jsonl", at_least=5 * NUM_STEPS)
        expected, found = (json.loads((run / "finished.json").read_text()) for run in (one, two))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            same = value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-6)
            assert found[name] == same, name
        assert find_model(two / "model").head == head
    assert (by_two / "reward" / "reward_report.json").is_file()
    assert (by_two / "reward" / "model" / "reward_normalization.json").is_file()
