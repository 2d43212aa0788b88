"""Held-out prompts are rewarded every few iterations and the best policy kept; a KL budget ends."""

import types

import jax
import numpy as np
import pytest

from huatuo_jax.ppo.held_out_config import HeldOutRewardsConfig
from huatuo_jax.ppo.held_out_rewards import HeldOutRewarding, HeldOutRewards
from huatuo_jax.ppo.loop import TOTAL_KL
from huatuo_jax.ppo.reward_mix import MixedRewards
from huatuo_jax.ppo.reward_terms import RewardMixConfig, RewardTerm
from huatuo_jax.ppo.stage import PpoStage
from huatuo_jax.training.metrics import read_rows
from tests.ppo import tiny
from tests.ppo.tiny import config, run_tiny, table, token_text

HELD_OUT = HeldOutRewardsConfig(prompts="none", every=2)
MEASURES = "eval/measure"


def rows_of(workdir):
    return list(read_rows(workdir / "ppo" / "metrics.jsonl"))


def test_the_policy_of_the_highest_measure_is_kept(tmp_path):
    tiny.kept.clear()
    cfg = config(num_iterations=5, held_out_rewards=HELD_OUT)
    run_tiny(cfg, tmp_path, scorer=table(longest=3))
    measured = {row["step"]: row for row in rows_of(tmp_path) if MEASURES in row}
    assert sorted(measured) == [0, 2, 4, 5]
    trained = [measured[step][MEASURES] for step in (2, 4, 5)]
    records = sum(value > max(trained[:n], default=-np.inf) for n, value in enumerate(trained))
    assert len(tiny.kept) == records
    for name in ("reward", "length", "ended", "without_reward"):
        assert all(f"eval/{name}" in row for row in measured.values())
    assert measured[0]["eval/without_reward"] == 0


def test_a_run_that_is_made_again_measures_nothing_anew(tmp_path):
    cfg = config(num_iterations=2, held_out_rewards=HELD_OUT)
    first, _ = run_tiny(cfg, tmp_path, scorer=table(longest=3))
    rows = rows_of(tmp_path)
    again, _ = run_tiny(cfg, tmp_path, scorer=table(longest=3))
    # The last measure came after the last checkpoint: it is taken once more, and is the same.
    assert [row.get(MEASURES) for row in rows_of(tmp_path)] == [row.get(MEASURES) for row in rows]
    for one, other in zip(
        jax.tree.leaves(first.policy), jax.tree.leaves(again.policy), strict=True
    ):
        if not jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(one, other)


def brevity(prompts, responses, *, num_tokens, **columns):
    return [-float(number) for number in num_tokens]


def test_the_measure_may_be_a_term_of_the_reward(tmp_path):
    mix = RewardMixConfig(
        terms=(
            RewardTerm(of="length", weight=2.0),
            RewardTerm(of="tests.ppo.test_held_out_rewards:brevity"),
        )
    )
    held_out = HeldOutRewardsConfig(prompts="none", every=2, measure="brevity")
    cfg = config(num_iterations=2, reward=mix, held_out_rewards=held_out)
    source = MixedRewards(mix, scorer=None, normalization=None, decode=token_text, count_tokens=len)
    run_tiny(cfg, tmp_path, rewards=source)
    for row in rows_of(tmp_path):
        if MEASURES in row:
            assert row[MEASURES] == row["eval/reward/brevity"] == -row["eval/length"]
            assert row["eval/reward"] == pytest.approx(row["eval/length"], rel=1e-6)


def measure(iteration, value):
    return HeldOutRewards(
        iteration=iteration,
        measure=value,
        reward=value,
        length=1.0,
        ended=1.0,
        without_reward=0.0,
        terms={},
    )


@pytest.mark.parametrize(
    ("values", "kept", "best_is_initial"),
    [([0, 1, 3, 2], 4, False), ([0, 3, 3, 2], 2, False), ([5, 1, 3, 2], 4, True)],
)
def test_the_result_names_the_best_trained_policy_and_the_earlier_of_equal_ones(
    values, kept, best_is_initial
):
    found = HeldOutRewarding(
        cfg=config(held_out_rewards=HELD_OUT), prompts=(), normalization=None, keep=lambda _: None
    )
    found.open([{**vars(measure(2 * n, v))} for n, v in enumerate(values)], restored=6)
    assert found.result() == {
        "kept_iteration": kept,
        "kept_measure": max(values[1:]),
        "best_is_initial": best_is_initial,
    }
    assert not found.is_due(6, is_last=True)
    assert found.is_due(7, is_last=True) and not found.is_due(7, is_last=False)
    assert found.is_due(8, is_last=False)


def test_a_budget_of_kl_ends_the_run_and_keeps_its_last_checkpoint(tmp_path):
    tiny.kept.clear()
    cfg = config(
        num_iterations=30,
        optimizer={"learning_rate": 3e-2},
        kl_coef=0.0,
        loop={"checkpoint_every": 30},
        held_out_rewards=HeldOutRewardsConfig(prompts="none", every=30),
        stop_at_total_kl=0.2,
    )
    state, numbers = run_tiny(cfg, tmp_path, scorer=table(longest=3))
    assert int(state.iteration) < 30
    kls = [row["ppo/kl_per_sequence"] for row in rows_of(tmp_path) if "ppo/score" in row]
    assert kls[-1] >= 0.2 > max(kls[:-1])
    assert numbers["ppo/kl_per_sequence"] == kls[-1]
    # The policy that the run ends with is measured, and there is one to keep.
    assert len(tiny.kept) == 1
    again, _ = run_tiny(cfg, tmp_path, scorer=table(longest=3))
    assert int(again.iteration) == int(state.iteration)


@pytest.mark.parametrize(("num_iterations", "early"), [(8, True), (6, False)])
def test_a_budget_that_the_last_iteration_spends_ends_nothing_early(num_iterations, early):
    stage = types.SimpleNamespace(
        judging=None,
        save_model=lambda directory, variables: None,
        cfg=types.SimpleNamespace(stop_at_total_kl=0.2, num_iterations=num_iterations),
    )
    state = types.SimpleNamespace(iteration=6, policy=types.SimpleNamespace(variables=None))
    result = PpoStage.finish(stage, None, state, {TOTAL_KL: 0.25})
    assert result.get("ended", "").startswith("KL of 0.250") is early


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stop_at_total_kl": 0.0}, "stop_at_total_kl=0.0 must be above 0"),
        (
            {"held_out_rewards": HeldOutRewardsConfig(prompts="none", measure="brevity")},
            r"measure='brevity' must be one of \['reward'\]",
        ),
    ],
)
def test_a_setting_that_cannot_be_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        config(**changed)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "prompts is empty"),
        ({"prompts": "none", "every": 0}, "every=0 must be at least 1"),
        ({"prompts": "none", "temperature": 0.0}, "temperature=0.0 must be above 0"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HeldOutRewardsConfig(**fields)
