"""Goodput: the share of a stage's wall time that trained, and what the rest was lost to.

Rows of metrics hold the seconds since the row before: `throughput/trained_s` and a field for each
of `LOSSES`. `throughput/goodput` is the share that trained of all the time since the stage was
first started. Time that no row holds was lost to starts: loading and restoring, the time while the
run was stopped, and steps that a killed run had done past its checkpoint.
"""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.monitoring

TIME_PREFIX = "throughput/"
GOODPUT = f"{TIME_PREFIX}goodput"
LOSSES = {
    "compile": "compiling",
    "data_wait": "waiting for data",
    "evaluation": "evaluating",
    "judging": "judging",
    "saving": "saving",
    "reporting": "writing the report",
}
"""What time is lost to, by the name of its field of a row: `throughput/NAME_s`."""

STARTS = "starting and restarting"

_TRAINED = "trained"
_COMPILING = "/jax/core/compile/"


class WallTime:
    """The seconds of a stage since its first start, by what they were spent on."""

    def __init__(self, began_s: float, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds up the rows that there are.

        Args:
            began_s: when the stage was first started, in seconds since 1970.
            rows: of its metrics.
        """
        self._began_s = self._until_s = began_s
        self._spent = dict.fromkeys((_TRAINED, *LOSSES), 0.0)
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds the time since the row before."""
        self._until_s = max(self._until_s, row["time_s"])
        for name in self._spent:
            field = f"{TIME_PREFIX}{name}_s"
            if field in row:
                self._spent[name] += row[field]

    @property
    def seconds(self) -> float:
        """All seconds from the first start to the last row."""
        return self._until_s - self._began_s

    @property
    def trained_s(self) -> float:
        """Seconds in which steps that are kept were computed."""
        return self._spent[_TRAINED]

    @property
    def goodput(self) -> float:
        """The share of the seconds that trained; 0 where no time has passed."""
        return min(self.trained_s / self.seconds, 1.0) if self.seconds > 0 else 0.0

    def lost_s(self) -> dict[str, float]:
        """Returns the other seconds, by what they were lost to in words."""
        lost = {words: self._spent[name] for name, words in LOSSES.items()}
        return lost | {STARTS: max(self.seconds - math.fsum(self._spent.values()), 0.0)}


class TimeSpent(contextlib.AbstractContextManager["TimeSpent"]):
    """Measures what the seconds of this process are spent on, until a row takes them."""

    def __init__(self) -> None:
        """Listens to what jax compiles, until it is left."""
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._compiled: list[tuple[float, float]] = []
        self._compiled_s = self._told_s = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def __exit__(self, *_: object) -> None:
        """Listens no more."""
        jax.monitoring.unregister_event_duration_listener(self._listen)

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Counts the time of a block as lost to one of `LOSSES`, apart from compiling in it."""
        before, began = self._compiled_s, time.perf_counter()
        try:
            yield
        finally:
            compiled = self._compiled_s - before
            self._told_s += compiled
            self._spent["compile"] += compiled
            self._spent[what] += max(time.perf_counter() - began - compiled, 0.0)

    def of_step(self, seconds: float, *, waited_s: float = 0.0) -> dict[str, float]:
        """Returns the fields of a step's row, and begins those of the next row.

        Args:
            seconds: that the step took.
            waited_s: of them, for data.
        """
        compiled = self._compiled_s - self._told_s
        self._told_s = self._compiled_s
        self._spent["compile"] += compiled
        self._spent[_TRAINED] += max(seconds - waited_s - compiled, 0.0)
        return self.take()

    def take(self) -> dict[str, float]:
        """Returns the fields of a row, and begins those of the next one."""
        spent = {f"{TIME_PREFIX}{name}_s": value for name, value in self._spent.items() if value}
        self._spent.clear()
        return spent

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Adds the time of an event of compiling, of which one may lie inside another."""
        if not event.startswith(_COMPILING):
            return
        began = time.perf_counter() - duration_secs
        while self._compiled and self._compiled[-1][0] >= began:
            self._compiled_s -= self._compiled.pop()[1]
        self._compiled.append((began, duration_secs))
        self._compiled_s += duration_secs


class StepClock:
    """Splits the time of steps into waiting for data and computing."""

    def __init__(self) -> None:
        """Starts it."""
        self._since = time.perf_counter()
        self._waited_s = 0.0

    def restart(self) -> None:
        """Leaves what was done since the last step (an evaluation, a save) out of the next one."""
        self._since = time.perf_counter()
        self._waited_s = 0.0

    def add_wait(self, seconds: float) -> None:
        """Adds time spent waiting for data."""
        self._waited_s += seconds

    def step(self) -> tuple[float, float]:
        """Ends a step and begins the next one: the seconds it took, and those it waited."""
        now = time.perf_counter()
        took, waited = now - self._since, self._waited_s
        self._since, self._waited_s = now, 0.0
        return max(took, 1e-9), min(waited, took)
