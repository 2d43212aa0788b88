"""Reads the files of a run that its report and its model cards show; absent ones are None."""

import dataclasses
import json
import pathlib
from typing import Any

from huatuo_jax.core.files import as_path, read_rows
from huatuo_jax.data.records import KINDS
from huatuo_jax.training.run_directory import (
    CONFIG_FILE,
    DATA_FILE,
    ENVIRONMENT_FILE,
    StageDirectory,
)
from huatuo_jax.training.wall_time import WallTime

Rows = list[dict[str, Any]]
TRAINED = ("sft", "reward", "ppo")
MODELS = ("base", "sft", "best_of_n", "ppo", "reference")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's files.

    Attributes:
        folder: the run's.
        journal: `recipe.json`: settings, times and result of each stage.
        config: `config.json`: all settings of the training stages.
        environment: the newest start in `environment.json`.
        synthesis: reports of the data that the run made, by kind.
        dialogues: statistics of the dialogues of fine-tuning.
        metrics: rows of each training stage.
        wall_time: of each training stage that was started, since then.
        accounts: rows read, used and left out, of prompts, answers and each training stage.
        labels: the judge's report.
        reward: the reward model's held-out report.
        samples: PPO's answers while it was trained.
        evaluation: `evaluation.json`.
        suites: results of the evaluation by suites, where that stage is finished.
        release: `export/release.json`.
        answers: scored answers of each model to the held-out prompts.
    """

    folder: pathlib.Path
    journal: dict[str, Any]
    config: dict[str, Any]
    environment: dict[str, Any] | None
    synthesis: dict[str, dict[str, Any]]
    dialogues: dict[str, Any] | None
    metrics: dict[str, Rows]
    wall_time: dict[str, WallTime]
    accounts: dict[str, dict[str, Any]]
    labels: dict[str, Any] | None
    reward: dict[str, Any] | None
    samples: Rows
    evaluation: dict[str, Any] | None
    suites: dict[str, Any] | None
    release: dict[str, Any] | None
    answers: dict[str, Rows]

    def series(self, stage: str, name: str) -> tuple[list[int], list[float]]:
        """Returns the steps and values of a metric, where it was written."""
        rows = [row for row in self.metrics[stage] if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]


def read_run(folder: pathlib.Path) -> Run:
    """Reads the files that a run's folder holds.

    Raises:
        ValueError: a file is not JSON.
    """
    config = _json(folder / CONFIG_FILE) or {}
    journal = _json(folder / "recipe.json") or {}
    evaluated = journal.get("suites", {"finished": None})["finished"] is not None
    environment = _json(folder / ENVIRONMENT_FILE)
    metrics = {stage: _rows(folder / stage / "metrics.jsonl") for stage in TRAINED}
    began_s = {stage: StageDirectory(folder / stage).began_s() for stage in TRAINED}
    return Run(
        folder=folder,
        journal=journal,
        config=config,
        environment=environment["starts"][-1] if environment else None,
        synthesis=_synthesis(folder, journal),
        dialogues=_dialogues(folder, config),
        metrics=metrics,
        wall_time={
            stage: WallTime(began, metrics[stage])
            for stage, began in began_s.items()
            if began is not None and metrics[stage]
        },
        accounts=_accounts(folder),
        labels=_json(folder / "labels.jsonl.report.json"),
        reward=_json(folder / "reward" / "reward_report.json"),
        samples=_rows(folder / "ppo" / "samples.jsonl"),
        evaluation=_json(folder / "evaluation.json"),
        suites=_json(folder / "suites" / "evaluation.json") if evaluated else None,
        release=_json(folder / "export" / "release.json"),
        answers={name: _rows(folder / "evaluation" / f"scored_{name}.jsonl") for name in MODELS},
    )


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON file of the run.

    Raises:
        ValueError: it is not JSON.
        OSError: it cannot be read.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    return found


def _dialogues(folder: pathlib.Path, config: dict[str, Any]) -> dict[str, Any] | None:
    if "sft" not in config:
        return None
    cache = config["sft"]["settings"]["data"]["cache"] or folder / "data"
    name = config["sft"]["decisive"]["dialogues"]["cache"]
    return _json(as_path(cache) / name / "statistics.json")


def _synthesis(folder: pathlib.Path, journal: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if "synthesis" not in journal:
        return {}
    found = {kind: _json(folder / "synthesis" / f"{kind}.jsonl.report.json") for kind in KINDS}
    return {kind: report for kind, report in found.items() if report is not None}


def _accounts(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    places = {
        "prompts": folder / "prompts.jsonl.report.json",
        "answers": folder / "answers.jsonl.report.json",
        **{stage: folder / stage / DATA_FILE for stage in ("sft", "reward", "dpo", "ppo")},
        **{
            f"evaluation of {name}": folder / "evaluation" / f"answers_{name}.jsonl.report.json"
            for name in MODELS
        },
    }
    found = {name: _json(path) for name, path in places.items()}
    return {name: account for name, account in found.items() if account is not None}


def _json(path: pathlib.Path) -> dict[str, Any] | None:
    return read_json(path) if path.exists() else None


def _rows(path: pathlib.Path) -> Rows:
    return read_rows(path, unfinished="skip") if path.exists() else []
