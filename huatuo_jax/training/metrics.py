"""Metrics of a run: `metrics.jsonl`, TensorBoard, throughput, and progress on the terminal.

A row is `{"step", "time_s", "stage", NAME: number, ...}`. The fields that depend on the clock are
known by their names (`is_time_field`): all others are the same in a run that was interrupted and in
one that was not. A number that is not finite has no JSON form and is left out of its row; the
counters in the row say why (`train/steps_not_finite`).

Model-FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B) is the floating-point operations that
the model's mathematics asks for, over what the devices could do in that time:

    FLOPs of a step = 6 P t  +  6 P_head s  +  12 L N H a
    utilisation     = FLOPs of a step / (seconds * devices * peak FLOPs per second)

where t is the number of tokens that are not padding and P the parameters of the layers' matrix
products (no embedding lookup, norms or biases); s is the number of scored tokens, as the head reads
no others, and P_head its parameters; a is the number of (query, key) pairs that causality and
segments leave, the sum of `position + 1` over all tokens. The 6 is 2 FLOPs a multiply-add, once
forward and twice backward; the 12 is the same for the two products of attention. What
rematerialisation computes again does not count, nor does padding: both lower the utilisation. With
adapters the gradients of frozen weights are not computed, and 6 becomes 4; the adapters' own
products are left out as small.
"""

import contextlib
import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.core import files
from huatuo_jax.training.trackers import TensorBoard, Tracker
from huatuo_jax.training.wall_time import GOODPUT, TIME_PREFIX, WallTime

EVALUATION_PREFIX = "eval/"
JUDGED_PREFIX = "judged/"

# Peak of dense bfloat16 matrix products per device in FLOPs/s, by jax's name for it, as published
# by the makers. A TPU v2 or v3 device is one of its chip's two cores.
PEAK_FLOPS: dict[str, float] = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
}

Sums = dict[str, jax.Array]


class MetricsLog(contextlib.AbstractContextManager["MetricsLog"]):
    """Writes rows of one stage; used as a context manager, by one process of a run."""

    def __init__(
        self,
        path: pathlib.Path,
        *,
        stage: str,
        after_step: int | None,
        evaluated: bool,
        tensorboard: pathlib.Path | None,
        trackers: Sequence[Tracker] = (),
        began_s: float | None = None,
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
            trackers: to be sent the rows too, and closed with the log.
            began_s: when the stage was first started, in seconds since 1970, for the share of the
                time since then that trained; None for no share.
        """
        cut_rows(path, after_step=after_step, evaluated=evaluated)
        self._file = files.AppendedFile(path, locked=False)
        self._stage = stage
        self._wall_time = None if began_s is None else WallTime(began_s, read_rows(path))
        self._trackers = list(trackers)
        if tensorboard is not None:
            self._trackers.insert(0, TensorBoard(tensorboard, after_step=after_step))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a row."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        now = round(time.time(), 3)
        row = {"step": step, "time_s": now, "stage": self._stage, **finite}
        if self._wall_time is not None:
            self._wall_time.add(row)
            finite[GOODPUT] = row[GOODPUT] = self._wall_time.goodput
        self._file.append([row])
        for tracker in self._trackers:
            tracker.write(step, finite, time_s=now)

    def flush(self) -> None:
        """Puts all rows on disk, so that a kill cannot lose them."""
        self._file.sync()
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self.flush()
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()


def is_time_field(name: str) -> bool:
    """Tells the fields that depend on the clock: `time_s` and all of `throughput/`."""
    return name == "time_s" or name.startswith(TIME_PREFIX)


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads a metrics file, without a last row that a kill cut short."""
    return files.read_rows(path, unfinished="skip")


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

    with files.AppendedFile(path, locked=False) as file:
        file.keep_while(is_kept)


def ratio(total: Any, count: float) -> float:
    """Divides a sum by a count; NaN where there is nothing to count."""
    return float(total) / count if count else math.nan


def peak_flops(device: jax.Device) -> float | None:
    """Returns the device's peak in FLOPs per second; None where it is not known, as on a CPU."""
    return PEAK_FLOPS.get(device.device_kind)


def mesh_peak_flops(mesh: Mesh) -> float | None:
    """Returns the peak of a mesh's devices together, in FLOPs per second; None if unknown."""
    peak = peak_flops(mesh.devices.flat[0])
    return None if peak is None else peak * mesh.size


@dataclasses.dataclass(frozen=True)
class ModelFlops:
    """The parts of the formula that belong to the model.

    Attributes:
        layers: parameters P of the layers' matrix products.
        head: parameters P_head of the head.
        attention: L N H.
        per_parameter: 6, or 4 where the layers are frozen.
    """

    layers: int
    head: int
    attention: int
    per_parameter: int = 6

    @classmethod
    def of(cls, cfg: BackboneConfig, *, adapters_only: bool = False) -> "ModelFlops":
        """Counts the parts of a backbone with a language-model head."""
        heads = cfg.num_heads + 2 * cfg.num_kv_heads
        attention = cfg.hidden_size * cfg.head_dim * (heads + cfg.num_heads)
        mlp = cfg.hidden_size * cfg.intermediate_size * (3 if cfg.gated_mlp else 2)
        return cls(
            layers=cfg.num_layers * (attention + mlp),
            head=cfg.hidden_size * cfg.vocab_size,
            attention=cfg.num_layers * cfg.num_heads * cfg.head_dim,
            per_parameter=4 if adapters_only else 6,
        )

    def of_step(self, *, tokens: float, scored_tokens: float, attended_pairs: float) -> float:
        """Returns the FLOPs of a step, from its tokens, scored tokens and (query, key) pairs."""
        products = self.layers * tokens + self.head * scored_tokens
        return self.per_parameter * products + 12 * self.attention * attended_pairs

    def of_forward(self, *, tokens: float, scored_tokens: float, attended_pairs: float) -> float:
        """Returns the FLOPs of a forward pass: a third of a step in which everything is trained."""
        return (
            dataclasses.replace(self, per_parameter=6).of_step(
                tokens=tokens, scored_tokens=scored_tokens, attended_pairs=attended_pairs
            )
            / 3
        )


class ProgressReport(Protocol):
    """Progress of a loop, for the person who waits."""

    def step(self, step: int, *, loss: float | None, tokens_per_s: float) -> None:
        """Reports that a step is done."""

    def say(self, line: str) -> None:
        """Reports something that is worth a line."""

    def close(self) -> None:
        """Ends the report."""


def make_progress(stage: str, num_steps: int, *, start: int, every: int) -> ProgressReport:
    """Makes a bar if standard output is a terminal, otherwise lines.

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
        """Does nothing."""

    def say(self, line: str) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class _TimeLeft:
    """Time left by the pace since the second step: the first one compiles."""

    def __init__(self, num_steps: int, *, start: int) -> None:
        self._num_steps = num_steps
        self._first_step = start + 1
        self._first_done = time.perf_counter()

    def after(self, step: int) -> str:
        """Returns hours, minutes and seconds as `1:02:03`; `?` before there is a pace."""
        if step <= self._first_step:
            self._first_done = time.perf_counter()
            return "?"
        pace = (time.perf_counter() - self._first_done) / (step - self._first_step)
        seconds = round(pace * (self._num_steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


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


def _numbers(loss: float | None, tokens_per_s: float, left: str) -> str:
    shown = f"loss {loss:.4f}" if loss is not None and math.isfinite(loss) else "no loss"
    return f"{shown}, {tokens_per_s:,.0f} tokens/s, {left} left"
