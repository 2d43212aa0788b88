"""From the models and settings of a run to what its loop needs."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from huatuo_jax.ppo.config import PpoConfig
from huatuo_jax.ppo.estimates import compile_targets
from huatuo_jax.ppo.held_out import HeldOutJudging
from huatuo_jax.ppo.loop import PpoJob
from huatuo_jax.ppo.losses import PolicyObjective, policy_row_loss, value_row_loss
from huatuo_jax.ppo.prompts import Prompts
from huatuo_jax.ppo.report import Decode, IterationFlops
from huatuo_jax.ppo.roles import Critic, make_reference
from huatuo_jax.ppo.rollout import AnswerScorer, Sampler, mesh_of
from huatuo_jax.ppo.state import PpoState, abstract_ppo_state, new_ppo_state
from huatuo_jax.ppo.trainer import Learner, Trainer
from huatuo_jax.ppo.update import RowLoss, compile_apply, compile_pass
from huatuo_jax.scoring import Normalization
from huatuo_jax.training.initial_model import InitialModel
from huatuo_jax.training.optimizer import Optimizer, make_optimizer
from huatuo_jax.training.run_directory import StageDirectory
from huatuo_jax.training.state import TrainState
from huatuo_jax.training.throughput import ModelFlops


def check_policy(cfg: PpoConfig, policy: InitialModel) -> None:
    """Raise ValueError where a model cannot be the policy of a run."""
    backbone = policy.cfg
    if cfg.max_length > backbone.max_positions:
        raise ValueError(
            f"config.ppo: data.max_prompt_tokens={cfg.data.max_prompt_tokens} and "
            f"rollout.max_new_tokens={cfg.rollout.max_new_tokens} must be at most the model's "
            f"{backbone.max_positions} positions together"
        )
    backbone.require_fixed_angles(cfg.max_length, purpose="PPO")


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
    """The policy as a run trains it."""
    steps = cfg.num_epochs * cfg.num_minibatches * (cfg.num_iterations - cfg.warmup_iterations)
    optimizer = make_optimizer(cfg.optimizer, num_steps=steps)
    state = policy.abstract_state(optimizer, mesh)
    return Trained(
        optimizer, state, _learner(cfg, _policy_loss(cfg, policy), optimizer, state, mesh)
    )


def critic_of(cfg: PpoConfig, critic: Critic, mesh: Mesh) -> Trained:
    """The critic as a run trains it."""
    steps = cfg.num_epochs * cfg.num_minibatches * cfg.num_iterations
    optimizer = make_optimizer(cfg.value.optimizer or cfg.optimizer, num_steps=steps)
    state = critic.abstract_state(optimizer, mesh)
    return Trained(
        optimizer, state, _learner(cfg, _value_loss(cfg, critic), optimizer, state, mesh)
    )


def _learner(
    cfg: PpoConfig, loss: RowLoss, optimizer: Optimizer, state: TrainState, mesh: Mesh
) -> Learner:
    return Learner(
        run_pass=compile_pass(loss, state, mesh, rows_at_once=cfg.rows_at_once),
        apply=compile_apply(optimizer, state, mesh),
    )


def make_job(
    cfg: PpoConfig,
    *,
    policy: InitialModel,
    critic: Critic | None,
    prompts: Prompts,
    make_scorer: Callable[[], AnswerScorer],
    normalization: Normalization | None,
    directory: StageDirectory,
    decisive: Mapping[str, Any],
    mesh: Mesh,
    decode: Decode | None,
    scorer_flops: ModelFlops | None,
    judging: HeldOutJudging | None = None,
) -> PpoJob:
    """The job of a run; no weights are read before the loop asks for them.

    Args:
        cfg: the run's settings.
        policy: to start from.
        critic: to start from; None for estimators without one.
        prompts: what is asked.
        make_scorer: makes what scores the answers.
        normalization: of its scores, where `cfg.score.scale` is `stored`.
        directory: where the run's files are.
        decisive: the settings that decide results.
        mesh: where everything lies; answers are generated where `cfg.rollout.mesh` says.
        decode: from tokens to text; None for tokens in `samples.jsonl`.
        scorer_flops: of the reward model; None where there is none.
        judging: of held-out answers; None for none.

    Raises:
        ValueError: `cfg.rollout.mesh` does not divide the devices or the model.
    """
    rollout_mesh = mesh_of(cfg.rollout, mesh, policy.cfg)
    key = jax.random.key(cfg.seed)
    trained = policy_of(cfg, policy, mesh)
    valued = None if critic is None else critic_of(cfg, critic, mesh)

    def make_state() -> PpoState:
        value = None
        if critic is not None and valued is not None:
            value = critic.make_state(key, valued.optimizer, mesh)
        return new_ppo_state(
            policy.make_state(key, trained.optimizer, mesh),
            value,
            kl_coef=cfg.kl_coef,
            seed=cfg.seed,
            mesh=mesh,
        )

    def make_trainer() -> Trainer:
        return Trainer(
            cfg=cfg,
            mesh=mesh,
            prompts=prompts,
            sampler=Sampler(
                policy.transformer,
                cfg.rollout,
                stop_token_ids=prompts.stop_token_ids,
                max_length=cfg.max_length,
                mesh=rollout_mesh,
            ),
            scorer=make_scorer(),
            make_targets=compile_targets(
                cfg,
                stop_token_ids=prompts.stop_token_ids,
                normalization=normalization,
                mesh=mesh,
            ),
            policy=trained.learner,
            reference=make_reference(policy, key, mesh),
            critic=critic,
            value=None if valued is None else valued.learner,
        )

    return PpoJob(
        directory=directory,
        decisive=decisive,
        num_iterations=cfg.num_iterations,
        mesh=mesh,
        make_state=make_state,
        abstract_state=abstract_ppo_state(
            trained.state, None if valued is None else valued.state, mesh
        ),
        make_trainer=make_trainer,
        flops=IterationFlops(
            policy=ModelFlops.of(policy.cfg, adapters_only=cfg.model.lora is not None),
            critic=None
            if critic is None
            else ModelFlops.of(critic.model.cfg, adapters_only=cfg.value.lora is not None),
            scorer=scorer_flops,
        ),
        decode=decode,
        judging=judging,
    )


def _tokens_allowed(cfg: PpoConfig) -> int | None:
    return cfg.rollout.max_new_tokens if cfg.denominator == "max_new_tokens" else None


def _policy_loss(cfg: PpoConfig, policy: InitialModel) -> RowLoss:
    objective = PolicyObjective(
        temperature=cfg.rollout.temperature,
        clip_low=cfg.clip_low,
        clip_high=cfg.clip_high,
        dual_clip=cfg.dual_clip,
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
