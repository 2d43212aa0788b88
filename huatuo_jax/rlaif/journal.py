"""`recipe.json`: which stages are finished, what they were made from, and how long they took."""

import datetime
import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any, TypedDict

from huatuo_jax.atomic import write_file
from huatuo_jax.checkpoint.differences import as_json, differences
from huatuo_jax.report.run import read_json

JOURNAL_FILE = "recipe.json"


class Entry(TypedDict):
    """One stage.

    Attributes:
        settings: those that decide its result.
        inputs: a hash of each file or model it was made from.
        starts: when it was started, each time.
        seconds: of all starts that ended in an orderly way; a killed one leaves none.
        finished: when; None while it is not.
        result: what it reported; None while it is not finished.
    """

    settings: dict[str, Any]
    inputs: dict[str, str]
    starts: list[str]
    seconds: float
    finished: str | None
    result: dict[str, Any] | None


class Journal:
    """The journal of one run's folder; every change is on disk when the call returns."""

    def __init__(self, workdir: str | os.PathLike[str], *, writes: bool = True) -> None:
        """Reads it, where there is one.

        Args:
            workdir: the run's folder.
            writes: whether this process is the one that writes it; others remember what they do.

        Raises:
            ValueError: it is no JSON.
        """
        self._path, self._writes = pathlib.Path(workdir) / JOURNAL_FILE, writes
        self.stages: dict[str, Entry] = {}
        if self._path.exists():
            self.stages = read_json(self._path)

    def is_finished(self, name: str) -> bool:
        """Whether a stage is."""
        return name in self.stages and self.stages[name]["finished"] is not None

    def changes(
        self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]
    ) -> list[str]:
        """Which settings and inputs of a finished stage are not those that it was made with."""
        entry = self.stages[name]
        settings = as_json(settings, name=name)
        changed = differences(entry["settings"], settings)
        changed += [
            f"{which}: the stage was made from another content"
            for which, content in inputs.items()
            if which not in entry["inputs"] or entry["inputs"][which] != content
        ]
        return changed + [f"{which}: is gone" for which in entry["inputs"] if which not in inputs]

    def check(self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
        """Raise ValueError where a finished stage was made with other settings or inputs."""
        changed = self.changes(name, settings, inputs)
        if changed:
            raise ValueError(
                f"stage {name!r} is finished in {self._path.parent}, with other settings: "
                f"{'; '.join(changed)}. Undo the change, or choose another workdir"
            )

    def start(self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
        """Writes down that a stage is started, for the first time or again."""
        before = self.stages[name] if name in self.stages else None
        self.stages[name] = Entry(
            settings=as_json(settings, name=name),
            inputs=dict(inputs),
            starts=[*(before["starts"] if before else []), _now()],
            seconds=before["seconds"] if before else 0.0,
            finished=None,
            result=None,
        )
        self._write()
        self._started_s = time.monotonic()

    def stop(self, name: str) -> None:
        """Writes down the time of a start that did not finish the stage."""
        self.stages[name]["seconds"] += time.monotonic() - self._started_s
        self._write()

    def finish(self, name: str, result: Mapping[str, Any]) -> None:
        """Writes down that a stage is finished."""
        entry = self.stages[name]
        entry["seconds"] += time.monotonic() - self._started_s
        entry["finished"] = _now()
        entry["result"] = as_json(result, name=name)
        self._write()

    def _write(self) -> None:
        if not self._writes:
            return
        text = json.dumps(self.stages, ensure_ascii=False, indent=2)
        write_file(self._path, f"{text}\n")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
