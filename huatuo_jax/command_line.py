"""What every command shares: one clear line for an error, and progress that can be read."""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import overload

from absl import app, flags, logging
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_LINE_EVERY_S = 10.0


@overload
def run(main: Callable[[], None]) -> None: ...


@overload
def run(main: Callable[[list[str]], None], *, positional: str) -> None: ...


def run(main: Callable[..., None], *, positional: str | None = None) -> None:
    """Run a command after its flags are parsed; what a user can cause ends in one line, code 1.

    Args:
        main: the command. Its ValueError and OSError are messages to the user; anything else is
            our bug and keeps its traceback.
        positional: what stands on the command line beside the flags, in a word such as FILES;
            `main` then takes the list of it, which is never empty.
    """

    def guarded(arguments: list[str]) -> None:
        given = arguments[1:]  # The first is the command's own name.
        if not flags.FLAGS["verbosity"].present:
            # Orbax and TFDS tell of every file they touch.
            logging.set_verbosity(logging.WARNING)
        try:
            if positional is None:
                if given:
                    raise ValueError(f"unexpected argument {given[0]!r}; see --help")
                main()
            else:
                if not given:
                    raise ValueError(f"no {positional} given; see --help")
                main(given)
        except BrokenPipeError:
            # The reader of the output has gone (`| head`); nothing is wrong, or left to say. Python
            # flushes standard output once more as it ends, which must not fail either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (ValueError, OSError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(1)

    app.run(guarded)


def terminal_width() -> int | None:
    """The columns of the terminal that standard output is; None where it is something else."""
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return None
    return shutil.get_terminal_size().columns


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
