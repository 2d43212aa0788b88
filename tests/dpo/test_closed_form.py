"""With exact labels of every pair of a small world, DPO ends where PPO's optimum is.

Labels are those of Bradley and Terry, sigmoid(reward - other reward); the best policy is in
proportion to reference * exp(reward / beta), found here by listing all answers.
"""

import dataclasses
import itertools

import numpy as np
import pytest

from huatuo_jax.preferences.data import Answer, Group, Pair
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.optimizer import OptimizerConfig
from tests.dpo.tiny import config, run_tiny, tiny_job
from tests.ppo.test_closed_form import assert_best
from tests.ppo.tiny import BACKBONE, PROMPT, all_answers, exact_log_probs, table
from tests.ppo.tiny import config as ppo_config

BETA = 1.0
LONGEST = 3


def _group(answers, rewards):
    """Every pair of answers, with the probability that the first is the better one."""
    start = len(PROMPT.token_ids)
    tokens = tuple(
        Answer(
            np.array((*PROMPT.token_ids, *answer), np.int32),
            len(answer),
            1,
            np.arange(start + len(answer)) >= start,
        )
        for answer in answers
    )
    pairs = tuple(
        Pair(one, other, float(1 / (1 + np.exp(rewards[other] - rewards[one]))), None, "exact")
        for one, other in itertools.combinations(range(len(answers)), 2)
    )
    return Group("world", "world", tokens, pairs)


@pytest.mark.slow
def test_dpo_with_exact_labels_ends_at_the_best_policy(tmp_path):
    answers = list(all_answers(longest=LONGEST))
    rewards = np.array([table(longest=LONGEST, seed=2).rewards[answer] for answer in answers])
    group = _group(answers, rewards)
    num_steps = 600
    cfg = config(
        backbone=BACKBONE,
        row_length=sum(len(one.token_ids) for one in group.answers),
        beta=BETA,
        num_steps=num_steps,
        batch_size=1,
        optimizer=OptimizerConfig(
            learning_rate=1e-2, decay="linear", weight_decay=0.0, clip_norm=None
        ),
        loop=LoopConfig(evaluate_every=num_steps, checkpoint_every=num_steps, tensorboard=False),
    )
    # Of the same seed, PPO's tests start from the same policy.
    exact = dataclasses.replace(ppo_config(), seed=cfg.seed)
    first = tiny_job(cfg, tmp_path / "first", [group]).make_state()
    reference = exact_log_probs(exact, {"params": first.variables["params"]}, answers)
    state, _ = run_tiny(cfg, tmp_path, [group])
    policy = exact_log_probs(exact, {"params": state.variables["params"]}, answers)
    assert_best(policy, reference, rewards, beta=BETA)
