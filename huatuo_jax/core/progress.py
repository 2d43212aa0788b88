"""Progress of counted work: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from huatuo_jax.core import distributed

_PLAIN_LINE_EVERY_S = 10.0


def tell(line: str) -> None:
    """Prints a line to standard error; of several processes only the first does."""
    if distributed.is_first():
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress_bar(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Shows progress: a bar on a terminal, a line now and then elsewhere, in the first process.

    Args:
        label: of the work.
        unit: of the counts.

    Yields:
        A function to call with the count done and the count in all.
    """
    if not distributed.is_first():
        yield lambda done, total: None
        return
    if sys.stderr.isatty():
        columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, transient=True) as progress:
            task = progress.add_task(label, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
        return
    last_s = time.monotonic()

    def plain(done: int, total: int) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if done == total or now_s - last_s >= _PLAIN_LINE_EVERY_S:
            last_s = now_s
            print(f"{label}: {done} of {total} {unit}", file=sys.stderr, flush=True)

    yield plain
