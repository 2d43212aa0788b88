"""Best-of-n: what it picks, how far it can be from its model, and that it is compared fairly."""

import itertools
import math

import numpy as np
import pytest

from huatuo_jax.data.records import Message, Prompt
from huatuo_jax.evaluation.answers import (
    EvaluationConfig,
    ScoredAnswers,
    best_answers,
    kl_upper_bound,
    repeated,
)
from huatuo_jax.evaluation.stage import judge_pairs
from huatuo_jax.judge.judgements import Reply
from huatuo_jax.judge.questions import Answered, win_rates


class RewardJudge:
    """Prefers the answer with the higher reward, which is its text."""

    async def compare(self, prompt, first, second):
        return Reply(p_first=float(float(first) > float(second)))


def scored(rewards):
    """Answers whose texts are their rewards, in every place where answers stand."""
    answered, records = [], []
    for name, found in rewards.items():
        prompt = Prompt(id=name, messages=(Message("user", "咳嗽"),), source="test")
        texts = tuple(map(str, found))
        answered.append(Answered(prompt, texts))
        answers = [{"text": text, "token_ids": [1]} for text in texts]
        records.append({"id": name, "answers": answers, "rewards": found, "scores": found})
    return ScoredAnswers(answered, rewards, records)


def test_the_answer_with_the_highest_reward_is_taken_with_all_that_belongs_to_it():
    best = best_answers(scored({"a": [0.5, 2.0, 1.0], "b": [3.0, -1.0, 3.0]}))
    assert best.rewards == {"a": [2.0], "b": [3.0]}
    assert best.texts == ["2.0", "3.0"]
    assert best.records[0] == {
        "id": "a",
        "answers": [{"text": "2.0", "token_ids": [1]}],
        "rewards": [2.0],
        "scores": [2.0],
    }


def test_an_answer_without_a_reward_is_taken_only_where_none_has_one():
    best = best_answers(scored({"a": [None, -5.0], "b": [None, None]}))
    assert best.rewards == {"a": [-5.0], "b": [None]}


@pytest.mark.parametrize("n", [2, 4, 16])
def test_its_share_against_fresh_answers_is_n_over_n_plus_1_before_the_reward_itself(n):
    """With continuous rewards the best of n + 1 equal draws is any of them alike."""
    draw = np.random.default_rng(0)
    drawn = scored({f"p{i}": list(draw.normal(i % 5, 1.0, size=4 + n)) for i in range(3000)})
    sft, best = drawn.part(slice(4)), best_answers(drawn.part(slice(4, None)))
    shown = repeated(best, as_often_as=sft)
    found = win_rates(judge_pairs(shown.answered, sft.answered, RewardJudge()), seed=0)
    assert found["wins"] + found["losses"] == 3000 * 4
    share = found["share"]
    assert share["low"] < n / (n + 1) < share["high"] and share["high"] - share["low"] < 0.03


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_bound_holds_the_exact_kl_and_is_reached_as_answers_become_unlikely(n):
    """A model of m equally likely answers in the order of their reward, enumerated."""
    gaps = []
    for size in (2, 4, 12):
        chosen = np.zeros(size)
        for drawn in itertools.product(range(size), repeat=n):
            chosen[max(drawn)] += size**-n
        exact = float(np.sum(chosen * np.log(chosen * size)))
        gaps.append(kl_upper_bound(n) - exact)
    assert min(gaps) > 0 and gaps == sorted(gaps, reverse=True)
    # The sum becomes the integral of n x^(n-1) log(n x^(n-1)) from 0 to 1.
    size = 100_000
    edges = np.linspace(0, 1, size + 1) ** n
    chosen = np.diff(edges)
    chosen = chosen[chosen > 0]
    assert kl_upper_bound(n) == pytest.approx(
        float(np.sum(chosen * np.log(chosen * size))), abs=1e-3
    )
    assert kl_upper_bound(n) == math.log(n) - (n - 1) / n


def test_n_is_the_number_of_answers_unless_told_otherwise_and_never_one():
    assert EvaluationConfig(num_samples=4).num_candidates == 4
    assert EvaluationConfig(num_samples=1).num_candidates == 2
    assert EvaluationConfig(num_samples=1, best_of_n=16).num_candidates == 16
    with pytest.raises(ValueError, match="best_of_n=1 must be at least 2, or None"):
        EvaluationConfig(best_of_n=1)
