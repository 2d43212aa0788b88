"""An evaluation by suites, from its settings to its figures, for the command and the recipe.

    evaluation.json             figures, settings, versions

beside the files that `session` describes. The caller writes the page.
"""

import importlib.metadata
import itertools
import json
import pathlib
import platform
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from huatuo_jax.core.files import as_path, make_folder, write_file
from huatuo_jax.core.progress import tell
from huatuo_jax.evaluation.asking import SPENDING_SUFFIX
from huatuo_jax.evaluation.comparing_suites import PairJudge
from huatuo_jax.evaluation.contamination import overlaps_with_files
from huatuo_jax.evaluation.opening import (
    ModelChoice,
    Opening,
    check_models,
    open_judges,
    open_models,
    open_suites,
)
from huatuo_jax.evaluation.session import ServerJudge, Session
from huatuo_jax.evaluation.suite_settings import SuiteSettings, check_settings
from huatuo_jax.judge.spending import SpendingFile

FORMAT = "huatuo-evaluation-1"
RESULTS_FILE = "evaluation.json"
PAGE_FILE = "report.html"

_PACKAGES = ("huatuo_jax", "jax", "numpy", "transformers", "nltk", "jieba", "rapidfuzz")


class SuiteRun:
    """An evaluation whose sets are read and whose judges are there."""

    def __init__(
        self,
        cfg: SuiteSettings,
        models: Mapping[str, ModelChoice],
        output: pathlib.Path,
        *,
        flag: str = "--",
        dry: bool = False,
    ) -> None:
        """Checks settings, judges and sets; nothing is computed or paid for, no model is opened.

        Args:
            cfg: the settings.
            models: by their names in tables.
            output: folder of all files.
            flag: stands before a field's name in messages.
            dry: nothing is sent, computed or written.

        Raises:
            ValueError: settings that do not go together, a set that is missing or in another
                layout, or a judge that does not answer.
        """
        check_settings(cfg, flag=flag)
        check_models(cfg, models, flag=flag)
        self._cfg, self._models, self._output = cfg, models, output
        self._dry = dry
        self._judges = open_judges(cfg, output, flag=flag, dry=dry)
        self._suites = open_suites(Opening(cfg, self._judges, len(models), flag))
        for path in cfg.training_data:
            if not as_path(path).exists():
                raise ValueError(f"{path}: there is no such file or folder")

    def plan(self) -> list[str]:
        """Returns the lines of a dry run: what would be asked, and its cost.

        Raises:
            ValueError: a model or its template is not supported.
            FileNotFoundError: there is no such model.
        """
        assert self._dry
        session = self._open()
        for suite in self._suites:
            suite.run(session)
        return session.plan_lines()

    def evaluate(self) -> dict[str, Any]:
        """Returns all figures, and writes them to the output folder.

        A run that was killed resumes: replies and responses that are there are taken.

        Raises:
            ValueError: as `plan`; or no request can be answered any more, see `ReplyFile.ask`.
            Interrupted: SIGTERM or Ctrl-C came, see `ReplyFile.ask`.
            FileNotFoundError: there is no such model.
            OSError: something cannot be written.
        """
        session = self._open()
        # One model after the other, so that each is loaded once.
        for model, suite in itertools.product(self._models, self._suites):
            suite.answer(session, model)
        result: dict[str, Any] = {
            "format": FORMAT,
            "settings": _settings(self._cfg),
            "models": {name: one.settings() for name, one in session.models.items()},
            "judge": _judge_settings(self._judges.first),
            "second_judge": _judge_settings(self._judges.second),
            "versions": _versions(),
            "suites": {},
            "contamination": None,
            "calls": {},
        }
        for suite in self._suites:
            result["suites"][suite.name] = suite.run(session)
            tell(f"{suite.name}: done")
        if self._cfg.training_data:
            tests = {suite.name: suite.test_texts() for suite in self._suites}
            result["contamination"] = overlaps_with_files(tests, self._cfg.training_data)
        result["calls"] = _calls(self._output)
        make_folder(self._output)
        text = json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False)
        write_file(self._output / RESULTS_FILE, text.encode("utf-8", "replace"))
        return result

    def _open(self) -> Session:
        """Opens the models."""
        cfg, models = self._cfg, self._models
        first, second = self._judges.first, self._judges.second
        return Session(
            open_models(cfg, models, dry=self._dry),
            self._output,
            judge=first if isinstance(first, ServerJudge) else None,
            second_judge=second if isinstance(second, ServerJudge) else None,
            seed=cfg.seed,
            limit=cfg.limit,
            max_new_tokens=cfg.max_new_tokens,
            dry=self._dry,
        )


def _settings(cfg: SuiteSettings) -> dict[str, Any]:
    """The settings as results hold them; servers' keys are no settings."""
    found = asdict(cfg)
    for name in ("judge", "second_judge", "examples", "files"):
        found[name] = {key: value for key, value in found[name].items() if value is not None}
    return found


def _calls(output: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The calls of all runs of a folder, by file of replies, as its spending files have them.

    Calls of unknown cost had no reply: a kill or the server lost it.
    """
    found = {}
    for path in sorted(output.rglob(f"*{SPENDING_SUFFIX}")):
        spending = SpendingFile(path)
        totals = spending.totals()
        spending.close()
        replies = path.relative_to(output).as_posix().removesuffix(SPENDING_SUFFIX)
        found[replies] = asdict(totals)
    return found


def _judge_settings(judge: PairJudge | None) -> dict[str, Any] | None:
    if judge is None:
        return None
    return dict(judge.settings() if isinstance(judge, ServerJudge) else judge.settings)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
