"""A reward of several terms: how they are summed, and what none of them does to a run."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.ppo.advantages import grpo_advantages, no_moments, rloo_advantages
from huatuo_jax.ppo.prompts import TokenPrompt
from huatuo_jax.ppo.reward_mix import MixedRewards, ScorerRewards, combined
from huatuo_jax.ppo.reward_terms import RewardMixConfig, RewardTerm
from huatuo_jax.ppo.rollout import Sampled
from huatuo_jax.ppo.targets import compile_targets, rollout_fields
from huatuo_jax.reward_functions.lengths import over_free_tokens
from huatuo_jax.reward_functions.rubrics import HUATUOGPT_3
from huatuo_jax.training.metrics import read_rows
from huatuo_jax.training.scoring import Normalization
from tests.ppo.test_targets import _experience
from tests.ppo.tiny import END, Table, config, run_tiny, table, token_text

HERE = "tests.ppo.test_reward_mix"
PROMPTS = [
    TokenPrompt("p0", (1, 2), ({"role": "user", "content": "a"},), {"reference": "1 2"}),
    TokenPrompt("p1", (2, 2), ({"role": "user", "content": "b"},), {"dose": 3}),
]
ANSWERS = [Sampled([1, 2, END], "stop"), Sampled([3, 3], "length")]


def rightness(prompts, responses, *, reference, **columns):
    return [
        None if right is None else float(one == right)
        for one, right in zip(responses, reference, strict=True)
    ]


def brevity(prompts, responses, *, num_tokens, num_final_tokens, step=1.0, **columns):
    assert num_final_tokens == [len(one.split()) for one in responses]
    return [-step * number for number in num_tokens]


def mixed(cfg, *, scorer=None, normalization=None):
    return MixedRewards(
        cfg,
        scorer=scorer,
        normalization=normalization,
        decode=token_text,
        count_tokens=lambda text: len(text.split()),
    )


def numbers(*values):
    applies = np.array([one is not None for one in values])
    return np.array([0.0 if one is None else one for one in values], np.float32), applies


def test_terms_are_weighed_and_summed_where_they_apply():
    cfg = RewardMixConfig(
        terms=(
            RewardTerm(weight=0.5),
            RewardTerm(of=f"{HERE}:rightness", weight=2.0),
            RewardTerm(of=f"{HERE}:brevity", adjusts=True, settings={"step": 0.1}),
            RewardTerm(of="length", weight=0.01),
        )
    )
    scorer = Table({(1, 2, END): 5.0, (3, 3): 1.0})
    stored = Normalization(mean=1.0, standard_deviation=2.0, num_answers=2, answers="two")
    found = mixed(cfg, scorer=scorer, normalization=stored).of(PROMPTS, ANSWERS, group=None)
    expected = [0.5 * 2 + 2 * 1 - 0.3 + 0.03, 0.5 * 0 - 0.2 + 0.02]
    np.testing.assert_allclose(found.scores_N, expected, rtol=1e-6)
    assert found.has_reward_N.all()
    assert found.shown(1) == pytest.approx(
        {"reward_model": 0.0, "rightness": None, "brevity": -0.2, "length": 2.0}
    )


def test_an_adjustment_alone_is_no_reward():
    cfg = RewardMixConfig(
        terms=(
            RewardTerm(of=f"{HERE}:rightness"),
            RewardTerm(of=f"{HERE}:brevity", adjusts=True),
        )
    )
    found = mixed(cfg).of(PROMPTS, ANSWERS, group=None)
    assert found.has_reward_N.tolist() == [True, False]
    assert found.scores_N.tolist() == [-2.0, 0.0]
    fields = found.fields(prefix="ppo")
    assert fields == {
        "ppo/without_reward": 0.5,
        "ppo/reward/rightness": 1.0,
        "ppo/reward/rightness/without": 0.5,
        "ppo/reward/brevity": -2.5,
        "ppo/reward/brevity/without": 0.0,
    }


def test_a_rubric_of_positive_points_alone_pays_for_length_and_a_penalty_takes_it_back():
    cfg = RewardMixConfig(
        terms=(RewardTerm(name="rubric"), RewardTerm(name="length", adjusts=True)),
    )
    met = [[True, False, False], [True, True, False], [True, True, True], [True, True, True]]
    scores = [HUATUOGPT_3.score([1.0, 1.0, 1.0], one) for one in met]  # Each is longer.
    assert scores == sorted(scores) and scores[-1] == 1.0
    tokens = [200, 1000, 2200, 4200]
    penalties = over_free_tokens([None] * 4, [""] * 4, num_final_tokens=tokens)
    terms = {"rubric": numbers(*scores), "length": numbers(*penalties)}
    found = combined(cfg, terms, group=None)
    np.testing.assert_allclose(found.scores_N, [1 / 3, 2 / 3 - 0.1, 0.75, 0.5], rtol=1e-6)


def test_normalised_terms_are_in_deviations_of_their_group_before_they_are_summed():
    cfg = RewardMixConfig(
        terms=(
            RewardTerm(of="length", name="wide", weight=2.0),
            RewardTerm(of="length", name="narrow"),
        ),
        combine="sum_of_normalised",
    )
    terms = {
        "wide": numbers(0.0, 100.0, 200.0, 7.0, None, 7.0),
        "narrow": numbers(0.1, None, 0.3, 0.0, 1.0, 2.0),
    }
    found = combined(cfg, terms, group=3)
    up = np.sqrt(1.5)
    expected = [-2 * up - 1, 0, 2 * up + 1, -up, 0, up]
    np.testing.assert_allclose(found.scores_N, expected, atol=2e-3)
    plain = combined(dataclasses.replace(cfg, combine="sum"), terms, group=3)
    np.testing.assert_allclose(plain.scores_N, [0.1, 200, 400.3, 14, 1, 16], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"of": "rewards"}, "of='rewards' must be 'reward_model', 'length', module:function"),
        ({"weight": 0.0}, "weight=0.0 must be a number other than 0"),
        ({"weight": float("nan")}, "weight=nan must be"),
        ({"settings": {"a": 1}}, "of='reward_model' has no settings"),
        ({"name": "two words"}, "name='two words' must be a word"),
    ],
)
def test_a_wrong_term_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RewardTerm(**fields)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"terms": ()}, "terms must hold one with adjusts=False"),
        ({"terms": (RewardTerm(adjusts=True),)}, "terms must hold one with adjusts=False"),
        ({"terms": (RewardTerm(), RewardTerm())}, "name 'reward_model' must be given once"),
        ({"most_without": 1.5}, "most_without=1.5 must be from 0 to 1"),
    ],
)
def test_a_wrong_mix_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        RewardMixConfig(**changed)


MIX = RewardMixConfig(terms=(RewardTerm(of=f"{HERE}:rightness"),))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"score": {"of": "length"}}, "score.of='length' has no use beside reward"),
        ({"value": {"start": "reward"}}, "value.start='reward' needs a reward model"),
        (
            {"reward": RewardMixConfig(combine="sum_of_normalised")},
            "combine='sum_of_normalised' needs rollout.answers_per_prompt >= 2",
        ),
    ],
)
def test_a_mix_that_its_run_cannot_have_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        config(**({"reward": MIX} | changed))


GROUPS = np.array([[1.0, 3.0, -5.0, 0.5], [2.0, 2.0, 7.0, 1.0], [4.0, 1.0, 1.0, 9.0]], np.float32)
APPLIES = np.array([[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]], bool)


def test_an_answer_without_a_reward_leaves_its_group_and_is_at_0():
    rewards, applies = jnp.asarray(GROUPS), jnp.asarray(APPLIES)
    found = np.asarray(rloo_advantages(rewards, applies_BG=applies))
    mean = 4.5 / 3
    np.testing.assert_allclose(
        found[0], [1.5 * (1 - mean), 1.5 * (3 - mean), 0, 1.5 * -1], rtol=1e-6
    )
    assert not found[1:].any()  # One that is alone has nothing to be compared with.
    found = np.asarray(grpo_advantages(rewards, divide_by_deviation=True, applies_BG=applies))
    kept = np.array([1.0, 3.0, 0.5])
    expected = (kept - mean) / (kept.std() + 1e-4)
    np.testing.assert_allclose(found[0], [*expected[:2], 0, expected[2]], rtol=1e-5)
    assert not found[1:].any()


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo"])
def test_targets_are_those_of_a_rollout_without_the_answers_that_have_no_reward(estimator):
    whole = _experience()
    keep = np.array([0, 1, 3])
    has_reward_N = np.array([True, True, False, True])
    junk = whole._replace(
        raw_scores_N=np.where(has_reward_N, whole.raw_scores_N, 1e6), has_reward_N=has_reward_N
    )
    group = {"num_prompts": 1, "answers_per_prompt": 4 if estimator != "gae" else 1}
    cfg = config(
        estimator=estimator,
        score={"scale": "running", "whiten": True},
        rollout=group | ({"num_prompts": 4} if estimator == "gae" else {}),
    )
    some = dataclasses.replace(
        cfg,
        rollout=dataclasses.replace(
            cfg.rollout,
            num_prompts=3 if estimator == "gae" else 1,
            answers_per_prompt=1 if estimator == "gae" else 3,
        ),
        num_minibatches=3,
    )
    found, expected = (
        compile_targets(settings, stop_token_ids=(END,), normalization=None)(
            rollout, jnp.float32(0.2), no_moments()
        )
        for settings, rollout in (
            (cfg, junk),
            (some, type(whole)(*(None if a is None else a[keep] for a in whole))),
        )
    )
    np.testing.assert_allclose(found.advantages_NT[keep], expected.advantages_NT, atol=1e-5)
    np.testing.assert_allclose(found.returns_NT[keep], expected.returns_NT, atol=1e-5)
    assert not np.asarray(found.advantages_NT[2]).any()
    if estimator == "gae":
        np.testing.assert_array_equal(found.returns_NT[2], whole.values_NT[2])
    fields, others = (rollout_fields(one.sums, prefix="ppo") for one in (found, expected))
    for name in ("reward", "answer_score", "score", "score_deviation", "score_length_correlation"):
        assert fields[f"ppo/{name}"] == pytest.approx(others[f"ppo/{name}"], abs=1e-5), name


def test_a_mix_of_the_reward_model_alone_is_the_reward_model(tmp_path):
    plain = config(num_iterations=2)
    mix = dataclasses.replace(plain, reward=RewardMixConfig())
    scorer = table(longest=3)
    _, alone = run_tiny(plain, tmp_path / "alone", scorer=scorer)
    _, found = run_tiny(mix, tmp_path / "mix", rewards=mixed(mix.reward, scorer=scorer))
    assert found | alone == found  # Its own numbers come on top of the very same.
    assert found["ppo/without_reward"] == 0


calls = []


def sometimes(prompts, responses, **columns):
    """None at every third response."""
    calls.append(len(responses))
    return [None if n % 3 == 0 else float(len(one)) for n, one in enumerate(responses)]


def test_a_run_counts_what_has_no_reward_and_shows_the_terms(tmp_path):
    mix = RewardMixConfig(terms=(RewardTerm(of=f"{HERE}:sometimes", name="mine"),))
    cfg = config(estimator="rloo", reward=mix, rollout={"num_prompts": 2, "answers_per_prompt": 4})
    calls.clear()
    run_tiny(cfg, tmp_path, rewards=mixed(mix))
    assert calls == [8] * cfg.num_iterations  # One call an iteration.
    rows = list(read_rows(tmp_path / "ppo" / "metrics.jsonl"))
    assert [row["ppo/reward/mine/without"] for row in rows] == [0.375] * cfg.num_iterations
    assert all("ppo/reward/mine" in row for row in rows)
    samples = list(read_rows(tmp_path / "ppo" / "samples.jsonl"))
    assert samples[0]["rewards"] == {"mine": None} and samples[0]["score"] is None
    assert samples[1]["rewards"]["mine"] == samples[1]["score"]


def test_too_many_responses_without_a_reward_stop_the_run_in_one_line(tmp_path):
    term = RewardTerm(of=f"{HERE}:sometimes", name="mine")
    mix = RewardMixConfig(terms=(term,), most_without=0.3)
    cfg = config(estimator="rloo", reward=mix, rollout={"num_prompts": 2, "answers_per_prompt": 4})
    message = (
        r"^iteration 1: 38% of the responses have no reward, more than "
        r"config.ppo.reward.most_without=0.3 \(mine applies to 62%\)$"
    )
    with pytest.raises(ValueError, match=message):
        run_tiny(cfg, tmp_path, rewards=mixed(mix))


def test_a_scorer_alone_rewards_every_response():
    found = ScorerRewards(Table({(1, 2, END): 5.0, (3, 3): 1.0})).of(PROMPTS, ANSWERS, group=None)
    assert found.scores_N.tolist() == [5.0, 1.0] and found.has_reward_N.all()
    assert found.terms == {}
