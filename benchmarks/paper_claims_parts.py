"""The parts of the experiment on the paper's claims: each a recipe in a folder of its own.

Three parts differ in what fine-tuning reads. All others are branches of the one that reads both
kinds of data: they take its SFT model, and whatever else comes before their first change, from its
folder. So they have the same model, prompts and held-out prompts, and nothing is made twice.
"""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from huatuo_jax.clinic.files import ClinicSizes
from huatuo_jax.clinic.judge import ClinicJudge
from huatuo_jax.core.config import WORKDIR_MARK, checked, load_card, replaced
from huatuo_jax.data.records import KINDS, Kind
from huatuo_jax.recipe.config import HELD_OUT_FILE, JUDGED_FILE, RlaifConfig
from huatuo_jax.recipe.prompts import TRAIN_FILE
from huatuo_jax.sft import clinic_sources

ROOT = pathlib.Path(__file__).resolve().parent.parent
CARD = ROOT / "configs" / "rlaif.py"
STAGES = ("sft", "answers", "labels", "reward", "ppo", "evaluation")

Changes = Mapping[str, Any]
"""Fields of `RlaifConfig` by their dotted names, and their values."""

BOTH = "both"
DATA: Mapping[str, tuple[Kind, ...]] = {
    BOTH: KINDS,
    "distilled": ("distilled_instruction", "distilled_conversation"),
    "real": ("real_instruction", "real_conversation"),
}
"""Part -> the kinds of dialogues that fine-tuning reads; `both` has to be the first."""

BIASED_JUDGE = ClinicJudge(length_bias=1.0, self_preference=2.0)
"""Log-odds: 1 for an answer twice as long, 2 for one in the distilled manner throughout."""

CONTROLS: Mapping[str, Changes] = {
    # Nothing but the length counts, so that nobody else may choose among the policies.
    "length_alone": {
        "ppo.score.of": "length",
        "ppo.score.scale": "running",
        "ppo.judging": None,
    },
    "judge_without_reference": {"judge.clinic_judge": ClinicJudge(with_reference=False)},
    "biased_judge": {"judge.clinic_judge": BIASED_JUDGE},
}

ABLATIONS: Mapping[str, Changes] = {
    "balanced_length": {"labels.comparison.max_length_ratio": None},
    "second_reward_epoch": {"reward.num_epochs": 1},
    "judged_early_stopping": {"ppo.judging": None},
    "small_policy_learning_rate": {"ppo.optimizer.learning_rate": 3e-4},
}
"""Change -> the fields that undo it alone; one that undoes nothing of the card is left out."""

TITLES: Mapping[str, str] = {
    BOTH: "distilled and real data",
    "distilled": "distilled data only",
    "real": "real data only",
    "length_alone": "control: rewarded for length alone",
    "judge_without_reference": "control: a judge without the reference",
    "biased_judge": "control: a biased judge",
}

TINY: Changes = {
    "clinic.sizes": ClinicSizes(
        dialogues=40,
        held_out_dialogues=12,
        prompts=12,
        held_out_prompts=12,
        cases=2,
        exams=2,
        pairs=4,
    ),
    "sft.model.backbone.hidden_size": 32,
    "sft.model.backbone.intermediate_size": 64,
    "sft.model.backbone.num_layers": 1,
    "sft.model.backbone.num_heads": 2,
    "sft.model.backbone.num_kv_heads": 1,
    "sft.model.backbone.head_dim": 16,
    "sft.num_epochs": 1,
    "answers.num_samples": 3,
    "answers.sampling.max_new_tokens": 12,
    "reward.num_epochs": 1,
    "ppo.rollout.num_prompts": 8,
    "ppo.rollout.max_new_tokens": 12,
    "ppo.value.warmup_iterations": 0,
    "ppo.num_iterations": 2,
    "evaluation.num_samples": 2,
    "evaluation.max_new_tokens": 12,
}
"""Sizes at which the experiment runs in a minute or two, and its figures say nothing."""

_EARLIER = {
    "answers": (f"{WORKDIR_MARK}/sft/model", f"{WORKDIR_MARK}/{TRAIN_FILE}"),
    "labels": (f"{WORKDIR_MARK}/answers.jsonl",),
    "reward": (f"{WORKDIR_MARK}/comparisons.jsonl",),
    "ppo": (f"{WORKDIR_MARK}/reward/model",),
}
"""Stage -> what it and all later ones find made, beside what earlier stages do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One recipe of a seed.

    Attributes:
        name: of its folder.
        title: what the page calls it.
        models: whose outcomes are its own; a branch has the SFT model of `both`. `reference` stands
            for the answers in the data.
        kinds: what fine-tuning reads.
        changes: of a branch of `both`; None for a part that trains its own SFT model.
    """

    name: str
    title: str
    models: tuple[str, ...]
    kinds: tuple[Kind, ...] = KINDS
    changes: Changes | None = None


def claims_parts() -> list[Part]:
    """The parts of the table of claims, `both` first."""
    own = [
        Part(
            name=name,
            title=TITLES[name],
            models=("reference", "sft", "best_of_n", "ppo") if name == BOTH else ("sft", "ppo"),
            kinds=kinds,
        )
        for name, kinds in DATA.items()
    ]
    return own + [
        Part(name=name, title=TITLES[name], models=("ppo",), changes=changes)
        for name, changes in CONTROLS.items()
    ]


def contributions_parts(
    cfg: RlaifConfig, ablations: Mapping[str, Changes] = ABLATIONS
) -> tuple[list[Part], list[str]]:
    """The parts of the table of contributions, and the changes that the card does not have.

    Raises:
        ValueError: a field that there is not.
    """
    parts = [Part(name=BOTH, title="today's settings", models=("sft", "ppo"))]
    undone = []
    for name, changes in ablations.items():
        if replaced(cfg, changes) == cfg:
            undone.append(name)
            continue
        title = f"without: {name.replace('_', ' ')}"
        parts.append(Part(name=f"without_{name}", title=title, models=("ppo",), changes=changes))
    return parts, undone


def read_card(changes: Changes, *, path: pathlib.Path = CARD) -> RlaifConfig:
    """The recipe of a card with its settings, but for these changes, up to the evaluation."""
    cfg = checked(load_card(str(path)), RlaifConfig, path="config")
    if cfg.clinic is None:
        raise ValueError(f"{path}: clinic=None; truth is known of the clinic's prompts alone")
    return replaced(cfg, {"stages": STAGES, **changes})


def with_seed(cfg: RlaifConfig, seed: int) -> RlaifConfig:
    """The recipe with another clinic, and this seed in all that is random."""
    names = ("clinic", "sft", "answers", "labels.comparison", "reward", "ppo", "evaluation")
    return replaced(cfg, {f"{name}.seed": seed for name in names})


def recipe_of(
    part: Part, cfg: RlaifConfig, folder: pathlib.Path, *, sft_steps: int | None
) -> RlaifConfig:
    """The recipe of a part.

    Args:
        part: which.
        cfg: of `both`, with its seed.
        folder: of the seed, which has a folder for each part.
        sft_steps: updates of the SFT model of `both`; None for `both` itself, whose epochs tell.
    """
    if part.changes is not None:
        return branch(cfg, folder / BOTH, part.changes)
    if part.name == BOTH:
        return cfg
    assert sft_steps is not None
    sources = clinic_sources(part.kinds)
    return replaced(cfg, {"sft.data.sources": sources, "sft.num_steps": sft_steps})


def branch(cfg: RlaifConfig, parent: pathlib.Path, changes: Changes) -> RlaifConfig:
    """A recipe that takes from another one's folder all that comes before its first change.

    Args:
        cfg: the other one's.
        parent: the other one's folder.
        changes: of the stages after SFT.

    Raises:
        ValueError: a change of what all branches share, or PPO is to be judged where the other
            recipe set no prompts aside for that.
    """
    sections = {name.partition(".")[0] for name in changes}
    stages = {"labels" if name == "judge" else name for name in sections}
    if not stages or not stages <= set(_EARLIER):
        raise ValueError(
            f"changes={sorted(changes)} must be of {', '.join(_EARLIER)}: branches share the rest"
        )
    order = list(_EARLIER)
    first = min(map(order.index, stages))
    made = [path for stage in order[: first + 1] for path in _EARLIER[stage]]
    made.append(f"{WORKDIR_MARK}/{HELD_OUT_FILE}")
    places = {path: path.replace(WORKDIR_MARK, os.fspath(parent)) for path in made}
    found = replaced(cfg, changes)
    judging = found.ppo.judging
    if judging is not None:
        if cfg.ppo.judging is None:
            raise ValueError("ppo.judging: the other recipe is evaluated on the prompts it needs")
        prompts = judging.prompts or os.fspath(parent / JUDGED_FILE)
        found = replaced(found, {"ppo.judging.prompts": prompts})
    base = cfg.evaluation.base or cfg.base_as_it_is or os.fspath(parent / "base" / "model")
    found = replaced(found, {"evaluation.base": base, "stages": STAGES[first + 1 :]})
    return _with_paths(found, places)


def share_answers(parent: pathlib.Path, folder: pathlib.Path) -> None:
    """Gives a branch the held-out answers of base and SFT, which would come out the same."""
    source, target = parent / "evaluation", folder / "evaluation"
    if target.exists() or not source.exists():
        return
    part = folder / "evaluation.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in ("base", "sft"):
        for path in source.glob(f"answers_{name}.*"):
            shutil.copy2(path, part / path.name)
    part.rename(target)


def _with_paths(settings: Any, places: Mapping[str, str]) -> Any:
    """A config with other paths, wherever they stand."""
    if isinstance(settings, str):
        return places.get(settings, settings)
    if isinstance(settings, tuple):
        return tuple(_with_paths(one, places) for one in settings)
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        names = [field.name for field in dataclasses.fields(settings) if field.init]
        return dataclasses.replace(
            settings, **{name: _with_paths(getattr(settings, name), places) for name in names}
        )
    return settings


def chosen_parts(parts: Sequence[Part], names: Sequence[str] | None) -> list[Part]:
    """Those of these names, and `both`, which all others need.

    Raises:
        ValueError: a name that there is not.
    """
    known = [part.name for part in parts]
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"parts={unknown} must be some of {known}")
    return [part for part in parts if names is None or part.name in names or part.name == BOTH]
