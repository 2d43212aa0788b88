"""`metrics.jsonl` and TensorBoard: numbers by name, one row for each step and each evaluation.

A row is `{"step", "time_s", "stage", NAME: number, ...}`. Which fields depend on the clock is
fixed by their names (`is_time_field`): all others are the same in a run that was interrupted and in
one that was not. A number that is not finite has no place in JSON and is left out of its row; the
counters in the row say why (`train/steps_not_finite`).
"""

import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax

from huatuo_jax import json_lines

TIME_PREFIX = "throughput/"
EVALUATION_PREFIX = "eval/"
JUDGED_PREFIX = "judged/"


def is_time_field(name: str) -> bool:
    """Tells the fields that depend on the clock: `time_s` and all of `throughput/`."""
    return name == "time_s" or name.startswith(TIME_PREFIX)


class MetricsLog:
    """Writes rows of one stage; used as a context manager, by one process of a run."""

    def __init__(
        self,
        path: pathlib.Path,
        *,
        stage: str,
        after_step: int | None,
        evaluated: bool,
        tensorboard: pathlib.Path | None,
    ) -> None:
        """Opens the file and cuts what a run left there that went on past its last checkpoint.

        Args:
            path: `metrics.jsonl`.
            stage: the stage's name, for the rows.
            after_step: the step that was restored; rows of later steps are removed. None removes
                all.
            evaluated: whether the restored step was evaluated before it was saved; if not, a row
                of its evaluation is removed too.
            tensorboard: folder of the event files; None for none.
        """
        cut_rows(path, after_step=after_step, evaluated=evaluated)
        self._file = json_lines.AppendedFile(path, locked=False)
        self._stage = stage
        self._events = None
        if tensorboard is not None:
            # Events past the restored step are hidden by TensorBoard.
            import tensorboardX  # Takes seconds, as it imports torch where it finds it.

            purged = 0 if after_step is None else after_step + 1
            self._events = tensorboardX.SummaryWriter(str(tensorboard), purge_step=purged)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a row."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        now = round(time.time(), 3)
        self._file.append([{"step": step, "time_s": now, "stage": self._stage, **finite}])
        if self._events is not None:
            for name, value in finite.items():
                self._events.add_scalar(name, value, step, walltime=now)

    def flush(self) -> None:
        """Puts all rows on disk, where a kill cannot take them back."""
        self._file.sync()
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self.flush()
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "MetricsLog":
        """Returns the log itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, without a last one that a kill cut short."""
    return json_lines.read_rows(path, unfinished="skip")


def cut_rows(path: pathlib.Path, *, after_step: int | None, evaluated: bool) -> None:
    """Removes what was written after a checkpoint.

    Args:
        path: the metrics file; there may be none.
        after_step: the checkpoint's step; None removes all rows.
        evaluated: whether the evaluation or judging of that step belongs to what is kept.
    """
    if not path.exists():
        return

    def is_kept(row: dict[str, Any]) -> bool:
        if after_step is None or row["step"] > after_step:
            return False
        is_evaluation = any(name.startswith((EVALUATION_PREFIX, JUDGED_PREFIX)) for name in row)
        return row["step"] < after_step or evaluated or not is_evaluation

    with json_lines.AppendedFile(path, locked=False) as file:
        file.keep_while(is_kept)


Sums = dict[str, jax.Array]


def ratio(total: Any, count: float) -> float:
    """Divides a sum by a count; NaN where there is nothing to count."""
    return float(total) / count if count else math.nan
