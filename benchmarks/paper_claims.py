"""Does the paper's claim hold in the clinic, where the truth is known?

HuatuoGPT (arXiv 2305.15075): fine-tuning on distilled and real data together is better than on
either alone, and RLAIF adds to it. For each seed, which has a clinic of its own: SFT on distilled
dialogues, on real ones, and on both, with as many updates, and each of them with RLAIF after it;
and, on the SFT model of both, PPO rewarded for length alone, labels of a judge that does not know
the truth, and labels of a biased judge. All of them answer the same held-out prompts of their
clinic, and the clinic's exact judge says what is true of the answers.

    python benchmarks/paper_claims.py --workdir=runs/paper_claims
    python benchmarks/paper_claims.py --workdir=runs/paper_claims --table=contributions
    python benchmarks/paper_claims.py --page=docs/paper_claims.md

The second line tells what each setting of `configs/rlaif.py` contributes: each is undone alone,
from the same SFT model, prompts, answers and number of verdicts. Both write to `--output`, each its
own table, after every seed; the third makes a page and a plot of it. Each part is a recipe in
`WORKDIR/seed_N/PART`: stopped, the same command goes on.

Models this small do not keep two cores busy. Two processes, each with half of the `--seeds` and an
`--output` of its own, take less time; the command with all seeds then finds every part finished and
writes the whole table.
"""

import dataclasses
import datetime
import gc
import json
import math
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import paper_claims_figures as figures
import paper_claims_page as page
from paper_claims_parts import (
    BOTH,
    ROOT,
    TINY,
    Part,
    chosen_parts,
    claims_parts,
    contributions_parts,
    read_card,
    recipe_of,
    share_answers,
    with_seed,
)

from huatuo_jax.clinic.judge import ClinicJudge
from huatuo_jax.core import command_line
from huatuo_jax.core.config import as_json, identity
from huatuo_jax.core.files import write_file
from huatuo_jax.core.statistics import bootstrap_settings
from huatuo_jax.evaluation.stage import write_json
from huatuo_jax.recipe.config import RlaifConfig
from huatuo_jax.recipe.recipe import Journal, run_rlaif
from huatuo_jax.report.run import read_json
from huatuo_jax.training.loop import INTERRUPTED_EXIT_CODE, Diverged, Interrupted
from huatuo_jax.training.run_directory import environment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Run the experiment on the paper's claims, or write its page.

    Attributes:
        workdir: folder of all runs.
        seeds: which seeds.
        table: what is run.
        parts: of the table; none for all; `both` always is run.
        output: file for the figures.
        page: write this page and a plot of the figures, and run nothing.
        tiny: sizes to try it out, whose figures say nothing.
        dialogues: to fine-tune on; None, here and below, leaves the card's value.
        prompts: to learn from.
        held_out_prompts: to evaluate on.
        sft_epochs: of fine-tuning.
        answers: to each prompt.
        iterations: of PPO.
        evaluation_answers: to each held-out prompt.
    """

    workdir: str = "runs/paper_claims"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    table: Literal["claims", "contributions"] = "claims"
    parts: tuple[str, ...] = ()
    output: str = "benchmarks/results/paper_claims.json"
    page: str | None = None
    tiny: bool = False
    dialogues: int | None = None
    prompts: int | None = 600
    held_out_prompts: int | None = None
    sft_epochs: int | None = None
    answers: int | None = None
    iterations: int | None = None
    evaluation_answers: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for seeds that are none, below 0, or given twice."""
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds} must be different whole numbers from 0")


SIZES: Mapping[str, str] = {
    "dialogues": "clinic.sizes.dialogues",
    "prompts": "clinic.sizes.prompts",
    "held_out_prompts": "clinic.sizes.held_out_prompts",
    "sft_epochs": "sft.num_epochs",
    "answers": "answers.num_samples",
    "iterations": "ppo.num_iterations",
    "evaluation_answers": "evaluation.num_samples",
}
"""Flag -> the field of the card that it sets."""


class Step(NamedTuple):
    """A part of a seed, in the order in which they are run."""

    seed: int
    part: Part
    folder: pathlib.Path
    stages: tuple[str, ...]


def main(flags: Flags) -> None:
    """Run what is not finished, and write the figures; or write the page of them."""
    output = pathlib.Path(flags.output)
    if flags.page is not None:
        write_page(output, pathlib.Path(flags.page))
        return
    cfg = read_card(size_changes(flags))
    parts, undone = claims_parts(), list[str]()
    if flags.table == "contributions":
        parts, undone = contributions_parts(cfg)
        for name in undone:
            print(f"{name}: the card is without it already; left out", flush=True)
    parts = chosen_parts(parts, flags.parts or None)
    workdir = pathlib.Path(flags.workdir)
    keep_compiled(workdir)
    steps = steps_of(parts, cfg, workdir, seeds=flags.seeds)
    found: dict[int, figures.SeedFigures] = {}
    for number, step in enumerate(steps):
        print(f"[{number + 1} of {len(steps)}] {time_told(steps, number)}", flush=True)
        run_step(step, cfg)
        if step.part is parts[-1]:
            found[step.seed] = figures_of(step.folder.parent, parts, flags, seed=step.seed)
            made = table(found, parts, cfg, steps[: number + 1], undone, flags)
            write_table(output, made, name=flags.table)
            print(f"written: {output}, {len(found)} of {len(flags.seeds)} seeds", flush=True)


def steps_of(
    parts: list[Part], cfg: RlaifConfig, workdir: pathlib.Path, *, seeds: Sequence[int]
) -> list[Step]:
    """All parts of all seeds; a seed's parts stand together, `both` before its branches."""
    stages = {part.name: recipe_of(part, cfg, workdir, sft_steps=1).stages for part in parts}
    return [
        Step(seed, part, workdir / f"seed_{seed}" / part.name, stages[part.name])
        for seed in seeds
        for part in parts
    ]


def size_changes(flags: Flags) -> dict[str, Any]:
    """The card's fields that the flags set."""
    if flags.tiny:
        return dict(TINY)
    return {
        field: getattr(flags, name)
        for name, field in SIZES.items()
        if getattr(flags, name) is not None
    }


def run_step(step: Step, cfg: RlaifConfig) -> None:
    """Runs a part's recipe, resuming it; returns at once if it already finished.

    Raises:
        ValueError: a training stage diverged, or the config is invalid.
    """
    both = step.folder.parent / BOTH
    updates = None if step.part.name == BOTH else sft_updates(both)
    recipe = recipe_of(step.part, with_seed(cfg, step.seed), step.folder.parent, sft_steps=updates)
    if step.part.changes is not None:
        share_answers(both, step.folder)
    try:
        run_rlaif(recipe, step.folder)
    except Interrupted as stopped:
        print(f"seed {step.seed}, {step.part.name}: {stopped}", flush=True)
        raise SystemExit(INTERRUPTED_EXIT_CODE) from None
    except Diverged as error:
        raise ValueError(f"{step.folder}: {error}") from error
    jax.clear_caches()
    gc.collect()


def sft_updates(folder: pathlib.Path) -> int:
    """How many updates fine-tuning took in a part's folder."""
    return int(read_json(folder / "sft" / "finished.json")["step"])


def keep_compiled(workdir: pathlib.Path) -> None:
    """One folder of compiled programs for all parts, most of which run the same ones."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = os.path.abspath(workdir / "compiled")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        jax.config.update("jax_compilation_cache_dir", folder)
        # Small programs are many, and each part has them again.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def figures_of(
    folder: pathlib.Path, parts: list[Part], flags: Flags, *, seed: int
) -> figures.SeedFigures:
    """The figures of a seed's finished parts."""
    pairs = figures.pairs_of_claims()
    if flags.table == "contributions":
        pairs = figures.pairs_of_contributions(parts)
    return figures.figures_of_seed(folder, parts, pairs, seed=seed)


def table(
    found: Mapping[int, figures.SeedFigures],
    parts: list[Part],
    cfg: RlaifConfig,
    steps: list[Step],
    undone: list[str],
    flags: Flags,
) -> dict[str, Any]:
    """A table of all seeds by now, with all that it was made with."""
    rows = figures.table_of(found, parts)
    made: dict[str, Any] = {
        **rows,
        "parts": {part.name: _told(part) for part in parts},
        "not_in_the_card": undone,
        "settings": _without_places(identity(cfg)),
        "tiny": flags.tiny,
        "minutes": minutes_by_part(steps),
        "minutes_in_all": minutes_in_all(steps),
        "versions": _versions(),
        "intervals": {
            "of_a_seed": bootstrap_settings(seed=0) | {"seed": "that of the clinic"},
            "over_seeds": "mean and 95 % t-interval of the seeds' values",
        },
    }
    if flags.table == "claims":
        made["claims"] = figures.verdicts_on_claims(rows["comparisons"])
    return made


def write_table(output: pathlib.Path, made: Mapping[str, Any], *, name: str) -> None:
    """Writes a table in the place of its last one; the other table stays as it is."""
    before = read_json(output) if output.exists() else {}
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, {**before, name: made})


def write_page(output: pathlib.Path, path: pathlib.Path) -> None:
    """Writes the page of the figures, and beside the figures their plot."""
    found = read_json(output)
    plot = output.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    if "claims" in found:
        write_file(plot, page.drawn(found["claims"]))
    beside = pathlib.Path(os.path.relpath(plot, path.parent)).as_posix()
    write_file(path, page.page(found, plot=beside))
    print(f"written: {path}{f', {plot}' if 'claims' in found else ''}")


def time_told(steps: list[Step], number: int) -> str:
    """The step, the time spent by now, and about how much is left.

    A stage that is not finished is expected to take as long as it took on average: in the same part
    of other seeds, else in other parts.
    """
    step = steps[number]
    told = f"seed {step.seed}, {step.part.name}: {step.part.title}"
    by_part: dict[tuple[str, str], list[float]] = {}
    by_stage: dict[str, list[float]] = {}
    spent = 0.0
    for one in steps:
        for stage, seconds in stage_seconds(one.folder).items():
            by_part.setdefault((one.part.name, stage), []).append(seconds)
            by_stage.setdefault(stage, []).append(seconds)
            spent += seconds
    left, unknown = 0.0, False
    for one in steps[number:]:
        finished = stage_seconds(one.folder)
        for stage in one.stages:
            known = by_part.get((one.part.name, stage)) or by_stage.get(stage)
            if stage in finished:
                continue
            if known is None:
                unknown = True
            else:
                left += statistics.mean(known)
    least = "at least " if unknown else "about "
    return f"{told}; {spent / 60:.0f} min spent, {least}{left / 60:.0f} min left"


def stage_seconds(folder: pathlib.Path) -> dict[str, float]:
    """How long each finished stage of a part took."""
    entries = Journal(folder, writes=False).stages
    return {name: one["seconds"] for name, one in entries.items() if one["finished"] is not None}


def minutes_by_part(steps: list[Step]) -> dict[str, float]:
    """How long each part took on average over the seeds."""
    found: dict[str, list[float]] = {}
    for step in steps:
        minutes = sum(stage_seconds(step.folder).values()) / 60
        found.setdefault(step.part.name, []).append(minutes)
    return {name: round(statistics.mean(minutes), 2) for name, minutes in found.items()}


def minutes_in_all(steps: list[Step]) -> float:
    """How long anything was running; stages that ran at the same time count once."""
    spans = []
    for step in steps:
        for one in Journal(step.folder, writes=False).stages.values():
            if one["finished"] is not None:
                end = datetime.datetime.fromisoformat(one["finished"]).timestamp()
                spans.append((end - one["seconds"], end))
    seconds, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        seconds += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return round(seconds / 60, 1)


def _told(part: Part) -> dict[str, Any]:
    """A part for the figures' file."""
    changes = {
        name: ", ".join(value.changes) if isinstance(value, ClinicJudge) else value
        for name, value in (part.changes or {}).items()
    }
    return {"title": part.title, "kinds": part.kinds, "changes": as_json(changes, name=part.name)}


def _versions() -> dict[str, Any]:
    """Of the program and its libraries, and the machine's kind."""
    found = environment()
    names = ("time", "python", "packages", "devices", "git_commit")
    return {name: found[name] for name in names} | {"cores": os.cpu_count()}


def _without_places(settings: Mapping[str, Any]) -> Any:
    """Settings without the place of the checkout."""
    return json.loads(json.dumps(settings).replace(json.dumps(f"{ROOT}{os.sep}")[1:-1], ""))


if __name__ == "__main__":
    command_line.run(main, Flags)
