"""The sizes that programs are compiled for: prompt lengths, pages of the cache, rows decoded."""

import bisect
import dataclasses

_SHORTEST_PREFILL = 16
_FEWEST_ROWS = 4  # Rows of a shard; fewer take about as long.


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Rising sizes; anything between two of them takes the larger.

    Attributes:
        prefill: tokens of a prompt.
        pages: pages of the cache, on all batch shards together.
        rows: rows decoded in a step, on all batch shards together.
    """

    prefill: tuple[int, ...]
    pages: tuple[int, ...]
    rows: tuple[int, ...]

    @classmethod
    def up_to(
        cls,
        max_length: int,
        *,
        page_size: int,
        slots: int,
        shards: int = 1,
        narrow: bool = False,
        free_pages: int = 0,
    ) -> "Buckets":
        """Makes powers of two and sizes halfway between them, up to one that holds everything.

        Args:
            max_length: tokens of a slot at most.
            page_size: positions of a page.
            slots: rows of the cache.
            shards: batch shards of the mesh; each holds as many of the pages.
            narrow: let steps have fewer rows than slots, each size a quarter of the next.
            free_pages: pages of a shard that take a step hardly any time beside its weights; there
                are no smaller sizes.
        """
        prefill = row_lengths(max_length)
        rows, pages_per_row = slots // shards, -(-max_length // page_size)
        # At least a page for every other slot: below that, reading the weights takes longer.
        most = rows * pages_per_row
        pages = ladder(min(max(rows // 2, free_pages, 1), most), most)
        steps = [rows]
        while narrow and steps[-1] // 4 >= _FEWEST_ROWS:
            steps.append(steps[-1] // 4)
        return cls(
            prefill,
            tuple(shards * size for size in pages),
            tuple(shards * size for size in reversed(steps)),
        )

    @property
    def num_programs(self) -> int:
        """Returns the largest number of programs that can be compiled."""
        # Each number of pages: allocated, inserted into, decoded for each number of rows; each pair
        # of neighbours: grown and shrunk; and the prompt cache is allocated.
        pages = len(self.pages)
        return len(self.prefill) + (2 + len(self.rows)) * pages + 2 * (pages - 1) + 1

    @property
    def num_prefix_programs(self) -> int:
        """Returns how many more there can be with a prefix cache."""
        # Each length: extended by; each number of pages: copied from; and the prefix cache is
        # allocated, copied into from the prompt cache, and copied from.
        return len(self.prefill) + len(self.pages) + 3

    def pages_for(self, needed: int, now: int) -> int:
        """Returns the number of pages to have, for those needed and those there now.

        A cache that is too large shrinks only to a size that leaves an eighth of it free, as
        otherwise it would soon grow again.
        """
        fitting = bucket_of(needed, self.pages)
        if fitting >= now:
            return fitting
        return min(now, bucket_of(-(-needed * 8 // 7), self.pages))


def row_lengths(max_length: int) -> tuple[int, ...]:
    """Returns the lengths that rows of tokens are padded to, so that few programs are compiled."""
    return ladder(_SHORTEST_PREFILL, max_length)


def bucket_of(size: int, buckets: tuple[int, ...]) -> int:
    """Returns the smallest bucket that holds a size, or the largest if none does."""
    return buckets[min(bisect.bisect_left(buckets, size), len(buckets) - 1)]


def ladder(first: int, last: int) -> tuple[int, ...]:
    """Returns sizes from the first up to the last: doubles, and one and a half times each."""
    sizes, size = {last}, first
    while size < last:
        sizes |= {size, min(size * 3 // 2, last)}
        size *= 2
    return tuple(sorted(sizes))
