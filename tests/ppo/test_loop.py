"""What the loop does where things go wrong, or far: skipped steps, early stops, a critic alone."""

import dataclasses
import shutil

import jax
import numpy as np
import optax
import pytest

from huatuo_jax.core import files
from huatuo_jax.training.loop import Diverged, train
from huatuo_jax.training.metrics import read_rows
from huatuo_jax.training.optimizer import schedule_position
from tests.ppo.tiny import PROMPT, Table, config, run_tiny, table, tiny_job


class Spoilt(Table):
    """Scores that are no numbers, of the first answers of some rollouts."""

    def __init__(self, *, rollouts, answers):
        super().__init__(table(longest=3).rewards)
        self._rollouts, self._answers, self._number = rollouts, answers, 0

    def scores(self, answers):
        scores_N = super().scores(answers)
        if self._number in self._rollouts:
            scores_N[: self._answers] = np.nan
        self._number += 1
        return scores_N


def _rows(workdir):
    return read_rows(workdir / "ppo" / "metrics.jsonl")


def test_a_score_that_is_no_number_skips_the_steps_it_is_in_and_no_others(tmp_path):
    cfg = config(whiten_advantages=False)
    state, _ = run_tiny(cfg, tmp_path, scorer=Spoilt(rollouts=(1,), answers=1))
    # One of two minibatches, in each of two passes.
    assert int(state.policy.num_not_finite) == int(state.value.num_not_finite) == 2
    assert int(state.policy.num_updates) == 10
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.policy.trained))
    rows = _rows(tmp_path)
    assert [row["ppo/policy_steps_not_finite"] for row in rows] == [0, 2, 2]
    assert "ppo/score" not in rows[1] and "ppo/score" in rows[2]


def test_steps_that_are_not_finite_in_a_row_stop_the_run(tmp_path):
    cfg = config(loop={"max_not_finite_in_a_row": 6})
    with pytest.raises(Diverged, match=f"iteration 2: .* answers to {PROMPT.id}, .*8 steps in a"):
        run_tiny(cfg, tmp_path, scorer=Spoilt(rollouts=range(9), answers=8))
    assert [row["ppo/policy_updates"] for row in _rows(tmp_path)] == [0, 0]


def test_passes_over_a_rollout_end_where_the_policy_has_gone_too_far(tmp_path):
    run_tiny(config(stop_at_kl=1e-9), tmp_path / "near")
    rows = _rows(tmp_path / "near")
    # The first step is taken, as its KL is 0; the second is not.
    assert [row["ppo/policy_updates"] for row in rows] == [1, 2, 3]
    assert all(row["ppo/stopped_early"] == 1.0 for row in rows)
    assert [row["ppo/value_updates"] for row in rows] == [1, 2, 3]
    run_tiny(config(stop_at_kl=1e9), tmp_path / "far")
    rows = _rows(tmp_path / "far")
    assert [row["ppo/policy_updates"] for row in rows] == [4, 8, 12]
    assert not any(row["ppo/stopped_early"] for row in rows)


def test_while_the_critic_warms_up_the_policy_keeps_every_bit(tmp_path):
    cfg = config(value={"warmup_iterations": 2})
    before = jax.device_get(tiny_job(cfg, tmp_path / "first").make_state().policy.trained)
    job = tiny_job(cfg, tmp_path)
    state, trainer = job.make_state(), job.make_trainer()
    for _ in range(2):
        state, report = trainer.iterate(state)
        assert not report.update.policy and len(report.update.value) == 4
    for left, right in zip(
        jax.tree.leaves(before), jax.tree.leaves(state.policy.trained), strict=True
    ):
        assert left.tobytes() == np.asarray(right).tobytes()
    assert int(state.value.num_updates) == 8
    state, report = trainer.iterate(state)
    assert len(report.update.policy) == 4 and int(state.policy.num_updates) == 4


def test_a_run_goes_on_over_samples_that_hold_unicode_line_separators(tmp_path):
    cfg = config()
    job = dataclasses.replace(
        tiny_job(cfg, tmp_path), decode=lambda ids: "\u2028\u2029\u0085".join(map(str, ids))
    )
    train(job, cfg.loop)
    path = tmp_path / "ppo" / "samples.jsonl"
    unbroken = path.read_bytes()
    rows = files.read_rows(path, unfinished="read")
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3] and "\u2028" in rows[0]["prompt"]
    shutil.rmtree(job.directory.checkpoints / "3")  # As a kill right before it leaves things.
    train(job, cfg.loop)
    assert path.read_bytes() == unbroken


def test_the_coefficient_waits_for_the_policy_to_be_trained(tmp_path):
    """While the critic alone is trained, the KL is 0 whatever the coefficient is."""
    cfg = config(
        value={"warmup_iterations": 3}, num_iterations=6, target_kl_per_sequence=1e-4, kl_coef=0.03
    )
    run_tiny(cfg, tmp_path)
    rows = _rows(tmp_path)
    coefficients = [row["ppo/kl_coef"] for row in rows]
    assert coefficients[:4] == pytest.approx([0.03] * 4, rel=1e-6)
    errors = [row["ppo/kl_per_sequence"] / 1e-4 - 1 for row in rows]
    for before, after, error in zip(coefficients[3:], coefficients[4:], errors[3:], strict=False):
        assert after == pytest.approx(before * (1 + 0.1 * np.clip(error, -0.2, 0.2)), rel=1e-5)
    assert coefficients[4] != coefficients[3]


@pytest.mark.parametrize("stop_at_kl", [pytest.param(None, marks=pytest.mark.slow), 1e-9])
def test_learning_rates_come_to_their_end_wherever_the_passes_end(tmp_path, stop_at_kl):
    """A linear decay over all planned steps; the first step of an iteration is always taken."""
    cfg = config(
        num_iterations=5, value={"warmup_iterations": 2}, stop_at_kl=stop_at_kl, num_epochs=3
    )
    state, _ = run_tiny(cfg, tmp_path)
    rows = _rows(tmp_path)
    a_rollout, peak = 6, cfg.optimizer.learning_rate
    stops = stop_at_kl == 1e-9
    last_of = 0 if stops else a_rollout - 1
    for iteration, row in enumerate(rows):
        step = iteration * a_rollout + (last_of if iteration >= 2 else a_rollout - 1)
        expected = peak * (1 - step / (5 * a_rollout))
        assert row["ppo/value_learning_rate"] == pytest.approx(expected, rel=1e-5)
        if iteration >= 2:
            step = (iteration - 2) * a_rollout + last_of
            expected = peak * (1 - step / (3 * a_rollout))
            assert row["ppo/policy_learning_rate"] == pytest.approx(expected, rel=1e-5)
    assert int(state.policy.num_updates) == (3 if stops else 18)
    for part, planned in ((state.policy, 18), (state.value, 30)):
        assert int(schedule_position(part.opt_state, part.num_updates)) == planned
        adam = [one for one in jax.tree.leaves(part.opt_state, is_leaf=_is_adam) if _is_adam(one)]
        assert int(adam[0].count) == int(part.num_updates)


def _is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


@pytest.mark.slow
def test_a_bound_that_is_never_met_changes_no_bit(tmp_path):
    found = [
        run_tiny(config(stop_at_kl=bound, num_iterations=2), tmp_path / str(bound))
        for bound in (None, 1e9)
    ]
    for left, right in zip(
        *(jax.tree.leaves((state.policy, state.value)) for state, _ in found), strict=True
    ):
        assert (
            np.array_equal(jax.random.key_data(left), jax.random.key_data(right))
            if (jax.dtypes.issubdtype(left.dtype, jax.dtypes.prng_key))
            else np.array_equal(left, right)
        )


@pytest.mark.slow
def test_a_run_is_a_function_of_its_seed(tmp_path):
    first, again, other = (
        run_tiny(config(seed=seed, num_iterations=1), tmp_path / name)[1]
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first == again != other
