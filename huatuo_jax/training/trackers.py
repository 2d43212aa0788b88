"""Sends a stage's metrics to TensorBoard, Weights & Biases and MLflow, beside its `metrics.jsonl`.

TensorBoard's events are in the stage's folder. The other two are off by default, and each has an
extra. Keys and servers come from the environment, as each of them documents it (`WANDB_API_KEY`,
`MLFLOW_TRACKING_URI`), and are written to no file. A resumed stage continues its runs there.
"""

import importlib.util
import json
import os
import pathlib
import secrets
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from huatuo_jax.core.files import as_path, is_address, write_file
from huatuo_jax.core.progress import tell

TrackerName = Literal["wandb", "mlflow"]
IDS_FILE = "trackers.json"

_PROJECT = "huatuo_jax"
_LONGEST_VALUE = 500  # Characters that MLflow takes of a setting.
_SETTINGS_AT_ONCE = 100  # That MLflow takes in a request.


class Tracker(Protocol):
    """A receiver of metrics."""

    def write(self, step: int, numbers: Mapping[str, float], *, time_s: float) -> None:
        """Adds the numbers of a step; `time_s` in seconds since 1970."""

    def flush(self) -> None:
        """Sees to it that a kill cannot lose them, where they lie on disk."""

    def close(self) -> None:
        """Ends it, with all numbers sent."""


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Checks that trackers are installed and know where to send metrics.

    Raises:
        ValueError: one is not, or does not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"loop.trackers={name!r} is not installed: pip install 'huatuo_jax[{name}]'"
            )
    if "mlflow" in names and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ValueError(
            "loop.trackers='mlflow' needs MLFLOW_TRACKING_URI in the environment, as "
            "http://127.0.0.1:5000 or sqlite:////home/me/mlflow.db"
        )
    if "wandb" in names and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        import wandb

        if not wandb.login(prompt=False):
            raise ValueError(
                "loop.trackers='wandb' needs WANDB_API_KEY in the environment, or `wandb login`; "
                "WANDB_MODE=offline keeps the metrics here"
            )


def open_trackers(
    names: Sequence[TrackerName],
    folder: pathlib.Path,
    *,
    settings: Mapping[str, Any],
    resumed: bool,
) -> list[Tracker]:
    """Opens trackers for a stage.

    Args:
        names: of them.
        folder: the stage's.
        settings: to show beside the metrics.
        resumed: whether the stage resumes from a checkpoint, and so its runs in the trackers.

    Raises:
        ValueError: one refuses or cannot be reached.
    """
    path = folder / IDS_FILE
    ids: dict[str, str] = {}
    if resumed and path.exists():
        ids = json.loads(path.read_text(encoding="utf-8"))
    makers: dict[TrackerName, Callable[..., _WeightsAndBiases | _Mlflow]] = {
        "wandb": _WeightsAndBiases,
        "mlflow": _Mlflow,
    }
    found: list[Tracker] = []
    for name in names:
        title = f"{folder.absolute().parent.name}/{folder.name}"
        made = makers[name](folder, title, settings, run_id=ids[name] if name in ids else None)
        ids[name] = made.run_id
        found.append(made)
    if names:
        write_file(path, json.dumps(ids, indent=2) + "\n")
    return found


class _EventObject:
    """A file of events in a bucket, which is written anew at each flush.

    tensorboardX's own has a condition on what is there, and fails where an answer is lost: its
    repeated request finds the object that it has written before.
    """

    def __init__(self, path: str) -> None:
        self._path, self._events = as_path(path), bytearray()

    def write(self, data: bytes) -> None:
        self._events += data

    def flush(self) -> None:
        write_file(self._path, bytes(self._events))

    close = flush


class _EventObjects:
    """Makes the writers of a scheme for tensorboardX."""

    open = _EventObject

    @staticmethod
    def directory_check(path: str) -> None:
        """Does nothing: a bucket needs no folders."""


class TensorBoard:
    """Events in a folder."""

    def __init__(self, folder: pathlib.Path, *, after_step: int | None) -> None:
        """Opens the folder; events past `after_step`, the restored one, are hidden."""
        import tensorboardX  # Takes seconds, as it imports torch where it finds it.
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import register_writer_factory

        if is_address(folder):
            register_writer_factory(str(folder).partition("://")[0], _EventObjects)
        self._summary, self._value = Summary, Summary.Value
        purged = 0 if after_step is None else after_step + 1
        self._events = tensorboardX.SummaryWriter(str(folder), purge_step=purged)

    def write(self, step: int, numbers: Mapping[str, float], *, time_s: float) -> None:
        """Adds the numbers of a step."""
        # One event for all: an event for each number costs a small model's step a millisecond.
        values = [self._value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._events.file_writer.add_summary(self._summary(value=values), step, walltime=time_s)

    def flush(self) -> None:
        """Puts all events on disk."""
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._events.close()


class _WeightsAndBiases:
    """A run of Weights & Biases, which sends in a process of its own and never waits.

    After a restart it ignores steps that it had before, which a resumed run computes again alike.

    Attributes:
        run_id: of the run.
    """

    def __init__(
        self, folder: pathlib.Path, title: str, settings: Mapping[str, Any], *, run_id: str | None
    ) -> None:
        import wandb

        self.run_id = run_id or secrets.token_hex(8)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=title,
                id=self.run_id,
                resume="allow",
                dir=tempfile.gettempdir() if is_address(folder) else folder,
                config=dict(settings),
            )
        except wandb.Error as error:
            raise ValueError(f"loop.trackers: Weights & Biases: {error}") from error

    def write(self, step: int, numbers: Mapping[str, float], *, time_s: float) -> None:
        """Adds the numbers of a step."""
        self._run.log({**numbers, "time_s": time_s}, step=step)

    def flush(self) -> None:
        """Does nothing: what was written is in its file."""

    def close(self) -> None:
        """Waits until all is sent."""
        self._run.finish()


class _Mlflow:
    """A run of MLflow, to which numbers are sent in the background.

    Attributes:
        run_id: of the run.
    """

    def __init__(
        self, folder: pathlib.Path, title: str, settings: Mapping[str, Any], *, run_id: str | None
    ) -> None:
        import mlflow
        from mlflow.entities import Param

        del folder  # It has none.
        self._mlflow = mlflow
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        try:
            self._client = mlflow.MlflowClient()
            if run_id is None:
                known = self._client.get_experiment_by_name(experiment)
                place = (
                    self._client.create_experiment(experiment)
                    if known is None
                    else known.experiment_id
                )
                run_id = self._client.create_run(place, run_name=title).info.run_id
                shown = [Param(name, value) for name, value in _flat(settings)]
                for first in range(0, len(shown), _SETTINGS_AT_ONCE):
                    self._client.log_batch(run_id, params=shown[first : first + _SETTINGS_AT_ONCE])
            self._client.update_run(run_id, status="RUNNING")
        except mlflow.MlflowException as error:
            raise ValueError(f"loop.trackers: MLflow: {error}") from error
        self.run_id: str = run_id

    def write(self, step: int, numbers: Mapping[str, float], *, time_s: float) -> None:
        """Adds the numbers of a step."""
        from mlflow.entities import Metric

        moment = round(1000 * time_s)
        metrics = [Metric(name, value, moment, step) for name, value in numbers.items()]
        self._client.log_batch(self.run_id, metrics=metrics, synchronous=False)

    def flush(self) -> None:
        """Does nothing: what was written is on its way."""

    def close(self) -> None:
        """Waits until all is sent; prints a failure and goes on."""
        try:
            self._mlflow.flush_async_logging()
            self._client.set_terminated(self.run_id)
        except self._mlflow.MlflowException as error:
            tell(f"MLflow: some metrics were not sent, all are in metrics.jsonl: {error}")


def _flat(settings: Mapping[str, Any], path: str = "") -> list[tuple[str, str]]:
    """Returns nested settings as names and texts."""
    found = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{path}{name}.")
        else:
            found.append((f"{path}{name}", str(value)[:_LONGEST_VALUE]))
    return found
