"""The share of points and its interval, against what can be counted and a closed form."""

import math

import pytest

from huatuo_jax.core.statistics import interval_of, mean_over_prompts
from huatuo_jax.judge.judgements import Judgement
from huatuo_jax.judge.questions import Verdict, points_of, verdicts_of, win_rates


def judgement(name, first, second, p_first):
    error = {} if p_first is not None else {"error": "no verdict", "failure": "unreadable"}
    return Judgement(
        id=name,
        key=f"{name} {first} {second}",
        protocol="pairwise",
        first=first,
        second=second,
        p_first=p_first,
        judge="test",
        template="",
        prompt_sha256="",
        answer_sha256=("", ""),
        **error,
    )


def test_a_verdict_needs_both_orders_and_counts_the_later_model():
    """Of answers 0 and 1 the points of 1."""
    found = verdicts_of(
        [
            judgement("won", 0, 1, 0.2),
            judgement("won", 1, 0, 0.9),
            judgement("lost", 0, 1, 1.0),
            judgement("lost", 1, 0, 0.0),
            judgement("contradicts itself", 0, 1, 0.8),
            judgement("contradicts itself", 1, 0, 0.7),
            judgement("tie once", 0, 1, 0.5),
            judgement("tie once", 1, 0, 0.7),
            judgement("failed in one order", 0, 1, None),
            judgement("failed in one order", 1, 0, 1.0),
            judgement("asked in one order", 1, 0, 1.0),
        ],
        one=1,
        other=0,
    )
    assert {name: verdict.points for name, verdict in found.items()} == {
        "won": 1.0,
        "lost": 0.0,
        "contradicts itself": 0.5,
        "tie once": 1.0,
    }
    rates = win_rates({name: [verdict] for name, verdict in found.items()}, seed=0)
    assert rates["share"]["value"] == (1 + 0 + 0.5 + 1) / 4
    assert (rates["wins"], rates["ties"], rates["losses"]) == (2, 1, 1)


@pytest.mark.parametrize(("p_first", "points"), [(0.5, 0.5), (0.51, 1.0), (0.49, 0.0)])
def test_a_probability_is_a_vote(p_first, points):
    assert points_of(p_first) == points


def quantile(count, chance, level):
    """Of a binomial distribution, by its definition."""
    below = 0.0
    for number in range(count + 1):
        below += math.comb(count, number) * chance**number * (1 - chance) ** (count - number)
        if below >= level:
            return number
    return count


@pytest.mark.parametrize(("wins", "count"), [(20, 40), (30, 40), (150, 200)])
def test_the_interval_over_prompts_is_that_of_a_binomial_distribution(wins, count):
    """Drawing prompts with replacement, each of 0 or 1 point, draws from a binomial."""
    verdicts = {f"p{n}": [Verdict(float(n < wins), float(n < wins))] for n in range(count)}
    share = win_rates(verdicts, seed=0)["share"]
    assert share["value"] == wins / count and share["num_prompts"] == count
    for level, bound in ((0.025, share["low"]), (0.975, share["high"])):
        # Of 2,000 resamples: one count more or less where two are nearly as probable.
        assert abs(bound * count - quantile(count, wins / count, level)) <= 1


def test_answers_to_one_prompt_are_one_observation():
    many = mean_over_prompts({"a": [1.0] * 50, "b": [0.0]})
    assert many.value == 0.5 and many.num_prompts == 2 and (many.low, many.high) == (0.0, 1.0)
    assert interval_of([], seed=0) is None
