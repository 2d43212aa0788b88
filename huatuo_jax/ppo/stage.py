"""The PPO stage: an SFT model, a reward model and prompts in, a policy out."""

import functools
import os
from typing import Any

from huatuo_jax.config import all_fields, checked, identity, placed_in
from huatuo_jax.data.answers import text_of
from huatuo_jax.ppo.config import PpoConfig
from huatuo_jax.ppo.held_out import FOLDER as JUDGED_FOLDER
from huatuo_jax.ppo.held_out import (
    HeldOutJudging,
    identity_of,
    open_held_out,
    reach_server,
    record_of,
)
from huatuo_jax.ppo.job import check_policy, make_job
from huatuo_jax.ppo.loop import train
from huatuo_jax.ppo.programs import abstract_roles, micro_batch_programs
from huatuo_jax.ppo.prompts import open_prompts
from huatuo_jax.ppo.roles import open_critic, open_reward_model
from huatuo_jax.ppo.rollout import AnswerScorer, LengthScorer
from huatuo_jax.progress import tell
from huatuo_jax.training.data_report import report_data
from huatuo_jax.training.evaluation import check_rows
from huatuo_jax.training.initial_model import open_model
from huatuo_jax.training.micro_batch import settle
from huatuo_jax.training.run_directory import begin_stage
from huatuo_jax.training.state import Variables
from huatuo_jax.training.throughput import ModelFlops

STAGE = "ppo"
MODEL_FOLDER = "model"

# Of the last iteration, in the result; all others stand in its row of metrics.
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


def run_ppo(config: PpoConfig, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Runs the stage in a run's folder, or goes on with it, or finds it done.

    Args:
        config: of the stage; `{workdir}` in a path stands for the run's folder.
        workdir: the run's folder.

    Returns:
        The number of iterations and the main gauges of the last one; with `judging`, which
        iteration's policy was kept, its share of points, whether the initial policy is better
        (`best_is_initial`), and why the run ended. The policy is in `WORKDIR/ppo/model`, an Orbax
        directory with the tokenizer, adapters merged.

    Raises:
        ValueError: a config, a file, a model or a mesh that cannot be; before anything is compiled.
        FileNotFoundError: there is no such model.
        Interrupted: the run was stopped and saved.
        Diverged: too many steps in a row were not finite.
        OSError: something cannot be read or written.
    """
    cfg = placed_in(checked(config, PpoConfig, path=f"config.{STAGE}"), workdir)
    if cfg.without_use is not None:
        tell(f"{STAGE}: {cfg.without_use}")
    mesh = cfg.mesh.make()
    check_rows(cfg.rows_at_once, name="micro_batch_size", mesh=mesh)
    policy = open_model(cfg.model, cfg.compute.compute_config())
    check_policy(cfg, policy)
    template = cfg.data.chat_template
    tokenizer = policy.load_tokenizer(STAGE, template)
    reward = open_reward_model(
        cfg.reward_model,
        scale=cfg.score.scale,
        max_length=cfg.max_length,
        tokenizer=tokenizer,
    )
    critic = open_critic(cfg, policy, reward)
    prompts = open_prompts(
        cfg.data,
        tokenizer,
        max_new_tokens=cfg.rollout.max_new_tokens,
        stop_token_ids=policy.stop_token_ids(template, tokenizer),
    )
    tasks = None if cfg.judging is None else open_held_out(cfg, tokenizer)
    decisive = identity(cfg) | {
        "initial_model": policy.identity,
        "reward_model_files": reward.identity,
        "prompts": prompts.identity,
    }
    if tasks is not None:
        decisive["held_out"] = identity_of(cfg, tasks)
    directory = begin_stage(workdir, STAGE, settings=all_fields(cfg), decisive=decisive)
    if (result := directory.result()) is not None:
        return result
    report_data(directory, prompts.account)
    by_length = cfg.score.of == "length"
    cfg, _ = settle(
        cfg,
        stage=STAGE,
        rows=cfg.minibatch_size,
        mesh=mesh,
        make=functools.partial(
            abstract_roles,
            policy=policy,
            critic=critic,
            rewarding=None if by_length else reward.info.cfg,
            mesh=mesh,
        ),
        programs=micro_batch_programs,
    )

    def make_scorer() -> AnswerScorer:
        if by_length:
            return LengthScorer()
        compute = policy.compute
        rows, length = cfg.rows_at_once, cfg.max_length
        return reward.make_scorer(compute, mesh, rows_at_once=rows, row_length=length)

    def keep(variables: Variables) -> None:
        place = directory.folder / MODEL_FOLDER
        policy.save(variables, place, template=template, tokenizer=tokenizer)

    judging = None
    if tasks is not None:
        judging = HeldOutJudging(
            cfg=cfg,
            folder=directory.folder / JUDGED_FOLDER,
            tasks=tasks,
            server=reach_server(cfg),
            make_record=functools.partial(record_of, template=template, tokenizer=tokenizer),
            normalization=reward.normalization_outside_training(cfg.score),
            transformer=policy.transformer,
            keep=keep,
        )
    job = make_job(
        cfg,
        policy=policy,
        critic=critic,
        prompts=prompts,
        make_scorer=make_scorer,
        normalization=reward.normalization,
        directory=directory,
        decisive=decisive,
        mesh=mesh,
        decode=functools.partial(text_of, tokenizer),
        scorer_flops=None if by_length else ModelFlops.of(reward.info.cfg),
        judging=judging,
    )
    state, fields = train(job, cfg.loop)
    if judging is None:
        keep(state.policy.variables)
    names = (f"{STAGE}/{name}" for name in _RESULT)
    result = {"step": int(state.iteration)}
    result |= {name: fields[name] for name in names if name in fields}
    if judging is not None:
        result |= judging.result()
    directory.finish(result)
    return result
