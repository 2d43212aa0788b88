"""Before its first step a stage says what it trains on and what is left out."""

import dataclasses
import json

import pytest

from huatuo_jax.data import SAMPLE_FOLDER
from huatuo_jax.data.accounting import TRAINED_ON
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig, open_dialogues
from huatuo_jax.training.run_directory import DATA_FILE, StageDirectory, report_data

TOKENIZER = str(SAMPLE_FOLDER / "tokenizer")


@pytest.fixture
def mine(tmp_path):
    """Forty dialogues, 34 of them longer than a row; two stand twice, and a row is cut."""
    path = tmp_path / "mine.jsonl"
    rows = [
        {"question": f"头疼{n}天了", "answer": "多喝水，注意休息。" * (40 if n < 34 else 1)}
        for n in range(40)
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in [*rows, *rows[-2:]]]
    # More good ones: of 43 rows, a bad one would be more than the reader lets pass.
    lines += [json.dumps({"question": f"咳嗽{n}天", "answer": "休息。"}) for n in range(100)]
    path.write_text("\n".join([*lines, '{"question": "cut']) + "\n", encoding="utf-8")
    return path


def config(path, **source):
    return DataConfig(
        sources=(SourceConfig(name="mine", paths=(str(path),), **source),),
        row_length=128,
        held_out=HeldOutConfig(share=0.1),
        num_threads=0,
    )


def test_every_row_is_used_or_left_out_for_a_reason_that_is_said(mine, tmp_path, capsys):
    directory = StageDirectory(tmp_path / "sft")
    directory.folder.mkdir()
    tokenizer = load_tokenizer(TOKENIZER)
    for _ in range(2):  # The second time from the cache.
        data = open_dialogues(config(mine), tokenizer, seed=0, default_cache=tmp_path / "data")
        assert data.account is not None
        report_data(directory, data.account)
        found = json.loads((directory.folder / DATA_FILE).read_text(encoding="utf-8"))
        assert (found["rows"], found["rows_left_out"]) == (143, {"bad row": 1})
        assert found["left_out"] == {"the same dialogue again": 2, "too long": 34}
        assert found["records"] == 142 == sum(found["used"].values()) + 36
        assert found["used"][TRAINED_ON] == len(data.prepared.train)
        assert found["used"]["held out"] == len(data.prepared.held_out)
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith("sft: 143 rows read, 142 dialogues: ")
        assert f"sft: left out, too long: 34, such as {mine}:1: does not fit 128 tokens" in said
        assert any(line.startswith("sft: left out, the same dialogue again: 2, ") for line in said)
        assert any(
            line.startswith(f"sft: left out, bad row: 1, such as {mine}:143") for line in said
        )
        assert said[-1].startswith("sft: warning: 26% of the data is left out")


def test_a_limit_sets_dialogues_aside_and_is_no_fault_of_the_data(mine, tmp_path):
    data = open_dialogues(
        config(mine, limit=5),
        load_tokenizer(TOKENIZER),
        seed=0,
        default_cache=tmp_path / "data",
    )
    found = data.account.to_json()
    assert found["used"][TRAINED_ON] == 5
    assert found["set_aside"] == {"over the limit of mine": len(data.prepared.train) - 5}
    assert found["records"] == sum(
        sum(found[name].values()) for name in ("used", "set_aside", "left_out")
    )


def test_data_of_which_nothing_is_left_says_why(tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [{"question": f"头疼{n}天", "answer": "多喝水。" * 200} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(ValueError, match="no dialogue is left to train on(.|\n)*too long: 9, such"):
        open_dialogues(
            dataclasses.replace(config(path), held_out=HeldOutConfig(share=0.0)),
            load_tokenizer(TOKENIZER),
            seed=0,
            default_cache=tmp_path / "data",
        )
