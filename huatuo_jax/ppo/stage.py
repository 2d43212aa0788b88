"""The PPO stage: an SFT model, a reward model and prompts in, a policy out.

An iteration (`huatuo_jax.ppo.trainer`) samples answers, scores them and updates policy and critic.
"""

import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.backbone.matmul import store_as_computed
from huatuo_jax.backbone.transformer import Transformer, init_params
from huatuo_jax.core import sharding
from huatuo_jax.core.progress import tell
from huatuo_jax.data.answers import text_of
from huatuo_jax.data.batches import pack_row
from huatuo_jax.generation.prompts import Task
from huatuo_jax.ppo.config import PpoConfig
from huatuo_jax.ppo.held_out import FOLDER as JUDGED_FOLDER
from huatuo_jax.ppo.held_out import (
    HeldOutJudging,
    identity_of,
    open_held_out,
    reach_server,
    record_of,
)
from huatuo_jax.ppo.loop import PpoJob
from huatuo_jax.ppo.losses import PolicyObjective, policy_row_loss, value_row_loss
from huatuo_jax.ppo.models import (
    Critic,
    RewardModel,
    make_reference,
    open_critic,
    open_reward_model,
)
from huatuo_jax.ppo.prompts import Prompts, open_prompts
from huatuo_jax.ppo.report import Decode, IterationFlops
from huatuo_jax.ppo.rollout import AnswerScorer, LengthScorer, Sampler, mesh_of
from huatuo_jax.ppo.targets import compile_targets
from huatuo_jax.ppo.trainer import (
    NUMBERS_OF_TOKENS,
    Learner,
    PpoState,
    RowLoss,
    Trainer,
    abstract_ppo_state,
    compile_apply,
    compile_pass,
    new_ppo_state,
)
from huatuo_jax.training.initial_model import InitialModel, open_model
from huatuo_jax.training.metrics import ModelFlops
from huatuo_jax.training.micro_batch import settle
from huatuo_jax.training.optimizer import Optimizer, make_optimizer
from huatuo_jax.training.programs import StageProgram
from huatuo_jax.training.run_directory import StageDirectory
from huatuo_jax.training.scoring import Normalization, compile_values, head_scores
from huatuo_jax.training.stage import Stage, run_stage
from huatuo_jax.training.update import TrainState, abstract_batch

STAGE = "ppo"

# Metrics of the last iteration that are in the result; its row of metrics has all.
_RESULT = (
    "score",
    "reward",
    "kl_per_sequence",
    "kl_coef",
    "response_length",
    "eos_rate",
    "entropy",
    "explained_variance",
)


class PpoStage(Stage[PpoConfig]):
    """One run of PPO.

    Attributes:
        critic: to start from; None for estimators without one.
        prompts: what is asked.
        normalization: of raw scores, where `cfg.score.scale` is `stored`.
        judging: of held-out answers; None for none.
        decode: from tokens to text; None for tokens in `samples.jsonl`.
    """

    name = STAGE
    critic: Critic | None
    prompts: Prompts
    normalization: Normalization | None = None
    judging: HeldOutJudging | None = None
    decode: Decode | None = None
    _reward: RewardModel | None = None
    _tasks: list[Task] | None = None

    @staticmethod
    def open_model(cfg: PpoConfig) -> InitialModel:
        """Finds the policy and checks that prompts and answers suit it."""
        if cfg.without_use is not None:
            tell(f"{STAGE}: {cfg.without_use}")
        policy = open_model(cfg.model, cfg.compute.compute_config())
        check_policy(cfg, policy)
        return policy

    def open_data(self) -> dict[str, Any]:
        """Finds reward model and critic, and reads the prompts."""
        cfg, policy = self.cfg, self.model
        reward = open_reward_model(
            cfg.reward_model,
            scale=cfg.score.scale,
            max_length=cfg.max_length,
            tokenizer=self.tokenizer,
        )
        self._reward, self.normalization = reward, reward.normalization
        self.decode = functools.partial(text_of, self.tokenizer)
        self.critic = open_critic(cfg, policy, reward)
        self.prompts = open_prompts(
            cfg.data,
            self.tokenizer,
            max_new_tokens=cfg.rollout.max_new_tokens,
            stop_token_ids=policy.stop_token_ids(self.template, self.tokenizer),
        )
        self.account = self.prompts.account
        found: dict[str, Any] = {
            "reward_model_files": reward.identity,
            "prompts": self.prompts.identity,
        }
        if cfg.judging is not None:
            self._tasks = open_held_out(cfg, self.tokenizer)
            found["held_out"] = identity_of(cfg, self._tasks)
        return found

    def make_job(self, directory: StageDirectory, decisive: Mapping[str, Any]) -> PpoJob:
        """Makes the job of the loop, with a number for `micro_batch_size`."""
        reward = self._scoring_model
        self.cfg, _ = settle(
            self.cfg,
            stage=STAGE,
            rows=self.cfg.minibatch_size,
            mesh=self.mesh,
            make=functools.partial(
                abstract_roles,
                policy=self.model,
                critic=self.critic,
                rewarding=None if reward is None else reward.info.cfg,
                mesh=self.mesh,
            ),
            programs=micro_batch_programs,
        )
        if self._tasks is not None:
            self.judging = self._make_judging(directory, self._tasks)
        return self.job(directory, decisive)

    def job(self, directory: StageDirectory, decisive: Mapping[str, Any]) -> PpoJob:
        """Makes the job of a run; no weights are read before the loop asks for them.

        Raises:
            ValueError: `cfg.rollout.mesh` does not divide the devices or the model.
        """
        cfg, mesh, policy = self.cfg, self.mesh, self.model
        critic, reward = self.critic, self._scoring_model
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
            stop_token_ids = self.prompts.stop_token_ids
            return Trainer(
                cfg=cfg,
                mesh=mesh,
                prompts=self.prompts,
                sampler=Sampler(
                    policy.transformer,
                    cfg.rollout,
                    stop_token_ids=stop_token_ids,
                    max_length=cfg.max_length,
                    mesh=rollout_mesh,
                ),
                scorer=self.make_scorer(),
                make_targets=compile_targets(
                    cfg,
                    stop_token_ids=stop_token_ids,
                    normalization=self.normalization,
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
            num_steps=cfg.num_iterations,
            mesh=mesh,
            make_state=make_state,
            abstract_state=abstract_ppo_state(
                trained.state, None if valued is None else valued.state, mesh
            ),
            make_trainer=make_trainer,
            flops=IterationFlops(
                policy=policy.flops,
                critic=None if critic is None else critic.model.flops,
                scorer=None if reward is None else ModelFlops.of(reward.info.cfg),
            ),
            decode=self.decode,
            judging=self.judging,
        )

    def make_scorer(self) -> AnswerScorer:
        """Makes what scores answers: the reward model on its devices, or the control."""
        reward = self._scoring_model
        if reward is None:
            return LengthScorer()
        return reward.make_scorer(
            self.model.compute,
            self.mesh,
            rows_at_once=self.cfg.rows_at_once,
            row_length=self.cfg.max_length,
        )

    def finish(
        self, directory: StageDirectory, state: PpoState, numbers: Mapping[str, float]
    ) -> dict[str, Any]:
        """Saves the policy, unless judgings kept one; returns the main numbers of the run."""
        if self.judging is None:
            self.save_model(directory, state.policy.variables)
        names = (f"{STAGE}/{name}" for name in _RESULT)
        result: dict[str, Any] = {"step": int(state.iteration)}
        result |= {name: numbers[name] for name in names if name in numbers}
        return result if self.judging is None else result | self.judging.result()

    @property
    def _scoring_model(self) -> RewardModel | None:
        """The reward model; None where something else gives the scores."""
        return None if self.cfg.score.of == "length" else self._reward

    def _make_judging(self, directory: StageDirectory, tasks: list[Task]) -> HeldOutJudging:
        assert self._reward is not None
        return HeldOutJudging(
            cfg=self.cfg,
            folder=directory.folder / JUDGED_FOLDER,
            tasks=tasks,
            server=reach_server(self.cfg),
            make_record=functools.partial(
                record_of, template=self.template, tokenizer=self.tokenizer
            ),
            normalization=self._reward.normalization_outside_training(self.cfg.score),
            transformer=self.model.transformer,
            keep=functools.partial(self.save_model, directory),
        )


def run_ppo(config: PpoConfig, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Runs the stage, resuming from its newest checkpoint; returns the saved result if it is done.

    Args:
        config: of the stage; `{workdir}` in a path stands for the run's folder.
        workdir: the run's folder.

    Returns:
        The number of iterations and the main metrics of the last one; with `judging`, which
        iteration's policy was kept, its share of points, whether the initial policy is better
        (`best_is_initial`), and why the run ended. The policy is in `WORKDIR/ppo/model`, an Orbax
        directory with the tokenizer, adapters merged.

    Raises:
        ValueError: an invalid config, file, model or mesh; before anything is compiled.
        FileNotFoundError: there is no such model.
        Interrupted: the run was stopped and saved.
        Diverged: too many steps in a row were not finite.
        OSError: something cannot be read or written.
    """
    return run_stage(PpoStage, PpoConfig, config, workdir)


def check_policy(cfg: PpoConfig, policy: InitialModel) -> None:
    """Raises ValueError where a model does not suit as the policy of a run."""
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
    reference = trained.state.trained
    if cfg.model.lora is None:
        reference = _stored(reference, policy.cfg, policy.compute.compute_dtype)
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
        reference=reference,
        critic=critic,
        valued=None if critic is None else critic_of(cfg, critic, mesh),
        scorer=scorer,
        scorer_variables=scorer_variables,
    )


def micro_batch_programs(roles: Roles) -> Iterator[StageProgram]:
    """Yields policy and critic passes over a minibatch of the longest rows, and the scoring."""
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
    rows = cfg.rows_at_once
    row = pack_row([], row_length=cfg.max_length, pad_token_id=0)
    return StageProgram(
        name="ppo/score",
        function=compile_values(functools.partial(head_scores, scorer), mesh),
        arguments=(roles.scorer_variables, abstract_batch(row, rows, mesh)),
        beside=(roles.trained.state, roles.reference, roles.value_state),
        mesh=mesh,
        rows=rows,
        rows_at_once=rows,
        in_micro_batches=True,
    )


def _learner(
    cfg: PpoConfig, loss: RowLoss, optimizer: Optimizer, state: TrainState, mesh: Mesh
) -> Learner:
    return Learner(
        run_pass=compile_pass(loss, state, mesh, rows_at_once=cfg.rows_at_once),
        apply=compile_apply(optimizer, state, mesh),
    )


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


def _tokens_allowed(cfg: PpoConfig) -> int | None:
    return cfg.rollout.max_new_tokens if cfg.denominator == "max_new_tokens" else None


def _pass(
    roles: Roles, name: str, trained: Trained, frozen: Any, beside: tuple[Any, ...]
) -> StageProgram:
    cfg, mesh = roles.cfg, roles.mesh
    everywhere = jax.NamedSharding(mesh, jax.P())
    return StageProgram(
        name=f"ppo/{name}_pass",
        function=trained.learner.run_pass,
        arguments=(
            trained.state.trained,
            frozen,
            abstract_batch(_row(cfg.max_length), cfg.minibatch_size, mesh),
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
