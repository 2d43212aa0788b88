"""The programs of a PPO stage: its four models, what trains two of them, and its engine's."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from huatuo_jax import sharding
from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.compiling.models import Architectures
from huatuo_jax.compiling.programs import Devices, Program, attended_pairs
from huatuo_jax.generation import weights
from huatuo_jax.generation.abstract import abstract_engine
from huatuo_jax.ppo.config import PpoConfig
from huatuo_jax.ppo.job import Trained, check_policy
from huatuo_jax.ppo.programs import Roles, abstract_roles, policy_pass, scoring, value_pass
from huatuo_jax.ppo.roles import open_critic
from huatuo_jax.ppo.rollout import mesh_of, slots_of
from huatuo_jax.sharding import OnMesh
from huatuo_jax.training.evaluation import check_rows
from huatuo_jax.training.initial_model import ModelConfig, open_model
from huatuo_jax.training.throughput import ModelFlops


def ppo_programs(cfg: PpoConfig, devices: Devices, architectures: Architectures) -> list[Program]:
    """The programs of the stage on these devices.

    Raises:
        ValueError: the config, or a model of it, cannot be.
    """
    roles = _roles(cfg, devices, architectures)
    programs = [*_generation(roles), _scoring(roles), *_training(roles, "policy", roles.trained)]
    if roles.valued is not None:
        programs += _training(roles, "value", roles.valued)
    return programs


def _roles(cfg: PpoConfig, devices: Devices, architectures: Architectures) -> Roles:
    mesh = cfg.mesh.make(devices)
    check_rows(cfg.rows_at_once, name="config.ppo.micro_batch_size", mesh=mesh)
    compute = cfg.compute.compute_config()
    cfg = dataclasses.replace(cfg, model=architectures.in_place(cfg.model, path="config.ppo.model"))
    policy = open_model(cfg.model, compute)
    check_policy(cfg, policy)
    rewarding = architectures.of(cfg.reward_model, path="config.ppo.reward_model")
    critic = open_critic(_without_reward_model(cfg, rewarding), policy, None)
    return abstract_roles(cfg, policy=policy, critic=critic, rewarding=rewarding, mesh=mesh)


def _without_reward_model(cfg: PpoConfig, rewarding: BackboneConfig) -> PpoConfig:
    """The config with a critic of the reward model's architecture, where it begins as that model.

    What its weights begin with decides no shape.
    """
    if cfg.value.start != "reward":
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
            function=engine.programs.jitted_prefill,
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
            function=engine.programs.jitted_decode,
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
    """The move of one array, the largest, to the mesh of generation; they move one by one."""
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
        # It is an argument of this program, and its result is not there yet.
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
    return Program.of(
        program,
        does=f"the reward model on {rows} rows of {length} tokens",
        backbone=backbone,
        tokens=rows * length,
        model_flops=ModelFlops.of(backbone).of_forward(
            tokens=rows * length,
            scored_tokens=0,
            attended_pairs=attended_pairs(backbone, rows=rows, length=length),
        ),
    )


def _training(roles: Roles, name: str, trained: Trained) -> list[Program]:
    """A pass over a minibatch, and the optimizer step that uses its gradients."""
    cfg, mesh, state = roles.cfg, roles.mesh, trained.state
    rows, length = cfg.minibatch_size, cfg.max_length
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
            does=f"{rows} rows of {length} tokens through the {name} with their gradients; "
            "without them for what an update is held against (log-probabilities, values)",
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
