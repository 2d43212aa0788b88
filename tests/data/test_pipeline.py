import dataclasses
import json

import numpy as np
import pytest

from huatuo_jax.core.files import as_path, copy_file
from huatuo_jax.data import pipeline
from huatuo_jax.data.batches import BatchIterator, RowConfig, RowStream, evaluation_batches
from huatuo_jax.data.chat.templates import ChatMLTemplate, HuatuoGPTTemplate
from huatuo_jax.data.mixture import DuplicatesConfig, HeldOutConfig, Mixture, one_epoch_each
from huatuo_jax.data.pipeline import PrepareConfig, describe, prepare
from huatuo_jax.data.readers import DialogueSource
from huatuo_jax.data.records import Message
from huatuo_jax.data.tokenizing import TemplateTokenizer
from huatuo_jax.hf.tokenizer import load_tokenizer

CONFIG = PrepareConfig(held_out=HeldOutConfig(share=0.2))


def invented(number):
    """A question and its answer, unlike those of any other number."""
    random = np.random.default_rng(number)
    words = ["咳嗽", "头痛", "三天", "发热", "化验", "血压", "休息", "饮水", "复诊", "用药", "检查"]
    question, answer = ("".join(random.choice(words, size)) for size in (12, 40))
    return {"question": question + "怎么办？", "answer": answer + "。"}


def write(path, rows):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8")
    return (str(path),)


@pytest.fixture
def tokenizer(byte_tokenizer):
    return TemplateTokenizer(template=ChatMLTemplate(), tokenizer=byte_tokenizer, max_tokens=512)


@pytest.fixture
def sources(tmp_path):
    first = write(tmp_path / "first.jsonl", [invented(n) for n in range(60)])
    second = write(tmp_path / "second.jsonl", [invented(n) for n in range(60, 100)])
    return [
        DialogueSource(name="first", paths=first, reading={"kind": "real_instruction"}),
        DialogueSource(name="second", paths=second),
    ]


def texts(dataset, tokenizer):
    return [tokenizer.decode(dataset[index].token_ids) for index in range(len(dataset))]


def test_every_dialogue_ends_in_one_split_as_its_template_renders_it(
    sources, tokenizer, byte_tokenizer, tmp_path
):
    prepared = prepare(sources, tokenizer, CONFIG, folder=tmp_path / "cache")
    assert len(prepared.train) + len(prepared.held_out) == 100
    assert 5 <= len(prepared.held_out) <= 40
    found = {
        tuple(split[index].token_ids.tolist())
        for split in (prepared.train, prepared.held_out)
        for index in range(len(split))
    }
    rows = [invented(number) for number in range(100)]
    expected = {
        tuple(
            tokenizer(
                (Message("user", row["question"]), Message("assistant", row["answer"]))
            ).token_ids.tolist()
        )
        for row in rows
    }
    assert found == expected


def test_dialogues_and_their_cache_may_be_in_a_bucket(
    sources, tokenizer, byte_tokenizer, tmp_path, bucket
):
    there = []
    for source in sources:
        paths = tuple(f"gs://bucket/{as_path(path).name}" for path in source.paths)
        for path, copy in zip(source.paths, paths, strict=True):
            copy_file(path, copy)
        there.append(dataclasses.replace(source, paths=paths))
    before = prepare(sources, tokenizer, CONFIG, folder=tmp_path / "cache")
    after = prepare(there, tokenizer, CONFIG, folder="gs://bucket/cache")
    expected = texts(before.train, byte_tokenizer)
    assert texts(after.train, byte_tokenizer) == expected
    assert after.statistics["splits"] == before.statistics["splits"]
    stored = [name for name in bucket.files("bucket") if name.startswith("cache/")]
    assert any(".array_record" in name for name in stored)
    bucket.refuses = lambda method, path: 403 if path.startswith("/upload") else None
    again = prepare(there, tokenizer, CONFIG, folder="gs://bucket/cache")
    assert texts(again.train, byte_tokenizer) == expected, "built once"
    assert before.folder.name == after.folder.name == again.folder.name, "part of a run's identity"


def test_the_statistics_are_those_of_the_examples(sources, tokenizer, tmp_path):
    prepared = prepare(sources, tokenizer, CONFIG, folder=tmp_path / "cache")
    for name, split in (("train", prepared.train), ("held_out", prepared.held_out)):
        groups = prepared.statistics["splits"][name]
        assert groups["all"]["all"]["examples"] == len(split)
        assert groups["all"]["all"]["tokens"] == split.lengths.sum()
        assert groups["all"]["all"]["longest"] == split.lengths.max()
        for index, source in enumerate(split.sources):
            trained = split.num_trained[split.source_ids == index].sum()
            assert groups["by_source"][source]["trained_tokens"] == trained
        assert set(groups["by_kind"]) == {"real_instruction", "unknown"}
    lines = describe(prepared.statistics)
    assert "60 rows" in lines and f"train: {len(prepared.train)} examples" in lines


def test_a_dialogue_stays_in_its_split_when_data_is_added(
    sources, tokenizer, byte_tokenizer, tmp_path
):
    before = prepare(sources[:1], tokenizer, CONFIG, folder=tmp_path / "cache")
    after = prepare(sources, tokenizer, CONFIG, folder=tmp_path / "cache")
    assert set(texts(before.train, byte_tokenizer)) < set(texts(after.train, byte_tokenizer))
    assert set(texts(before.held_out, byte_tokenizer)) < set(texts(after.held_out, byte_tokenizer))


def test_the_cache_is_found_again_and_nothing_is_read_or_tokenised(
    sources, tokenizer, tmp_path, monkeypatch
):
    first = prepare(sources, tokenizer, CONFIG, folder=tmp_path / "cache")
    monkeypatch.setattr(pipeline, "_build", None)
    calls = []
    again = prepare(sources, tokenizer, CONFIG, folder=tmp_path / "cache", progress=calls.append)
    assert again.folder == first.folder and calls == []
    assert again.statistics == first.statistics
    elsewhere = dataclasses.replace(CONFIG, num_processes=2)
    assert prepare(sources, tokenizer, elsewhere, folder=tmp_path / "cache").folder == first.folder


def test_the_cache_is_built_anew_when_anything_it_depends_on_changes(
    sources, tokenizer, byte_tokenizer, tmp_path
):
    folder = tmp_path / "cache"
    more_words = type(byte_tokenizer).from_pretrained(_saved(byte_tokenizer, tmp_path / "words"))
    more_words.add_tokens(["怎么办"])
    changed = write(tmp_path / "third.jsonl", [invented(n) for n in range(61)])
    variants = [
        (sources, tokenizer, CONFIG),
        (sources[:1], tokenizer, CONFIG),
        ([DialogueSource(name="first", paths=changed), sources[1]], tokenizer, CONFIG),
        (sources, dataclasses.replace(tokenizer, template=HuatuoGPTTemplate()), CONFIG),
        (sources, dataclasses.replace(tokenizer, max_tokens=511), CONFIG),
        (sources, dataclasses.replace(tokenizer, tokenizer=more_words), CONFIG),
        (sources, tokenizer, PrepareConfig(held_out=HeldOutConfig(share=0.3))),
        (
            sources,
            tokenizer,
            dataclasses.replace(CONFIG, duplicates=DuplicatesConfig(remove=False)),
        ),
    ]
    folders = {prepare(*variant, folder=folder).folder for variant in variants}
    assert len(folders) == len(variants)


def _saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


def test_duplicates_are_reported_and_taken_out_of_the_training_data(
    tokenizer, byte_tokenizer, tmp_path
):
    rows = [invented(n) for n in range(40)]
    held_out = write(tmp_path / "held_out.jsonl", rows[:10])
    almost = {**rows[1], "answer": rows[1]["answer"] + "好"}
    train = write(tmp_path / "train.jsonl", [rows[0], almost, *rows[10:], rows[20]])
    sources = [
        DialogueSource(name="train", paths=train, held_out_by="never"),
        DialogueSource(name="held_out", paths=held_out, held_out_by="always"),
    ]
    removing = prepare(sources, tokenizer, CONFIG, folder=tmp_path / "cache")
    found = removing.statistics["duplicates"]
    counts = ("repeated_in_train", "held_out_too", "nearly_held_out", "removed_from_train")
    assert [found[name] for name in counts] == [1, 1, 1, 3]
    (example,) = found["nearly_held_out_examples"]
    assert 0.8 <= example["similarity"] < 1.0
    assert example["held_out"]["text"].startswith(rows[1]["question"])
    assert len(removing.train) == 30 and len(removing.held_out) == 10
    assert not set(texts(removing.train, byte_tokenizer)) & set(
        texts(removing.held_out, byte_tokenizer)
    )
    keeping = prepare(
        sources,
        tokenizer,
        dataclasses.replace(CONFIG, duplicates=DuplicatesConfig(remove=False)),
        folder=tmp_path / "cache",
    )
    assert len(keeping.train) == 33
    assert keeping.statistics["duplicates"] == {**found, "removed_from_train": 0}


def test_dialogues_that_are_too_long_are_counted(tmp_path, byte_tokenizer):
    rows = [invented(n) for n in range(30)]
    rows[3]["answer"] = "好。" * 1000
    sources = [DialogueSource(name="one", paths=write(tmp_path / "a.jsonl", rows))]
    tokenizer = TemplateTokenizer(
        template=ChatMLTemplate(), tokenizer=byte_tokenizer, max_tokens=512
    )
    config = PrepareConfig(held_out=HeldOutConfig(share=0.0))
    prepared = prepare(sources, tokenizer, config, folder=tmp_path / "cache")
    assert prepared.held_out is None and len(prepared.train) == 29
    assert prepared.statistics["dropped"] == {"too long": 1}
    assert len(prepared.statistics["dropped_examples"]["too long"]) == 1


def test_a_template_that_refuses_the_data_stops_the_run(sources, tmp_path, byte_tokenizer):
    class Refusing(ChatMLTemplate):
        def render(self, messages, tokenizer, **settings):
            raise ValueError("messages: this template cannot say them")

    tokenizer = TemplateTokenizer(template=Refusing(), tokenizer=byte_tokenizer, max_tokens=512)
    with pytest.raises(ValueError, match="100 of 100 dialogues.*cannot say them"):
        prepare(sources, tokenizer, CONFIG, folder=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_share_that_holds_out_nothing_is_refused(sources, tokenizer, tmp_path):
    config = PrepareConfig(held_out=HeldOutConfig(share=1e-9))
    with pytest.raises(ValueError, match="holds out none"):
        prepare(sources, tokenizer, config, folder=tmp_path / "cache")


def test_two_sources_of_one_name_are_refused(sources, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="first"):
        prepare([sources[0], sources[0]], tokenizer, CONFIG, folder=tmp_path / "cache")


@pytest.mark.slow
def test_real_dialogues_pack_into_rows_that_are_almost_full(shared_data, tmp_path):
    single = DialogueSource(
        name="single",
        paths=(str(shared_data / "1_sft_single_real" / "medicalgpt_medical_sft.jsonl"),),
        reading={"kind": "real_instruction"},
    )
    multi = DialogueSource(
        name="multi",
        paths=tuple(
            str(path) for path in sorted((shared_data / "3_distilled/disc_dialogues").iterdir())
        ),
        reading={"kind": "distilled_conversation"},
    )
    tokenizer = TemplateTokenizer(
        template=ChatMLTemplate(),
        tokenizer=load_tokenizer(shared_data / "tokenizers" / "minimind_6400"),
        max_tokens=2048,
    )
    prepared = prepare(
        [single, multi],
        tokenizer,
        PrepareConfig(held_out=HeldOutConfig(share=0.05)),
        folder=tmp_path / "cache",
    )
    train = prepared.train
    mixture = Mixture(train.source_ids, train.sources, one_epoch_each(train.sources), seed=0)
    rows = RowStream(train, RowConfig(row_length=2048), mixture=mixture)
    assert rows.plan(0).efficiency > 0.98
    batches = BatchIterator(rows, batch_size=16)
    num_rows, trained = 0, 0
    while num_rows < rows.first_row(1) // 16 * 16:
        batch = next(batches)
        trained += batch["trained_mask"].sum()
        num_rows += 16
    tail = sum(
        train.num_trained[rows.examples_in(r)].sum() for r in range(num_rows, rows.first_row(1))
    )
    assert trained + tail == train.num_trained.sum()
    batches.close()
    evaluation = RowStream(prepared.held_out, RowConfig(row_length=2048), mixture=None)
    tokens = sum((b["segment_ids"] > 0).sum() for b in evaluation_batches(evaluation, batch_size=8))
    assert tokens == prepared.held_out.lengths.sum()


def test_marks_of_a_file_reach_the_masks_of_its_examples_and_all_else_is_counted(
    tokenizer, byte_tokenizer, tmp_path
):
    def turns(number, *weights):
        row = invented(number)
        contents = [row["question"], row["answer"], "还有吗？", "没有。"]
        roles = ("user", "assistant") * 2
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        for index, weight in zip((1, 3), weights, strict=True):
            messages[index]["weight"] = weight
        return {"id": str(number), "messages": messages}

    rows = [turns(0, 1, 1), turns(1, 0, 1), turns(2, 1, 0), turns(3, 0, 0)]
    source = DialogueSource(name="mine", paths=write(tmp_path / "mine.jsonl", rows))
    config = PrepareConfig(held_out=HeldOutConfig(share=0.0))
    prepared = prepare([source], tokenizer, config, folder=tmp_path / "cache")
    assert len(prepared.train) == 3
    assert prepared.statistics["dropped"] == {"nothing to train": 1}
    for index in range(3):
        example = prepared.train[index]
        row = rows[int(example.id)]
        learned = byte_tokenizer.decode(example.token_ids[example.trained_mask])
        for turn in row["messages"]:
            is_learned = turn["role"] == "assistant" and turn["weight"] == 1
            assert (turn["content"] in learned) == is_learned
