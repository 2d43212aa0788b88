"""Rows: every pair of an epoch once, its answers beside it, at a position that is one number."""

import itertools

import numpy as np
import pytest

from huatuo_jax.data.batches import (
    BatchIterator,
    HostShare,
    PrefetchConfig,
    evaluation_batches,
)
from huatuo_jax.preferences.rows import ComparisonRows, RowsConfig, parts_of
from tests.preferences.tiny import token_groups

GROUPS = token_groups([2, 3, 2, 5, 2, 2, 4, 2, 3, 2], soft=True)


def _pairs_in(row):
    """(chosen ids, rejected ids, label, margin, weight) of each pair, read out of the arrays."""
    for place in np.flatnonzero(row["pair_weight"]):
        both = []
        for name in ("chosen_at", "rejected_at"):
            end = row[name][place]
            segment = row["segment_ids"] == row["segment_ids"][end]
            ids = row["token_ids"][segment]
            assert np.flatnonzero(segment)[-1] == end
            np.testing.assert_array_equal(row["positions"][segment], np.arange(len(ids)))
            both.append(tuple(ids.tolist()))
        numbers = (row[name][place] for name in ("p_chosen", "margin", "pair_weight"))
        yield (*both, *(round(float(number), 5) for number in numbers))


def _expected(groups, weight):
    for group in groups:
        for pair in group.pairs:
            ids = (tuple(group.answers[i].token_ids.tolist()) for i in (pair.chosen, pair.rejected))
            margin = pair.margin or 0.0
            yield (*ids, *(round(x, 5) for x in (pair.p_chosen, margin, weight(group))))


@pytest.mark.parametrize(("row_length", "packed"), [(200, True), (75, False), (32, True)])
@pytest.mark.parametrize("denominator", ["pairs", "prompts"])
def test_every_pair_is_in_each_epoch_once_with_its_answers_in_its_row(
    row_length, packed, denominator
):
    cfg = RowsConfig(row_length=row_length, packed=packed, denominator=denominator, pad_token_id=9)
    rows = ComparisonRows(GROUPS, cfg)
    expected = sorted(
        _expected(GROUPS, lambda g: 1.0 if denominator == "pairs" else 1 / len(g.pairs))
    )
    for epoch in range(3):
        numbers = range(rows.first_row(epoch), rows.first_row(epoch + 1))
        places = rows.most_pairs(numbers.stop)
        read = [rows.read(row, num_pairs=places) for row in numbers]
        assert sorted(itertools.chain(*map(_pairs_in, read))) == expected
    order = [rows.parts_in(0), rows.parts_in(rows.first_row(1))]
    assert [one.id for one in order[0]] != [one.id for one in order[1]] or row_length == 32


def test_an_answer_goes_through_the_model_once_where_its_group_fits_a_row():
    rows = ComparisonRows(GROUPS, RowsConfig(row_length=200))
    assert rows.num_repeated == 0
    read = [rows.read(row, num_pairs=rows.most_pairs(1)) for row in range(rows.first_row(1))]
    assert sum(int(row["segment_ids"].max()) for row in read) == sum(
        len(group.answers) for group in GROUPS
    )


def test_a_group_that_fits_no_row_keeps_all_its_pairs_in_parts():
    group = max(GROUPS, key=lambda one: len(one.answers))
    whole = sum(len(one.token_ids) for one in group.answers)
    parts = parts_of(group, row_length=whole - 1, denominator="prompts")
    assert len(parts) > 1 and all(part.num_tokens < whole for part in parts)
    found = [
        (part.answers[pair.chosen], part.answers[pair.rejected])
        for part in parts
        for pair in part.pairs
    ]
    expected = [(group.answers[p.chosen], group.answers[p.rejected]) for p in group.pairs]
    assert sorted(map(str, found)) == sorted(map(str, expected))
    assert sum(part.weight * len(part.pairs) for part in parts) == pytest.approx(1)
    assert ComparisonRows([group], RowsConfig(row_length=whole - 1)).num_repeated > 0


def test_a_stream_goes_on_from_its_position_on_any_number_of_hosts():
    rows = ComparisonRows(GROUPS, RowsConfig(row_length=64))
    plain = BatchIterator(rows.reading(40), batch_size=4)
    batches = [next(plain) for _ in range(8)]
    assert plain.get_state() == {"next_row": 32}
    other = ComparisonRows(GROUPS, RowsConfig(row_length=64))
    hosts = [
        BatchIterator(other.reading(40), batch_size=4, share=HostShare(host=host, num_hosts=2))
        for host in range(2)
    ]
    for host in hosts:
        host.set_state({"next_row": 20})
    for batch in batches[5:]:
        halves = [next(host) for host in hosts]
        for name, values in batch.items():
            np.testing.assert_array_equal(values, np.concatenate([half[name] for half in halves]))


def test_evaluation_gives_each_pair_once_and_fills_up_with_empty_rows():
    rows = ComparisonRows(GROUPS, RowsConfig(row_length=64, shuffled=False))
    end = rows.first_row(1)
    read = list(evaluation_batches(rows, batch_size=3))
    assert len(read) == -(-end // 3)
    assert sum(float(batch["pair_weight"].sum()) for batch in read) == sum(
        len(group.pairs) for group in GROUPS
    )
    assert {batch["token_ids"].shape for batch in read} == {(3, 64)}


def test_batches_that_threads_make_ahead_are_those_made_when_asked_for():
    found = []
    for num_threads in (0, 2):
        rows = ComparisonRows(GROUPS, RowsConfig(row_length=64))
        batches = BatchIterator(
            rows.reading(40),
            batch_size=4,
            prefetch=PrefetchConfig(num_threads=num_threads),
            end_row=40,
        )
        found.append(list(batches))
    assert len(found[0]) == len(found[1]) == 10
    for asked, ahead in zip(*found, strict=True):
        assert asked.keys() == ahead.keys()
        for name in asked:
            np.testing.assert_array_equal(asked[name], ahead[name])
