"""Bulk answers by several processes: the file that one process makes, up to rounding."""

import json

import pytest

from huatuo_jax.generation.bulk import BulkConfig, run_bulk
from huatuo_jax.generation.requests import SamplingConfig
from tests.multi_host.processes import ROOT, Processes

CHUNK = 2


@pytest.fixture(scope="module")
def of_one(model_folder, prompts_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("one") / "answers.jsonl"
    cfg = BulkConfig(
        model=str(model_folder),
        prompts=str(prompts_file),
        output=str(output),
        num_samples=2,
        chunk_size=CHUNK,
        sampling=SamplingConfig(max_new_tokens=8),
    )
    run_bulk(cfg)
    return output


def answer(model_folder, prompts_file, output, *, count):
    """Both processes' words, after they ran the command to its end."""
    flags = {
        "model": model_folder,
        "prompts": prompts_file,
        "output": output,
        "num_samples": 2,
        "max_new_tokens": 8,
        "chunk_size": CHUNK,
    }
    command = ROOT / "launch" / "generate.py"
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    with Processes(output.parent / "logs", command, arguments, count=count) as processes:
        codes = processes.wait()
        logs = [processes.log(index) for index in range(count)]
    assert codes == [0] * count, logs
    return logs


def assert_same_answers(output, expected):
    lines, expected_lines = (path.read_text("utf-8").splitlines() for path in (output, expected))
    assert len(lines) == len(expected_lines) == 7
    for line, other in zip(lines, expected_lines, strict=True):
        record, expected = json.loads(line), json.loads(other)
        for one, two in zip(record.pop("answers"), expected.pop("answers"), strict=True):
            assert one.pop("log_probs") == pytest.approx(two.pop("log_probs"), abs=1e-5)
            assert one == two
        assert record == expected


@pytest.mark.slow
def test_two_processes_go_on_with_the_file_of_one(of_one, model_folder, prompts_file, tmp_path):
    begun = b"".join(of_one.read_bytes().splitlines(keepends=True)[: 2 * CHUNK + 1])
    output = tmp_path / "answers.jsonl"
    output.write_bytes(begun)  # One record of the third chunk, which is done again.
    settings = of_one.with_name("answers.jsonl.settings.json")
    (tmp_path / settings.name).write_bytes(settings.read_bytes())
    logs = answer(model_folder, prompts_file, output, count=2)
    assert_same_answers(output, of_one)
    kept = b"".join(begun.splitlines(keepends=True)[: 2 * CHUNK])
    assert output.read_bytes().startswith(kept)
    assert "7 of 7 prompts" in logs[0] and f"written: {output}" in logs[0]
    assert "prompts" not in logs[1] and "written" not in logs[1]


@pytest.mark.slow
def test_four_processes_make_the_file_of_one_and_leave_it_alone(
    of_one, model_folder, prompts_file, tmp_path
):
    output = tmp_path / "answers.jsonl"
    answer(model_folder, prompts_file, output, count=4)
    assert_same_answers(output, of_one)
    before = output.stat().st_mtime_ns
    logs = answer(model_folder, prompts_file, output, count=2)
    assert "nothing left to do" in logs[0] and output.stat().st_mtime_ns == before
