import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from huatuo_jax.generation import sampling as functions
from huatuo_jax.generation.sampling import Settings
from tests.generation.tiny import log_softmax

# As the engine runs them: no setting causes a recompilation.
choose = jax.jit(functions.choose)
filter_scores = jax.jit(functions.filter_scores)
penalise_repetition = jax.jit(functions.penalise_repetition)

DRAWS = 50_000
VOCAB = 12


def settings_of(rows, **changed):
    fields = {
        "temperature_B": np.float32(1.0),
        "top_k_B": np.int32(0),
        "top_p_B": np.float32(1.0),
        "min_p_B": np.float32(0.0),
        "repetition_penalty_B": np.float32(1.0),
        "min_new_tokens_B": np.int32(0),
        "max_new_tokens_B": np.int32(9),
        "seed_B": np.uint32(5),
        "answer_B": np.int32(0),
        "num_top_log_probs_B": np.int32(0),
    }
    for name, value in changed.items():
        fields[name + "_B"] = np.asarray(value, dtype=fields[name + "_B"].dtype)
    arrays = {name: jnp.broadcast_to(value, (rows,)) for name, value in fields.items()}
    return Settings(stop_token_ids_BE=jnp.full((rows, 2), -1, jnp.int32), **arrays)


def small_logits():
    return np.random.default_rng(4).normal(size=VOCAB).astype(np.float32) * 1.5


def exact_distribution(logits_V, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The filters one after another, over a sorted list."""
    weights = {token: float(np.exp(x / temperature)) for token, x in enumerate(logits_V)}
    kept = sorted(weights, key=lambda token: -weights[token])
    if top_k:
        kept = kept[:top_k]
    total, nucleus, mass = sum(weights[token] for token in kept), [], 0.0
    for token in kept:
        if nucleus and mass >= top_p:
            break
        nucleus.append(token)
        mass += weights[token] / total
    kept = [token for token in nucleus if weights[token] >= min_p * weights[nucleus[0]]]
    total = sum(weights[token] for token in kept)
    return np.array([weights[t] / total if t in kept else 0.0 for t in range(len(logits_V))])


def draw(logits_V, **sampling):
    logits_BV = jnp.broadcast_to(jnp.asarray(logits_V)[None, :], (DRAWS, len(logits_V)))
    chosen = choose(
        logits_BV,
        jnp.zeros(logits_BV.shape, dtype=bool),
        settings_of(DRAWS, **sampling),
        generated_B=jnp.arange(DRAWS),
        active_B=jnp.ones(DRAWS, dtype=bool),
    )
    return tuple(np.asarray(array) for array in chosen[:3])


def chi_square_probability(counts, probabilities):
    """Of a statistic at least this large, by Wilson and Hilferty's normal approximation."""
    kept = probabilities > 0
    assert counts[~kept].sum() == 0, "a token was drawn that the filters leave out"
    freedom = kept.sum() - 1
    if freedom == 0:
        return 1.0
    expected = probabilities[kept] * counts.sum()
    statistic = ((counts[kept] - expected) ** 2 / expected).sum()
    variance = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - (1 - variance)) / variance**0.5
    return float(0.5 * torch.erfc(torch.tensor(z / 2**0.5)))


SAMPLINGS = [
    {},
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"top_k": 3},
    {"top_k": 1},
    {"top_p": 0.7},
    {"top_p": 0.05},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 6, "top_p": 0.8},
    {"temperature": 1.7, "top_k": 9, "top_p": 0.9, "min_p": 0.15},
    {"temperature": 0.5, "top_p": 0.95, "min_p": 0.05},
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_draws_follow_the_exact_distribution(sampling):
    logits_V = small_logits()
    probabilities = exact_distribution(logits_V, **sampling)
    tokens_B, log_probs_B, sampling_log_probs_B = draw(logits_V, **sampling)
    counts = np.bincount(tokens_B, minlength=VOCAB)
    assert chi_square_probability(counts, probabilities) > 1e-4
    plain = log_softmax(logits_V / sampling.get("temperature", 1.0))
    np.testing.assert_allclose(log_probs_B, plain[tokens_B], atol=1e-5)
    np.testing.assert_allclose(sampling_log_probs_B, np.log(probabilities[tokens_B]), atol=1e-5)


def test_a_slightly_wrong_temperature_would_be_noticed():
    logits_V = small_logits()
    tokens_B, _, _ = draw(logits_V, temperature=1.05)
    counts = np.bincount(tokens_B, minlength=VOCAB)
    assert chi_square_probability(counts, exact_distribution(logits_V)) < 1e-6


@pytest.mark.parametrize("sampling", SAMPLINGS[1:], ids=str)
def test_filters_keep_what_those_of_transformers_keep(sampling):
    generator = np.random.default_rng(8)
    logits_BV = generator.normal(size=(20, 300)).astype(np.float32) * 3
    theirs = torch.tensor(logits_BV)
    if "temperature" in sampling:
        theirs = transformers.TemperatureLogitsWarper(sampling["temperature"])(None, theirs)
    if "top_k" in sampling:
        theirs = transformers.TopKLogitsWarper(sampling["top_k"])(None, theirs)
    if "top_p" in sampling:
        theirs = transformers.TopPLogitsWarper(sampling["top_p"])(None, theirs)
    if "min_p" in sampling:
        theirs = transformers.MinPLogitsWarper(sampling["min_p"])(None, theirs)
    temperature = np.float32(sampling.get("temperature", 1.0))
    drawn_B = jnp.ones(20, dtype=bool)
    ours = filter_scores(jnp.asarray(logits_BV / temperature), settings_of(20, **sampling), drawn_B)
    np.testing.assert_allclose(np.asarray(ours), theirs.numpy(), rtol=1e-6)


def test_rows_keep_their_own_settings():
    logits_V = small_logits()
    logits_BV = jnp.broadcast_to(jnp.asarray(logits_V)[None, :], (4, VOCAB))
    settings = settings_of(4, top_k=[0, 2, 0, 0], top_p=[1, 1, 0.3, 1], min_p=[0, 0, 0, 0.5])
    kept_BV = np.isfinite(filter_scores(logits_BV, settings, jnp.ones(4, dtype=bool)))
    rows = [{}, {"top_k": 2}, {"top_p": 0.3}, {"min_p": 0.5}]
    expected_BV = [exact_distribution(logits_V, **row) > 0 for row in rows]
    np.testing.assert_array_equal(kept_BV, expected_BV)
    unfiltered_BV = filter_scores(logits_BV, settings, jnp.zeros(4, dtype=bool))
    np.testing.assert_array_equal(unfiltered_BV, logits_BV)


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
def test_repetition_penalty_is_that_of_transformers(penalty):
    generator = np.random.default_rng(2)
    logits_BV = generator.normal(size=(5, 40)).astype(np.float32) * 4
    tokens_BT = generator.integers(0, 40, (5, 17))
    seen_BV = np.zeros((5, 40), dtype=bool)
    np.put_along_axis(seen_BV, tokens_BT, True, axis=1)
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    theirs = processor(torch.tensor(tokens_BT), torch.tensor(logits_BV))
    ours = penalise_repetition(logits_BV, jnp.asarray(seen_BV), jnp.full(5, penalty))
    np.testing.assert_allclose(np.asarray(ours), theirs.numpy(), rtol=1e-6)


def test_temperature_zero_takes_the_best_token_for_certain():
    tokens_B, _, sampling_log_probs_B = draw(small_logits(), temperature=0.0)
    assert (tokens_B == small_logits().argmax()).all()
    assert (sampling_log_probs_B == 0).all()


def test_noise_depends_on_seed_answer_and_token_alone():
    logits_BV = jnp.zeros((6, 1000))
    settings = settings_of(6, seed=[1, 1, 1, 2, 1, 1], answer=[0, 0, 1, 0, 0, 0])
    chosen = choose(
        logits_BV,
        jnp.zeros(logits_BV.shape, dtype=bool),
        settings,
        generated_B=jnp.array([3, 3, 3, 3, 4, 3]),
        active_B=jnp.ones(6, dtype=bool),
    )
    first, same, *others, last = np.asarray(chosen.tokens_B).tolist()
    assert first == same == last
    assert len({first, *others}) == 4
