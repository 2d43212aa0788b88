"""A run's data on the Hub: what a row holds, that it loads, and what its card says."""

import json

import datasets
import pytest
import yaml

from huatuo_jax.core.files import read_rows, write_rows
from huatuo_jax.data.readers import read_comparisons, read_prompts
from huatuo_jax.hub.push import push
from huatuo_jax.judge.judgements import read_judgements
from tests.hub.test_push import config
from tests.hub.test_refusals import refusal


@pytest.fixture
def pushed(run, hub, tmp_path):
    """Pushes the data and gives the folder that arrived."""

    def push_data(**fields):
        push(config(run, hub, what=("data",), **fields), lambda _: None)
        folder = tmp_path / "arrived"
        folder.mkdir()
        for name, content in hub.files("doctor/demo-data", kind="dataset").items():
            (folder / name).write_bytes(content)
        return folder

    return push_data


def load(folder, name, tmp_path, **settings):
    cache = str(tmp_path / "datasets")
    return datasets.load_dataset(str(folder), name, split="train", cache_dir=cache, **settings)


def test_data_is_pushed_only_where_it_is_named(run, hub):
    push(config(run, hub), lambda _: None)
    assert all(kind == "model" for kind, _ in hub.repos)
    push(config(run, hub, what=("data",)), lambda _: None)
    assert hub.repos["dataset", "doctor/demo-data"].private
    names = set(hub.files("doctor/demo-data", kind="dataset"))
    assert names == {"README.md", "prompts.jsonl", "labels.jsonl", "comparisons.jsonl"}


def test_each_config_loads_with_the_columns_of_the_card(run, pushed, tmp_path):
    folder = pushed()
    prompts = load(folder, "prompts", tmp_path)
    assert prompts.column_names == ["id", "messages", "reference", "diagnosis", "source"]
    assert prompts["diagnosis"] == [None] * 3  # A column of nulls alone has its type all the same.
    assert str(prompts.features["diagnosis"].dtype) == "string"
    assert prompts[1] == {
        "id": "p1",
        "messages": [{"role": "user", "content": "头痛1天了，怎么办？"}],
        "reference": "请多休息。",
        "diagnosis": None,
        "source": "a clinic",
    }
    pairs = load(folder, "comparisons", tmp_path)
    assert pairs["margin"] == [None, 1.0, 1.0] and pairs["p_chosen"] == [0.75] * 3
    assert pairs[0]["rejected"] == [{"role": "assistant", "content": "不知道。"}]
    assert "chosen_token_ids" not in pairs.column_names
    labels = load(folder, "labels", tmp_path)
    judgements = {(one.id, one.answer): one for one in read_judgements(run / "labels.jsonl")}
    answers = {
        row["id"]: row["answers"] for row in read_rows(run / "answers.jsonl", unfinished="read")
    }
    assert len(labels) == len(judgements) == 6
    for row in labels:
        (index,) = row["answers"]
        judged = judgements[row["id"], index]
        assert row["scores"] == judged.scores and row["judge"] == judged.judge
        assert row["texts"] == [answers[row["id"]][index]["text"]] and row["p_first"] is None
    assert not {"raw", "error", "usage", "cost", "key"} & set(labels.column_names)


def test_what_arrives_is_read_by_this_project_as_what_was_there(run, pushed):
    folder = pushed()
    for read, name in ((read_prompts, "prompts.jsonl"), (read_comparisons, "comparisons.jsonl")):
        ours, theirs = (
            [{**one.to_json(), "source": None} for one in read(place / name)]
            for place in (run, folder)
        )
        for row in ours:
            for field in ("ward", "chosen_token_ids", "read_from"):
                row.pop(field, None)
        assert theirs == ours


def test_a_long_column_of_nulls_before_its_first_value_still_loads(run, pushed, tmp_path):
    rows = [{"id": f"p{n}", "messages": [], "source": "s"} for n in range(100)]
    rows[-1]["diagnosis"] = "感冒"
    write_rows(run / "prompts.jsonl", rows)
    found = load(pushed(), "prompts", tmp_path, chunksize=1000)
    assert found["diagnosis"] == [None] * 99 + ["感冒"]


def test_the_card_says_who_judged_how_many_of_what_and_the_licence(pushed):
    card = (pushed(data_license="cc-by-4.0") / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "cc-by-4.0"
    assert [one["config_name"] for one in head["configs"]] == ["prompts", "labels", "comparisons"]
    assert "The prompts may hold patients' words" in card
    assert "| `labels` | 6 |" in card and "| `comparisons` | 3 |" in card
    assert "| a clinic | 2 |" in card and "| a book | 1 |" in card
    assert "| offline-rubric-v1 | score | 6 | 3 |" in card
    assert '"model": "a judge"' in card
    assert "`cc-by-4.0`, as stated by whoever pushed this dataset." in card


def test_without_a_licence_the_card_says_that_none_is_stated(pushed):
    card = (pushed() / "README.md").read_text(encoding="utf-8")
    assert "license: unknown\n" in card and "Not stated." in card


def test_keys_and_passwords_are_replaced_and_counted(run, hub, pushed):
    key, address = "sk-" + "abcd1234" * 3, "https://me:password@judge.example/v1"
    rows = read_rows(run / "prompts.jsonl", unfinished="read")
    rows[0]["messages"][0]["content"] = f"用{key}问{address}"
    rows[1]["reference"] = "\ud83d半个字"
    write_rows(run / "prompts.jsonl", rows)
    journal = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    journal["labels"]["settings"]["prices"] = address
    (run / "recipe.json").write_text(json.dumps(journal), encoding="utf-8")
    folder = pushed()
    whole = "".join(path.read_text(encoding="utf-8") for path in folder.iterdir())
    assert key not in whole and "password@" not in whole
    (first, second, _) = read_rows(folder / "prompts.jsonl", unfinished="read")
    assert first["messages"][0]["content"] == "用[removed]问https://[removed]@judge.example/v1"
    assert second["reference"] == "\ufffd半个字"
    assert "in 2 rows [removed] stands for what looked like a key" in whole


def test_failed_judgements_and_those_of_other_answers_are_left_out_and_counted(run, hub, pushed):
    rows = read_rows(run / "labels.jsonl", unfinished="read")
    rows[0] |= {"scores": None, "error": "no reply from https://me:password@host", "reason": None}
    rows[1]["answer_sha256"] = ["0" * 64]
    write_rows(run / "labels.jsonl", rows)
    folder = pushed()
    assert len(read_rows(folder / "labels.jsonl", unfinished="read")) == 4
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "2 judgements are left out of the labels" in card and "no reply" not in card


def append(name, text):
    def change(run):
        with (run / name).open("a", encoding="utf-8") as file:
            file.write(text)

    return change


def remove(*names):
    def change(run):
        for name in names:
            (run / name).unlink()

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (append("prompts.jsonl", "{no json\n"), "prompts.jsonl:4: not a line of JSON"),
        (append("prompts.jsonl", '{"id": "x"}\n'), "prompts.jsonl:4: cannot be pushed: the record"),
        (
            append("prompts.jsonl", '{"id": 7, "messages": [], "source": "s"}\n'),
            "prompts.jsonl:4: cannot be pushed: id is a int; it should be text",
        ),
        (append("comparisons.jsonl", '{"id": "x"}\n'), "comparisons.jsonl:4: cannot be pushed: "),
        (append("labels.jsonl", '{"id": "x"}\n'), "labels.jsonl:7: not a judgement: protocol is"),
        (remove("answers.jsonl"), "answers.jsonl: no such file; it holds the answers that the"),
        (
            remove("prompts.jsonl", "labels.jsonl", "comparisons.jsonl"),
            "no data to push; there is none of prompts.jsonl, labels.jsonl, comparisons.jsonl",
        ),
    ],
)
def test_rows_that_do_not_parse_are_told_before_anything_is_sent(run, hub, change, expected):
    change(run)
    assert expected in refusal(config(run, hub, what=("data",)))
    assert not hub.requests


def test_data_of_a_run_without_labels_is_what_there_is(run, hub):
    for name in ("labels.jsonl", "comparisons.jsonl", "answers.jsonl"):
        (run / name).unlink()
    told = []
    push(config(run, hub, what=("data",), dry_run=True), told.append)
    assert "  left out: labels.jsonl: the run does not have it" in told
    push(config(run, hub, what=("data",)), told.append)
    names = set(hub.files("doctor/demo-data", kind="dataset"))
    assert names == {"README.md", "prompts.jsonl"}


def test_data_needs_no_export_and_no_finished_one(run, hub):
    (run / "export" / "release.json").unlink()
    push(config(run, hub, what=("data",)), lambda _: None)
    assert ("dataset", "doctor/demo-data") in hub.repos
