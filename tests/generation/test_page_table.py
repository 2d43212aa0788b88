"""The table of pages against a plain model of it: dictionaries, and contents that are moved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.generation.buckets import Buckets, bucket_of
from huatuo_jax.generation.cache import Cache, PageTable, grow, shrink
from huatuo_jax.generation.requests import SlotTable

ROWS, PAGES_PER_ROW, PAGE = 6, 5, 8


class Model:
    """Every page's content by shard; a row's positions carry its number and their own."""

    def __init__(self, table, shards):
        self.table, self.shards = table, shards
        self.rows_per_shard = ROWS // shards
        self.content = [[] for _ in range(shards)]  # A number a page, written at its first use.
        self.written = {}  # (row, index of the page in the row) -> that number.

    def grow(self, num_pages):
        self.table.grow(num_pages)
        for part in self.content:
            part += [None] * (num_pages // self.shards - len(part))

    def fit(self, lengths):
        self.table.fit(lengths)
        for row, length in enumerate(lengths):
            shard = row // self.rows_per_shard
            for index in range(PAGES_PER_ROW):
                if index >= -(-length // PAGE):
                    self.written.pop((row, index), None)
                elif (row, index) not in self.written:
                    self.written[row, index] = np.random.default_rng().integers(1 << 60)
                    page = self.table.pages.table_BM[row, index]
                    self.content[shard][page] = self.written[row, index]

    def shrink(self, num_pages):
        kept = num_pages // self.shards
        targets = self.table.shrink(num_pages).reshape(self.shards, -1)
        for part, moved in zip(self.content, targets, strict=True):
            tail, part[kept:] = part[kept:], []
            for content, target in zip(tail, moved, strict=True):
                if target < kept:
                    part[target] = content

    def check(self, lengths):
        pages, per_shard = self.table.pages, self.table.num_pages // self.shards
        owned = set()
        for row, length in enumerate(lengths):
            shard, own = divmod(row, self.rows_per_shard)
            count = -(-length // PAGE)
            assert (pages.table_BM[row, count:] == -1).all()
            for index, page in enumerate(pages.table_BM[row, :count]):
                assert self.content[shard][page] == self.written[row, index]
                place = shard * per_shard + page
                assert pages.rows_P[place] == own and pages.starts_P[place] == index * PAGE
                owned.add(place)
        free = np.delete(pages.rows_P, sorted(owned))
        assert len(owned) == sum(-(-length // PAGE) for length in lengths)
        assert (free == -1).all()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_rows_keep_their_pages_through_any_course_of_events(shards, seed):
    generator = np.random.default_rng(seed)
    table = PageTable(rows=ROWS, pages_per_row=PAGES_PER_ROW, page_size=PAGE, shards=shards)
    model, lengths = Model(table, shards), np.zeros(ROWS, int)
    for _ in range(60):
        low = generator.random() < 0.5
        changed = generator.random(ROWS) < 0.4
        drawn = generator.integers(0, (PAGES_PER_ROW * PAGE + 1) // (3 if low else 1), ROWS)
        lengths = np.where(changed, drawn, lengths)
        needed = table.needed(lengths)
        by_shard = np.ceil(lengths / PAGE).reshape(shards, -1).sum(axis=1)
        assert needed == shards * by_shard.max()
        if needed > table.num_pages:
            model.grow(needed + shards * int(generator.integers(3)))
        model.fit(lengths)
        if 0 < needed < table.num_pages and low:
            model.shrink(needed)
            assert table.num_pages == needed
        model.check(lengths)


def test_a_cache_grows_and_shrinks_as_its_table_says():
    table = PageTable(rows=3, pages_per_row=4, page_size=2)
    table.grow(6)
    table.fit([4, 4, 4])
    table.fit([0, 4, 4])
    for stacked in (False, True):
        numbers = np.arange(6)
        pool = np.broadcast_to(numbers[:, None, None, None], (6, 2, 2, 3)).astype(np.float32)
        layers = pool[None] if stacked else (pool,)
        cache = Cache(layers, layers, np.stack([numbers, numbers], axis=1))
        cache = jax.tree.map(jnp.asarray, cache)
        # Pages 4 and 5 are row 2's; they move where row 0's were.
        smaller = shrink(cache, jnp.array([0, 1]))
        expected = [4, 5, 2, 3]
        np.testing.assert_array_equal(smaller.tokens_PS[:, 0], expected)
        keys = smaller.keys[0]
        np.testing.assert_array_equal(keys[:, 1, 1, 2], expected)
        larger = grow(smaller, added=3)
        assert larger.num_pages == 7 and larger.keys[0].shape[0] == 7
        np.testing.assert_array_equal(larger.values[0][:4, 0, 0, 0], expected)
    np.testing.assert_array_equal(table.shrink(4), [0, 1])
    np.testing.assert_array_equal(table.pages.table_BM[:, :2], [[-1, -1], [2, 3], [0, 1]])


def test_buckets_rise_to_all_that_can_be_needed_and_divide_by_the_shards():
    buckets = Buckets.up_to(96, page_size=64, slots=16, shards=4)
    assert buckets.prefill == (16, 24, 32, 48, 64, 96)
    assert buckets.pages == (8, 12, 16, 24, 32)
    assert Buckets.up_to(20, page_size=64, slots=1).pages == (1,)
    assert bucket_of(13, buckets.pages) == 16


def test_sizes_below_the_free_pages_of_a_shard_are_left_out():
    sizes = {"page_size": 64, "slots": 16, "shards": 4}
    assert Buckets.up_to(96, **sizes, free_pages=3).pages == (12, 16, 24, 32)
    assert Buckets.up_to(96, **sizes, free_pages=1).pages == Buckets.up_to(96, **sizes).pages
    assert Buckets.up_to(96, **sizes, free_pages=50).pages == (32,)


def test_a_cache_shrinks_only_where_an_eighth_of_it_stays_free():
    buckets = Buckets.up_to(512, page_size=64, slots=16)
    assert buckets.pages == (8, 12, 16, 24, 32, 48, 64, 96, 128)
    assert buckets.pages_for(20, now=0) == 24
    assert buckets.pages_for(25, now=24) == 32
    assert buckets.pages_for(22, now=32) == 32
    assert buckets.pages_for(21, now=32) == 24
    assert buckets.pages_for(3, now=128) == 8
    assert buckets.pages_for(0, now=8) == 8
    assert buckets.pages_for(128, now=128) == 128


def test_rows_are_counted_anew_where_only_some_are_decoded():
    table = PageTable(rows=6, pages_per_row=2, page_size=8, shards=2)
    table.grow(8)
    table.fit([0, 9, 8, 3, 0, 0])
    pages = table.of_rows(np.array([1, 2, 3, 5]))
    assert pages.table_BM.tolist() == [[0, 1], [2, -1], [0, -1], [-1, -1]]
    assert pages.rows_P.tolist() == [0, 0, 1, -1, 0, -1, -1, -1]
    with pytest.raises(AssertionError, match="left out"):
        table.of_rows(np.array([0, 1, 3, 4]))


def test_the_slots_to_decode_are_those_with_answers_and_idle_ones_to_a_bucket():
    table = SlotTable(8)
    table.progress.active_B[[2, 5, 6]] = True
    sizes = (2, 4, 8)
    assert table.rows_to_decode(sizes, shards=1).tolist() == [0, 2, 5, 6]
    assert table.rows_to_decode(sizes, shards=2).tolist() == [0, 2, 5, 6]
    table.progress.active_B[7] = True
    assert table.rows_to_decode(sizes, shards=2).tolist() == list(range(8))
    table.progress.active_B[:] = False
    assert table.rows_to_decode(sizes, shards=2).tolist() == [0, 4]
