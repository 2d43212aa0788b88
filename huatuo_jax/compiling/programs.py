"""The programs of a config's stages, made by the stages' own functions from shapes alone.

A program is a jitted function of a stage with the shapes of its arguments. The architecture of each
stage's model is found without reading a weight. PPO's programs are those of its four models, of
their training, and of its engine.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from huatuo_jax.backbone.config import PRESETS, BackboneConfig, preset
from huatuo_jax.checkpoint import models
from huatuo_jax.core import sharding
from huatuo_jax.core.config import WORKDIR_MARK
from huatuo_jax.core.sharding import OnMesh, path_name
from huatuo_jax.dpo import STAGE as DPO
from huatuo_jax.dpo import DpoConfig, dpo_step
from huatuo_jax.dpo import step_flops as dpo_flops
from huatuo_jax.generation import weights
from huatuo_jax.generation.abstract import abstract_engine
from huatuo_jax.hf.generation_config import CONFIG_FILE
from huatuo_jax.ppo import stage as ppo
from huatuo_jax.ppo.config import PpoConfig
from huatuo_jax.ppo.models import open_critic
from huatuo_jax.ppo.roles import (
    Roles,
    Trained,
    abstract_roles,
    policy_pass,
    scoring,
    value_pass,
)
from huatuo_jax.ppo.rollout import mesh_of, slots_of
from huatuo_jax.ppo.stage import check_policy
from huatuo_jax.ppo.targets import RowShapes
from huatuo_jax.preferences.rows import abstract_rows as abstract_pairs
from huatuo_jax.recipe.config import RlaifConfig, StagesConfig
from huatuo_jax.reward import stage as reward
from huatuo_jax.reward.config import RewardConfig
from huatuo_jax.sft import STAGE as SFT
from huatuo_jax.sft import SftConfig, abstract_rows, check_lengths, sft_step
from huatuo_jax.training.initial_model import InitialModel, ModelConfig, open_model
from huatuo_jax.training.loop import check_rows
from huatuo_jax.training.metrics import ModelFlops
from huatuo_jax.training.programs import StageProgram
from huatuo_jax.training.update import Step, update_program

Devices = Sequence[jax.Device]
StageConfig = SftConfig | RewardConfig | DpoConfig
TrainingConfig = StagesConfig | RlaifConfig
# The number of steps follows from the data where the config does not set it; it decides no shape.
_NUM_STEPS = 10_000
# So do the pairs of a row, which take next to no memory.
_PAIRS_OF_A_ROW = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program(StageProgram):
    """A program of a stage, and the measures of its work.

    Attributes:
        does: a call, in words.
        backbone: of its model.
        tokens: tokens of a call.
        model_flops: FLOPs of a call by formula, on all devices together.
    """

    does: str
    backbone: BackboneConfig
    tokens: int
    model_flops: float

    @classmethod
    def of(cls, program: StageProgram, **measured: Any) -> "Program":
        """Returns a stage's program with the other attributes."""
        given = {one.name: getattr(program, one.name) for one in dataclasses.fields(StageProgram)}
        return cls(**given, **measured)

    @property
    def stacked_shapes(self) -> set[tuple[int, ...]]:
        """Returns the shapes of the arguments that hold parameters of all layers."""
        leaves = jax.tree_util.tree_leaves_with_path(self.arguments)
        return {
            leaf.shape
            for path, leaf in leaves
            if "/layers/" in path_name(path) and leaf.shape[:1] == (self.backbone.num_layers,)
        }


def attended_pairs(cfg: BackboneConfig, *, rows: int, length: int) -> float:
    """Counts pairs of query and key in rows that are full and of one segment."""
    window = min(cfg.sliding_window or length, length)
    return rows * (window * (window + 1) / 2 + (length - window) * window)


class Architectures:
    """The architectures of a config's models, from the config, this machine, or the hub."""

    def __init__(self, named: str | None) -> None:
        """Sets the preset, if any.

        Args:
            named: the preset of every model that no stage of the config makes; None looks them up.

        Raises:
            ValueError: no preset has this name.
        """
        self._named = None if named is None else preset(named)
        self._made: dict[str, BackboneConfig] = {}

    def add(self, stage: str, cfg: BackboneConfig) -> None:
        """Records the architecture of the model that a stage leaves in its folder."""
        self._made[f"{WORKDIR_MARK}/{stage}/model"] = cfg

    def in_place(self, section: ModelConfig, *, path: str) -> ModelConfig:
        """Returns the section with the architecture in place of its directory.

        Raises:
            ValueError: there is no such model; names the field.
        """
        if section.directory is None:
            return section
        return dataclasses.replace(
            section,
            directory=None,
            backbone=self.of(
                section.directory, path=f"{path}.directory", ignored=section.ignore_config_fields
            ),
            tokenizer=section.tokenizer_source,
        )

    def of(self, directory: str, *, path: str, ignored: tuple[str, ...] = ()) -> BackboneConfig:
        """Returns the architecture of a model of an earlier stage, a folder, or a hub id.

        Args:
            directory: of the model.
            path: of the field, for messages.
            ignored: fields of its `config.json`, see `models.find_model`.

        Raises:
            ValueError: there is no such model; names the field.
        """
        if directory in self._made:
            return self._made[directory]
        if self._named is not None:
            return self._named
        reason = "no stage of this config makes it"
        if WORKDIR_MARK not in directory:
            try:
                return models.architecture_of(directory, ignored=ignored)
            except OSError as error:
                reason = f"its {CONFIG_FILE} cannot be read: {str(error).strip().splitlines()[0]}"
        raise ValueError(
            f"{path}={directory!r}: {reason}; --preset names an architecture in its place: "
            f"{', '.join(PRESETS)}"
        )


def ppo_programs(cfg: PpoConfig, devices: Devices, architectures: Architectures) -> list[Program]:
    """Returns the programs of the PPO stage on these devices.

    Raises:
        ValueError: the config, or a model of it, is invalid.
    """
    roles = _roles(cfg, devices, architectures)
    scores = [] if roles.scorer is None else [_scoring(roles)]
    programs = [*_generation(roles), *scores, *_training(roles, "policy", roles.trained)]
    if roles.valued is not None:
        programs += _training(roles, "value", roles.valued)
    return programs


def programs_of(
    config: TrainingConfig,
    devices: Devices,
    *,
    stages: Sequence[str] = (),
    architecture: str | None = None,
) -> list[Program]:
    """Returns the programs of the stages of a config.

    Args:
        config: stages, or a recipe.
        devices: to compile for.
        stages: some of them; none for all that have programs.
        architecture: the preset of models that no stage makes; None reads their configs.

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
    batch = abstract_pairs(cfg, mesh, num_pairs=_PAIRS_OF_A_ROW)
    return [_update(reward.STAGE, cfg, mesh, model, step, batch, flops.of_step(**sizes))]


def _dpo(cfg: DpoConfig, devices: Devices, architectures: Architectures) -> list[Program]:
    mesh = _mesh(cfg, devices, stage=DPO)
    place = architectures.in_place(cfg.model, path="config.dpo.model")
    model = open_model(place, cfg.compute.compute_config())
    step = dpo_step(cfg, model, mesh, num_steps=cfg.num_steps or _NUM_STEPS)
    flops = ModelFlops.of(model.cfg, adapters_only=cfg.model.lora is not None)
    sizes = _sizes(cfg, model, all_scored=True)
    batch = abstract_pairs(cfg, mesh, num_pairs=_PAIRS_OF_A_ROW)
    return [_update(DPO, cfg, mesh, model, step, batch, dpo_flops(flops, **sizes))]


_MAKERS: dict[str, Callable[[Any, Devices, Architectures], list[Program]]] = {
    SFT: _sft,
    reward.STAGE: _reward,
    DPO: _dpo,
    ppo.STAGE: ppo_programs,
}


def _roles(cfg: PpoConfig, devices: Devices, architectures: Architectures) -> Roles:
    mesh = cfg.mesh.make(devices)
    check_rows(cfg.rows_at_once, name="config.ppo.micro_batch_size", mesh=mesh)
    compute = cfg.compute.compute_config()
    cfg = dataclasses.replace(cfg, model=architectures.in_place(cfg.model, path="config.ppo.model"))
    policy = open_model(cfg.model, compute)
    check_policy(cfg, policy)
    rewarding = None
    if cfg.needs_reward_model:
        rewarding = architectures.of(cfg.reward_model, path="config.ppo.reward_model")
    critic = open_critic(_without_reward_model(cfg, rewarding), policy, None)
    if not cfg.scores_by_model:
        rewarding = None
    return abstract_roles(cfg, policy=policy, critic=critic, rewarding=rewarding, mesh=mesh)


def _without_reward_model(cfg: PpoConfig, rewarding: BackboneConfig | None) -> PpoConfig:
    """Returns the config with a critic of the reward model's architecture, if it starts there.

    Its initial weights decide no shape.
    """
    if cfg.value.start != "reward" or rewarding is None:
        return cfg
    return dataclasses.replace(
        cfg,
        model=ModelConfig(backbone=rewarding, tokenizer="none"),
        value=dataclasses.replace(cfg.value, start="policy", head="zero"),
    )


def _generation(roles: Roles) -> list[Program]:
    cfg, policy = roles.cfg, roles.policy
    mesh = mesh_of(cfg.rollout, roles.mesh, policy.cfg)
    slots = slots_of(cfg.rollout, mesh)
    engine = abstract_engine(
        policy.transformer,
        roles.trained.state.variables,
        slots=slots,
        max_length=cfg.max_length,
        mesh=mesh,
    )
    held = (roles.trained.state, roles.reference, roles.value_state, roles.scorer_variables)
    common: dict[str, Any] = {
        "mesh": mesh,
        "backbone": policy.cfg,
        "rows": slots,
        "rows_at_once": slots,
    }
    flops = ModelFlops.of(policy.cfg)
    rows = sharding.batch_shards(mesh)
    length = engine.prompt_tokens // rows
    steps = slots * engine.steps
    moving = []
    if mesh != roles.mesh:
        placed = engine.prefill_arguments[0]
        moving = [_moving(roles, mesh, placed, (*held, placed))]
    return [
        *moving,
        Program(
            name="ppo/prefill",
            does=f"{rows} prompts of {length} tokens into the cache",
            function=engine.programs.prefill,
            arguments=engine.prefill_arguments,
            beside=(*held, engine.decode_arguments[1]),
            tokens=engine.prompt_tokens,
            model_flops=flops.of_forward(
                tokens=engine.prompt_tokens,
                scored_tokens=0,
                attended_pairs=attended_pairs(policy.cfg, rows=rows, length=length),
            ),
            **common,
        ),
        Program(
            name="ppo/decode",
            does=f"{engine.steps} tokens of each of {slots} answers, {cfg.max_length} tokens long",
            function=engine.programs.decode,
            arguments=engine.decode_arguments,
            beside=(*held, engine.prefill_arguments[1]),
            tokens=steps,
            model_flops=flops.of_forward(
                tokens=steps,
                scored_tokens=steps,
                attended_pairs=steps
                * min(cfg.max_length, policy.cfg.sliding_window or cfg.max_length),
            ),
            attends=False,
            **common,
        ),
    ]


def _moving(roles: Roles, mesh: Mesh, placed: Any, held: Any) -> Program:
    """Returns the move of the largest array to the mesh of generation; arrays move one by one."""
    found = jax.tree_util.tree_leaves_with_path(
        weights.that_are_read(roles.trained.state.variables)
    )
    pairs = zip(found, jax.tree.leaves(placed), strict=True)
    (path, leaf), to = max(pairs, key=lambda pair: pair[0][1].size)
    share = leaf.size / sum(other.size for _, other in found)
    return Program(
        name="ppo/move",
        does=f"the policy's largest array, {sharding.path_name(path)} ({share:.0%} of its "
        "weights), to where answers are generated",
        function=OnMesh(weights.moving(to.sharding, to.dtype), None),
        arguments=(leaf,),
        # It is an argument of this program, and its result does not exist yet.
        beside=[other for other in jax.tree.leaves(held) if other is not leaf and other is not to],
        mesh=mesh,
        backbone=roles.policy.cfg,
        rows=0,
        rows_at_once=0,
        tokens=0,
        model_flops=0.0,
        attends=False,
    )


def _scoring(roles: Roles) -> Program:
    assert roles.scorer is not None
    backbone, program = roles.scorer.cfg, scoring(roles, roles.scorer)
    rows, length = program.rows, roles.cfg.max_length
    shapes = RowShapes.of(roles.cfg, roles.mesh)
    return Program.of(
        program,
        does=f"the reward model on {shapes.at_once(shapes.width)} rows of {shapes.width} tokens",
        backbone=backbone,
        tokens=rows * length,
        model_flops=ModelFlops.of(backbone).of_forward(
            tokens=rows * length,
            scored_tokens=0,
            attended_pairs=attended_pairs(backbone, rows=rows, length=length),
        ),
    )


def _training(roles: Roles, name: str, trained: Trained) -> list[Program]:
    """Returns a pass over a minibatch, and the optimizer step that uses its gradients."""
    cfg, mesh, state = roles.cfg, roles.mesh, trained.state
    rows, length = cfg.minibatch_size, cfg.max_length
    shapes = RowShapes.of(cfg, mesh)
    backbone, adapters_only = roles.policy.cfg, cfg.model.lora is not None
    scored, other, program = rows * cfg.rollout.max_new_tokens, roles.value_state, policy_pass
    if name == "value":
        assert roles.critic is not None
        backbone, adapters_only = roles.critic.model.cfg, cfg.value.lora is not None
        scored, other, program = 0, roles.trained.state, value_pass
    over_minibatch = program(roles)
    sums, _, gradients = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, jax.P())
        ),
        over_minibatch.lower().out_info,
    )
    gradients = sharding.abstract_parameters(gradients, mesh)
    return [
        Program.of(
            over_minibatch,
            does=f"{shapes.num_rows} rows of {shapes.width} tokens through the {name} with their "
            "gradients; without them for the old log-probabilities or values of an update",
            backbone=backbone,
            tokens=rows * length,
            model_flops=ModelFlops.of(backbone, adapters_only=adapters_only).of_step(
                tokens=rows * length,
                scored_tokens=scored,
                attended_pairs=attended_pairs(backbone, rows=rows, length=length),
            ),
        ),
        Program(
            name=f"ppo/{name}_apply",
            does=f"the optimizer step of the {name}",
            function=trained.learner.apply,
            arguments=(state, sums, gradients),
            beside=(roles.reference, other, roles.scorer_variables),
            mesh=mesh,
            backbone=backbone,
            rows=rows,
            rows_at_once=cfg.rows_at_once,
            tokens=rows * length,
            model_flops=0.0,
            attends=False,
        ),
    ]


def _mesh(cfg: StageConfig, devices: Devices, *, stage: str) -> Mesh:
    mesh = cfg.mesh.make(devices)
    check_rows(cfg.rows_at_once, name=f"config.{stage}.micro_batch_size", mesh=mesh)
    return mesh


def _sizes(cfg: StageConfig, model: InitialModel, *, all_scored: bool) -> dict[str, float]:
    """Returns tokens, tokens read by the token head, and pairs of query and key of a step."""
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
    """Returns the optimizer step of a stage that has no other program."""
    rows, length = cfg.batch_size, cfg.data.row_length
    return Program.of(
        update_program(stage, step, batch, mesh),
        does=f"one optimizer step on {rows} rows of {length} tokens",
        backbone=model.cfg,
        tokens=rows * length,
        model_flops=model_flops,
    )
