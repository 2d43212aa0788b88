"""Groups of equal rewards are drawn anew within a bound; truncated answers may be left out."""

import functools

import numpy as np
import pytest

from huatuo_jax.ppo.config import RolloutConfig
from huatuo_jax.ppo.redrawing import with_variance
from huatuo_jax.ppo.report import Spent
from huatuo_jax.ppo.reward_mix import Rewards
from huatuo_jax.ppo.rollout import Rollout
from huatuo_jax.ppo.trainer import _experience
from huatuo_jax.training.metrics import read_rows
from tests.ppo.tiny import END, PROMPT, Table, config, run_tiny, table, tiny_job

GROUP = 2


class Prompts:
    """Draws groups by the place of their prompt: the scores of each are given."""

    def __init__(self, scores):
        self.scores, self.asked = scores, []

    def draw(self, number, first, num_prompts):
        self.asked.append((number, first, num_prompts))
        places = list(range(first, first + num_prompts))
        scores_N = np.array([one for place in places for one in self.scores[place]], np.float32)
        answers = [f"{place}.{index}" for place in places for index in range(GROUP)]
        terms = {"mine": (scores_N.copy(), np.ones(len(scores_N), bool))}
        rewards = Rewards(scores_N, np.ones(len(scores_N), bool), terms)
        return self.lay([f"p{place}" for place in places], answers), rewards

    @staticmethod
    def lay(prompts, answers):
        return Rollout(prompts, answers, {}, np.zeros((len(answers), 1), np.float32))


def draw(scores, *, num_prompts, rounds):
    prompts = Prompts(scores)
    found = with_variance(prompts.draw, prompts.lay, num_prompts=num_prompts, rounds=rounds)
    return found, prompts.asked


SCORES = [(0, 1), (1, 1), (0, 0), (2, 2), (3, 4), (5, 6)]


def test_equal_groups_give_way_to_the_next_prompts_in_their_place():
    found, asked = draw(SCORES, num_prompts=3, rounds=9)
    assert asked == [(0, 0, 3), (1, 3, 2), (2, 5, 1)]
    assert found.num_prompts == 6
    assert found.rollout.prompts == ["p0", "p5", "p4"]
    assert found.rollout.answers == ["0.0", "0.1", "5.0", "5.1", "4.0", "4.1"]
    np.testing.assert_array_equal(found.rewards.scores_N, [0, 1, 5, 6, 3, 4])
    np.testing.assert_array_equal(found.rewards.terms["mine"][0], found.rewards.scores_N)


def test_the_bound_leaves_equal_groups_as_they_are():
    found, asked = draw(SCORES, num_prompts=3, rounds=1)
    assert asked == [(0, 0, 3), (1, 3, 2)]
    assert found.rollout.prompts == ["p0", "p3", "p4"]
    found, asked = draw(SCORES, num_prompts=3, rounds=0)
    assert asked == [(0, 0, 3)] and found.rollout.prompts == ["p0", "p1", "p2"]


class FirstToken(Table):
    """1 for answers that begin with token 1, 0 for all others: many groups are equal."""

    def scores(self, answers):
        firsts = [int(one.token_ids[one.prompt_length]) for one in answers]
        return np.array([float(first == 1) for first in firsts], np.float32)


def _run(tmp_path, rounds):
    cfg = config(
        estimator="grpo",
        num_iterations=2,
        num_epochs=1,
        rollout={"num_prompts": 4, "answers_per_prompt": 2, "redraw_rounds": rounds},
    )
    state, _ = run_tiny(cfg, tmp_path, scorer=FirstToken({}))
    return cfg, state, list(read_rows(tmp_path / "ppo" / "metrics.jsonl"))


@pytest.mark.slow
def test_a_run_goes_on_in_the_order_of_prompts_after_those_it_drew_anew(tmp_path):
    cfg, state, rows = _run(tmp_path / "anew", 6)
    drawn = sum(row["ppo/groups_drawn_anew"] for row in rows)
    assert drawn > 0
    assert int(state.next_prompt) == 4 * cfg.num_iterations + drawn
    _, _, plain = _run(tmp_path / "plain", 0)
    share = "ppo/groups_without_variance"
    assert rows[0][share] < plain[0][share]
    assert "ppo/groups_drawn_anew" not in plain[0]


def test_groups_of_one_cannot_be_drawn_anew():
    with pytest.raises(ValueError, match="redraw_rounds=1 needs answers_per_prompt >= 2"):
        RolloutConfig(redraw_rounds=1)
    with pytest.raises(ValueError, match="redraw_rounds=-1 must be 0 or more"):
        RolloutConfig(redraw_rounds=-1)


def test_answers_without_an_end_are_left_out_of_the_loss_and_stay_in_the_means(tmp_path):
    cfg = config(trains_on_truncated=False)
    job = tiny_job(cfg, tmp_path, scorer=table(longest=3))
    trainer, state = job.make_trainer(), job.make_state()
    rollout = trainer._sample(state)
    rewards = trainer._rewarded(rollout, Spent())
    experience = _experience(rollout, rewards, trainer._evaluated(state, rollout))
    targets = trainer.make_targets(experience, state.kl_coef, state.scores)
    rows = trainer._training_rows(rollout, experience, targets)
    ended = np.array([one.token_ids[-1] == END for one in rollout.answers])
    assert 0 < ended.sum() < len(ended)
    start = len(PROMPT.token_ids)
    assert (rows["mask"].any(axis=1) == ended).all()
    assert (rollout.rows["mask"][:, start]).all(), "the rollout itself keeps them"
    assert int(targets.sums["answers"]) == len(ended)


@pytest.mark.slow
def test_a_run_trains_on_the_tokens_of_ended_answers_alone(tmp_path):
    run = functools.partial(run_tiny, scorer=table(longest=3))
    _, whole = run(config(num_iterations=1), tmp_path / "whole")
    state, some = run(config(num_iterations=1, trains_on_truncated=False), tmp_path / "some")
    assert whole["ppo/score"] == some["ppo/score"]
    assert whole["ppo/policy_loss"] != some["ppo/policy_loss"]
    # A minibatch without an answer that ended is no update.
    assert int(state.policy.num_updates) + int(state.policy.num_empty) == 4
    assert int(state.policy.num_updates) > 0
