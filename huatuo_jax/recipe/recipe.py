"""Runs the recipe: its stages in order, each once; run again, it resumes.

Several processes run it together in a shared folder. They train and generate on one mesh; the first
of them calls the judge and writes the files.

The journal `recipe.json` holds each stage's settings, inputs, times and result.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import jax

from huatuo_jax.core import distributed
from huatuo_jax.core.config import as_json, checked, differences
from huatuo_jax.core.files import absolute, as_path, make_folder, write_file
from huatuo_jax.core.folders import is_written
from huatuo_jax.judge.config import reach_judge
from huatuo_jax.recipe.base_model import check_adapted
from huatuo_jax.recipe.checks import check_inputs, choose_offline_judge
from huatuo_jax.recipe.config import (
    HELD_OUT_FILE,
    JUDGED_FILE,
    STAGE_RUNS,
    RlaifConfig,
    StagesConfig,
)
from huatuo_jax.recipe.export import RELEASE_FILE
from huatuo_jax.recipe.prompts import ACCOUNT_FILE, TRAIN_FILE, Prompts, make_prompts, write_prompts
from huatuo_jax.recipe.stages import REPORT_FILE, Stage, left_out, make_stages, synthesis_stage
from huatuo_jax.report.run import read_json
from huatuo_jax.sft import write_clinic_of
from huatuo_jax.training.loop import INTERRUPTED_EXIT_CODE, Diverged, Interrupted
from huatuo_jax.training.run_directory import run_lock

JOURNAL_FILE = "recipe.json"


class Entry(TypedDict):
    """The journal's entry of one stage.

    Attributes:
        settings: the fields that decide its result.
        inputs: a hash of each file or model that it reads.
        starts: the time of each start.
        seconds: of all starts but those that were killed.
        finished: time of its end; None while it is not finished.
        result: its figures; None while it is not finished.
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
        """Reads the journal, if there is one.

        Args:
            workdir: the run's folder.
            writes: False for the processes that only keep it in memory.

        Raises:
            ValueError: it is not JSON.
        """
        self._path, self._writes = as_path(workdir) / JOURNAL_FILE, writes
        self.stages: dict[str, Entry] = {}
        if self._path.exists():
            self.stages = read_json(self._path)

    def is_finished(self, name: str) -> bool:
        """Tells whether a stage is finished."""
        return name in self.stages and self.stages[name]["finished"] is not None

    def changes(
        self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]
    ) -> list[str]:
        """Lists the settings and inputs of a finished stage that have changed since it ran."""
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
        """Raises ValueError where a finished stage was run with other settings or inputs."""
        changed = self.changes(name, settings, inputs)
        if changed:
            raise ValueError(
                f"stage {name!r} is finished in {self._path.parent}, with other settings: "
                f"{'; '.join(changed)}. Undo the change, or choose another workdir"
            )

    def start(self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
        """Records that a stage starts, for the first time or again."""
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
        """Records the time of a start that did not finish the stage."""
        self.stages[name]["seconds"] += time.monotonic() - self._started_s
        self._write()

    def finish(self, name: str, result: Mapping[str, Any]) -> None:
        """Records that a stage is finished, with its result."""
        entry = self.stages[name]
        entry["seconds"] += time.monotonic() - self._started_s
        entry["finished"] = _now()
        entry["result"] = as_json(result, name=name)
        self._write()

    def forget(self, name: str) -> None:
        """Removes the entry of a stage that the run no longer has."""
        if self.stages.pop(name, None) is not None:
            self._write()

    def _write(self) -> None:
        if not self._writes:
            return
        text = json.dumps(self.stages, ensure_ascii=False, indent=2)
        write_file(self._path, f"{text}\n")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def run_rlaif(config: RlaifConfig, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Runs the recipe in a run's folder, resuming it there.

    A finished stage is not run again. All inputs, and the judge's server, are checked first.

    Args:
        config: of the recipe; `{workdir}` in a path stands for the run's folder.
        workdir: the run's folder.

    Returns:
        The main figures: PPO's gain in reward, its KL from SFT, and the time. After the stages of
        their names, `released` is a sentence on what is released and why, and `report` is the
        report's path.

    Raises:
        ValueError: an invalid config, file, judge or folder; names the field. Or workdir is not
            visible to every process.
        Interrupted: the run was stopped; the same call resumes it.
        Diverged: a training stage's steps were not finite.
        OSError: something cannot be read or written.
    """
    folder = as_path(workdir)
    check_adapted(checked(config, RlaifConfig, path="config"))
    with run_lock(folder):
        return _run_recipe(config.in_workdir(folder), folder)


def _run_recipe(cfg: RlaifConfig, folder: pathlib.Path) -> dict[str, Any]:
    distributed.check_shared(folder)
    write_clinic_of(folder, cfg.clinic)
    _keep_compiled(folder)
    journal = Journal(folder, writes=distributed.is_first())
    for name in left_out(cfg) & set(cfg.stages):
        journal.forget(name)
    count = len(set(cfg.stages) - left_out(cfg))
    first = _run_synthesis(cfg, folder, journal, count=count)
    prompts = make_prompts(cfg.sft.data, cfg.prompts, num_judged=cfg.num_judged_prompts(folder))
    distributed.by_first("prompts", lambda: _write_prompts(folder, prompts))
    if distributed.is_first():
        for line in prompts.account.lines():
            print(f"prompts: {line}", flush=True)
    cfg, told = choose_offline_judge(cfg, folder)
    if distributed.is_first():
        print(told, flush=True)
    stages = make_stages(cfg, folder)
    wanted = unfinished_stages(stages, journal)
    distributed.check_same("the stages to be run", sorted(wanted))
    check_inputs(cfg, folder, wanted)
    if "labels" in wanted and distributed.is_first():
        reach_judge(cfg.judge)
    judging = cfg.ppo.judging
    if "ppo" in wanted and judging is not None and distributed.is_first():
        assert judging.judge is not None
        reach_judge(judging.judge, field="config.ppo.judging.judge")
    if "evaluation" in wanted and distributed.is_first():
        tell_temperatures(cfg)
    # No process starts before all of them have checked their inputs.
    distributed.barrier("inputs checked")
    run_stages(stages[first - 1 :], journal, wanted, first=first, count=count)
    figures: dict[str, Any] = {}
    if journal.is_finished("evaluation"):
        figures |= journal.stages["evaluation"]["result"] or {}
    figures["seconds"] = sum(journal.stages[stage.name]["seconds"] for stage in stages)
    if "export" in cfg.stages:
        figures["released"] = read_json(folder / "export" / RELEASE_FILE)["sentence"]
    if "report" in cfg.stages:
        figures["report"] = str(folder / REPORT_FILE)
    return figures


def _run_synthesis(cfg: RlaifConfig, folder: pathlib.Path, journal: Journal, *, count: int) -> int:
    """Runs the stage whose rows prompts and fine-tuning are read from; returns the next number."""
    if "synthesis" not in set(cfg.stages) - left_out(cfg):
        return 1
    stages = [synthesis_stage(cfg, folder)]
    wanted = unfinished_stages(stages, journal)
    if wanted:  # What needs no rows is checked before any is paid for.
        check_inputs(cfg, folder, {"sft"} & set(cfg.stages))
        distributed.barrier("inputs checked before synthesis")
    make_folder(folder)
    run_stages(stages, journal, wanted, count=count)
    return 2


def _write_prompts(folder: pathlib.Path, prompts: Prompts) -> None:
    make_folder(folder)
    write_prompts(folder / TRAIN_FILE, prompts.train)
    write_prompts(folder / HELD_OUT_FILE, prompts.held_out)
    if prompts.judged:
        write_prompts(folder / JUDGED_FILE, prompts.judged)
    account = json.dumps(prompts.account.to_json(), ensure_ascii=False, indent=2)
    write_file(folder / ACCOUNT_FILE, f"{account}\n")


def unfinished_stages(stages: Sequence[Stage], journal: Journal) -> set[str]:
    """Returns the stages to be run; the report is cheap and is written each time.

    A stage with `follows` is run again after any other one, and where its own settings or inputs
    have changed.

    Raises:
        ValueError: another finished one was made with other settings, or from other files.
    """
    wanted: set[str] = set()
    for stage in stages:
        stands = journal.is_finished(stage.name) and all(map(is_written, stage.outputs))
        if stands and stage.follows:
            hashes = stage.input_hashes()
            stands = not wanted and not journal.changes(stage.name, stage.settings, hashes)
        elif stands:
            journal.check(stage.name, stage.settings, stage.input_hashes())
        if not stands or stage.name == "report":
            wanted.add(stage.name)
    return wanted


def run_stages(
    stages: Sequence[Stage],
    journal: Journal,
    wanted: set[str],
    *,
    first: int = 1,
    count: int | None = None,
) -> None:
    """Runs the stages of `wanted` in order, printing the number of each.

    Args:
        stages: in their order.
        journal: of the run.
        wanted: names of those to be run.
        first: number of the first one.
        count: of all stages of the run; None for these.
    """
    count = len(stages) if count is None else count
    for number, stage in enumerate(stages, start=first):
        is_wanted = stage.name in wanted
        if distributed.is_first():
            told = "" if is_wanted else ", finished before"
            print(f"stage {number} of {count}: {stage.name}{told}", flush=True)
        if not is_wanted:
            continue
        journal.start(stage.name, stage.settings, stage.input_hashes())
        try:
            result = stage.run()
        except KeyboardInterrupt:
            journal.stop(stage.name)
            if distributed.count() > 1:
                raise  # The other processes, which are still running, learn that this one failed.
            raise Interrupted(
                f"stopped in stage {stage.name!r}; run the same command again to go on"
            ) from None
        except BaseException:
            journal.stop(stage.name)
            raise
        journal.finish(stage.name, result)


def tell_temperatures(cfg: RlaifConfig) -> None:
    """Prints a line where evaluation and PPO sample at different temperatures."""
    own, rollouts = cfg.evaluation.temperature, cfg.ppo.rollout.temperature
    if own != rollouts:
        print(
            f"evaluation.temperature={own} is not ppo.rollout.temperature={rollouts}: rewards and "
            "KL of the evaluation are not those that PPO trains for",
            flush=True,
        )


def _keep_compiled(folder: pathlib.Path) -> None:
    """Caches compiled programs in the run's folder, as several stages share them."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.fspath(absolute(folder / "compiled")))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Run the stages of a config, or the whole recipe; run again, it resumes.

    Finished stages are skipped. Exit code 75: stopped (SIGTERM, Ctrl-C), saved.

    Attributes:
        workdir: the run's folder; made if it does not exist.
    """

    workdir: str


@distributed.joined()
def main(flags: Flags, config: StagesConfig | RlaifConfig) -> None:
    """Runs each stage in order and prints its result."""
    for name, run, settings in _runs(config):
        try:
            result = run(settings, flags.workdir)
        except Interrupted as stopped:
            print(f"{name}: {stopped}", flush=True)
            raise SystemExit(INTERRUPTED_EXIT_CODE) from None
        except Diverged as error:
            raise ValueError(f"{name}: {error}") from error
        if distributed.is_first():
            told = [f"{key}: {result[key]}" for key in ("released", "report") if key in result]
            print(f"{name}: finished in {flags.workdir}: {_summary(result)}", *told, sep="\n")


def _runs(config: Any) -> list[tuple[str, Callable[..., dict[str, Any]], Any]]:
    if isinstance(config, RlaifConfig):
        return [(config.recipe, run_rlaif, config)]
    if not isinstance(config, StagesConfig):
        raise ValueError(
            f"the card's get_config() returns a {type(config).__name__}; it must be a StagesConfig "
            "or an RlaifConfig"
        )
    return [(name, STAGE_RUNS[name], getattr(config, name)) for name in config.stages]


def _summary(result: dict[str, Any]) -> str:
    """Returns the numbers over all kinds of data: `eval/loss`, but not `eval/loss/KIND`."""
    numbers = ((name, value) for name, value in result.items() if isinstance(value, int | float))
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers if name.count("/") < 2)
