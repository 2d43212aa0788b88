import itertools
import json
import pickle

import grain
import numpy as np
import pytest

from huatuo_jax.data.batches import (
    BatchIterator,
    HostShare,
    PrefetchConfig,
    RowConfig,
    RowStream,
    evaluation_batches,
)
from huatuo_jax.data.mixture import Mixture, one_epoch_each
from huatuo_jax.data.tokenizing import ALL_KINDS, Entry, Example, TokenDataset, write_examples

NUM_EXAMPLES = 60
ROW_LENGTH = 32
NO_THREADS = PrefetchConfig(num_threads=0)
NAMES = {"token_ids", "segment_ids", "positions", "trained_mask", "kind_ids"}


def make_example(number):
    """An example whose every token says which example it is of, and where in it."""
    length = int(np.random.default_rng(number).integers(2, 25))
    return Example(
        token_ids=(number * 100 + np.arange(length)).astype(np.int32),
        trained_mask=np.arange(length) % 3 > 0,
        kind=ALL_KINDS[number % 4],
        id=f"d{number}",
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    entries = [Entry("train", ("one", "two")[n % 2], make_example(n)) for n in range(NUM_EXAMPLES)]
    write_examples(folder, [entries], sources=["one", "two"], description="")
    return TokenDataset(folder, "train")


def training_rows(dataset, seed=0, **fields):
    mixture = Mixture(dataset.source_ids, dataset.sources, one_epoch_each(dataset.sources), seed=0)
    config = RowConfig(row_length=ROW_LENGTH, **fields)
    return RowStream(dataset, config, mixture=mixture, seed=seed)


def take(iterator, number):
    return list(itertools.islice(iterator, number))


def stacked(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in NAMES}


def assert_same(first, second):
    assert set(first) == set(second) == NAMES
    for name in NAMES:
        np.testing.assert_array_equal(first[name], second[name], strict=True)


def examples_seen(batch):
    """The numbers of the examples whose first token is in a batch."""
    starts = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
    return (batch["token_ids"][starts] // 100).tolist()


def test_batches_are_dicts_of_fixed_shapes_and_types(dataset):
    batches = BatchIterator(training_rows(dataset), batch_size=4, prefetch=NO_THREADS)
    for batch in take(batches, 12):
        assert set(batch) == NAMES
        for name, array in batch.items():
            assert array.shape == (4, ROW_LENGTH)
            assert array.dtype == (np.bool_ if name == "trained_mask" else np.int32)


@pytest.mark.parametrize("packed", [True, False])
def test_each_epoch_of_the_stream_holds_every_dialogue_once_and_whole(dataset, packed):
    rows = training_rows(dataset, packed=packed)
    ends = [rows.first_row(epoch) for epoch in range(4)]
    batches = BatchIterator(rows, batch_size=1, prefetch=NO_THREADS)
    everything = take(batches, ends[-1])
    for start, end in itertools.pairwise(ends):
        seen = sum((examples_seen(batch) for batch in everything[start:end]), [])
        assert sorted(seen) == list(range(NUM_EXAMPLES))
        num_tokens = sum(int((batch["segment_ids"] > 0).sum()) for batch in everything[start:end])
        assert num_tokens == dataset.lengths.sum()


def test_epochs_and_seeds_differ_in_order(dataset):
    rows, other = training_rows(dataset, seed=0), training_rows(dataset, seed=1)
    first_rows = [[tuple(rows.plan(epoch)[row]) for row in range(5)] for epoch in range(2)]
    assert first_rows[0] != first_rows[1]
    assert first_rows[0] != [tuple(other.plan(0)[row]) for row in range(5)]


def test_the_saved_position_is_one_number_that_json_can_say(dataset):
    batches = BatchIterator(training_rows(dataset), batch_size=4)
    take(batches, 3)
    assert json.loads(json.dumps(batches.get_state())) == {"next_row": 12}
    batches.close()


@pytest.mark.parametrize("prefetch", [NO_THREADS, PrefetchConfig(num_threads=3, num_batches=5)])
def test_resuming_at_every_position_gives_the_unbroken_stream(dataset, prefetch):
    unbroken = BatchIterator(training_rows(dataset), batch_size=4, prefetch=NO_THREADS)
    num_batches = training_rows(dataset).first_row(3) // 4
    states, batches = [], []
    for _ in range(num_batches):
        states.append(unbroken.get_state())
        batches.append(next(unbroken))
    resumed = BatchIterator(training_rows(dataset), batch_size=4, prefetch=prefetch)
    for position in reversed(range(num_batches)):
        resumed.set_state(states[position])
        for expected in batches[position : position + 3]:
            assert_same(next(resumed), expected)
    resumed.close()


def test_a_position_is_taken_up_by_any_number_of_hosts(dataset):
    batch_size, num_batches = 8, 9
    unbroken = take(
        BatchIterator(training_rows(dataset), batch_size=batch_size, prefetch=NO_THREADS),
        num_batches,
    )
    state = {"next_row": 0}
    found = []
    for num_hosts in (1, 2, 4, 8, 2, 1, 4, 8, 4):
        hosts = [
            BatchIterator(
                training_rows(dataset),
                batch_size=batch_size,
                share=HostShare(host=host, num_hosts=num_hosts),
                prefetch=NO_THREADS,
            )
            for host in range(num_hosts)
        ]
        parts = []
        for host in hosts:
            host.set_state(state)
            parts.append(next(host))
            assert parts[-1]["token_ids"].shape == (batch_size // num_hosts, ROW_LENGTH)
        states = [host.get_state() for host in hosts]
        assert all(one == states[0] for one in states)
        state = states[0]
        found.append(stacked(parts))
    for one, expected in zip(found, unbroken, strict=True):
        assert_same(one, expected)


def test_another_batch_size_goes_on_with_the_next_row(dataset):
    rows = stacked(
        take(BatchIterator(training_rows(dataset), batch_size=1, prefetch=NO_THREADS), 40)
    )
    first = BatchIterator(training_rows(dataset), batch_size=5, prefetch=NO_THREADS)
    start = take(first, 2)
    second = BatchIterator(training_rows(dataset), batch_size=3, prefetch=NO_THREADS)
    second.set_state(first.get_state())
    assert_same(stacked(start + take(second, 10)), rows)


@pytest.mark.slow
def test_processes_give_the_batches_that_threads_give(dataset):
    expected = take(BatchIterator(training_rows(dataset), batch_size=4, prefetch=NO_THREADS), 10)
    batches = BatchIterator(
        training_rows(dataset),
        batch_size=4,
        prefetch=PrefetchConfig(num_threads=1, num_batches=2, num_processes=2),
    )
    for batch in expected[:5]:
        assert_same(next(batches), batch)
    batches.set_state({"next_row": 12})
    for batch in expected[3:8]:
        assert_same(next(batches), batch)
    assert batches.get_state() == {"next_row": 32}
    batches.close()


def test_grains_checkpoint_handler_saves_and_restores_the_position(dataset, tmp_path):
    batches = BatchIterator(training_rows(dataset), batch_size=4, prefetch=NO_THREADS)
    take(batches, 5)
    handler = grain.checkpoint.CheckpointHandler()
    handler.save(tmp_path, batches)
    expected = take(batches, 3)
    restored = handler.restore(tmp_path, BatchIterator(training_rows(dataset), batch_size=4))
    for batch in expected:
        assert_same(next(restored), batch)
    restored.close()


@pytest.mark.parametrize("batch_size", [4, 7, 100])
def test_evaluation_sees_every_row_once_and_fills_up_the_last_batch(dataset, batch_size):
    rows = RowStream(dataset, RowConfig(row_length=ROW_LENGTH), mixture=None)
    batches = list(evaluation_batches(rows, batch_size=batch_size))
    num_rows = len(rows.plan(0))
    assert len(batches) == -(-num_rows // batch_size)
    everything = stacked(batches)
    assert everything["token_ids"].shape == (len(batches) * batch_size, ROW_LENGTH)
    assert sorted(examples_seen(everything)) == list(range(NUM_EXAMPLES))
    assert everything["trained_mask"].sum() == dataset.num_trained.sum()
    for name in NAMES:
        assert not everything[name][num_rows:].any()


def test_an_evaluation_that_is_over_stays_over(dataset):
    rows = RowStream(dataset, RowConfig(row_length=ROW_LENGTH), mixture=None)
    batches = evaluation_batches(rows, batch_size=7)
    list(batches)
    end = batches.get_state()
    for _ in range(2):
        assert next(batches, None) is None
        batches.set_state(end)
    batches.set_state({"next_row": 0})
    assert next(batches) is not None
    batches.close()


def test_hosts_agree_on_the_number_of_evaluation_batches(dataset):
    rows = RowStream(dataset, RowConfig(row_length=ROW_LENGTH), mixture=None)
    whole = list(evaluation_batches(rows, batch_size=20, prefetch=NO_THREADS))
    parts = [
        list(
            evaluation_batches(
                rows,
                batch_size=20,
                share=HostShare(host=host, num_hosts=4),
                prefetch=NO_THREADS,
            )
        )
        for host in range(4)
    ]
    for index, batch in enumerate(whole):
        assert_same(stacked([part[index] for part in parts]), batch)


def test_targets_per_kind_are_those_of_the_examples(dataset):
    rows = RowStream(dataset, RowConfig(row_length=ROW_LENGTH), mixture=None)
    batches = stacked(list(evaluation_batches(rows, batch_size=4, prefetch=NO_THREADS)))
    found = np.bincount(batches["kind_ids"][batches["trained_mask"]], minlength=4)
    expected = np.bincount(dataset.kind_ids, weights=dataset.num_trained, minlength=4)
    assert found.tolist() == expected.tolist()


def test_a_batch_is_cut_to_the_smallest_bucket_that_all_its_rows_fit(dataset):
    rows = training_rows(dataset, packed=False, buckets=(8, 16, 24))
    whole = training_rows(dataset, packed=False)
    hosts = [
        BatchIterator(
            rows,
            batch_size=2,
            share=HostShare(host=host, num_hosts=2),
            prefetch=NO_THREADS,
        )
        for host in range(2)
    ]
    expected = BatchIterator(whole, batch_size=2, prefetch=NO_THREADS)
    lengths = set()
    for parts in itertools.islice(zip(*hosts, strict=True), 30):
        batch, full = stacked(parts), next(expected)
        longest = int((full["segment_ids"] > 0).sum(axis=1).max())
        length = min(size for size in (8, 16, 24, 32) if size >= longest)
        lengths.add(length)
        assert_same(batch, {name: array[:, :length] for name, array in full.items()})
    assert len(lengths) > 1


def test_the_dialogues_of_a_row_can_be_named(dataset):
    rows = training_rows(dataset)
    row = rows.first_row(1) + 2
    batches = BatchIterator(rows, batch_size=1, prefetch=NO_THREADS)
    batches.set_state({"next_row": row})
    assert rows.ids_in(row) == [f"d{number}" for number in examples_seen(next(batches))]


def test_a_stream_in_another_process_has_the_same_rows(dataset):
    rows = training_rows(dataset)
    last = rows.first_row(2) - 1
    copy = pickle.loads(pickle.dumps(rows))
    assert copy.locate(last) == rows.locate(last) == (1, len(rows.plan(1)) - 1)
    assert_same(copy.read(last, row_length=32), rows.read(last, row_length=32))


def test_hosts_that_cannot_share_a_batch_are_refused(dataset):
    with pytest.raises(ValueError, match="batch_size: 6.*multiple.*4"):
        BatchIterator(training_rows(dataset), batch_size=6, share=HostShare(num_hosts=4))
    with pytest.raises(ValueError, match="host: 4"):
        HostShare(host=4, num_hosts=4)


def test_buckets_that_are_no_shorter_than_a_row_are_refused():
    with pytest.raises(ValueError, match="data.buckets"):
        RowConfig(row_length=32, buckets=(16, 32))
