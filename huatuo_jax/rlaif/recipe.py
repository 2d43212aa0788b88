"""The recipe: its stages in order, each once, resumable anywhere by running it again.

Several processes run it together, in a folder that all of them see. They train and generate on one
mesh; the first of them asks the judge, and writes what is written once.
"""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from huatuo_jax import multi_host
from huatuo_jax.atomic import write_file
from huatuo_jax.config import checked
from huatuo_jax.feedback.judge_config import reach_judge
from huatuo_jax.report.run import read_json
from huatuo_jax.rlaif.base_model import check_adapted
from huatuo_jax.rlaif.checks import check_inputs
from huatuo_jax.rlaif.config import HELD_OUT_FILE, JUDGED_FILE, RlaifConfig
from huatuo_jax.rlaif.export import RELEASE_FILE
from huatuo_jax.rlaif.journal import Journal
from huatuo_jax.rlaif.offline_judge import choose_offline_judge
from huatuo_jax.rlaif.prompts import (
    ACCOUNT_FILE,
    TRAIN_FILE,
    Prompts,
    make_prompts,
    write_prompts,
)
from huatuo_jax.rlaif.stages import Stage, make_stages
from huatuo_jax.sft import write_clinic_of
from huatuo_jax.training.preemption import Interrupted


def run_rlaif(config: RlaifConfig, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Runs the recipe in a run's folder, or goes on with it.

    A finished stage is not run again. All inputs are looked at first, the judge's server too, so
    that nothing is trained in vain.

    Args:
        config: of the recipe; `{workdir}` in a path stands for the run's folder.
        workdir: the run's folder.

    Returns:
        The main figures: what PPO gained in reward, how far it went from SFT, and the time. Where
        they were made, `released` says in a sentence what is released and why, and `report` is the
        report's path.

    Raises:
        ValueError: a config, a file, a judge or a folder that cannot be; names the field. Or the
            folder is none that all processes share.
        Interrupted: the run was stopped, and can go on.
        Diverged: a training stage's steps were not finite.
        OSError: something cannot be read or written.
    """
    folder = pathlib.Path(workdir)
    check_adapted(checked(config, RlaifConfig, path="config"))
    cfg = config.in_workdir(folder)
    multi_host.check_joined()
    multi_host.check_shared(folder)
    write_clinic_of(folder, cfg.clinic)
    prompts = make_prompts(cfg.sft.data, cfg.prompts, num_judged=cfg.num_judged_prompts(folder))
    multi_host.by_first("prompts", lambda: _write_prompts(folder, prompts))
    if multi_host.is_first():
        for line in prompts.account.lines():
            print(f"prompts: {line}", flush=True)
    cfg, told = choose_offline_judge(cfg, folder)
    if multi_host.is_first():
        print(told, flush=True)
    stages, journal = make_stages(cfg, folder), Journal(folder, writes=multi_host.is_first())
    wanted = unfinished_stages(stages, journal)
    multi_host.check_same("the stages to be run", sorted(wanted))
    check_inputs(cfg, folder, wanted)
    if "labels" in wanted and multi_host.is_first():
        reach_judge(cfg.judge)
    judging = cfg.ppo.judging
    if "ppo" in wanted and judging is not None and multi_host.is_first():
        assert judging.judge is not None
        reach_judge(judging.judge, field="config.ppo.judging.judge")
    if "evaluation" in wanted and multi_host.is_first():
        tell_temperatures(cfg)
    # Nothing is begun, nor waited for, before all have looked at everything.
    multi_host.barrier("inputs checked")
    _keep_compiled(folder)
    run_stages(stages, journal, wanted)
    figures: dict[str, Any] = {}
    if journal.is_finished("evaluation"):
        figures |= journal.stages["evaluation"]["result"] or {}
    figures["seconds"] = sum(journal.stages[stage.name]["seconds"] for stage in stages)
    if "export" in cfg.stages:
        figures["released"] = read_json(folder / "export" / RELEASE_FILE)["sentence"]
    if "report" in cfg.stages:
        figures["report"] = str(folder / "report.html")
    return figures


def _write_prompts(folder: pathlib.Path, prompts: Prompts) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(folder / TRAIN_FILE, prompts.train)
    write_prompts(folder / HELD_OUT_FILE, prompts.held_out)
    if prompts.judged:
        write_prompts(folder / JUDGED_FILE, prompts.judged)
    account = json.dumps(prompts.account.to_json(), ensure_ascii=False, indent=2)
    write_file(folder / ACCOUNT_FILE, f"{account}\n")


def unfinished_stages(stages: Sequence[Stage], journal: Journal) -> set[str]:
    """The stages that are to be run; the report is cheap and is made anew each time.

    A stage that follows the others is run again after any of them, and where its own settings or
    inputs have changed.

    Raises:
        ValueError: another finished one was made with other settings, or from other files.
    """
    wanted: set[str] = set()
    for stage in stages:
        stands = journal.is_finished(stage.name) and all(path.exists() for path in stage.outputs)
        if stands and stage.follows:
            hashes = stage.input_hashes()
            stands = not wanted and not journal.changes(stage.name, stage.settings, hashes)
        elif stands:
            journal.check(stage.name, stage.settings, stage.input_hashes())
        if not stands or stage.name == "report":
            wanted.add(stage.name)
    return wanted


def run_stages(stages: Sequence[Stage], journal: Journal, wanted: set[str]) -> None:
    """Runs those that are wanted, in order, and says which of how many it is at."""
    for number, stage in enumerate(stages, start=1):
        is_wanted = stage.name in wanted
        if multi_host.is_first():
            told = "" if is_wanted else ", finished before"
            print(f"stage {number} of {len(stages)}: {stage.name}{told}", flush=True)
        if not is_wanted:
            continue
        journal.start(stage.name, stage.settings, stage.input_hashes())
        try:
            result = stage.run()
        except KeyboardInterrupt:
            journal.stop(stage.name)
            if multi_host.count() > 1:
                raise  # The others, which go on, are told that this one failed.
            raise Interrupted(
                f"stopped in stage {stage.name!r}; run the same command again to go on"
            ) from None
        except BaseException:
            journal.stop(stage.name)
            raise
        journal.finish(stage.name, result)


def tell_temperatures(cfg: RlaifConfig) -> None:
    """Says where the evaluation is not at the temperature that PPO samples at."""
    own, rollouts = cfg.evaluation.temperature, cfg.ppo.rollout.temperature
    if own != rollouts:
        print(
            f"evaluation.temperature={own} is not ppo.rollout.temperature={rollouts}: rewards and "
            "KL of the evaluation are not those that PPO trains for",
            flush=True,
        )


def _keep_compiled(folder: pathlib.Path) -> None:
    """Keeps compiled programs in the run's folder: several stages run the same ones."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.abspath(folder / "compiled"))
