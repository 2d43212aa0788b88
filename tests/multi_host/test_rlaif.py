"""The whole recipe by two processes: what one makes; killed anywhere, the same command goes on."""

import signal
import socket

import jax
import numpy as np
import pytest

from huatuo_jax.checkpoint.models import find_model, load_params
from huatuo_jax.core.files import as_path, read_rows
from huatuo_jax.core.sharding import path_name
from huatuo_jax.recipe.recipe import Journal
from tests.multi_host import metrics
from tests.multi_host.processes import Processes
from tests.recipe.tiny import RUN_STAGES, write_dialogues

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "mine.jsonl"
    write_dialogues(path)
    return path


def start(data, folder, *, count, attempt=0, workdir=None):
    """Processes in `workdir`, with their logs in `folder`; without the one, in `folder` too."""
    logs, workdir = folder / f"logs-{attempt}", workdir or folder / "run"
    return Processes(logs, "run_rlaif.py", (data, workdir), count=count, timeout_s=60)


def finish(data, folder, *, count, attempt=0, workdir=None):
    """What each process said of a run that it brought to its end."""
    with start(data, folder, count=count, attempt=attempt, workdir=workdir) as processes:
        codes = processes.wait()
        logs = [processes.log(index) for index in range(count)]
    assert codes == [0] * count, logs
    return logs


@pytest.fixture(scope="module")
def by_two(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, finish(data, folder, count=2)


def rows(path):
    return read_rows(path, unfinished="read")


def assert_same_answers(found, expected):
    """The same tokens; log-probabilities and scores up to rounding."""
    for one, two in zip(rows(found), rows(expected), strict=True):
        pairs = zip(one.pop("answers"), two.pop("answers"), strict=True)
        for own, other in pairs:
            assert own.pop("log_probs") == pytest.approx(other.pop("log_probs"), abs=1e-4)
            assert own == other
        assert one == two


def assert_same_run(found, expected):
    """The same rows and responses; numbers up to rounding."""
    for stage in ("sft", "reward"):
        paths = (folder / stage / "metrics.jsonl" for folder in (found, expected))
        metrics.assert_same(*paths, at_least=20)
    assert_same_answers(found / "answers.jsonl", expected / "answers.jsonl")
    for name in ("prompts.jsonl", "held_out_prompts.jsonl", "comparisons.jsonl"):
        assert (found / name).read_bytes() == (expected / name).read_bytes()
    for stage in ("sft", "ppo"):
        samples, others = (rows(folder / stage / "samples.jsonl") for folder in (found, expected))
        assert [row["answer"] for row in samples] == [row["answer"] for row in others] != []
    for name in ("report.html", "evaluation.json", "export/policy/model.safetensors"):
        assert (found / name).is_file()
    assert all(Journal(found).is_finished(stage) for stage in RUN_STAGES)


def test_two_processes_make_what_one_makes(data, by_two, tmp_path):
    finish(data, tmp_path, count=1)
    assert_same_run(by_two[0] / "run", tmp_path / "run")
    first, second = by_two[1]
    assert "stage 8 of 8: report" in first and "stage" not in second


def weights(folder):
    params = load_params(find_model(folder))
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return {path_name(path): np.asarray(leaf) for path, leaf in flat}


def lose_the_second(data, folder, *, stage, workdir=None):
    """Starts two processes and kills the second in a stage; the first says so and ends."""
    with start(data, folder, count=2, workdir=workdir) as processes:
        number = RUN_STAGES.index(stage) + 1
        processes.wait_until(lambda: f"stage {number} of 8" in processes.log(0))
        processes.kill(1)
        assert processes.wait() == [75, -signal.SIGKILL], processes.log(0)
        last = processes.log(0).splitlines()[-1]
    assert f"process 1 (host {socket.gethostname()}) not heard of for 60 s" in last


def said_of_the_one_before(stage):
    number = RUN_STAGES.index(stage)
    return f"stage {number} of 8: {RUN_STAGES[number - 1]}, finished before"


def test_two_processes_in_a_bucket_lose_one_and_the_other_goes_on_alone(
    data, by_two, bucket, tmp_path
):
    workdir = as_path("gs://bucket/run")
    lose_the_second(data, tmp_path, stage="ppo", workdir=workdir)
    logs = finish(data, tmp_path, count=1, attempt=1, workdir=workdir)
    assert said_of_the_one_before("ppo") in logs[0]
    assert_same_run(workdir, by_two[0] / "run")


@pytest.mark.parametrize("stage", ["answers", "ppo"])
def test_a_run_that_lost_a_process_goes_on_to_the_same_end(data, by_two, tmp_path, stage):
    lose_the_second(data, tmp_path, stage=stage)
    logs = finish(data, tmp_path, count=2, attempt=1)
    assert said_of_the_one_before(stage) in logs[0]
    found, expected = tmp_path / "run", by_two[0] / "run"
    for name in ("sft", "reward", "ppo"):
        one, two = (metrics.numbers(run / name / "metrics.jsonl") for run in (found, expected))
        assert one == two and one
        one, two = (weights(run / name / "model") for run in (found, expected))
        assert one.keys() == two.keys()
        for path, value in two.items():
            np.testing.assert_array_equal(one[path], value, err_msg=path)
    assert (found / "evaluation.json").read_bytes() == (expected / "evaluation.json").read_bytes()
