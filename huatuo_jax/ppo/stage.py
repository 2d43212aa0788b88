"""The PPO stage: an SFT model, a reward model and prompts in, a policy out.

An iteration (`huatuo_jax.ppo.trainer`) samples answers, scores them and updates policy and critic.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from huatuo_jax.core import distributed
from huatuo_jax.core.progress import tell
from huatuo_jax.data.answers import text_of
from huatuo_jax.data.batches import Row
from huatuo_jax.generation.prompts import Task
from huatuo_jax.judge.config import reach_judge
from huatuo_jax.judge.openai import OpenAIJudgeConfig
from huatuo_jax.judge.server import key_from_environment
from huatuo_jax.ppo.config import PpoConfig
from huatuo_jax.ppo.held_out import FOLDER as JUDGED_FOLDER
from huatuo_jax.ppo.held_out import (
    HeldOutJudging,
    identity_of,
    open_held_out,
    reach_server,
    record_of,
)
from huatuo_jax.ppo.held_out_rewards import HeldOutCheck, HeldOutRewarding
from huatuo_jax.ppo.loop import TOTAL_KL, PpoJob
from huatuo_jax.ppo.models import (
    Critic,
    RewardModel,
    VerifierModel,
    open_critic,
    open_reward_model,
    open_verifier,
)
from huatuo_jax.ppo.prompts import Prompts, TokenPrompt, held_out_tasks, open_prompts
from huatuo_jax.ppo.reference import abstract_reference, compile_sync, make_reference
from huatuo_jax.ppo.report import Decode, IterationFlops
from huatuo_jax.ppo.reward_mix import MixedRewards, RewardSource, ScorerRewards, check_functions
from huatuo_jax.ppo.reward_terms import RewardMixConfig
from huatuo_jax.ppo.roles import (
    abstract_roles,
    critic_of,
    micro_batch_programs,
    policy_of,
    ptx_of,
)
from huatuo_jax.ppo.rollout import AnswerScorer, LengthScorer, Sampler, mesh_of
from huatuo_jax.ppo.targets import RowShapes, compile_targets
from huatuo_jax.ppo.trainer import (
    PpoState,
    Trainer,
    abstract_ppo_state,
    new_ppo_state,
)
from huatuo_jax.reward_functions.grader import Grader
from huatuo_jax.training.dialogue_data import open_dialogues
from huatuo_jax.training.initial_model import InitialModel, open_model
from huatuo_jax.training.metrics import ModelFlops
from huatuo_jax.training.micro_batch import settle
from huatuo_jax.training.run_directory import StageDirectory
from huatuo_jax.training.scoring import Normalization
from huatuo_jax.training.stage import Stage, run_stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STAGE = "ppo"
GRADED_FOLDER = "graded"
"""In the stage's folder: the replies of the judge that reward functions ask, and its spending."""

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
        judging: of held-out answers, or their rewards; None for none.
        decode: from tokens to text; None for tokens in `samples.jsonl`.
        ptx_rows: rows of dialogues by number, endless; None where no fine-tuning is added.
    """

    name = STAGE
    critic: Critic | None
    prompts: Prompts
    normalization: Normalization | None = None
    judging: HeldOutCheck | None = None
    decode: Decode | None = None
    ptx_rows: Callable[[int], Row] | None = None
    _reward: RewardModel | None = None
    _verifier: VerifierModel | None = None
    _grader_server: OpenAIJudgeConfig | None = None
    _tasks: list[Task] | None = None
    _held_out_prompts: Sequence[TokenPrompt] | None = None

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
        reward: RewardModel | None = None
        if cfg.needs_reward_model:
            reward = open_reward_model(
                cfg.reward_model,
                scale=cfg.score.scale,
                max_length=cfg.max_length,
                tokenizer=self.tokenizer,
            )
        self._reward = reward
        self.normalization = None if reward is None else reward.normalization
        self.decode = functools.partial(text_of, self.tokenizer)
        self.critic = open_critic(cfg, policy, reward)
        self.prompts = open_prompts(
            cfg.data,
            self.tokenizer,
            max_new_tokens=cfg.rollout.max_new_tokens,
            stop_token_ids=policy.stop_token_ids(self.template, self.tokenizer),
        )
        self.account = self.prompts.account
        found: dict[str, Any] = {"prompts": self.prompts.identity}
        if reward is not None:
            found["reward_model_files"] = reward.identity
        if cfg.reward is not None:
            found["reward_functions"] = check_functions(cfg.reward, self.prompts)
            found["prompt_columns"] = self.prompts.columns_identity
            found |= self._open_graders(cfg.reward)
        if cfg.judging is not None:
            self._tasks = open_held_out(cfg, self.tokenizer)
            found["held_out"] = identity_of(cfg, self._tasks)
        if cfg.held_out_rewards is not None:
            tasks = held_out_tasks(
                cfg.data,
                self.tokenizer,
                path=cfg.held_out_rewards.prompts,
                num_prompts=cfg.held_out_rewards.num_prompts,
                max_new_tokens=cfg.rollout.max_new_tokens,
                purpose="to reward",
            )
            held_out = Prompts([TokenPrompt.of(task) for task in tasks], ())
            found["held_out"] = [held_out.identity, held_out.columns_identity]
            self._held_out_prompts = held_out.items
        if cfg.ptx is not None:
            cfg.ptx.check(policy.cfg, self.mesh)
            with distributed.first_then_others("tokenising"):
                dialogues = open_dialogues(
                    cfg.ptx.data,
                    self.tokenizer,
                    seed=cfg.seed,
                    default_cache=self.workdir / "data",
                )
            self.ptx_rows = functools.partial(
                dialogues.train.read, row_length=cfg.ptx.data.row_length
            )
            found["ptx"] = dialogues.identity
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
        elif self._held_out_prompts is not None:
            self.judging = HeldOutRewarding(
                cfg=self.cfg,
                prompts=self._held_out_prompts,
                normalization=self._normalization_outside_training,
                keep=functools.partial(self.save_model, directory),
            )
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
        moves = cfg.reference_sync is not None

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
                reference=make_reference(cfg, policy, key, mesh) if moves else None,
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
                rewards=self.make_rewards(),
                make_targets=compile_targets(
                    cfg,
                    stop_token_ids=stop_token_ids,
                    normalization=self.normalization,
                    mesh=mesh,
                ),
                policy=trained.learner,
                reference=None if moves else make_reference(cfg, policy, key, mesh),
                sync=compile_sync(cfg, policy, trained.state, mesh) if moves else None,
                critic=critic,
                value=None if valued is None else valued.learner,
                ptx=None if self.ptx_rows is None else ptx_of(cfg, policy, self.ptx_rows, mesh),
            )

        return PpoJob(
            directory=directory,
            decisive=decisive,
            num_steps=cfg.num_iterations,
            mesh=mesh,
            make_state=make_state,
            abstract_state=abstract_ppo_state(
                trained.state,
                None if valued is None else valued.state,
                mesh,
                reference=abstract_reference(cfg, policy, trained.state) if moves else None,
            ),
            make_trainer=make_trainer,
            flops=IterationFlops(
                policy=policy.flops,
                critic=None if critic is None else critic.model.flops,
                scorer=None if reward is None else ModelFlops.of(reward.info.cfg),
            ),
            decode=self.decode,
            judging=self.judging,
            stop_at_total_kl=cfg.stop_at_total_kl,
        )

    def make_rewards(self) -> RewardSource:
        """Makes what rewards answers: a scorer alone, or the sum of terms."""
        cfg = self.cfg
        if cfg.reward is None:
            return ScorerRewards(self.make_scorer())
        services: dict[str, Any] = {}
        if cfg.reward.grader is not None:
            grader, server = cfg.reward.grader, self._grader_server
            services["grader"] = distributed.by_first(
                "the judge's replies",
                lambda: Grader(
                    grader,
                    self.workdir / STAGE / GRADED_FOLDER,
                    server=server,
                    key=None if server is None else key_from_environment(),
                ),
            )
        if self._verifier is not None:
            services["verifier"] = self._verifier.open(self.model.compute, self.mesh)
        return MixedRewards(
            cfg.reward,
            scorer=self.make_scorer() if cfg.reward.has_model else None,
            normalization=self.normalization,
            decode=functools.partial(text_of, self.tokenizer),
            count_tokens=functools.partial(_count_tokens, self.tokenizer),
            services=services,
        )

    def make_scorer(self) -> AnswerScorer:
        """Makes what scores answers: the reward model on its devices, or the control."""
        reward = self._scoring_model
        if reward is None:
            return LengthScorer()
        shapes = RowShapes.of(self.cfg, self.mesh)
        return reward.make_scorer(
            self.model.compute,
            self.mesh,
            rows_at_once=shapes.at_once(shapes.width),
            row_length=shapes.width,
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
        if self.judging is not None:
            result |= self.judging.result()
        budget, kl = self.cfg.stop_at_total_kl, numbers.get(TOTAL_KL, 0.0)
        is_spent = budget is not None and kl >= budget
        early = int(state.iteration) < self.cfg.num_iterations
        if is_spent and early and not (self.judging and self.judging.turned):
            ended = f"KL of {kl:.3f} from the reference, the budget being {budget:g}"
            result["ended"] = ended
        return result

    def _open_graders(self, mix: RewardMixConfig) -> dict[str, Any]:
        """Reaches the judge and finds the verifier; returns what makes them others."""
        found: dict[str, Any] = {}
        if mix.grader is not None:
            judge = mix.grader.judge
            field = "config.ppo.reward.grader.judge"
            self._grader_server = distributed.by_first(
                "judge", lambda: reach_judge(judge, field=field)
            )
            server = self._grader_server
            found["grader"] = distributed.told_by_first(
                "judge's name", lambda: "offline" if server is None else server.model
            )
        if mix.verifier_model is not None:
            self._verifier = open_verifier(mix.verifier_model)
            found["verifier_model_files"] = self._verifier.identity
        return found

    @property
    def _scoring_model(self) -> RewardModel | None:
        """The reward model; None where something else gives the scores."""
        return self._reward if self.cfg.scores_by_model else None

    @property
    def _normalization_outside_training(self) -> Normalization | None:
        """Of a reward model that is the reward alone; a sum of terms normalises by itself."""
        if self.cfg.reward is not None or self._reward is None:
            return None
        return self._reward.normalization_outside_training(self.cfg.score)

    def _make_judging(self, directory: StageDirectory, tasks: list[Task]) -> HeldOutJudging:
        return HeldOutJudging(
            cfg=self.cfg,
            folder=directory.folder / JUDGED_FOLDER,
            tasks=tasks,
            server=reach_server(self.cfg),
            make_record=functools.partial(
                record_of, template=self.template, tokenizer=self.tokenizer
            ),
            normalization=self._normalization_outside_training,
            transformer=self.model.transformer,
            keep=functools.partial(self.save_model, directory),
        )


def _count_tokens(tokenizer: "PreTrainedTokenizerBase", text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def run_ppo(
    config: PpoConfig,
    workdir: str | os.PathLike[str],
    *,
    after_evaluation: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Runs the stage, resuming from its newest checkpoint; returns the saved result if it is done.

    Args:
        config: of the stage; `{workdir}` in a path stands for the run's folder.
        workdir: the run's folder.
        after_evaluation: called after each judging, in the first process alone.

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
    return run_stage(PpoStage, PpoConfig, config, workdir, after_evaluation=after_evaluation)


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
