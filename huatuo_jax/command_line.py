"""What every command shares: one clear line for an error, and progress that can be read."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from absl import app
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_LINE_EVERY_S = 10.0


def run(main: Callable[[], None]) -> None:
    """Run a command after its flags are parsed; what a user can cause ends in one line, code 1.

    Args:
        main: the command. Its ValueError and OSError are messages to the user; anything else is
            our bug and keeps its traceback.
    """

    def guarded(arguments: list[str]) -> None:
        try:
            if len(arguments) > 1:
                raise ValueError(f"unexpected argument {arguments[1]!r}; see --help")
            main()
        except (ValueError, OSError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(1)

    app.run(guarded)


@contextlib.contextmanager
def progress_bar(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, a plain line now and then elsewhere.

    Args:
        label: what is being done.
        unit: what is counted.

    Yields:
        A function to call with the count done and the count in all.
    """
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
