"""Between rollout and update: scores become rewards, rewards become advantages, by the config."""

import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.ppo.advantages import moments, no_moments
from huatuo_jax.ppo.targets import Experience, compile_targets, rollout_fields
from huatuo_jax.training.scoring import Normalization
from tests.ppo.tiny import END, config

LENGTHS = (3, 2, 4, 1)
WIDTH, START = 6, 1  # One prompt token before each answer.
KL_COEF = 0.2
NORMALIZATION = Normalization(mean=0.5, standard_deviation=2.0, num_answers=3, answers="three")


def _experience():
    """Four answers; the second and the last end, the others are cut off."""
    draw = np.random.default_rng(4)
    mask_NT = np.zeros((4, WIDTH), bool)
    ids_NT = np.full((4, WIDTH), 2)
    for row, length in enumerate(LENGTHS):
        mask_NT[row, START : START + length] = True
    ids_NT[1, START + 1] = ids_NT[3, START] = END
    ids_NT[0, START + 3] = END  # Behind the answer: nobody's end.

    def numbers():
        return np.where(mask_NT, draw.normal(size=mask_NT.shape), 0).astype(np.float32)

    return Experience(
        token_ids_NT=ids_NT,
        mask_NT=mask_NT,
        old_log_probs_NT=numbers(),
        reference_log_probs_NT=numbers(),
        sampler_log_probs_NT=numbers(),
        raw_scores_N=draw.normal(size=4).astype(np.float32),
        values_NT=numbers(),
        values_after_NT=numbers(),
    )


def _targets(experience, *, running=None, normalization=None, **changed):
    if changed.get("estimator", "gae") == "gae":
        changed = {"gae_lambda": 1.0, "whiten_advantages": False} | changed
    cfg = config(**changed)
    make = compile_targets(cfg, stop_token_ids=(END,), normalization=normalization)
    return make(experience, jnp.float32(KL_COEF), running or no_moments())


def _plain_returns(experience, scores_N, after_N=(0, 0, 0, 0), *, kl_coef=KL_COEF):
    """What is still to come at each token, in a loop one can check by eye."""
    returns_NT = np.zeros((4, WIDTH))
    for row, length in enumerate(LENGTHS):
        ahead = scores_N[row] + after_N[row]
        for place in reversed(range(START, START + length)):
            old, reference = (
                array[row, place]
                for array in (experience.old_log_probs_NT, experience.reference_log_probs_NT)
            )
            ahead -= kl_coef * (old - reference)
            returns_NT[row, place] = ahead
    return returns_NT


def _assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_returns_are_the_score_less_the_kl_that_is_still_to_come():
    experience = _experience()
    found = _targets(experience)
    expected = _plain_returns(experience, experience.raw_scores_N)
    _assert_close(found.returns_NT, expected)
    _assert_close(
        found.advantages_NT, np.where(experience.mask_NT, expected - experience.values_NT, 0)
    )


def test_a_penalty_in_the_loss_is_not_in_the_rewards():
    experience = _experience()
    found = _targets(experience, kl_in="sequence_square")
    _assert_close(
        found.returns_NT, _plain_returns(experience, experience.raw_scores_N, kl_coef=0.0)
    )


def test_scores_are_normalised_clipped_and_then_penalised():
    experience = _experience()
    rules = {"scale": "stored", "clip": 0.3, "on_truncation": "subtract", "penalty": 0.7}
    found = _targets(experience, normalization=NORMALIZATION, score=rules)
    expected = np.clip((experience.raw_scores_N - 0.5) / 2.0, -0.3, 0.3)
    expected -= 0.7 * np.array([1, 0, 1, 0])
    _assert_close(found.scores_N, expected)
    _assert_close(found.returns_NT, _plain_returns(experience, expected))


def test_running_scores_are_those_of_all_rollouts_so_far():
    experience = _experience()
    before = np.array([1.0, 4.0, 7.0], np.float32)
    running = moments(jnp.asarray(before), jnp.ones(3, bool))
    found = _targets(experience, running=running, score={"scale": "running"})
    seen = np.concatenate([before, experience.raw_scores_N])
    _assert_close(found.scores_N, (experience.raw_scores_N - seen.mean()) / seen.std())
    assert float(found.running.count) == 7


def test_an_answer_that_was_cut_off_goes_on_with_the_value_where_it_was_cut():
    experience = _experience()
    found = _targets(experience, score={"on_truncation": "bootstrap"})
    scores_N = experience.raw_scores_N * [0, 1, 0, 1]
    after_N = [
        experience.values_after_NT[row, START + length - 1] * cut_off
        for row, (length, cut_off) in enumerate(zip(LENGTHS, (1, 0, 1, 0), strict=True))
    ]
    _assert_close(found.returns_NT, _plain_returns(experience, scores_N, after_N))


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_groups_are_compared_by_their_whole_rewards(estimator):
    experience = _experience()
    rollout = {"num_prompts": 2, "answers_per_prompt": 2}
    undivided = {"divide_by_deviation": False} if estimator == "grpo" else {}
    found = _targets(experience, estimator=estimator, rollout=rollout, **undivided)
    totals_N = _plain_returns(experience, experience.raw_scores_N)[:, START]
    baseline_N = totals_N.reshape(2, 2)[:, ::-1].reshape(-1)
    advantages_N = (totals_N - baseline_N) * (1.0 if estimator == "rloo" else 0.5)
    _assert_close(found.advantages_NT, np.where(experience.mask_NT, advantages_N[:, None], 0))


def test_whitened_advantages_have_mean_0_and_variance_1_and_returns_are_left_alone():
    experience = _experience()
    plain = _targets(experience)
    found = _targets(experience, whiten_advantages=True)
    of_tokens = np.asarray(found.advantages_NT)[experience.mask_NT]
    assert of_tokens.mean() == pytest.approx(0, abs=1e-6)
    assert of_tokens.var() == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(found.returns_NT, plain.returns_NT)


@pytest.mark.parametrize("score", [-1.0, 0.1, 3.3, -127.7])
@pytest.mark.parametrize(
    "changed",
    [
        {"estimator": "rloo"},
        {"estimator": "grpo"},
        {"estimator": "grpo", "divide_by_deviation": False},
        {"estimator": "grpo", "score": {"scale": "running"}},
        {"score": {"scale": "running"}, "whiten_advantages": True},
    ],
    ids=["rloo", "grpo", "undivided", "running", "whitened"],
)
def test_equal_scores_at_the_reference_move_nothing(changed, score):
    experience = _experience()
    experience = experience._replace(
        reference_log_probs_NT=experience.old_log_probs_NT,
        raw_scores_N=np.full(4, score, np.float32),
        values_NT=np.zeros_like(experience.values_NT),
    )
    changed = dict(changed)
    if "estimator" in changed:
        changed["rollout"] = {"num_prompts": 1, "answers_per_prompt": 4}
    running = moments(jnp.full(3, score, jnp.float32), jnp.ones(3, bool))
    found = _targets(experience, running=running, **changed)
    np.testing.assert_array_equal(found.advantages_NT, 0)


def test_equal_rewards_of_all_tokens_are_whitened_to_0():
    """One token an answer: each has the whole reward."""
    experience = _experience()
    mask_NT = np.zeros_like(experience.mask_NT)
    mask_NT[:, START] = True
    experience = experience._replace(
        mask_NT=mask_NT,
        reference_log_probs_NT=experience.old_log_probs_NT,
        raw_scores_N=np.full(4, -1.0, np.float32),
        values_NT=np.zeros_like(experience.values_NT),
    )
    found = _targets(experience, score={"whiten": True})
    np.testing.assert_array_equal(found.returns_NT, 0)


def test_the_coefficient_follows_the_kl_of_a_whole_answer():
    experience = _experience()
    kl_N = (experience.old_log_probs_NT - experience.reference_log_probs_NT).sum(axis=1)
    found = _targets(experience, target_kl_per_sequence=0.1)
    _assert_close(found.kl_N, kl_N)
    error = np.clip(kl_N.mean() / 0.1 - 1, -0.2, 0.2)
    assert float(found.kl_coef) == pytest.approx(KL_COEF * (1 + 0.1 * error))
    assert float(_targets(experience).kl_coef) == pytest.approx(KL_COEF)


def test_numbers_that_are_not_finite_do_not_outlive_their_iteration():
    experience = _experience()
    spoilt = experience._replace(
        raw_scores_N=np.where([1, 0, 0, 0], np.nan, experience.raw_scores_N),
        reference_log_probs_NT=np.where(experience.mask_NT, np.nan, 0),
    )
    found = _targets(spoilt, target_kl_per_sequence=0.1, score={"scale": "running"})
    assert float(found.kl_coef) == pytest.approx(KL_COEF)
    assert float(found.running.count) == 0
    assert np.isnan(found.advantages_NT).any()


def test_gauges_of_a_rollout_are_means_of_its_tokens_and_answers():
    experience = _experience()
    found = _targets(experience)
    fields = rollout_fields(
        {name: np.asarray(value) for name, value in found.sums.items()}, prefix="ppo"
    )
    assert fields["ppo/response_length"] == np.mean(LENGTHS)
    assert fields["ppo/eos_rate"] == 0.5
    assert fields["ppo/score"] == pytest.approx(experience.raw_scores_N.mean(), rel=1e-5)
    mask_NT = experience.mask_NT
    returns, values = np.asarray(found.returns_NT)[mask_NT], experience.values_NT[mask_NT]
    explained = 1 - (returns - values).var() / returns.var()
    assert fields["ppo/explained_variance"] == pytest.approx(explained, rel=1e-4)
    rewards = _plain_returns(experience, experience.raw_scores_N)[:, START]
    assert fields["ppo/reward"] == pytest.approx(rewards.mean(), rel=1e-5)
