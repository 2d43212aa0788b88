"""Kappas, against scikit-learn, a plain loop, and the example in Fleiss' paper."""

import random

import pytest
from sklearn.metrics import cohen_kappa_score

from huatuo_jax.core.statistics import agreement_share, cohen_kappa, fleiss_kappa


@pytest.mark.parametrize("seed", range(20))
def test_cohens_kappa_equals_that_of_scikit_learn(seed):
    draw = random.Random(seed)
    labels = [draw.choice(["win", "tie", "loss"][: 2 + seed % 2]) for _ in range(40)]
    others = [one if draw.random() < 0.6 else draw.choice(["win", "tie", "loss"]) for one in labels]
    assert cohen_kappa(labels, others) == pytest.approx(
        cohen_kappa_score(labels, others), abs=1e-12
    )


def test_cohens_kappa_has_the_value_of_its_definition():
    # 7 of 10 agree; by chance .5 * .6 + .5 * .4 would.
    labels, others = "aaaaabbbbb", "aaaabbbbaa"
    assert cohen_kappa(labels, others) == pytest.approx((0.7 - 0.5) / (1 - 0.5))
    assert agreement_share(labels, others) == 0.7


def test_without_items_or_with_one_label_alone_there_is_no_kappa():
    assert cohen_kappa([], []) is None
    assert cohen_kappa("aaa", "aaa") is None
    assert cohen_kappa("aaa", "bbb") == 0.0
    assert agreement_share([], []) is None
    with pytest.raises(ValueError, match="kappa of 2 labels and 3"):
        cohen_kappa("ab", "abc")


# Ten items, fourteen raters, five categories: the numbers of labels a category (Fleiss 1971).
EXAMPLE = [
    (0, 0, 0, 0, 14),
    (0, 2, 6, 4, 2),
    (0, 0, 3, 5, 6),
    (0, 3, 9, 2, 0),
    (2, 2, 8, 1, 1),
    (7, 7, 0, 0, 0),
    (3, 2, 6, 3, 0),
    (2, 5, 3, 2, 2),
    (6, 5, 2, 1, 0),
    (0, 2, 2, 3, 7),
]


def labelled(table):
    return [[c for c, count in enumerate(row) for _ in range(count)] for row in table]


def plain_fleiss(table):
    """The formula of the paper, and of statsmodels, term by term."""
    size, num = sum(table[0]), len(table)
    shares = [sum(row[c] for row in table) / (num * size) for c in range(len(table[0]))]
    agreed = [(sum(n * n for n in row) - size) / (size * (size - 1)) for row in table]
    expected = sum(share * share for share in shares)
    return (sum(agreed) / num - expected) / (1 - expected)


def test_fleiss_kappa_is_that_of_the_example():
    assert fleiss_kappa(labelled(EXAMPLE)) == pytest.approx(0.20993, abs=5e-6)


@pytest.mark.parametrize("seed", range(10))
def test_fleiss_kappa_equals_the_formula_term_by_term(seed):
    draw = random.Random(seed)
    items = [[draw.randrange(3) for _ in range(2 + seed % 3)] for _ in range(15)]
    table = [[item.count(c) for c in range(3)] for item in items]
    assert fleiss_kappa(items) == pytest.approx(plain_fleiss(table), abs=1e-12)


def test_fleiss_kappa_needs_two_labels_an_item_and_as_many_for_each():
    assert fleiss_kappa([]) is None
    assert fleiss_kappa([["a"], ["b"]]) is None
    assert fleiss_kappa([["a", "a"], ["a", "a"]]) is None
    assert fleiss_kappa([["a", "a"], ["b", "b"]]) == 1.0
    with pytest.raises(ValueError, match=r"items with \[2, 3\] labels"):
        fleiss_kappa([["a", "a"], ["a", "b", "a"]])
