"""How far a run is, for the person who waits: a bar on a terminal, plain lines elsewhere."""

import math
import sys
import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


class ProgressReport(Protocol):
    """What the loop tells of itself."""

    def step(self, step: int, *, loss: float | None, tokens_per_s: float) -> None:
        """A step is done."""

    def say(self, line: str) -> None:
        """Something happened that is worth a line."""

    def close(self) -> None:
        """The run ends."""


def make_progress(stage: str, num_steps: int, *, start: int, every: int) -> ProgressReport:
    """A bar if standard output is a terminal, otherwise lines.

    Args:
        stage: the stage's name.
        num_steps: steps in all.
        start: steps done before.
        every: steps between two lines.
    """
    if sys.stdout.isatty():
        return _Bar(stage, num_steps, start=start)
    return _Lines(stage, num_steps, start=start, every=every)


class Silent:
    """No report: for the processes of a run that are not the first, and for tests."""

    def step(self, step: int, *, loss: float | None, tokens_per_s: float) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class _TimeLeft:
    """Time left by the pace since the second step: the first one compiles."""

    def __init__(self, num_steps: int, *, start: int) -> None:
        self._num_steps = num_steps
        self._first_step = start + 1
        self._first_done = time.perf_counter()

    def after(self, step: int) -> str:
        """Hours, minutes and seconds as `1:02:03`; `?` before there is a pace."""
        if step <= self._first_step:
            self._first_done = time.perf_counter()
            return "?"
        pace = (time.perf_counter() - self._first_done) / (step - self._first_step)
        seconds = round(pace * (self._num_steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _numbers(loss: float | None, tokens_per_s: float, left: str) -> str:
    shown = f"loss {loss:.4f}" if loss is not None and math.isfinite(loss) else "no loss"
    return f"{shown}, {tokens_per_s:,.0f} tokens/s, {left} left"


class _Lines:
    def __init__(self, stage: str, num_steps: int, *, start: int, every: int) -> None:
        self._stage, self._num_steps, self._every = stage, num_steps, every
        self._left = _TimeLeft(num_steps, start=start)

    def step(self, step: int, *, loss: float | None, tokens_per_s: float) -> None:
        left = self._left.after(step)
        if step % self._every == 0 or step == self._num_steps:
            self.say(f"step {step}/{self._num_steps}: {_numbers(loss, tokens_per_s, left)}")

    def say(self, line: str) -> None:
        print(f"{self._stage}: {line}", flush=True)

    def close(self) -> None:
        pass


class _Bar:
    def __init__(self, stage: str, num_steps: int, *, start: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn())
        numbers = (
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[numbers]}"),
        )
        self._progress = Progress(*columns, *numbers, console=Console())
        self._task: TaskID = self._progress.add_task(
            stage, total=num_steps, completed=start, numbers="compiling"
        )
        self._left = _TimeLeft(num_steps, start=start)
        self._progress.start()

    def step(self, step: int, *, loss: float | None, tokens_per_s: float) -> None:
        numbers = _numbers(loss, tokens_per_s, self._left.after(step))
        self._progress.update(self._task, completed=step, numbers=numbers)

    def say(self, line: str) -> None:
        self._progress.console.print(line, markup=False)

    def close(self) -> None:
        self._progress.stop()
