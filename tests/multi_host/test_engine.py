"""An engine of several processes: each of them is given the answers of one process."""

import json

import pytest

from tests.multi_host.processes import Processes


def answers(folder, *, count, devices=1, **mesh):
    """What each process was given, in order of completion."""
    folder.mkdir()
    arguments = (folder, *(f"{axis}={size}" for axis, size in mesh.items()))
    with Processes(
        folder / "logs", "run_engine.py", arguments, count=count, devices=devices
    ) as processes:
        codes = processes.wait()
        assert codes == [0] * count, [processes.log(index) for index in range(count)]
    return [json.loads((folder / f"{index}.json").read_text()) for index in range(count)]


@pytest.fixture(scope="module")
def of_one(tmp_path_factory):
    (found,) = answers(tmp_path_factory.mktemp("one") / "run", count=1)
    return found


def assert_same_answers(found, expected):
    def by_place(answers):
        return {(one["request_index"], one["answer_index"]): one for one in answers}

    found, expected = by_place(found), by_place(expected)
    assert found.keys() == expected.keys() and len(found) == 7
    for place, one in expected.items():
        for field, value in one.items():
            if "log_probs" in field:
                value = pytest.approx(value, rel=1e-5, abs=1e-5)
            assert found[place][field] == value, (place, field)


@pytest.mark.slow
def test_two_processes_are_each_given_the_answers_of_one(of_one, tmp_path):
    first, second = answers(tmp_path / "run", count=2)
    assert first == second
    assert_same_answers(first, of_one)


@pytest.mark.slow
def test_heads_split_over_two_processes_change_no_answer(of_one, tmp_path):
    first, second = answers(tmp_path / "run", count=2, tensor=2)
    assert first == second
    assert_same_answers(first, of_one)


@pytest.mark.slow
def test_four_processes_are_each_given_the_answers_of_one(of_one, tmp_path):
    found = answers(tmp_path / "run", count=4)
    assert all(one == found[0] for one in found)
    assert_same_answers(found[0], of_one)
