import numpy as np

from huatuo_jax.data.mixture import mix_bits, permutation


def test_a_permutation_holds_every_index_once():
    for num_items in (0, 1, 2, 1000):
        assert sorted(permutation(num_items, "key", 0).tolist()) == list(range(num_items))


def test_a_permutation_follows_from_its_key():
    assert permutation(100, 1, "epoch", 2).tolist() == permutation(100, 1, "epoch", 2).tolist()
    assert permutation(100, np.int64(1)).tolist() == permutation(100, 1).tolist()
    others = [(2, "epoch", 2), (1, "epoch", 3), (1, "rows", 2), (1, "epoch", "2"), (12, "epoch")]
    for other in others:
        assert permutation(100, 1, "epoch", 2).tolist() != permutation(100, *other).tolist()


def test_a_permutation_is_the_same_in_every_release():
    # Saved positions point into these orders, so they may never change.
    assert permutation(10, 0, "epoch", 0).tolist() == [4, 8, 7, 1, 2, 5, 9, 3, 6, 0]


def test_bits_are_mixed_as_the_reference_does():
    # The first three numbers of SplitMix64 from state 1234567, as published with its C code.
    golden = np.uint64(0x9E3779B97F4A7C15)
    states = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * golden
    assert mix_bits(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_every_place_gets_every_item_equally_often():
    counts = np.zeros((8, 8))
    for epoch in range(4000):
        counts[np.arange(8), permutation(8, "uniform", epoch)] += 1
    # 500 each, standard deviation 21.
    assert np.abs(counts - 500).max() < 5 * 21
