"""On a tiny transformer with a known reward, real runs end where the mathematics says.

The best policy of reward - beta * KL is in proportion to reference * exp(reward / beta); its
objective is beta * log Z. Both are found here by listing all answers.
"""

import numpy as np
import pytest

from huatuo_jax.ppo.reward_mix import ScorerRewards, combined
from huatuo_jax.ppo.reward_terms import RewardMixConfig, RewardTerm
from huatuo_jax.ppo.rollout import given_answers
from tests.ppo.tiny import all_answers, config, exact_log_probs, run_tiny, table, tiny_job

BETA = 1.0


class Planted(ScorerRewards):
    """The table's rewards as a sum of two terms; a fifth of the answers, at random, has none."""

    def __init__(self, scorer):
        super().__init__(scorer)
        self._draw = np.random.default_rng(0)
        self._cfg = RewardMixConfig(
            terms=tuple(RewardTerm(name=name, weight=0.5) for name in ("one", "other"))
        )

    def of(self, prompts, answers, *, group):
        scores_N = self.scorer.scores(given_answers(prompts, answers))
        shift_N = self._draw.normal(size=len(scores_N)).astype(np.float32)
        applies_N = self._draw.random(len(scores_N)) < 0.8
        terms = {
            "one": (scores_N + shift_N, applies_N),
            "other": (scores_N - shift_N, applies_N),
        }
        return combined(self._cfg, terms, group=group)


def _run(
    tmp_path, *, longest, seed, num_iterations, num_answers, learning_rate, planted=False, **changed
):
    """The final policy over all answers, the reference's, and the rewards."""
    scorer = table(longest=longest, seed=seed)
    rollout = {"num_prompts": num_answers // 8, "answers_per_prompt": 8, "max_new_tokens": longest}
    if changed.get("estimator", "gae") == "gae":
        changed |= {"whiten_advantages": False, "gae_lambda": 1.0}
    cfg = config(
        rollout=rollout | changed.pop("rollout", {}),
        optimizer={"learning_rate": learning_rate},
        kl_coef=BETA,
        num_iterations=num_iterations,
        denominator="max_new_tokens",
        loop={"checkpoint_every": num_iterations, "samples_per_iteration": 0},
        **changed,
    )
    answers = list(all_answers(longest=longest))
    rewards = np.array([scorer.rewards[answer] for answer in answers])
    reference = exact_log_probs(cfg, _first_variables(cfg, tmp_path), answers)
    source = Planted(scorer) if planted else None
    state, _ = run_tiny(cfg, tmp_path, scorer=scorer, rewards=source)
    return exact_log_probs(cfg, state.policy.variables, answers), reference, rewards


def _first_variables(cfg, tmp_path):
    return tiny_job(cfg, tmp_path / "first").make_state().policy.variables


def assert_best(policy, reference, rewards, *, beta=BETA):
    """Within .02 of the reward's range of the best objective, and .03 total variation of pi*."""
    assert np.exp(reference).sum() == pytest.approx(1, abs=1e-5)
    assert np.exp(policy).sum() == pytest.approx(1, abs=1e-5)
    log_best = reference + rewards / beta
    log_z = np.log(np.exp(log_best).sum())
    best = np.exp(log_best - log_z)
    objective = (np.exp(policy) * (rewards - beta * (policy - reference))).sum()
    spread = rewards.max() - rewards.min()
    started = (np.exp(reference) * rewards).sum()
    assert beta * log_z - started > 0.1 * spread, "there was nothing to learn"
    assert _distance(reference, best) > 0.3, "there was nothing to learn"
    missing, distance = (beta * log_z - objective) / spread, _distance(policy, best)
    print(f"missing {missing:.4f} of the range, distance {distance:.4f}")
    assert missing < 0.02
    assert distance < 0.03


def _distance(log_probs, probabilities):
    """The total variation."""
    return np.abs(np.exp(log_probs) - probabilities).sum() / 2


def test_ppo_ends_at_the_best_policy_of_a_small_world(tmp_path):
    assert_best(
        *_run(tmp_path, longest=1, seed=3, num_iterations=60, num_answers=64, learning_rate=5e-3)
    )


_WHOLE = {
    "longest": 3,
    "seed": 2,
    "num_iterations": 120,
    "num_answers": 256,
    "learning_rate": 3e-3,
}
# Of a penalty in the loss, whose gradient is that of the objective at the policy's own answers
# alone: each is used once.
_ONCE = {"num_epochs": 1, "num_minibatches": 4}
# The square has no baseline, so its gradient is noisy at the optimum too, and Adam's steps are the
# smaller for it: many are needed.
_SQUARE = {"num_iterations": 800, "num_minibatches": 1, "learning_rate": 6e-3}
# The baseline is one for all states, which are of different worth, so that the gradient is noisy at
# the optimum too: after 120 iterations the distance is .032, after 480 .012.
_WHITENED = {"num_iterations": 480}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"estimator": "gae"},
        {"estimator": "rloo"},
        {"estimator": "grpo", "divide_by_deviation": False},
        {"estimator": "rloo", "kl_in": "sequence_square", **_ONCE, **_SQUARE},
        {"estimator": "gae", "rollout": {"temperature": 0.7}},
        {"estimator": "reinforce", **_WHITENED},
        {"estimator": "reinforce_group", **_WHITENED},
        {"estimator": "rloo", "planted": True},
        {"estimator": "rloo", "ratio": "sequence", "sampler_ratio_cap": 2.0, "planted": True},
    ],
    ids=[
        "ppo",
        "rloo",
        "grpo",
        "kl in the loss",
        "temperature",
        "reinforce",
        "reinforce, mean of the group",
        "mixed with none, rloo",
        "mixed with none, ratios of sequences",
    ],
)
def test_every_estimator_ends_at_the_best_policy(tmp_path, changed):
    assert_best(*_run(tmp_path, **(_WHOLE | changed)))


@pytest.mark.slow
def test_k3_as_a_loss_ends_at_an_optimum_of_its_own(tmp_path):
    policy, reference, rewards = _run(tmp_path, **_WHOLE, estimator="rloo", kl_in="k3", **_ONCE)
    answers = list(all_answers(longest=_WHOLE["longest"]))
    own = _best_with_k3_loss(answers, np.exp(reference), rewards)
    best = np.exp(reference + rewards / BETA)
    assert _distance(reference, own) > 0.2, "there was nothing to learn"
    assert _distance(np.log(own), best / best.sum()) > 0.1, "both optima are the same"
    distance = _distance(policy, own)
    print(f"distance {distance:.4f}")
    assert distance < 0.03


def _best_with_k3_loss(answers, probabilities, rewards):
    """Of each answer, by backward induction over the states, which are what was said so far.

    In each state the policy is beta * reference / (c - Q), Q being the reward to be expected after
    a token, and c such that it sums to 1; see `ppo.rewards`.
    """
    reward_of = dict(zip(answers, rewards, strict=True))
    tokens = sorted({answer[0] for answer in answers})
    conditional = {}

    def reference_of(start):
        return sum(
            probability
            for answer, probability in zip(answers, probabilities, strict=True)
            if answer[: len(start)] == start
        )

    def value(state):
        ends = [(*state, token) for token in tokens]
        ahead = np.array([reward_of[end] if end in reward_of else value(end) for end in ends])
        reference = np.array([reference_of(end) for end in ends]) / reference_of(state)
        low, high = ahead.max(), ahead.max() + BETA
        for _ in range(200):
            middle = (low + high) / 2
            too_much = (BETA * reference / (middle - ahead)).sum() > 1
            low, high = (middle, high) if too_much else (low, middle)
        policy = BETA * reference / (high - ahead)
        conditional.update(zip(ends, policy, strict=True))
        return policy @ ahead

    value(())
    return np.array(
        [
            np.prod([conditional[answer[:length]] for length in range(1, len(answer) + 1)])
            for answer in answers
        ]
    )
