"""The programs of a config's stages, each made by the function that the stage itself uses."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from huatuo_jax.compiling.models import Architectures
from huatuo_jax.compiling.ppo_programs import ppo_programs
from huatuo_jax.compiling.programs import Devices, Program, attended_pairs
from huatuo_jax.dpo import stage as dpo
from huatuo_jax.dpo.config import DpoConfig
from huatuo_jax.ppo import stage as ppo
from huatuo_jax.reward import stage as reward
from huatuo_jax.reward.config import RewardConfig
from huatuo_jax.rlaif.config import RlaifConfig
from huatuo_jax.sft import STAGE as SFT
from huatuo_jax.sft import SftConfig, abstract_rows, check_lengths, sft_step
from huatuo_jax.stages import StagesConfig
from huatuo_jax.training.evaluation import check_rows
from huatuo_jax.training.initial_model import InitialModel, open_model
from huatuo_jax.training.step import Step, update_program
from huatuo_jax.training.throughput import ModelFlops

StageConfig = SftConfig | RewardConfig | DpoConfig
TrainingConfig = StagesConfig | RlaifConfig

# How long a run is follows from its data, where the config does not say; it decides no shape.
_NUM_STEPS = 10_000
# So do the pairs of a row; they weigh next to nothing.
_PAIRS_OF_A_ROW = 32


def programs_of(
    config: TrainingConfig,
    devices: Devices,
    *,
    stages: Sequence[str] = (),
    architecture: str | None = None,
) -> list[Program]:
    """The programs of the stages that a config names.

    Args:
        config: stages, or a recipe.
        devices: to compile for.
        stages: some of them; none for all that have programs.
        architecture: the preset of models that no stage makes; None looks at their configs.

    Raises:
        ValueError: a stage that the config does not have, or an invalid config.
    """
    there = [name for name in config.stages if name in _MAKERS]
    if missing := [name for name in stages if name not in there]:
        raise ValueError(f"stages={missing}: of those to compile, this config has {there}")
    architectures = Architectures(architecture)
    programs = []
    for name in there:
        found = _MAKERS[name](getattr(config, name), devices, architectures)
        architectures.add(name, found[0].backbone)
        if name in stages or not stages:
            programs += found
    return programs


def _sft(cfg: SftConfig, devices: Devices, architectures: Architectures) -> list[Program]:
    mesh = _mesh(cfg, devices, stage=SFT)
    place = architectures.in_place(cfg.model, path="config.sft.model")
    model = open_model(place, cfg.compute.compute_config())
    check_lengths(cfg.data, model.cfg)
    step = sft_step(cfg, model, mesh, num_steps=cfg.num_steps or _NUM_STEPS)
    flops = ModelFlops.of(model.cfg, adapters_only=cfg.model.lora is not None)
    sizes = _sizes(cfg, model, all_scored=True)
    batch = abstract_rows(cfg, mesh)
    return [_update(SFT, cfg, mesh, model, step, batch, flops.of_step(**sizes))]


def _reward(cfg: RewardConfig, devices: Devices, architectures: Architectures) -> list[Program]:
    mesh = _mesh(cfg, devices, stage=reward.STAGE)
    place = architectures.in_place(cfg.model, path="config.reward.model")
    model = reward.open_backbone(cfg, place)
    step = reward.reward_step(cfg, model, mesh, num_steps=cfg.num_steps or _NUM_STEPS)
    frozen = cfg.head_only or cfg.model.lora is not None
    flops = ModelFlops.of(model.cfg, adapters_only=frozen)
    sizes = _sizes(cfg, model, all_scored=False)
    batch = reward.abstract_rows(cfg, mesh, num_pairs=_PAIRS_OF_A_ROW)
    return [_update(reward.STAGE, cfg, mesh, model, step, batch, flops.of_step(**sizes))]


def _dpo(cfg: DpoConfig, devices: Devices, architectures: Architectures) -> list[Program]:
    mesh = _mesh(cfg, devices, stage=dpo.STAGE)
    place = architectures.in_place(cfg.model, path="config.dpo.model")
    model = open_model(place, cfg.compute.compute_config())
    step = dpo.dpo_step(cfg, model, mesh, num_steps=cfg.num_steps or _NUM_STEPS)
    flops = ModelFlops.of(model.cfg, adapters_only=cfg.model.lora is not None)
    sizes = _sizes(cfg, model, all_scored=True)
    batch = dpo.abstract_rows(cfg, mesh, num_pairs=_PAIRS_OF_A_ROW)
    return [_update(dpo.STAGE, cfg, mesh, model, step, batch, dpo.step_flops(flops, **sizes))]


def _mesh(cfg: StageConfig, devices: Devices, *, stage: str) -> Mesh:
    mesh = cfg.mesh.make(devices)
    check_rows(cfg.rows_at_once, name=f"config.{stage}.micro_batch_size", mesh=mesh)
    return mesh


def _sizes(cfg: StageConfig, model: InitialModel, *, all_scored: bool) -> dict[str, float]:
    """Of a step: tokens, those that the token head reads, pairs of query and key."""
    rows, length = cfg.batch_size, cfg.data.row_length
    return {
        "tokens": rows * length,
        "scored_tokens": rows * length if all_scored else 0,
        "attended_pairs": attended_pairs(model.cfg, rows=rows, length=length),
    }


def _update(
    stage: str,
    cfg: StageConfig,
    mesh: Mesh,
    model: InitialModel,
    step: Step,
    batch: dict[str, jax.ShapeDtypeStruct],
    model_flops: float,
) -> Program:
    """The optimizer step of a stage that has no other program."""
    rows, length = cfg.batch_size, cfg.data.row_length
    return Program.of(
        update_program(stage, step, batch, mesh),
        does=f"one optimizer step on {rows} rows of {length} tokens",
        backbone=model.cfg,
        tokens=rows * length,
        model_flops=model_flops,
    )


_MAKERS: dict[str, Callable[[Any, Devices, Architectures], list[Program]]] = {
    SFT: _sft,
    reward.STAGE: _reward,
    dpo.STAGE: _dpo,
    ppo.STAGE: ppo_programs,
}
