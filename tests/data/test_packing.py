import itertools

import numpy as np
import pytest

from huatuo_jax.data.batches import best_fit_rows, pack_row, plan_rows
from huatuo_jax.data.tokenizing import ALL_KINDS, Example


def first_fit_decreasing(lengths, row_length):
    rooms = []
    for length in sorted(lengths, reverse=True):
        for row, room in enumerate(rooms):
            if room >= length:
                rooms[row] -= length
                break
        else:
            rooms.append(row_length - length)
    return len(rooms)


def best_fit_by_search(lengths, row_length):
    """Best fit decreasing as its definition reads, over a plain list of rooms."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda row: rooms[row])] -= length
        else:
            rooms.append(row_length - length)
    return sorted(rooms)


def fewest_rows(lengths, row_length):
    """The optimum, by trying every distribution: place each example in an open or a new row."""
    best = len(lengths)

    def place(index, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if index == len(lengths):
            best = len(rooms)
            return
        for row, room in enumerate(rooms):
            if room >= lengths[index]:
                place(index + 1, [*rooms[:row], room - lengths[index], *rooms[row + 1 :]])
        place(index + 1, [*rooms, row_length - lengths[index]])

    place(0, [])
    return best


def make_example(length, kind_id=0, seed=0, name="x"):
    random = np.random.default_rng(seed)
    return Example(
        token_ids=random.integers(1, 100, length).astype(np.int32),
        trained_mask=random.integers(0, 2, length).astype(bool),
        kind=ALL_KINDS[kind_id],
        id=name,
    )


@pytest.mark.parametrize("seed", range(20))
def test_small_packings_are_within_the_bound_of_the_best_one(seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 20, size=8)
    _, num_rows = best_fit_rows(lengths, 20)
    best = fewest_rows(lengths.tolist(), 20)
    assert best <= num_rows <= 11 / 9 * best + 1


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("window", [None, 64, 7, 1])
def test_every_example_stands_in_one_row_and_no_row_is_over_full(seed, window):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 65, size=300)
    order = random.permutation(300)
    plan = plan_rows(lengths, order, row_length=64, window=window, key=(seed,))
    rows = [plan[row] for row in range(len(plan))]
    assert sorted(np.concatenate(rows).tolist()) == list(range(300))
    assert all(1 <= lengths[row].sum() <= 64 for row in rows)
    assert plan.tokens_per_row.tolist() == [lengths[row].sum() for row in rows]
    assert plan.efficiency == pytest.approx(lengths.sum() / (64 * len(rows)))


@pytest.mark.parametrize("seed", range(10))
def test_it_packs_as_best_fit_decreasing_and_no_worse_than_first_fit(seed):
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(3.0, 0.8, size=500), 1, 128).astype(np.int64)
    row_of, num_rows = best_fit_rows(lengths, 128)
    rooms = 128 - np.bincount(row_of, weights=lengths)
    assert sorted(rooms.tolist()) == best_fit_by_search(lengths.tolist(), 128)
    assert num_rows <= first_fit_decreasing(lengths.tolist(), 128)
    assert num_rows <= np.ceil(lengths.sum() / 128) * 1.02 + 1


def test_a_window_packs_only_neighbours_of_the_order_together():
    random = np.random.default_rng(0)
    lengths = random.integers(1, 33, size=200)
    order = random.permutation(200)
    place = np.argsort(order)
    plan = plan_rows(lengths, order, row_length=64, window=50)
    for row in range(len(plan)):
        assert len(set((place[plan[row]] // 50).tolist())) == 1


def test_a_plan_follows_from_its_arguments_and_its_key_reorders_the_rows():
    lengths = np.random.default_rng(0).integers(1, 33, size=200)
    first, again, other = (
        plan_rows(lengths, np.arange(200), row_length=64, key=key)
        for key in [("seed", 0), ("seed", 0), ("seed", 1)]
    )
    as_rows = [[tuple(plan[row]) for row in range(len(plan))] for plan in (first, again, other)]
    assert as_rows[0] == as_rows[1] != as_rows[2]
    assert sorted(as_rows[0]) == sorted(as_rows[2])


def test_the_rows_of_a_plan_are_not_ordered_by_length():
    lengths = np.random.default_rng(0).integers(1, 129, size=2000)
    plan = plan_rows(lengths, np.arange(2000), row_length=128)
    longest = np.array([lengths[plan[row]].max() for row in range(len(plan))])
    halves = longest[: len(plan) // 2].mean(), longest[len(plan) // 2 :].mean()
    assert halves[0] == pytest.approx(halves[1], rel=0.05)


def test_without_packing_each_example_has_its_row_in_the_given_order():
    plan = plan_rows([3, 5, 4], [2, 0, 1, 2], row_length=8, packed=False)
    assert [plan[row].tolist() for row in range(len(plan))] == [[2], [0], [1], [2]]
    assert plan.efficiency == 16 / 32


@pytest.mark.parametrize("lengths", [[3, 9, 4], [3, 0, 4]])
def test_an_example_that_fits_no_row_is_an_error_that_names_it(lengths):
    with pytest.raises(ValueError, match=f"example 1 with {lengths[1]}"):
        plan_rows(lengths, [0, 1, 2], row_length=8)


def test_a_row_holds_what_a_plain_loop_would_put_there():
    examples = [make_example(length, kind_id=length % 4, seed=length) for length in (5, 1, 4)]
    row = pack_row(examples, row_length=13, pad_token_id=7)
    place = 0
    for number, example in enumerate(examples, start=1):
        for t in range(len(example.token_ids)):
            assert row["token_ids"][place] == example.token_ids[t]
            assert row["segment_ids"][place] == number
            assert row["positions"][place] == t
            assert row["kind_ids"][place] == ALL_KINDS.index(example.kind)
            assert row["trained_mask"][place] == (t > 0 and example.trained_mask[t])
            place += 1
    assert place == 10
    assert row["token_ids"][place:].tolist() == [7, 7, 7]
    for name in ("segment_ids", "positions", "kind_ids", "trained_mask"):
        assert not row[name][place:].any()


def test_no_target_is_predicted_across_the_border_of_two_dialogues():
    examples = [make_example(length, seed=length) for length in (6, 3, 5, 2)]
    row = pack_row(examples, row_length=16, pad_token_id=0)
    targets = np.flatnonzero(row["trained_mask"])
    assert len(targets)
    assert (row["segment_ids"][targets] == row["segment_ids"][targets - 1]).all()
    assert (row["segment_ids"][targets] > 0).all()


def test_a_row_without_examples_is_padding():
    row = pack_row([], row_length=4, pad_token_id=9)
    assert row["token_ids"].tolist() == [9] * 4
    assert not any(row[name].any() for name in row if name != "token_ids")


def test_too_many_examples_for_a_row_are_refused():
    with pytest.raises(ValueError, match="12 tokens do not fit a row of 11"):
        pack_row([make_example(6), make_example(6)], row_length=11, pad_token_id=0)


def test_a_hundred_thousand_examples_pack_almost_without_padding():
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5.5, 0.8, size=100_000), 5, 2048).astype(np.int64)
    plan = plan_rows(lengths, np.arange(100_000), row_length=2048)
    assert plan.efficiency > 0.995


def test_all_pairs_of_two_lengths_share_a_row_where_they_can():
    for first, second in itertools.product(range(1, 9), repeat=2):
        _, num_rows = best_fit_rows(np.array([first, second]), 8)
        assert num_rows == (1 if first + second <= 8 else 2)
