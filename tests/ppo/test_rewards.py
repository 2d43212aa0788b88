"""Scores, answers without an end, and rewards of tokens, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.ppo import rewards
from tests.ppo.ragged import STOP_TOKENS, make_rollout


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


def test_an_answer_has_ended_if_its_last_token_is_a_configured_stop_token():
    rollout = make_rollout(starts=(2, 5, 0, 0, 1, 4))
    rollout.tokens_BT[0, 4] = 7  # Its last token.
    rollout.tokens_BT[1, 5] = 0
    rollout.tokens_BT[3] = [0, 7, 0, 7, 0, 3]  # Stop tokens, but not at the end.
    rollout.tokens_BT[4] = [7, 1, 1, 1, 1, 7]  # Before and after the answer.
    rollout.tokens_BT[5, 5] = 4
    ended_B = rewards.have_ended(
        jnp.asarray(rollout.tokens_BT), jnp.asarray(rollout.mask_BT), stop_token_ids=STOP_TOKENS
    )
    np.testing.assert_array_equal(ended_B, [True, True, False, False, False, False])
    with pytest.raises(ValueError, match="stop_token_ids"):
        rewards.have_ended(
            jnp.asarray(rollout.tokens_BT), jnp.asarray(rollout.mask_BT), stop_token_ids=()
        )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"on_truncation": "keep"}, [3.0, -4.0, 0.5, 3.0]),
        ({"on_truncation": "keep", "clip": 2.0}, [2.0, -2.0, 0.5, 2.0]),
        ({"on_truncation": "replace", "penalty": 1.0}, [3.0, -4.0, -1.0, -1.0]),
        ({"on_truncation": "subtract", "penalty": 1.0}, [3.0, -4.0, -0.5, 2.0]),
        # The clip comes first: the penalty is worth the same at every score.
        ({"on_truncation": "subtract", "penalty": 1.0, "clip": 2.0}, [2.0, -2.0, -0.5, 1.0]),
        ({"on_truncation": "bootstrap"}, [3.0, -4.0, 0.0, 0.0]),
    ],
)
def test_scores_follow_the_policy_for_answers_that_were_cut_off(settings, expected):
    scores_B = jnp.array([3.0, -4.0, 0.5, 3.0])
    ended_B = jnp.array([True, True, False, False])
    np.testing.assert_array_equal(rewards.answer_scores(scores_B, ended_B, **settings), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_truncation": "ignore"}, "on_truncation='ignore' must be one of"),
        ({"on_truncation": "replace"}, "penalty=None must be 0 or more"),
        ({"on_truncation": "subtract", "penalty": -1.0}, "penalty=-1.0 must be 0 or more"),
        ({"on_truncation": "keep", "penalty": 1.0}, "penalty=1.0 must be None"),
        ({"on_truncation": "keep", "clip": 0.0}, "clip=0.0 must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        rewards.answer_scores(jnp.zeros(1), jnp.zeros(1, bool), **settings)


def test_normalised_scores_are_deviations_from_the_mean():
    found = rewards.normalised_scores(jnp.array([1.0, 5.0]), mean=3.0, standard_deviation=4.0)
    np.testing.assert_array_equal(found, [-0.5, 0.5])


@pytest.mark.parametrize("starts", [None, (2, 5, 0, 0, 1, 4)])
def test_rewards_of_tokens_equal_a_loop(starts):
    rollout = make_rollout(starts=starts).with_junk(np.nan)
    found_BT = rewards.token_rewards(
        rollout.scores_B, rollout.old_BT, rollout.reference_BT, rollout.mask_BT, kl_coef=0.07
    )
    expected_BT = np.zeros_like(found_BT)
    for row, slots in rollout.places():
        for t in slots:
            log_ratio = rollout.old_BT[row, t] - rollout.reference_BT[row, t]
            expected_BT[row, t] = -0.07 * log_ratio
            if t == slots[-1]:
                expected_BT[row, t] += rollout.scores_B[row]
    np.testing.assert_allclose(found_BT, expected_BT, rtol=1e-12)
    assert found_BT.dtype == jnp.float64


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_other_estimators_in_the_reward_are_refused_with_the_reason(estimator):
    rollout = make_rollout()
    arrays = (rollout.scores_B, rollout.old_BT, rollout.reference_BT, rollout.mask_BT)
    with pytest.raises(ValueError, match="gradient vanishes to leading order.*pushes it further"):
        rewards.token_rewards(*arrays, kl_coef=0.1, estimator=estimator)
    with pytest.raises(ValueError, match="estimator='kl' must be 'k1'"):
        rewards.token_rewards(*arrays, kl_coef=0.1, estimator="kl")
