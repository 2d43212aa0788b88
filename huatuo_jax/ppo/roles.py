"""The models of a PPO run as they are trained and compiled: their programs, without an array."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.backbone.matmul import store_as_computed
from huatuo_jax.backbone.transformer import Transformer, init_params
from huatuo_jax.core import sharding
from huatuo_jax.data.batches import Row, pack_row
from huatuo_jax.ppo.config import PpoConfig
from huatuo_jax.ppo.losses import PolicyObjective, policy_row_loss, value_row_loss
from huatuo_jax.ppo.models import Critic
from huatuo_jax.ppo.ptx import Ptx, compile_added, ptx_row_loss
from huatuo_jax.ppo.reference import abstract_reference
from huatuo_jax.ppo.targets import RowShapes
from huatuo_jax.ppo.trainer import (
    NUMBERS_OF_TOKENS,
    Learner,
    RowLoss,
    compile_apply,
    compile_pass,
)
from huatuo_jax.training.initial_model import InitialModel
from huatuo_jax.training.optimizer import Optimizer, make_optimizer
from huatuo_jax.training.programs import StageProgram
from huatuo_jax.training.scoring import compile_values, head_scores
from huatuo_jax.training.update import TrainState, abstract_batch


class Trained(NamedTuple):
    """A model that a run trains; no array is made for it.

    Attributes:
        optimizer: by what.
        state: shapes and shardings.
        learner: its programs.
    """

    optimizer: Optimizer
    state: TrainState
    learner: Learner


def policy_of(cfg: PpoConfig, policy: InitialModel, mesh: Mesh) -> Trained:
    """Makes the policy's optimizer, abstract state and programs."""
    steps = cfg.num_epochs * cfg.num_minibatches * (cfg.num_iterations - cfg.warmup_iterations)
    optimizer = make_optimizer(cfg.optimizer, num_steps=steps)
    state = policy.abstract_state(optimizer, mesh)
    return Trained(
        optimizer, state, _learner(cfg, _policy_loss(cfg, policy), optimizer, state, mesh)
    )


def critic_of(cfg: PpoConfig, critic: Critic, mesh: Mesh) -> Trained:
    """Makes the critic's optimizer, abstract state and programs."""
    steps = cfg.num_epochs * cfg.num_minibatches * cfg.num_iterations
    optimizer = make_optimizer(cfg.value.optimizer or cfg.optimizer, num_steps=steps)
    state = critic.abstract_state(optimizer, mesh)
    return Trained(
        optimizer, state, _learner(cfg, _value_loss(cfg, critic), optimizer, state, mesh)
    )


def ptx_of(cfg: PpoConfig, policy: InitialModel, read: Callable[[int], Row], mesh: Mesh) -> Ptx:
    """Makes what adds the loss of fine-tuning to the policy's steps, compiled when it is used.

    Args:
        cfg: the run's settings, with `ptx`.
        policy: to start from.
        read: rows of dialogues by number.
        mesh: where everything lies.
    """
    assert cfg.ptx is not None
    rows = cfg.ptx.batch_size
    at_once = cfg.rows_at_once if rows % cfg.rows_at_once == 0 else rows
    state = policy_of(cfg, policy, mesh).state
    loss = ptx_row_loss(policy.transformer, chunk=cfg.compute.loss_chunk)
    return Ptx(
        read=read,
        batch_size=rows,
        run_pass=compile_pass(loss, state, mesh, rows_at_once=at_once),
        add=compile_added(state, mesh, coef=cfg.ptx.coef),
        mesh=mesh,
    )


class Roles(NamedTuple):
    """The models of a run, abstract.

    Attributes:
        cfg: the run's settings.
        mesh: where everything lies.
        policy: to start from.
        trained: the policy as it is trained.
        reference: in place of its trained variables.
        critic: to start from, None without one.
        valued: the critic as it is trained, None without one.
        scorer: the reward model; None without one.
        scorer_variables: its own; nothing without one.
    """

    cfg: PpoConfig
    mesh: Mesh
    policy: InitialModel
    trained: Trained
    reference: Any
    critic: Critic | None
    valued: Trained | None
    scorer: Transformer | None
    scorer_variables: Any

    @property
    def value_state(self) -> Any:
        """Of the critic; nothing without one."""
        return () if self.valued is None else self.valued.state


def abstract_roles(
    cfg: PpoConfig,
    *,
    policy: InitialModel,
    critic: Critic | None,
    rewarding: BackboneConfig | None,
    mesh: Mesh,
) -> Roles:
    """Makes the models of a run on a mesh as shapes, without an array.

    Args:
        cfg: the run's settings.
        policy: to start from.
        critic: to start from; None for estimators without one.
        rewarding: the reward model's architecture; None where something else gives the scores.
        mesh: where everything lies.
    """
    trained = policy_of(cfg, policy, mesh)
    scorer: Transformer | None = None
    scorer_variables: Any = ()
    if rewarding is not None:
        scorer = Transformer(rewarding, policy.compute)
        params = jax.eval_shape(
            lambda: init_params(jax.random.key(0), rewarding, policy.compute, head="score")
        )
        variables = sharding.abstract_parameters({"params": params}, mesh)
        scorer_variables = _stored(variables, rewarding, policy.compute.compute_dtype)
    return Roles(
        cfg=cfg,
        mesh=mesh,
        policy=policy,
        trained=trained,
        reference=abstract_reference(cfg, policy, trained.state),
        critic=critic,
        valued=None if critic is None else critic_of(cfg, critic, mesh),
        scorer=scorer,
        scorer_variables=scorer_variables,
    )


def micro_batch_programs(roles: Roles) -> Iterator[StageProgram]:
    """Yields policy and critic passes over the largest minibatch, and the scoring."""
    yield policy_pass(roles)
    if roles.valued is not None:
        yield value_pass(roles)
    if roles.scorer is not None:
        yield scoring(roles, roles.scorer)


def policy_pass(roles: Roles) -> StageProgram:
    """Describes a pass of the policy over a minibatch, with its gradients."""
    state = roles.trained.state
    beside = (state.opt_state, roles.reference, roles.value_state, roles.scorer_variables)
    return _pass(roles, "policy", roles.trained, state.frozen, beside)


def value_pass(roles: Roles) -> StageProgram:
    """Describes that pass of the critic, of a run that has one."""
    assert roles.critic is not None and roles.valued is not None
    state, policy = roles.valued.state, roles.trained.state
    frozen = roles.critic.frozen(state.frozen, policy.frozen)
    # The policy's frozen trunk is an argument where it is the critic's too.
    others = (policy.trained, policy.opt_state) if roles.critic.shares_trunk else policy
    beside = (state.opt_state, roles.reference, others, roles.scorer_variables)
    return _pass(roles, "value", roles.valued, frozen, beside)


def scoring(roles: Roles, scorer: Transformer) -> StageProgram:
    """Describes the reward model on a micro-batch of the longest rows."""
    cfg, mesh = roles.cfg, roles.mesh
    shapes = RowShapes.of(cfg, mesh)
    row = pack_row([], row_length=shapes.width, pad_token_id=0)
    return StageProgram(
        name="ppo/score",
        function=compile_values(functools.partial(head_scores, scorer), mesh),
        arguments=(
            roles.scorer_variables,
            abstract_batch(row, shapes.at_once(shapes.width), mesh),
        ),
        beside=(roles.trained.state, roles.reference, roles.value_state),
        mesh=mesh,
        rows=cfg.rows_at_once,
        rows_at_once=cfg.rows_at_once,
        in_micro_batches=True,
    )


def _learner(
    cfg: PpoConfig, loss: RowLoss, optimizer: Optimizer, state: TrainState, mesh: Mesh
) -> Learner:
    return Learner(
        run_pass=compile_pass(loss, state, mesh, rows_at_once=RowShapes.of(cfg, mesh).at_once),
        apply=compile_apply(optimizer, state, mesh),
    )


def _policy_loss(cfg: PpoConfig, policy: InitialModel) -> RowLoss:
    objective = PolicyObjective(
        temperature=cfg.rollout.temperature,
        clip_low=cfg.clip_low,
        clip_high=cfg.clip_high,
        dual_clip=cfg.dual_clip,
        ratio=cfg.ratio,
        entropy_coef=cfg.entropy_coef,
        kl_loss=None if cfg.kl_in == "reward" else cfg.kl_in,
        num_answers=cfg.minibatch_size,
        tokens_allowed=_tokens_allowed(cfg),
        chunk=cfg.compute.loss_chunk,
        mean_per_answer=cfg.denominator == "answers",
    )
    return policy_row_loss(policy.transformer, objective)


def _value_loss(cfg: PpoConfig, critic: Critic) -> RowLoss:
    return value_row_loss(
        critic.model.transformer,
        clip=cfg.value.clip,
        tokens_allowed=_tokens_allowed(cfg),
        mean_per_answer=cfg.denominator == "answers",
        offset=critic.head_offset,
    )


def _tokens_allowed(cfg: PpoConfig) -> int | None:
    return cfg.rollout.max_new_tokens if cfg.denominator == "max_new_tokens" else None


def _pass(
    roles: Roles, name: str, trained: Trained, frozen: Any, beside: tuple[Any, ...]
) -> StageProgram:
    cfg, mesh = roles.cfg, roles.mesh
    everywhere = jax.NamedSharding(mesh, jax.P())
    shapes = RowShapes.of(cfg, mesh)
    return StageProgram(
        name=f"ppo/{name}_pass",
        function=trained.learner.run_pass,
        arguments=(
            trained.state.trained,
            frozen,
            abstract_batch(_row(shapes.width), shapes.num_rows, mesh),
            jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere),
            jax.ShapeDtypeStruct((), jnp.bool_),
        ),
        beside=beside,
        mesh=mesh,
        rows=cfg.minibatch_size,
        rows_at_once=cfg.rows_at_once,
        in_micro_batches=True,
    )


def _row(length: int) -> dict[str, np.ndarray]:
    """Returns a row of a minibatch."""
    packed = pack_row([], row_length=length, pad_token_id=0)
    row = {name: packed[name] for name in ("token_ids", "segment_ids", "positions")}
    row["mask"] = packed["trained_mask"]
    row["answers"] = np.zeros(length, np.int32)
    return row | dict.fromkeys(NUMBERS_OF_TOKENS, np.zeros(length, np.float32))


def _stored(variables: Any, cfg: BackboneConfig, dtype: Any) -> Any:
    """Casts abstract variables as they are stored where no gradient is taken of them."""
    cast = functools.partial(store_as_computed, dtype=dtype, keep_lm_head=cfg.norm_head)
    places = jax.tree.map(lambda leaf: leaf.sharding, variables)
    return sharding.abstract_arrays(jax.eval_shape(cast, variables), places)
