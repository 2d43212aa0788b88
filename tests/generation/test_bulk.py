import datetime
import decimal
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.data.chat import templates
from huatuo_jax.data.records import Message
from huatuo_jax.generation.bulk import BulkConfig, run_bulk
from huatuo_jax.generation.requests import SamplingConfig
from tests.generation import tiny
from tests.generation.conftest import LINES

ROOT = pathlib.Path(__file__).resolve().parents[2]
SAMPLING = SamplingConfig(max_new_tokens=12, top_p=0.95)


def config(model_folder, prompts_file, output, **changed):
    fields = {
        "model": str(model_folder),
        "prompts": str(prompts_file),
        "output": str(output),
        "num_samples": 3,
        "chunk_size": 2,
        "sampling": SAMPLING,
        "seed": 4,
        "slots": 4,
        # Of eight virtual devices; the tiny model's heads divide by two.
        "mesh": MeshConfig(data=4, fsdp=1, tensor=2),
    }
    return BulkConfig(**(fields | changed))


@pytest.fixture(scope="module")
def unbroken(model_folder, prompts_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken") / "answers.jsonl"
    report = run_bulk(config(model_folder, prompts_file, output))
    assert report is not None and report.generated_tokens > 0
    return output


def rows_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_records_hold_the_prompt_and_its_answers(unbroken, model_folder, prompts_file, tokenizer):
    records = rows_of(unbroken)
    assert [record["id"] for record in records] == [*(f"p{n}" for n in range(6)), "long"]
    assert records[3]["department"] == 3 and records[6]["reference"] == LINES[1]
    template = templates.by_name("huatuogpt")
    end = tokenizer.eos_token_id
    for record in records:
        messages = [Message(**message) for message in record["messages"]]
        assert record["prompt_token_ids"] == template.prompt(messages, tokenizer)
        assert len(record["answers"]) == 3
        for answer in record["answers"]:
            ids = answer["token_ids"]
            stopped = ids[-1] == end
            assert answer["finish_reason"] == ("stop" if stopped else "length")
            assert stopped or len(ids) == 12
            assert answer["text"] == tokenizer.decode(ids, skip_special_tokens=True)
            sequence = [*record["prompt_token_ids"], *ids]
            cfg = tiny.config(vocab_size=len(tokenizer))
            (logits_TV,) = tiny.full_logits([sequence], model=type(tiny.MODEL)(cfg))
            full_TV = tiny.log_softmax(logits_TV[len(sequence) - len(ids) - 1 : -1])
            full_T = full_TV[np.arange(len(ids)), ids]
            np.testing.assert_allclose(answer["log_probs"], full_T, atol=2e-5)


@pytest.mark.parametrize("cut_at", [0.0, 0.3, 0.62, 0.999])
def test_a_run_that_was_cut_anywhere_ends_in_the_same_file(
    unbroken, model_folder, prompts_file, tmp_path, cut_at
):
    whole = unbroken.read_bytes()
    output = tmp_path / "answers.jsonl"
    output.write_bytes(whole[: int(cut_at * len(whole))])
    settings = unbroken.with_name("answers.jsonl.settings.json")
    (tmp_path / settings.name).write_bytes(settings.read_bytes())
    run_bulk(config(model_folder, prompts_file, output))
    assert output.read_bytes() == whole


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_file(model_folder, prompts_file, tmp_path):
    def command(output):
        flags = {
            "model": model_folder,
            "prompts": prompts_file,
            "output": output,
            "num_samples": 2,
            "max_new_tokens": 10,
            "chunk_size": 1,
            "slots": 2,
        }
        arguments = [f"--{name}={value}" for name, value in flags.items()]
        return [sys.executable, str(ROOT / "launch" / "generate.py"), *arguments]

    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    process = subprocess.Popen(command(killed), env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (killed.exists() and killed.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(killed.read_bytes().splitlines()) <= 7
    for output in (killed, whole):
        done = subprocess.run(command(output), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout and "7 of 7 prompts" in done.stderr
    assert killed.read_bytes() == whole.read_bytes()


def test_a_complete_file_is_left_alone(unbroken, model_folder, prompts_file):
    before = unbroken.stat().st_mtime_ns
    assert run_bulk(config(model_folder, prompts_file, unbroken)) is None
    assert unbroken.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 5}, "was made with seed 4, now 5"),
        ({"num_samples": 2}, "was made with num_samples 3, now 2"),
        ({"template": "nope"}, "'nope' is not known"),
        ({"max_length": 513}, "max_length=513 must be at most the model's 512"),
        (
            {"max_length": 40},
            r"none of the 7 prompts .*40 tokens(.|\n)*prompts\.jsonl:1: ",
        ),
        ({"slots": 0}, "slots=0 must be at least 1"),
        ({"mesh": MeshConfig(tensor=3)}, "mesh: .* 3 devices, which does not divide the 8"),
        ({"mesh": MeshConfig(fsdp=1, tensor=8)}, "mesh: tensor=8 must divide the model's . key"),
        ({"prompts": "missing.jsonl"}, "missing.jsonl"),
    ],
)
def test_what_cannot_be_is_refused_in_words(unbroken, model_folder, prompts_file, changed, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_bulk(config(model_folder, prompts_file, unbroken, **changed))


def test_a_file_of_something_else_is_not_touched(model_folder, prompts_file, tmp_path):
    output = tmp_path / "notes.jsonl"
    output.write_text("my notes\n")
    with pytest.raises(ValueError, match="notes.jsonl is there, and .* is not"):
        run_bulk(config(model_folder, prompts_file, output))
    assert output.read_text() == "my notes\n"


def test_the_oldest_turns_go_where_a_dialogue_does_not_fit(
    unbroken, model_folder, prompts_file, tokenizer, tmp_path
):
    lengths = {record["id"]: len(record["prompt_token_ids"]) for record in rows_of(unbroken)}
    only_long = tmp_path / "long.jsonl"
    only_long.write_text(prompts_file.read_text("utf-8").splitlines()[-1] + "\n", "utf-8")
    max_length = lengths["long"] + 11  # one too few for 12 new tokens
    output = tmp_path / "answers.jsonl"
    run_bulk(config(model_folder, only_long, output, max_length=max_length, drop_oldest_turns=True))
    (record,) = rows_of(output)
    last = [Message(**record["messages"][-1])]
    assert record["messages_dropped"] == 2 and len(record["messages"]) == 3
    assert record["prompt_token_ids"] == templates.by_name("huatuogpt").prompt(last, tokenizer)


def test_a_prompt_that_does_not_fit_is_left_out_and_named_by_file_and_line(
    unbroken, model_folder, prompts_file, tmp_path
):
    rows = prompts_file.read_text("utf-8").splitlines()
    rows.insert(2, json.dumps({"question": LINES[0] * 20}))
    rows.insert(4, json.dumps({"question": LINES[1] * 20, "read_from": "mine.csv:12"}))
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(rows) + "\n", "utf-8")
    output, said = tmp_path / "answers.jsonl", []
    cfg = config(model_folder, path, output, max_left_out_share=0.3)
    run_bulk(cfg, say=said.append)
    assert [record["id"] for record in rows_of(output)] == [*(f"p{n}" for n in range(6)), "long"]
    for record, alone in zip(rows_of(output), rows_of(unbroken), strict=True):
        assert record["prompt_token_ids"] == alone["prompt_token_ids"]
    assert said[0] == "9 rows read, 9 prompts: 7 to answer; left out: 2 prompts"
    assert said[1].startswith(f"left out, too long: 2, such as {path}:3: ")
    assert said[2].startswith("warning: 22% of the data is left out")
    account = json.loads((tmp_path / "answers.jsonl.report.json").read_text("utf-8"))
    assert account["left_out"] == {"too long": 2} and account["used"] == {"to answer": 7}
    assert account["places"]["too long"][1].startswith("mine.csv:12: ")
    with pytest.raises(
        ValueError, match="2 of 9 prompts .* max_left_out_share=0.1 allows"
    ) as error:
        run_bulk(config(model_folder, path, tmp_path / "other.jsonl"))
    assert f"{path}:3: " in str(error.value) and "mine.csv:12: " in str(error.value)
    assert not (tmp_path / "other.jsonl").exists()


def test_columns_that_json_lacks_are_written_as_what_they_were_read_as(model_folder, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(
        {
            "id": ["a", "b"],
            "question": [LINES[0], LINES[1]],
            "seen": pyarrow.array([0, None], pyarrow.timestamp("us")),
            "price": pyarrow.array([decimal.Decimal("0.1"), None]),
            "share": [float("nan"), 0.5],
            "raw": pyarrow.array([b"x", None], pyarrow.binary()),
            "at": pyarrow.array([datetime.date(2020, 1, 2), None]),
        }
    )
    parquet.write_table(table, tmp_path / "prompts.parquet")
    (tmp_path / "prompts.jsonl").write_text(
        json.dumps({"id": "c\ud83d", "question": LINES[0], "note": "\ud83d", "n": float("nan")})
    )
    own = [
        {"seen": "1970-01-01T00:00:00", "price": 0.1, "raw": "x", "at": "2020-01-02"},
        {"share": 0.5},
    ]
    for name, ids, extras in (
        ("prompts.parquet", ["a", "b"], own),
        ("prompts.jsonl", ["c\ufffd"], [{"note": "\ufffd"}]),
    ):
        output = tmp_path / f"{name}.answers.jsonl"
        run_bulk(config(model_folder, tmp_path / name, output, num_samples=1))
        records = rows_of(output)
        assert [record["id"] for record in records] == ids
        fields = ("id", "messages", "source", "prompt_token_ids", "answers")
        for record, extra in zip(records, extras, strict=True):
            assert {key: record[key] for key in record if key not in fields} == extra
