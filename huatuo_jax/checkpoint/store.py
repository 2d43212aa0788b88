"""The checkpoints of a training run: one folder a step; the newest and the best are kept."""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import tempfile
import types
from collections.abc import Mapping
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from huatuo_jax.checkpoint import orbax_files
from huatuo_jax.core.config import as_json, differences
from huatuo_jax.core.files import absolute, as_path, is_address, make_folder


@dataclasses.dataclass(frozen=True)
class Restored:
    """One checkpoint as it was saved; `metrics` and `extra` are empty if none were given."""

    step: int
    state: Any
    config: dict[str, Any]
    metrics: dict[str, float]
    extra: dict[str, Any]


class CheckpointStore:
    """A folder of checkpoints that survives a kill at any moment, used as a context manager.

    A background thread writes a save under a temporary name and renames it when it is complete, so
    a listed step is complete. Every method waits for a running save first, and raises its
    error if it failed: once, as an `OSError`. With several processes all of them must make the
    same calls.

    On disk a step is `DIRECTORY/STEP/` with `state/` (Orbax), `config/config.json`,
    `extra/extra.json` and `metrics/metrics` (JSON).
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_newest: int = 3,
        best_metric: str | None = None,
        best_mode: str = "min",
        asynchronous: bool = True,
        read_only: bool = False,
    ) -> None:
        """Opens a folder of checkpoints, and makes it unless it is only read.

        Opening it to write removes the unfinished saves of a killed run, so one run at a time may
        do that; others open it with `read_only`.

        Args:
            directory: a folder, or an address of `gs://`.
            keep_newest: how many of the newest steps to keep.
            best_metric: the metric whose best step is kept too; steps saved without it, or with
                NaN, are never the best.
            best_mode: whether the best is the `min` or the `max`; of equal steps it is the newest.
            asynchronous: whether `save` returns before the files are written.
            read_only: never write, make or remove anything; new steps of a running job are seen.

        Raises:
            ValueError: an argument is out of its range.
            OSError: the folder cannot be made or written.
        """
        if isinstance(keep_newest, bool) or not isinstance(keep_newest, int) or keep_newest < 1:
            raise ValueError(f"keep_newest: must be a whole number from 1, is {keep_newest!r}")
        if best_mode not in ("min", "max"):
            raise ValueError(f"best_mode: must be 'min' or 'max', is {best_mode!r}")
        self._best_metric = best_metric
        self._sign = 1.0 if best_mode == "max" else -1.0
        self._read_only = read_only
        self._saving: int | None = None
        orbax_files.check_place(as_path(directory), name="directory")
        address = os.fspath(absolute(as_path(directory).expanduser()))
        self._is_local = not is_address(address)
        if self._is_local and not read_only:
            _make_writable(address)
        self._manager = orbax_files.open_manager(
            address,
            keep_newest=keep_newest,
            score=self._score if best_metric is not None else None,
            asynchronous=asynchronous,
            clean=not read_only,
        )
        self._directory = self._manager.directory
        self._empty_deleted()

    def save(
        self,
        step: int,
        state: Any,
        *,
        config: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts saving a step; on return the state's arrays may be donated or changed.

        Args:
            step: the number to save under, past every saved one.
            state: any tree of arrays, typed random keys and numbers.
            config: the settings of the state, JSON values; compared by `restore`.
            metrics: numbers by name, with `best_metric` if it was measured.
            extra: all else that the next step needs, JSON values.

        Raises:
            ValueError: the step is not new, or something cannot be saved as it is.
            OSError: this save could not be started, or the one before it failed.
        """
        if self._read_only:
            raise ValueError(f"read_only: {self._directory} is open for reading only, not saving")
        newest = self.latest_step()
        if newest is not None and step <= newest:
            raise ValueError(f"step: {step} is not past the newest saved step {newest}")
        arguments = orbax_files.step_arguments(
            state,
            config=as_json(config, name="config"),
            extra=as_json(extra or {}, name="extra"),
        )
        self._saving = step
        try:
            orbax_files.save_step(
                self._manager,
                step,
                arguments,
                metrics={name: float(value) for name, value in (metrics or {}).items()},
            )
        except Exception as error:
            self._forget_failed_save()
            if orbax_files.system_error_number(error) is None:
                raise
            raise self._not_saved(step, error) from error

    def wait(self) -> None:
        """Waits until a running save is on disk and raises its error, an `OSError`, if it failed.

        Returns at once if nothing is being saved.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            step = self._saving
            self._forget_failed_save()
            raise self._not_saved(step, error) from error
        self._saving = None
        self._empty_deleted()
        if self._read_only:
            self._manager.reload()

    def close(self) -> None:
        """Waits for a running save and ends the background threads; `with` does so on exit."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Self:
        """Returns the store itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        """Closes the store; a failed save is noted on an error of the block, or raised."""
        try:
            self.close()
        except OSError as failure:
            if error is None:
                raise
            error.add_note(f"while closing the checkpoints: {failure}")

    def all_steps(self) -> list[int]:
        """Returns the steps that are saved completely, in order."""
        self.wait()
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Returns the newest step that is saved completely, or None."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """Returns the saved step with the best `best_metric`, or None if no step has it."""
        scores = {step: self._score(self._metrics(step)) for step in self.all_steps()}
        best = max(scores, key=lambda step: (scores[step], step), default=None)
        return None if best is None or scores[best] == -math.inf else best

    def restore(
        self,
        step: int | None = None,
        *,
        abstract_state: Any,
        config: Mapping[str, Any] | None = None,
        partial: bool = False,
    ) -> Restored:
        """Reads a checkpoint onto the devices that `abstract_state` names, bit for bit.

        The mesh and the number of devices may differ from those of the save: each device reads its
        own shards, and the whole state is never in host memory.

        Args:
            step: which one; the newest if None.
            abstract_state: the state's tree, a `jax.ShapeDtypeStruct` with a sharding for each
                array (without one it lands on the first device). Typed random keys are restored as
                such.
            config: the config of this run; if given it must equal the saved one.
            partial: read only the arrays that `abstract_state` names, such as the parameters.

        Raises:
            FileNotFoundError: there is no such checkpoint, or none at all.
            ValueError: the config differs, or the saved arrays have other paths, shapes or dtypes;
                the message has one line for each difference.
            OSError: the files cannot be read.
        """
        steps = self.all_steps()
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {self._directory}")
        step = steps[-1] if step is None else step
        if step not in steps:
            listed = ", ".join(map(str, steps))
            raise FileNotFoundError(f"no checkpoint of step {step} in {self._directory}: {listed}")
        folder = self._directory / str(step)
        saved_config = _read_json(folder / "config" / "config.json")
        if config is not None and (found := differences(saved_config, config)):
            lines = [f"config: {folder} was saved with another config:", *found]
            raise ValueError("\n  ".join(lines))
        return Restored(
            step=step,
            state=orbax_files.read_arrays(folder / "state", abstract_state, partial=partial),
            config=saved_config,
            metrics=self._metrics(step),
            extra=_read_json(folder / "extra" / "extra.json"),
        )

    def _metrics(self, step: int) -> dict[str, float]:
        return _read_json(self._directory / str(step) / "metrics" / "metrics")

    def _score(self, metrics: Mapping[str, float]) -> float:
        """Returns a step's score, the higher the better; -inf if it is not known."""
        if self._best_metric is None or self._best_metric not in metrics:
            return -math.inf
        score = self._sign * metrics[self._best_metric]
        return -math.inf if math.isnan(score) else score

    def _not_saved(self, step: int | None, error: Exception) -> OSError:
        return orbax_files.as_os_error(error, f"step {step} was not saved in {self._directory}")

    def _forget_failed_save(self) -> None:
        """Rereads the list of steps from the disk, and removes the failed save from it."""
        if self._is_local and jax.process_index() == 0:
            unfinished = f"{self._saving}{orbax_files.UNFINISHED}"
            shutil.rmtree(os.path.join(self._directory, unfinished), ignore_errors=True)
        self._saving = None
        self._manager.reload()

    def _empty_deleted(self) -> None:
        """Deletes the steps that the last save replaced; Orbax only moves them aside."""
        if self._is_local and not self._read_only and jax.process_index() == 0:
            shutil.rmtree(os.path.join(self._directory, orbax_files.DELETED), ignore_errors=True)


def saved_steps(directory: pathlib.Path) -> list[int]:
    """Returns the steps that are saved completely in a folder of checkpoints, in order.

    Opens nothing, and is quick. In a bucket a step without Orbax's marker is not complete.
    """
    if not directory.is_dir():
        return []
    steps = [path for path in directory.iterdir() if path.name.isdigit()]
    if is_address(directory):
        steps = [path for path in steps if (path / orbax_files.COMMITTED).exists()]
    return sorted(int(path.name) for path in steps)


def _make_writable(directory: str) -> None:
    """Makes the folder and checks that it is writable, before anything is computed."""
    if jax.process_index() == 0:
        try:
            make_folder(directory)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            raise orbax_files.as_os_error(error, f"{directory} cannot be written") from error
    multihost_utils.sync_global_devices(f"checkpoint folder {directory}")


def _read_json(path: Any) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise orbax_files.as_os_error(error, f"{path} cannot be read") from error
