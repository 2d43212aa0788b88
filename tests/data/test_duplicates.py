import time

import numpy as np
import pytest

from huatuo_jax.data.mixture import (
    DuplicatesConfig,
    find_duplicates,
    jaccard,
    near_duplicates,
    ngram_hashes,
    repetitions,
    signature,
)

CHARACTERS = np.array([chr(code) for code in range(0x4E00, 0x4E00 + 800)])


def random_text(random, length):
    return "".join(random.choice(CHARACTERS, length))


def edited(random, text, num_edits):
    characters = list(text)
    for place in random.choice(len(characters), num_edits, replace=False):
        characters[place] = random.choice(CHARACTERS)
    return "".join(characters)


def jaccard_of_strings(left, right, ngram):
    sets = [{text[i : i + ngram] for i in range(len(text) - ngram + 1)} for text in (left, right)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_the_jaccard_index_is_that_of_the_sets_of_ngrams():
    random = np.random.default_rng(0)
    for num_edits in (0, 1, 5, 20):
        text = random_text(random, 200)
        other = edited(random, text, num_edits) + text[:10]
        found = jaccard(ngram_hashes(text, 5), ngram_hashes(other, 5))
        assert found == pytest.approx(jaccard_of_strings(text, other, 5))


def test_texts_shorter_than_an_ngram_equal_only_themselves():
    texts = ["", "是", "是的", "的是", "是的是的"]
    for i, left in enumerate(texts):
        for j, right in enumerate(texts):
            similarity = jaccard(ngram_hashes(left, 5), ngram_hashes(right, 5))
            assert similarity == (1.0 if i == j else 0.0)


def test_signatures_agree_as_often_as_the_jaccard_index_says():
    random = np.random.default_rng(1)
    config = DuplicatesConfig(num_hashes=4096, num_bands=32)
    text = random_text(random, 300)
    for num_edits in (3, 10, 40):
        other = edited(random, text, num_edits)
        agreement = np.mean(signature(text, config) == signature(other, config))
        expected = jaccard_of_strings(text, other, config.ngram)
        assert agreement == pytest.approx(expected, abs=5 * 0.5 / np.sqrt(4096))


def test_small_edits_are_found_and_different_texts_are_not():
    random = np.random.default_rng(2)
    held_out = [random_text(random, 200) for _ in range(50)]
    close = [edited(random, text, 3) for text in held_out[:30]]
    far = [edited(random, text, 60) for text in held_out]
    train = [*far, *close, *(random_text(random, 200) for _ in range(300))]
    config = DuplicatesConfig(threshold=0.8)
    found = near_duplicates(train, held_out, config)
    assert {(pair.train, pair.held_out) for pair in found} == {(50 + i, i) for i in range(30)}
    for pair in found:
        expected = jaccard_of_strings(train[pair.train], held_out[pair.held_out], 5)
        assert pair.similarity == pytest.approx(expected)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_the_search_finds_what_comparing_all_pairs_finds(threshold):
    random = np.random.default_rng(3)
    held_out = [random_text(random, 120) for _ in range(40)]
    train = [edited(random, text, edits) for text in held_out for edits in (0, 1, 2, 4, 8)]
    everything = {
        (i, j)
        for i, left in enumerate(train)
        for j, right in enumerate(held_out)
        if jaccard_of_strings(left, right, 5) >= threshold
    }
    config = DuplicatesConfig(threshold=threshold)
    found = {(pair.train, pair.held_out) for pair in near_duplicates(train, held_out, config)}
    assert found <= everything
    # At 0.5 the bands miss one pair in eight, from 0.7 on practically none.
    assert len(found) >= len(everything) * (0.8 if threshold == 0.5 else 1.0)


def test_repetitions_are_all_but_the_first():
    assert repetitions(["a", "b", "a", "c", "b", "a"]) == [2, 4, 5]


def test_a_report_tells_the_sorts_of_duplicates_apart():
    random = np.random.default_rng(4)
    one, two, three = (random_text(random, 100) for _ in range(3))
    almost_two = edited(random, two, 1)
    train = [one, three, one, almost_two, two]
    report = find_duplicates(train, [two, "别的", "别的"], DuplicatesConfig())
    assert report.repeated_in_train == [2]
    assert report.repeated_in_held_out == [2]
    assert report.held_out_too == [4]
    assert [(pair.train, pair.held_out) for pair in report.nearly_held_out] == [(3, 0)]
    assert report.removable == {2, 3, 4}


def test_empty_lists_have_no_duplicates():
    assert near_duplicates([], ["a"], DuplicatesConfig()) == []
    assert near_duplicates(["a"], [], DuplicatesConfig()) == []


def test_thousands_of_texts_take_seconds():
    random = np.random.default_rng(5)
    texts = [random_text(random, 300) for _ in range(2000)]
    began = time.process_time()
    near_duplicates(texts[:1900], texts[1900:], DuplicatesConfig())
    # 13,000 in a minute would be 9 s for these; they take about 1 s of an idle core.
    assert time.process_time() - began < 9


@pytest.mark.parametrize(
    "fields", [{"threshold": 0.4}, {"threshold": 1.1}, {"ngram": 0}, {"num_bands": 5}]
)
def test_settings_the_search_cannot_serve_are_refused(fields):
    with pytest.raises(ValueError, match=f"duplicates.{next(iter(fields))}"):
        DuplicatesConfig(**fields)
