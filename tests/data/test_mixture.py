from collections import Counter

import numpy as np
import pytest

from huatuo_jax.data.mixture import Mixture, SourceShare, one_epoch_each

NAMES = ("small", "large", "other")
SOURCE_IDS = np.repeat([0, 1, 2], [10, 100, 40])


def per_source(examples):
    return Counter(NAMES[source] for source in SOURCE_IDS[examples])


def test_an_epoch_of_the_plain_mixture_is_a_permutation_of_all_examples():
    mixture = Mixture(SOURCE_IDS, NAMES, one_epoch_each(NAMES), seed=3)
    assert len(mixture) == 150
    for epoch in range(3):
        assert sorted(mixture.epoch(epoch).tolist()) == list(range(150))


def test_the_order_is_a_function_of_seed_and_epoch():
    orders = {
        (seed, epoch): Mixture(SOURCE_IDS, NAMES, one_epoch_each(NAMES), seed=seed)
        .epoch(epoch)
        .tolist()
        for seed in range(2)
        for epoch in range(2)
    }
    again = Mixture(SOURCE_IDS, NAMES, one_epoch_each(NAMES), seed=1)
    assert again.epoch(1).tolist() == orders[1, 1]
    assert len({tuple(order) for order in orders.values()}) == 4


def test_a_fraction_of_a_source_repeats_nothing_and_the_next_epochs_take_the_rest():
    shares = [SourceShare(name="large", epochs=0.25)]
    mixture = Mixture(SOURCE_IDS, NAMES, shares, seed=0)
    epochs = [mixture.epoch(epoch).tolist() for epoch in range(4)]
    assert [len(epoch) for epoch in epochs] == [25] * 4
    assert sorted(sum(epochs, [])) == list(range(10, 110))


def test_a_fraction_that_does_not_divide_repeats_nothing_within_an_epoch_either():
    mixture = Mixture(SOURCE_IDS, NAMES, [SourceShare(name="large", epochs=0.7)], seed=0)
    seen = Counter()
    for epoch in range(10):
        examples = mixture.epoch(epoch).tolist()
        assert len(set(examples)) == len(examples) == 70
        seen.update(examples)
        assert max(seen.values()) - min(seen[i] for i in range(10, 110)) <= 1
    assert set(seen.values()) == {7}


def test_more_than_one_epoch_repeats_every_example_evenly():
    mixture = Mixture(SOURCE_IDS, NAMES, [SourceShare(name="small", epochs=2.5)], seed=0)
    counts = Counter(mixture.epoch(0).tolist())
    assert len(mixture) == 25
    assert set(counts) == set(range(10))
    assert Counter(counts.values()) == {2: 5, 3: 5}


def test_equal_weights_are_equal_shares_on_any_python():
    """Added one after another, as `sum` did before Python 3.12, ten times 0.1 is less than 1."""
    shares = [SourceShare(name=f"s{n}", weight=0.1) for n in range(10)]
    names = [share.name for share in shares]
    source_ids = np.array([n % 10 for n in range(25)], np.int32)
    mixture = Mixture(source_ids, names, shares, seed=0)  # 2.5 examples each, rounded to even
    assert set(mixture.examples_per_source.values()) == {2}


def test_weights_are_shares_of_the_mixture():
    shares = [
        SourceShare(name="small", weight=1.0),
        SourceShare(name="large", weight=2.0),
        SourceShare(name="other", weight=2.0),
    ]
    mixture = Mixture(SOURCE_IDS, NAMES, shares, seed=0)
    assert mixture.examples_per_source == {"small": 30, "large": 60, "other": 60}
    assert per_source(mixture.epoch(5)) == mixture.examples_per_source


def test_a_limit_is_a_fixed_choice_of_examples():
    shares = [SourceShare(name="large", limit=30), SourceShare(name="small", limit=99)]
    mixture = Mixture(SOURCE_IDS, NAMES, shares, seed=0)
    assert mixture.examples_per_source == {"large": 30, "small": 10}
    first, second = (set(mixture.epoch(epoch).tolist()) for epoch in range(2))
    assert first == second
    assert first & set(range(10, 110)) != set(range(10, 40))


@pytest.mark.parametrize(
    "shares, message",
    [
        ([SourceShare(name="absent")], "no source is named 'absent'"),
        ([SourceShare(name="small"), SourceShare(name="small")], "named 2 times"),
        ([SourceShare(name="small", weight=1.0), SourceShare(name="large")], "large.*no weight"),
        ([SourceShare(name="small", epochs=0.01)], "mixture.small.*less than one"),
        ([], "no source"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(shares, message):
    with pytest.raises(ValueError, match=message):
        Mixture(SOURCE_IDS, NAMES, shares, seed=0)


@pytest.mark.parametrize("fields", [{"epochs": 0.0}, {"weight": -1.0}, {"limit": 0}])
def test_an_amount_that_is_not_positive_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        SourceShare(name="small", **fields)


def test_two_amounts_at_once_are_refused():
    with pytest.raises(ValueError, match="one of them"):
        SourceShare(name="small", epochs=1.0, weight=1.0)
