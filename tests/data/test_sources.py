import json

import pytest

from huatuo_jax.data.formats.adapters import find_adapter
from huatuo_jax.data.readers import DialogueSource, content_hash, source_names


def write(path, question="咳嗽怎么办？"):
    row = {"question": question, "answer": "多喝水。"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    return str(path)


def test_a_source_reads_all_its_files(tmp_path):
    paths = (write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", "头痛怎么办？"))
    source = DialogueSource(name="both", paths=paths, reading={"kind": "real_instruction"})
    dialogues = [dialogue for reading in source.readings() for dialogue in reading]
    assert [one.messages[0].content for one in dialogues] == ["咳嗽怎么办？", "头痛怎么办？"]
    assert {one.kind for one in dialogues} == {"real_instruction"}


def test_the_identity_follows_the_content_and_the_reading_but_not_the_folder(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    first, second = (write(tmp_path / name / "a.jsonl") for name in ("first", "second"))
    source = DialogueSource(name="one", paths=(first,))
    assert source.identity == DialogueSource(name="one", paths=(second,)).identity
    write(tmp_path / "second" / "a.jsonl", "头痛怎么办？")
    others = [
        DialogueSource(name="one", paths=(second,)),
        DialogueSource(name="two", paths=(first,)),
        DialogueSource(name="one", paths=(first, first)),
        DialogueSource(name="one", paths=(first,), reading={"kind": "real_instruction"}),
        DialogueSource(name="one", paths=(first,), reading={"adapter": find_adapter("toyhom")}),
        DialogueSource(name="one", paths=(first,), reading={"encoding": "cp1252"}),
        DialogueSource(name="one", paths=(first,), held_out_by="always"),
    ]
    identities = [json.dumps(other.identity) for other in (source, *others)]
    assert len(set(identities)) == len(identities)


def test_a_folder_is_known_by_all_its_files(tmp_path):
    write(tmp_path / "a.jsonl")
    before = content_hash(tmp_path)
    assert content_hash(tmp_path) == before
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    assert content_hash(tmp_path) != before


def test_a_source_without_files_is_refused():
    with pytest.raises(ValueError, match="sources.empty.paths"):
        DialogueSource(name="empty", paths=())


def test_sources_of_files_of_one_name_have_names_of_their_own():
    assert source_names(["a/train.jsonl", "b/dev.csv"]) == ["train", "dev"]
    assert source_names(["a/train.jsonl", "b/train.jsonl", "c.csv"]) == ["a/train", "b/train", "c"]
    assert source_names(["train.jsonl", "train.csv"]) == ["train.jsonl", "train.csv"]
    deep = ["x/a/train.jsonl", "y/a/train.jsonl"]
    assert source_names(deep) == deep
    assert source_names([]) == []
    assert source_names(["a.jsonl", "a.jsonl"]) == ["a", "a"]  # The same file twice is refused.
