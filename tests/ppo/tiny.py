"""A world of a few answers, run by the real engine and loop: what the tests of PPO share."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from huatuo_jax.data.records import Message, Prompt
from huatuo_jax.generation.prompts import Task
from huatuo_jax.ppo.config import PpoConfig, PpoLoopConfig, RolloutConfig, ScoreConfig, ValueConfig
from huatuo_jax.ppo.held_out import HeldOutJudging
from huatuo_jax.ppo.held_out_rewards import HeldOutRewarding
from huatuo_jax.ppo.models import open_critic
from huatuo_jax.ppo.prompts import Prompts, PromptsConfig, TokenPrompt
from huatuo_jax.ppo.stage import PpoStage, check_policy
from huatuo_jax.training.initial_model import ComputeSection, ModelConfig, open_model
from huatuo_jax.training.loop import train
from huatuo_jax.training.optimizer import OptimizerConfig
from huatuo_jax.training.run_directory import begin_stage
from tests.tiny import backbone, one_device

END = 0
NUM_ITERATIONS = 24  # Of a run that is killed.
# Of two tokens: after one alone, an answer of the same token would lead to the same state, as
# attention to equal tokens is the same however many there are.
PROMPT = TokenPrompt("p0", (1, 2))

BACKBONE = backbone(
    vocab_size=5,
    # Padded rows are part of every test.
    vocab_multiple=8,
    hidden_size=16,
    intermediate_size=24,
    head_dim=8,
    max_positions=16,
    initializer_range=0.3,
)


def all_answers(*, longest, vocab_size=BACKBONE.vocab_size, prefix=()):
    """Every answer that can be sampled: up to its end, or to its longest."""
    for token in range(vocab_size):
        answer = (*prefix, token)
        if token == END or len(answer) == longest:
            yield answer
        else:
            yield from all_answers(longest=longest, vocab_size=vocab_size, prefix=answer)


class Table:
    """Scores by token ids, in place of a reward model."""

    def __init__(self, rewards):
        self.rewards = rewards

    def scores(self, answers):
        return np.array(
            [
                self.rewards[tuple(np.asarray(one.token_ids)[one.prompt_length :].tolist())]
                for one in answers
            ],
            np.float32,
        )


def table(*, longest, seed=0, scale=1.0):
    """A reward for each answer, drawn once."""
    answers = list(all_answers(longest=longest))
    drawn = scale * np.random.default_rng(seed).normal(size=len(answers))
    return Table(dict(zip(answers, drawn.tolist(), strict=True)))


def config(**changed):
    """A run on one prompt; sections are changed as `rollout={"num_prompts": 4}`."""
    has_critic = changed.get("estimator", "gae") == "gae"
    sections = {
        "rollout": RolloutConfig(num_prompts=8, answers_per_prompt=1, max_new_tokens=3),
        "score": ScoreConfig(scale="raw", on_truncation="keep", penalty=None),
        "value": ValueConfig(start="policy") if has_critic else ValueConfig(),
        "compute": ComputeSection(loss_chunk=4),
        "loop": PpoLoopConfig(checkpoint_every=2, tensorboard=False, samples_per_iteration=2),
        "optimizer": OptimizerConfig(
            learning_rate=3e-3, decay="linear", weight_decay=0.0, clip_norm=None
        ),
    }
    for name, section in sections.items():
        fields = changed.pop(name, {})
        sections[name] = (
            dataclasses.replace(section, **fields) if isinstance(fields, dict) else fields
        )
    lora = changed.pop("lora", None)
    backbone = changed.pop("backbone", BACKBONE)
    settings = {
        "model": ModelConfig(backbone=backbone, tokenizer="none", lora=lora),
        "data": PromptsConfig(paths=("none",), max_prompt_tokens=4),
        "kl_coef": 0.1,
        "num_iterations": 3,
        "num_epochs": 2,
        "num_minibatches": 2,
    }
    return PpoConfig(**(settings | sections | changed))


def token_record(task, answers):
    """A record whose texts are the token ids."""
    found = [
        {
            "text": " ".join(map(str, one.token_ids)),
            "token_ids": one.token_ids,
            "finish_reason": one.finish_reason,
        }
        for one in answers
    ]
    return task.prompt.to_json() | {"prompt_token_ids": list(task.token_ids), "answers": found}


def tiny_judging(cfg, workdir, policy, *, num_prompts=16):
    """Judgings of so many prompts of the same tokens; what is kept is in `kept.npz`."""
    folder = pathlib.Path(workdir) / "ppo"

    def keep(variables):
        leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(variables))
        arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
        np.savez(folder / "kept.npz", **arrays)

    tasks = [
        Task(
            Prompt(id=f"h{index}", messages=(Message("user", f"{index}"),), source="test"),
            list(PROMPT.token_ids),
            0,
        )
        for index in range(num_prompts)
    ]
    return HeldOutJudging(
        cfg=cfg,
        folder=folder / "judged",
        tasks=tasks,
        server=None,
        make_record=token_record,
        normalization=None,
        transformer=policy.transformer,
        keep=keep,
    )


def token_text(token_ids):
    """Tokens as a text: their ids."""
    return " ".join(map(str, token_ids))


kept = []
"""The variables that held-out rewards kept, of all runs of the process."""


def tiny_job(
    cfg,
    workdir,
    *,
    scorer=None,
    mesh=None,
    prompts=(PROMPT,),
    normalization=None,
    rewards=None,
    ptx_rows=None,
):
    """A whole stage on the tiny world."""
    policy = open_model(cfg.model, cfg.compute.compute_config())
    check_policy(cfg, policy)
    decisive = {"seed": cfg.seed, "num_iterations": cfg.num_iterations}
    scorer = scorer or table(longest=cfg.rollout.max_new_tokens)
    stage = PpoStage(cfg, mesh=mesh or one_device(), workdir=workdir, model=policy)
    stage.critic = open_critic(cfg, policy, None)
    stage.prompts = Prompts(prompts, (END,))
    stage.make_scorer = lambda: scorer
    stage.ptx_rows = ptx_rows
    if rewards is not None:
        stage.make_rewards = lambda: rewards
    stage.normalization = normalization
    if cfg.held_out_rewards is not None:
        held_out = [TokenPrompt(f"h{index}", PROMPT.token_ids) for index in range(8)]
        stage.judging = HeldOutRewarding(
            cfg=cfg, prompts=held_out, normalization=None, keep=kept.append
        )
    if cfg.judging is not None:
        stage.judging = tiny_judging(cfg, workdir, policy)
    return stage.job(begin_stage(workdir, "ppo", settings=decisive, decisive=decisive), decisive)


def run_tiny(cfg, workdir, **options):
    """Trains to the end; the last state and the numbers of its iteration."""
    return train(tiny_job(cfg, workdir, **options), cfg.loop)


def exact_log_probs(cfg, variables, answers, *, prompt=PROMPT):
    """The log-probability of each answer by the plain model, at the temperature of the run."""
    model = open_model(cfg.model, cfg.compute.compute_config()).transformer
    start, longest = len(prompt.token_ids), max(map(len, answers))
    ids_NT = np.zeros((len(answers), start + longest), np.int32)
    for row, answer in enumerate(answers):
        ids_NT[row, : start + len(answer)] = (*prompt.token_ids, *answer)

    @jax.jit
    def log_probs(variables, ids_NT):
        hidden_NTD = model.apply(variables, ids_NT)
        logits_NTV = model.apply(variables, hidden_NTD, method="logits")
        return jax.nn.log_softmax(logits_NTV / cfg.rollout.temperature)

    found_NTV = np.asarray(log_probs(variables, jnp.asarray(ids_NT)), np.float64)
    return np.array(
        [
            sum(found_NTV[row, start - 1 + t, token] for t, token in enumerate(answer))
            for row, answer in enumerate(answers)
        ]
    )
