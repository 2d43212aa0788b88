"""A judge with known utilities and a known position bias, asked over the wire and reported on.

The items are the answers to one prompt; every two are shown in both orders. The server's log-odds
for the answer shown first are the difference of utilities, plus the bias, plus Gaussian noise that
is drawn anew for each two answers in each order. The one fixed order shows of every two answers the
one first that stands first in the file.
"""

import itertools
import math
import random

import numpy as np
import pytest

from huatuo_jax.judge.labelling import LabelConfig, label, questions_of
from huatuo_jax.judge.openai import OpenAIJudge, OpenAIJudgeConfig
from huatuo_jax.judge.questions import read_answered
from huatuo_jax.judge.report import label_report
from huatuo_jax.judge.server import ServerConfig
from tests.judge import planted_server as planted
from tests.judge.planted_answers import make_answers
from tests.judge.planted_server import KEY, MODEL, Planted, PlantedServer


def asked(tmp_path, *, num_items, log_probs, **fields):
    """The server, the items' texts, the judgements, and what the report says of positions."""
    lot = random.Random(7)
    path = tmp_path / "answers.jsonl"
    utilities = make_answers(
        path, num_prompts=1, num_answers=num_items, utility=lambda p, a: lot.gauss(0.0, 1.0)
    )
    # With log-probabilities the likeliest verdict is said, as at temperature 0.
    what = Planted(utilities=utilities, noise=not log_probs, **fields)
    answered = read_answered(path)
    with PlantedServer(what) as server:
        cfg = OpenAIJudgeConfig(
            model=MODEL, log_probs=log_probs, server=ServerConfig(base_url=server.url)
        )
        judge = OpenAIJudge(cfg, key=KEY, spending=None)
        questions = questions_of(LabelConfig(protocol="pairwise"), answered, judge)
        labels = label(questions, judge, tmp_path / "labels.jsonl", concurrency=4)
    assert labels.error is None and labels.failed == 0
    (part,) = label_report(labels.judgements, answered).parts
    return what, answered[0].answers, labels.judgements, part.position


def item_means(judgements, num_items, *, both_orders):
    """Each item's mean log-odds against all others; utilities up to a constant."""
    total = np.zeros(num_items)
    for judgement in judgements:
        if both_orders or judgement.first < judgement.second:
            log_odds = math.log(judgement.p_first / (1 - judgement.p_first))
            total[judgement.first] += log_odds
            total[judgement.second] -= log_odds
    return total


def correlation_with_utilities(what, texts, judgements, *, both_orders):
    utilities = [what.utilities[text] for text in texts]
    means = item_means(judgements, len(texts), both_orders=both_orders)
    return np.corrcoef(utilities, means)[0, 1]


def test_what_is_reported_is_what_the_server_did(tmp_path):
    what, texts, judgements, position = asked(
        tmp_path, num_items=8, log_probs=True, position_bias=0.6, logit_noise=0.5
    )
    biases, flips = [], []
    for one, other in itertools.combinations(texts, 2):
        forth = planted.log_odds_first(what, one, other)
        back = planted.log_odds_first(what, other, one)
        biases.append((forth + back) / 2)
        flips.append((forth > 0) == (back > 0))
    assert position.log_odds.value == pytest.approx(np.mean(biases), abs=1e-9)
    assert position.flip_rate.value == pytest.approx(np.mean(flips), abs=1e-12)
    for judgement in judgements:
        shown = [texts[index] for index in judgement.answers]
        assert judgement.p_first == pytest.approx(planted.p_first(what, *shown), abs=1e-9)


@pytest.mark.slow
def test_both_orders_recover_the_utilities_of_fifty_items_and_one_order_does_not(tmp_path):
    num_items, bias, noise = 50, 2.0, 0.5
    what, texts, judgements, position = asked(
        tmp_path, num_items=num_items, log_probs=True, position_bias=bias, logit_noise=noise
    )
    num_pairs = math.comb(num_items, 2)
    assert position.log_odds.num_items == num_pairs and len(judgements) == 2 * num_pairs
    error = noise / math.sqrt(2 * num_pairs)
    assert abs(position.log_odds.value - bias) < 4 * error
    # First wins in both orders, or second does: the noises of the two orders are independent.
    p_flips = []
    for one, other in itertools.combinations(texts, 2):
        gap = what.utilities[one] - what.utilities[other]
        forth, back = (normal_cdf((bias + way * gap) / noise) for way in (1, -1))
        p_flips.append(forth * back + (1 - forth) * (1 - back))
    error = math.sqrt(sum(p * (1 - p) for p in p_flips)) / num_pairs
    assert abs(position.flip_rate.value - np.mean(p_flips)) < 4 * error
    # Both orders: noise of 0.5 / sqrt(98) on utilities of spread 1. One order: an item gains the
    # bias from every item behind it and loses it to every item before it, which is a spread of
    # 2 / sqrt(3) that has nothing to do with its utility.
    both = correlation_with_utilities(what, texts, judgements, both_orders=True)
    fixed = correlation_with_utilities(what, texts, judgements, both_orders=False)
    assert both > 0.99 and fixed < 0.9, (both, fixed)


@pytest.mark.slow
def test_votes_show_the_bias_and_the_flips_of_their_closed_form(tmp_path):
    num_items, bias = 30, 0.8
    what, texts, _, position = asked(
        tmp_path, num_items=num_items, log_probs=False, position_bias=bias
    )
    num_pairs = math.comb(num_items, 2)
    excess, p_flips = [], []
    for one, other in itertools.combinations(texts, 2):
        forth, back = planted.p_first(what, one, other), planted.p_first(what, other, one)
        excess.append((forth + back) / 2 - 0.5)
        p_flips.append(forth * back + (1 - forth) * (1 - back))
    flip_error = math.sqrt(sum(p * (1 - p) for p in p_flips)) / num_pairs
    assert abs(position.flip_rate.value - np.mean(p_flips)) < 4 * flip_error
    assert abs(position.first_excess.value - np.mean(excess)) < 4 * 0.5 / math.sqrt(2 * num_pairs)
    assert abs(position.log_odds.value - bias) < 4 * position.log_odds.standard_error


def normal_cdf(x):
    return 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))
