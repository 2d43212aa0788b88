import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

import huatuo_jax
from huatuo_jax.data.tokenizing import (
    ALL_KINDS,
    Entry,
    Example,
    TokenDataset,
    build_once,
    cache_key,
    has_split,
    write_examples,
)

REPOSITORY = pathlib.Path(huatuo_jax.__file__).parents[1]

KILLED_BUILD = """
import os, pathlib, signal, sys
import numpy as np
from huatuo_jax.data.tokenizing import Example
from huatuo_jax.data.tokenizing import Entry, build_once, write_examples

def chunks():
    for number in range(1000):
        example = Example(np.arange(5, dtype=np.int32), np.ones(5, bool), "unknown", str(number))
        yield [Entry("train", "source", example)]
        if number == 20:
            os.kill(os.getpid(), signal.SIGKILL)

build_once(
    sys.argv[1], "key",
    lambda folder: write_examples(folder, chunks(), sources=["source"], description=""),
)
"""


def make_example(number):
    random = np.random.default_rng(number)
    length = int(random.integers(1, 50))
    return Example(
        token_ids=random.integers(0, 60_000, length).astype(np.int32),
        trained_mask=random.integers(0, 2, length).astype(bool),
        kind=ALL_KINDS[number % len(ALL_KINDS)],
        id=f"编号{number}",
    )


def write(folder, entries, sources=("one", "two")):
    chunks = [entries[start : start + 7] for start in range(0, len(entries), 7)]
    write_examples(folder, chunks, sources=sources, description="Invented.")


def entries(num_examples):
    return [
        Entry("held_out" if n % 5 == 0 else "train", ("one", "two")[n % 2], make_example(n))
        for n in range(num_examples)
    ]


def build_ten(folder):
    write(folder, entries(10))


def test_what_was_written_is_read_back_in_order(tmp_path):
    written = entries(60)
    write(tmp_path, written)
    for split in ("train", "held_out"):
        expected = [entry for entry in written if entry.split == split]
        dataset = TokenDataset(tmp_path, split)
        assert len(dataset) == len(expected)
        for index in np.random.default_rng(0).permutation(len(expected)):
            found, (_, source, example) = dataset[index], expected[index]
            assert found.token_ids.tolist() == example.token_ids.tolist()
            assert found.trained_mask.tolist() == example.trained_mask.tolist()
            assert (found.id, found.kind) == (example.id, example.kind)
            assert dataset.lengths[index] == len(example.token_ids)
            assert dataset.num_trained[index] == example.trained_mask[1:].sum()
            assert dataset.sources[dataset.source_ids[index]] == source
            assert ALL_KINDS[dataset.kind_ids[index]] == example.kind


def test_the_cache_is_a_dataset_of_tfds_and_needs_no_tensorflow(tmp_path):
    write(tmp_path, entries(20))
    builder = tfds.builder_from_directory(tmp_path)
    assert builder.info.description == "Invented."
    assert builder.info.splits["train"].num_examples == 16
    record = builder.as_data_source("train")[0]
    assert record["id"] == "编号1".encode() and record["source"] == b"two"
    assert "tensorflow" not in sys.modules


def test_a_split_without_examples_is_not_there(tmp_path):
    write(tmp_path, [Entry("train", "one", make_example(0))])
    assert has_split(tmp_path, "train") and not has_split(tmp_path, "held_out")


def test_nothing_to_train_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no dialogue is left"):
        write(tmp_path, [])


def test_files_that_lost_examples_are_not_read(tmp_path):
    for name, num_examples in (("a", 10), ("b", 20)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, entries(num_examples))
    (tmp_path / "b" / "index.npz").replace(tmp_path / "a" / "index.npz")
    with pytest.raises(ValueError, match="built again"):
        TokenDataset(tmp_path / "a", "train")


def test_a_cache_is_built_once_for_each_key(tmp_path):
    builds = []
    for key in ("first", "second", "first"):
        build_once(tmp_path, key, lambda folder: builds.append(build_ten(folder)))
    assert len(builds) == 2
    assert len(TokenDataset(tmp_path / "first", "train")) == 8


def test_the_key_follows_every_input():
    inputs = [{"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, {"a": 1, "b": 1}, {"a": [1]}]
    assert len({cache_key(one) for one in inputs}) == len(inputs)
    assert cache_key({"a": 1, "b": 2}) == cache_key({"b": 2, "a": 1})


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        build_once(tmp_path, "key", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]
    assert build_once(tmp_path, "key", build_ten).is_dir()


def test_a_build_that_was_killed_is_not_used(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", KILLED_BUILD, tmp_path],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=120,
    )
    assert process.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.glob("key.tmp-*")
    assert any(leftover.iterdir()) and not (tmp_path / "key").exists()
    cache = build_once(tmp_path, "key", build_ten)
    assert len(TokenDataset(cache, "train")) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock"]


def test_of_several_builders_one_builds_and_the_others_wait(tmp_path):
    builds = []

    def slowly(folder):
        builds.append(folder)
        time.sleep(0.2)
        build_ten(folder)

    found = []
    threads = [
        threading.Thread(target=lambda: found.append(build_once(tmp_path, "key", slowly)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1 and found == [tmp_path / "key"] * 4
