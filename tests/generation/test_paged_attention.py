"""Attention over pages against attention over whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.core import sharding
from huatuo_jax.generation import cache as caches
from huatuo_jax.generation.cache import PageTable
from huatuo_jax.generation.forward import attend_pages

LENGTHS = np.array([1, 16, 5, 0, 23, 8])  # Row 3 is free.
PAGE, MAX_LENGTH, HEADS, KV_HEADS, WIDTH = 4, 24, 6, 2, 5
CASES = {
    "plain": (None, None),
    "window": (7, None),
    "alibi": (None, np.linspace(0.1, 0.9, HEADS).astype(np.float32)),
    "window and alibi": (3, np.linspace(0.1, 0.9, HEADS).astype(np.float32)),
}


def rows_of_keys(seed=0):
    generator = np.random.default_rng(seed)
    shape = (len(LENGTHS), MAX_LENGTH, KV_HEADS, WIDTH)
    keys, values = (generator.normal(size=shape).astype(np.float32) * 2 for _ in range(2))
    queries = generator.normal(size=(len(LENGTHS), HEADS, WIDTH)).astype(np.float32)
    return queries, keys, values


def by_hand(queries, keys, values, window, slopes):
    """What each row gathers, head by head in float64."""
    gathered = np.zeros(queries.shape)
    for row, length in enumerate(LENGTHS):
        places = np.arange(0 if window is None else max(0, length - window), length)
        for head in range(HEADS if length else 0):
            group = head // (HEADS // KV_HEADS)
            keys_SH = keys[row, places, group].astype(np.float64)
            scores_S = keys_SH @ queries[row, head] / np.sqrt(WIDTH)
            if slopes is not None:
                scores_S -= slopes[head] * (length - 1.0 - places)
            weights_S = np.exp(scores_S - scores_S.max())
            gathered[row, head] = weights_S @ values[row, places, group] / weights_S.sum()
    return gathered


def in_pages(rows_BSKH, pages, num_pages):
    """The rows' content where the table says; NaN-free rubbish wherever nothing was written."""
    rubbish = np.random.default_rng(5).normal(size=(num_pages, KV_HEADS, PAGE, WIDTH)) * 9
    pool_PKSH = rubbish.astype(np.float32)
    for page in range(num_pages):
        row, start = pages.rows_P[page], pages.starts_P[page]
        for place in range(PAGE):
            if row >= 0 and start + place < LENGTHS[row]:
                pool_PKSH[page, :, place] = rows_BSKH[row, start + place]
    return pool_PKSH


def shuffled_table(seed, num_pages=40):
    """Pages that rows took in turns and gave back in between, so that they lie mixed."""
    generator = np.random.default_rng(seed)
    table = PageTable(rows=len(LENGTHS), pages_per_row=MAX_LENGTH // PAGE, page_size=PAGE)
    table.grow(num_pages)
    for _ in range(6):
        table.fit(generator.integers(0, MAX_LENGTH + 1, len(LENGTHS)))
    table.fit(np.where(LENGTHS > 0, np.minimum(LENGTHS + 5, MAX_LENGTH), 0))
    return table.pages


def gathered(
    pages, num_pages, window, slopes, dtype=np.float32, *, apart=False, positions_last=False
):
    """`apart` gives the keys and values of the queries apart; the pages hold others then."""
    queries, keys, values = rows_of_keys()
    last = np.arange(len(LENGTHS)), np.maximum(LENGTHS - 1, 0)
    own = None
    if apart:
        own = tuple(jnp.asarray(rows[last], dtype) for rows in (keys, values))
        keys[last], values[last] = 1e4, 1e4
    pools = [in_pages(rows, pages, num_pages) for rows in (keys, values)]
    if positions_last:
        pools[0] = pools[0].swapaxes(2, 3)
    queries, *pools = (jnp.asarray(array, dtype) for array in (queries, *pools))
    return np.asarray(
        jax.jit(attend_pages, static_argnames=("sliding_window", "keys_positions_last"))(
            queries,
            own,
            *pools,
            pages,
            jnp.asarray(last[1]),
            sliding_window=window,
            alibi_slopes_N=slopes,
            keys_positions_last=positions_last,
        )
    )


@pytest.mark.parametrize("apart", [False, True], ids=["own in pages", "own apart"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("positions_last", [False, True], ids=["PKSH", "PKHS"])
def test_rows_gather_from_pages_what_they_gather_from_whole_rows(case, apart, positions_last):
    window, slopes = CASES[case]
    queries, keys, values = rows_of_keys()
    expected = by_hand(queries, keys, values, window, slopes)
    found = gathered(
        shuffled_table(1), 40, window, slopes, apart=apart, positions_last=positions_last
    )
    owned = LENGTHS > 0
    np.testing.assert_allclose(found[owned], expected[owned], rtol=2e-5, atol=2e-6)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("apart", [False, True], ids=["own in pages", "own apart"])
def test_what_rows_gather_is_the_same_to_the_bit_wherever_their_pages_lie(apart):
    window, slopes = CASES["window and alibi"]
    first, second = shuffled_table(1), shuffled_table(2)
    assert not np.array_equal(first.table_BM, second.table_BM)
    found = [gathered(pages, 40, window, slopes, apart=apart) for pages in (first, second)]
    np.testing.assert_array_equal(*(array[LENGTHS > 0] for array in found))


def test_sums_over_16_bit_pages_are_those_of_32_bit():
    pages = shuffled_table(3)
    wide = gathered(pages, 40, None, None)
    narrow = gathered(pages, 40, None, None, dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    owned = LENGTHS > 0
    np.testing.assert_allclose(narrow[owned].astype(np.float32), wide[owned], atol=0.15)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "one layer"])
def test_a_step_writes_each_rows_keys_at_its_place_and_nothing_else(stacked, monkeypatch):
    layers = 3 if stacked else 1
    generator = np.random.default_rng(1)
    pages, positions = shuffled_table(4), np.array([1, 16, 5, 0, 23, 11])
    pool = generator.normal(size=(layers, 40, KV_HEADS, PAGE, WIDTH)).astype(np.float32)
    new = generator.normal(size=(layers, len(LENGTHS), 1, KV_HEADS, WIDTH)).astype(np.float32)
    expected = pool.copy()
    for row, position in enumerate(positions):
        if LENGTHS[row] > 0:  # The free row has no page.
            page = pages.table_BM[row, position // PAGE]
            expected[:, page, :, position % PAGE] = new[:, row, 0]
    if not stacked:
        pool, new, expected = pool[0], new[0], expected[0]
    for platform in ("cpu", "tpu"):  # Each has its own way, which any of them can go.
        monkeypatch.setattr(sharding, "platform_in_use", lambda platform=platform: platform)
        found = jax.jit(lambda *arguments: caches.write_step(*arguments))(
            jnp.asarray(pool), jnp.asarray(new), pages, jnp.asarray(positions)
        )
        np.testing.assert_array_equal(found, expected)
    found = caches.write_step(
        jnp.asarray(pool.swapaxes(-1, -2)),
        jnp.asarray(new),
        pages,
        jnp.asarray(positions),
        positions_last=True,
    )
    np.testing.assert_array_equal(found, expected.swapaxes(-1, -2))
