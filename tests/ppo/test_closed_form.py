"""On a tiny transformer with a known reward, real runs end where the mathematics says.

The best policy of reward - beta * KL is in proportion to reference * exp(reward / beta); its
objective is beta * log Z. Both are found here by listing all answers.
"""

import numpy as np
import pytest

from tests.ppo.tiny import all_answers, config, exact_log_probs, run_tiny, table, tiny_job

BETA = 1.0


def _run(tmp_path, *, longest, num_iterations, num_answers, learning_rate, **changed):
    """The final policy over all answers, the reference's, and the rewards."""
    scorer = table(longest=longest, seed=3)
    rollout = {"num_prompts": num_answers // 8, "answers_per_prompt": 8, "max_new_tokens": longest}
    cfg = config(
        rollout=rollout | changed.pop("rollout", {}),
        optimizer={"learning_rate": learning_rate},
        kl_coef=BETA,
        num_iterations=num_iterations,
        fixed_denominator=True,
        whiten_advantages=False,
        gae_lambda=1.0,
        loop={"checkpoint_every": num_iterations, "samples_per_iteration": 0},
        **changed,
    )
    answers = list(all_answers(longest=longest))
    rewards = np.array([scorer.rewards[answer] for answer in answers])
    reference = exact_log_probs(cfg, _first_variables(cfg, tmp_path), answers)
    state, _ = run_tiny(cfg, tmp_path, scorer=scorer)
    return exact_log_probs(cfg, state.policy.variables, answers), reference, rewards


def _first_variables(cfg, tmp_path):
    return tiny_job(cfg, tmp_path / "first").make_state().policy.variables


def _assert_best(policy, reference, rewards):
    assert np.exp(reference).sum() == pytest.approx(1, abs=1e-5)
    assert np.exp(policy).sum() == pytest.approx(1, abs=1e-5)
    log_best = reference + rewards / BETA
    log_z = np.log(np.exp(log_best).sum())
    objective = (np.exp(policy) * (rewards - BETA * (policy - reference))).sum()
    spread = rewards.max() - rewards.min()
    started = (np.exp(reference) * rewards).sum()
    assert BETA * log_z - started > 0.1 * spread, "there was nothing to learn"
    distance = np.abs(np.exp(policy) - np.exp(log_best - log_z)).sum() / 2
    print(
        f"missing {(BETA * log_z - objective) / spread:.4f} of the range, distance {distance:.4f}"
    )
    assert BETA * log_z - objective < 0.02 * spread
    assert distance < 0.03


def test_ppo_ends_at_the_best_policy_of_a_small_world(tmp_path):
    _assert_best(*_run(tmp_path, longest=1, num_iterations=60, num_answers=64, learning_rate=5e-3))


_WHOLE = {"longest": 3, "num_iterations": 200, "num_answers": 256, "learning_rate": 3e-3}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"estimator": "gae"},
        {"estimator": "rloo"},
        {"estimator": "grpo", "divide_by_deviation": False},
        {"estimator": "rloo", "kl_in": "sequence_square", "num_epochs": 1, "num_minibatches": 1},
        {"estimator": "gae", "rollout": {"temperature": 0.7}},
    ],
    ids=["ppo", "rloo", "grpo", "kl in the loss", "temperature"],
)
def test_every_estimator_ends_at_the_best_policy(tmp_path, changed):
    _assert_best(*_run(tmp_path, **_WHOLE, **changed))
