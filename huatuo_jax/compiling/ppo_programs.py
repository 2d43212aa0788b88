"""The programs of a PPO stage: its four models, what trains two of them, and its engine's."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from huatuo_jax import sharding
from huatuo_jax.backbone.casting import store_as_computed
from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.backbone.transformer import Transformer, init_params
from huatuo_jax.compiling.models import Architectures
from huatuo_jax.compiling.programs import (
    Devices,
    Program,
    attended_pairs,
)
from huatuo_jax.data.packing import pack_row
from huatuo_jax.generation import weights
from huatuo_jax.generation.abstract import abstract_engine
from huatuo_jax.ppo.config import PpoConfig
from huatuo_jax.ppo.job import Trained, check_policy, critic_of, policy_of
from huatuo_jax.ppo.roles import Critic, open_critic
from huatuo_jax.ppo.rollout import mesh_of, slots_of
from huatuo_jax.ppo.trainer import NUMBERS_OF_TOKENS
from huatuo_jax.scoring import compile_values, head_scores
from huatuo_jax.sharding import OnMesh
from huatuo_jax.training.evaluation import check_rows
from huatuo_jax.training.initial_model import InitialModel, ModelConfig, open_model
from huatuo_jax.training.step import abstract_batch
from huatuo_jax.training.throughput import ModelFlops


class Roles(NamedTuple):
    """The models of a run, abstract.

    Attributes:
        cfg: the run's settings.
        mesh: where everything lies.
        rollout_mesh: where answers are generated.
        policy: to start from.
        trained: the policy as it is trained.
        reference: in place of its trained variables.
        critic: to start from, None without one.
        valued: the critic as it is trained, None without one.
        scorer: the reward model.
        scorer_variables: its own.
    """

    cfg: PpoConfig
    mesh: Mesh
    rollout_mesh: Mesh
    policy: InitialModel
    trained: Trained
    reference: Any
    critic: Critic | None
    valued: Trained | None
    scorer: Transformer
    scorer_variables: Any

    @property
    def value_state(self) -> Any:
        """Of the critic; nothing without one."""
        return () if self.valued is None else self.valued.state


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
    rollout_mesh = mesh_of(cfg.rollout, mesh, policy.cfg)
    rewarding = architectures.of(cfg.reward_model, path="config.ppo.reward_model")
    critic = open_critic(_without_reward_model(cfg, rewarding), policy, None)
    trained = policy_of(cfg, policy, mesh)
    reference = trained.state.trained
    if cfg.model.lora is None:
        reference = _stored(reference, policy.cfg, compute.compute_dtype)
    scorer = Transformer(rewarding, compute)
    params = jax.eval_shape(
        lambda: init_params(jax.random.key(0), rewarding, compute, head="score")
    )
    variables = sharding.abstract_parameters({"params": params}, mesh)
    return Roles(
        cfg=cfg,
        mesh=mesh,
        rollout_mesh=rollout_mesh,
        policy=policy,
        trained=trained,
        reference=reference,
        critic=critic,
        valued=None if critic is None else critic_of(cfg, critic, mesh),
        scorer=scorer,
        scorer_variables=_stored(variables, rewarding, compute.compute_dtype),
    )


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
    mesh = roles.rollout_mesh
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
        moving = [_moving(roles, engine.prefill_arguments[0], (*held, engine.prefill_arguments[0]))]
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


def _moving(roles: Roles, placed: Any, held: Any) -> Program:
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
        mesh=roles.rollout_mesh,
        backbone=roles.policy.cfg,
        rows=0,
        rows_at_once=0,
        tokens=0,
        model_flops=0.0,
        attends=False,
    )


def _scoring(roles: Roles) -> Program:
    cfg, backbone = roles.cfg, roles.scorer.cfg
    rows, length = cfg.rows_at_once, cfg.max_length
    row = pack_row([], row_length=length, pad_token_id=0)
    return Program(
        name="ppo/score",
        does=f"the reward model on {rows} rows of {length} tokens",
        function=compile_values(functools.partial(head_scores, roles.scorer), roles.mesh),
        arguments=(roles.scorer_variables, abstract_batch(row, rows, roles.mesh)),
        beside=(roles.trained.state, roles.reference, roles.value_state),
        mesh=roles.mesh,
        backbone=backbone,
        rows=rows,
        rows_at_once=rows,
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
    everywhere = jax.NamedSharding(mesh, jax.P())
    backbone, frozen = roles.policy.cfg, state.frozen
    adapters_only, scored = cfg.model.lora is not None, rows * cfg.rollout.max_new_tokens
    others = (roles.reference, roles.value_state, roles.scorer_variables)
    if name == "value":
        assert roles.critic is not None
        backbone, frozen = (
            roles.critic.model.cfg,
            roles.critic.frozen(state.frozen, roles.trained.state.frozen),
        )
        adapters_only, scored = cfg.value.lora is not None, 0
        others = (roles.reference, roles.trained.state, roles.scorer_variables)
    arguments = (
        state.trained,
        frozen,
        abstract_batch(_row(length), rows, mesh),
        jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere),
        jax.ShapeDtypeStruct((), jnp.bool_),
    )
    found = trained.learner.run_pass.lower(*arguments).out_info
    sums, _, gradients = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), found
    )
    gradients = sharding.abstract_parameters(gradients, mesh)
    common: dict[str, Any] = {
        "mesh": mesh,
        "backbone": backbone,
        "rows": rows,
        "rows_at_once": cfg.rows_at_once,
    }
    return [
        Program(
            name=f"ppo/{name}_pass",
            does=f"{rows} rows of {length} tokens through the {name} with their gradients; "
            "without them for what an update is held against (log-probabilities, values)",
            function=trained.learner.run_pass,
            arguments=arguments,
            beside=(state.opt_state, *others),
            tokens=rows * length,
            model_flops=ModelFlops.of(backbone, adapters_only=adapters_only).of_step(
                tokens=rows * length,
                scored_tokens=scored,
                attended_pairs=attended_pairs(backbone, rows=rows, length=length),
            ),
            **common,
        ),
        Program(
            name=f"ppo/{name}_apply",
            does=f"the optimizer step of the {name}",
            function=trained.learner.apply,
            arguments=(state, sums, gradients),
            beside=others,
            tokens=rows * length,
            model_flops=0.0,
            attends=False,
            **common,
        ),
    ]


def _row(length: int) -> dict[str, np.ndarray]:
    """A row of a minibatch."""
    packed = pack_row([], row_length=length, pad_token_id=0)
    row = {name: packed[name] for name in ("token_ids", "segment_ids", "positions")}
    row["mask"] = packed["trained_mask"]
    row["answers"] = np.zeros(length, np.int32)
    return row | dict.fromkeys(NUMBERS_OF_TOKENS, np.zeros(length, np.float32))


def _stored(variables: Any, cfg: BackboneConfig, dtype: Any) -> Any:
    """Abstract variables as they are stored where no gradient is taken of them."""
    cast = functools.partial(store_as_computed, dtype=dtype, keep_lm_head=cfg.norm_head)
    places = jax.tree.map(lambda leaf: leaf.sharding, variables)
    return sharding.abstract_arrays(jax.eval_shape(cast, variables), places)
