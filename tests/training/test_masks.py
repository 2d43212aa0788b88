"""Masks from lengths, and sums under them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.training import losses
from tests.ppo.ragged import make_rollout


def test_masks_come_from_lengths_alone():
    expected = [[1, 1, 0], [0, 0, 0], [1, 1, 1], [1, 0, 0]]
    found = losses.answer_mask(jnp.array([2, 0, 3, 1]), 3)
    np.testing.assert_array_equal(found, np.array(expected, bool))


def test_last_tokens_are_the_last_of_their_runs_wherever_those_start():
    rollout = make_rollout(starts=(2, 5, 0, 0, 1, 4))
    expected = np.zeros_like(rollout.mask_BT)
    for row, slots in rollout.places():
        if slots:
            expected[row, slots[-1]] = True
    np.testing.assert_array_equal(losses.last_tokens(jnp.asarray(rollout.mask_BT)), expected)
    np.testing.assert_array_equal(
        losses.has_tokens(jnp.asarray(rollout.mask_BT)), rollout.lengths_B > 0
    )


def test_sums_of_answers_and_numbers_laid_on_tokens_equal_a_loop():
    rollout = make_rollout().with_junk(np.nan)
    with jax.enable_x64(True):
        sums_B = np.asarray(losses.sum_by_answer(rollout.rewards_BT, rollout.mask_BT))
        laid_BT = np.asarray(losses.over_tokens(rollout.scores_B, rollout.mask_BT))
    for row, slots in rollout.places():
        assert sums_B[row] == pytest.approx(sum(rollout.rewards_BT[row, t] for t in slots))
        for t in range(rollout.mask_BT.shape[1]):
            assert laid_BT[row, t] == (rollout.scores_B[row] if t in slots else 0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64),
        (jnp.int32, jnp.float32),
    ],
)
def test_nothing_is_held_in_less_than_float32_and_float64_stays(given, expected):
    with jax.enable_x64(True):
        values_BT = jnp.ones((2, 3), given)
        assert losses.masked(values_BT, jnp.ones((2, 3), bool)).dtype == expected
        assert losses.wide(values_BT).dtype == expected


def test_terms_are_tokens_or_a_fixed_number_for_each_answer():
    mask_BT = jnp.asarray(make_rollout().mask_BT)
    assert losses.count_terms(mask_BT) == 16
    assert losses.count_terms(mask_BT, tokens_allowed=10) == 50  # The empty row is no answer.
    assert losses.count_terms(mask_BT, mean_per_answer=True) == 5
    with pytest.raises(ValueError, match="tokens_allowed=0 must be at least 1"):
        losses.count_terms(mask_BT, tokens_allowed=0)
    with pytest.raises(ValueError, match="tokens_allowed=9 must be None for mean_per_answer=True"):
        losses.count_terms(mask_BT, tokens_allowed=9, mean_per_answer=True)


def test_each_token_knows_the_length_of_its_answer_where_a_row_holds_several():
    mask_BT = jnp.array(
        [
            [False, True, True, False, True, False, False, True],
            [True, True, True, True, True, True, True, True],
            [False] * 8,
            [True, False, False, True, True, True, False, False],
        ]
    )
    np.testing.assert_array_equal(
        jax.jit(losses.answer_lengths)(mask_BT),
        [[0, 2, 2, 0, 1, 0, 0, 1], [8] * 8, [0] * 8, [1, 0, 0, 3, 3, 3, 0, 0]],
    )
    values_BT = jnp.where(mask_BT, 6.0, jnp.nan)
    np.testing.assert_array_equal(
        losses.per_token(values_BT, mask_BT, mean_per_answer=True)[3], [6, 0, 0, 2, 2, 2, 0, 0]
    )
