"""Engine and ranking together: the best of n rewards follows P(best <= r) = F(r)^n."""

import itertools

import numpy as np
import pytest

from huatuo_jax.generation.requests import Request, SamplingConfig
from tests.generation import tiny

VOCAB = tiny.CFG.vocab_size
PROMPT = (7, 3, 44)
TEMPERATURE = 0.9


def enumerated_rewards():
    """Every answer of two tokens: its probability, and a reward drawn for it."""
    sequences = [[*PROMPT, first] for first in range(VOCAB)]
    logits = tiny.full_logits(sequences)
    first_V = np.exp(tiny.log_softmax(logits[0][2, :VOCAB] / TEMPERATURE))
    second_VV = np.exp([tiny.log_softmax(rows[3, :VOCAB] / TEMPERATURE) for rows in logits])
    probabilities = first_V[:, None] * second_VV
    return probabilities, np.random.default_rng(6).normal(size=(VOCAB, VOCAB))


@pytest.mark.parametrize("n", [2, 4, 16])
def test_the_best_of_n_follows_its_law(n):
    probabilities, rewards = enumerated_rewards()
    num_requests = 400
    engine = tiny.engine(slots=256, max_length=16, steps_per_round=2)
    sampling = SamplingConfig(max_new_tokens=2, temperature=TEMPERATURE)
    groups = engine.generate_in_order(
        Request(prompt_token_ids=PROMPT, sampling=sampling, seed=seed, num_answers=n)
        for seed in range(num_requests)
    )
    best = np.array([max(rewards[tuple(answer.token_ids)] for answer in group) for group in groups])
    thresholds = np.quantile(best, [0.05, 0.2, 0.4, 0.5, 0.6, 0.8, 0.95])
    for threshold in thresholds:
        law = probabilities[rewards <= threshold].sum() ** n
        deviation = np.sqrt(law * (1 - law) / num_requests)
        share = (best <= threshold).mean()
        assert abs(share - law) <= 3.9 * deviation, f"at {threshold}: {share} against {law}"


def test_the_law_of_another_n_would_be_noticed():
    probabilities, rewards = enumerated_rewards()
    table = sorted(itertools.product(range(VOCAB), repeat=2), key=lambda pair: rewards[pair])
    cumulative = np.cumsum([probabilities[pair] for pair in table])
    assert cumulative[-1] == pytest.approx(1)
    law_2, law_4 = cumulative**2, cumulative**4
    gap = np.abs(law_2 - law_4) / np.sqrt(law_2 * (1 - law_2).clip(1e-9) / 400)
    assert gap.max() > 2 * 3.9
