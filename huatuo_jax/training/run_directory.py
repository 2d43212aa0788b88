"""A run's folder: its settings, its machine, and one folder for each of its stages.

    config.json        all settings of every stage that was begun
    environment.json   versions, devices and commit, one entry for each start
    STAGE/checkpoints/ STAGE/metrics.jsonl  STAGE/tensorboard/  STAGE/data.json  STAGE/finished.json

Settings that decide results are a run's identity: once a stage has a checkpoint they may not
change. A field is operational (free to change) if it was declared with `operational`.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from huatuo_jax.checkpoint.orbax_files import check_place
from huatuo_jax.checkpoint.store import saved_steps
from huatuo_jax.core import distributed
from huatuo_jax.core.config import as_json, differences
from huatuo_jax.core.files import as_path, check_address, locked, make_folder, write_file
from huatuo_jax.data.accounting import Account

CONFIG_FILE = "config.json"
ENVIRONMENT_FILE = "environment.json"
FINISHED_FILE = "finished.json"
DATA_FILE = "data.json"

_PACKAGES = (
    "huatuo_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "transformers",
)


@dataclasses.dataclass(frozen=True)
class StageDirectory:
    """The folder of one stage."""

    folder: pathlib.Path

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.folder.name

    @property
    def checkpoints(self) -> pathlib.Path:
        """The folder of its checkpoints."""
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> pathlib.Path:
        """Its metrics, one row a line."""
        return self.folder / "metrics.jsonl"

    @property
    def tensorboard(self) -> pathlib.Path:
        """The folder of its TensorBoard events."""
        return self.folder / "tensorboard"

    def began_s(self) -> float | None:
        """Returns when the stage was first started, in seconds since 1970; None if never."""
        starts = earlier_starts(self.folder.parent, self.name)
        return datetime.datetime.fromisoformat(starts[0]["time"]).timestamp() if starts else None

    def result(self) -> dict[str, Any] | None:
        """Returns the finished stage's result, or None: a finished one is not run again."""
        path = self.folder / FINISHED_FILE
        return _read(path) if path.exists() else None

    def finish(self, result: Mapping[str, Any]) -> None:
        """Marks the stage as finished; call it when all it made is on disk."""
        # What the first process does alone at the end, such as a report, may take its time.
        distributed.by_first("stage finished", lambda: _write(self.folder / FINISHED_FILE, result))

    def has_checkpoint(self) -> bool:
        """Tells whether there is a whole checkpoint: from then on the settings are fixed."""
        return bool(saved_steps(self.checkpoints))


@contextlib.contextmanager
def run_lock(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Holds a run's folder in a bucket for this run alone; the first process has the lock.

    Raises:
        ValueError: the workdir is an unusable address, or another run is in it.
        OSError: it cannot be written.
    """
    check_address(workdir, name="workdir")
    folder = as_path(workdir)
    check_place(folder, name="workdir")
    distributed.check_joined()
    with contextlib.ExitStack() as held:
        distributed.by_first("lock", lambda: held.enter_context(locked(folder)))
        yield


def begin_stage(
    workdir: str | os.PathLike[str],
    name: str,
    *,
    settings: Mapping[str, Any],
    decisive: Mapping[str, Any],
    placed: Mapping[str, Any] | None = None,
) -> StageDirectory:
    """Opens a stage's folder and writes its settings, unless they contradict what is there.

    Args:
        workdir: the run's folder.
        name: the stage's.
        settings: all settings, from `all_fields`.
        decisive: those that decide results, from `identity`.
        placed: how the stage lies on the devices, for its entry in `environment.json`.

    Raises:
        ValueError: the stage has a checkpoint or is finished, and a decisive field has changed;
            one line a field. Or the folder is none that all processes share.
        OSError: the folder cannot be written.
    """
    folder = as_path(workdir)
    distributed.check_joined()
    distributed.check_shared(folder)
    distributed.check_same(f"what decides results of stage {name!r}", dict(decisive))
    stage = StageDirectory(folder / name)
    path = folder / CONFIG_FILE
    saved = _read(path) if path.exists() else {}
    begun = stage.has_checkpoint() or stage.result() is not None
    if begun and name in saved:
        changed = differences(saved[name]["decisive"], decisive)
        if changed:
            lines = [
                f"stage {name!r} in {folder} was begun with other settings; undo the change or "
                "choose another workdir:",
                *changed,
            ]
            raise ValueError("\n  ".join(lines))
    if jax.process_index() == 0:
        make_folder(stage.folder)
        _write(path, {**saved, name: {"settings": settings, "decisive": decisive}})
        start = {"stage": name, **(placed or {}), **environment()}
        _write(folder / ENVIRONMENT_FILE, {"starts": [*_starts(folder), start]})
    return stage


def earlier_starts(workdir: str | os.PathLike[str], name: str) -> list[dict[str, Any]]:
    """Returns the entries of a stage's starts in `environment.json`, the oldest first."""
    return [start for start in _starts(as_path(workdir)) if start["stage"] == name]


def _starts(folder: pathlib.Path) -> list[dict[str, Any]]:
    path = folder / ENVIRONMENT_FILE
    return list(_read(path)["starts"]) if path.exists() else []


def report_data(directory: StageDirectory, account: Account) -> None:
    """Prints an account of the stage's data and writes it to `STAGE/data.json`.

    Of several processes, the first one does.
    """
    if not distributed.is_first():
        return
    for line in account.lines():
        print(f"{directory.name}: {line}", flush=True)
    text = json.dumps(account.to_json(), ensure_ascii=False, indent=2)
    write_file(directory.folder / DATA_FILE, f"{text}\n")


def is_begun(workdir: str | os.PathLike[str]) -> bool:
    """Tells whether any stage in a run's folder has a checkpoint or is finished."""
    folder = as_path(workdir)
    if not folder.is_dir():
        return False
    stages = [StageDirectory(path) for path in folder.iterdir() if path.is_dir()]
    return any(stage.has_checkpoint() or stage.result() is not None for stage in stages)


def environment() -> dict[str, Any]:
    """Returns versions, devices and commit of this process."""
    devices = jax.devices()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": {"kind": devices[0].device_kind, "number": len(devices)},
        "num_processes": jax.process_count(),
        "git_commit": _git_commit(),
    }


def _version(package: str) -> str | None:
    """Returns a package's version; None for ours in a checkout that is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Returns the code's commit, with `+changes` where files differ; None outside git."""
    here = pathlib.Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        # An installed package may lie in a folder of somebody else's repository.
        git("ls-files", "--error-unmatch", "--", __file__)
        commit = git("rev-parse", "HEAD")
        return f"{commit}+changes" if git("status", "--porcelain", "--", ".") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); remove it to start anew") from error


def _write(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes JSON that is never seen half written."""
    text = json.dumps(as_json(value, name=path.name), ensure_ascii=False, indent=2)
    write_file(path, f"{text}\n")
