"""Settings that have no use beside others are refused by name, not passed over."""

import dataclasses
import re

import pytest

from huatuo_jax.core.config import load_card
from huatuo_jax.ppo.config import ScoreConfig, ValueConfig
from huatuo_jax.training.optimizer import OptimizerConfig
from tests.ppo.tiny import config

GROUPS = {"rollout": {"num_prompts": 2, "answers_per_prompt": 4}}
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)
KEPT = {"value": ValueConfig(head="keep")}

UNUSED = {
    "gamma": ({"gamma": 0.9}, "gamma=0.9"),
    "gae_lambda": ({"gae_lambda": 1.0}, "gae_lambda=1.0"),
    "whitening": ({"whiten_advantages": False}, "whiten_advantages=False"),
    "several": (
        {"gamma": 0.9, "whiten_advantages": False},
        "gamma=0.9, whiten_advantages=False",
    ),
}
OF_A_CRITIC = {
    "start": (ValueConfig(start="policy"), "value.start='policy'"),
    "optimizer": (ValueConfig(optimizer=OPTIMIZER), "value.optimizer"),
    "several": (
        ValueConfig(head="keep", clip=None, warmup_iterations=2),
        "value.head='keep', value.clip=None, value.warmup_iterations=2",
    ),
}


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
@pytest.mark.parametrize(("changed", "names"), UNUSED.values(), ids=UNUSED.keys())
def test_what_an_estimator_without_a_critic_does_not_use_is_refused(estimator, changed, names):
    message = f"estimator='{estimator}' has no use for {names}: leave it out"
    with pytest.raises(ValueError, match=re.escape(message)):
        config(estimator=estimator, **GROUPS, **changed)


@pytest.mark.parametrize(("value", "names"), OF_A_CRITIC.values(), ids=OF_A_CRITIC.keys())
def test_a_card_with_a_critic_takes_another_estimator_and_says_what_that_does_not_use(value, names):
    cfg = config(estimator="rloo", **GROUPS, value=value)
    assert cfg.without_use == f"estimator='rloo' has no use for {names}"
    assert dataclasses.replace(cfg, value=ValueConfig()).without_use is None
    assert config(value=value, score={"scale": "raw"}).without_use is None


ALONE = {
    "deviation": ({"divide_by_deviation": False}, "estimator='gae' .* divide_by_deviation=False"),
    "gain": ({"kl_gain": 0.2}, "target_kl_per_sequence=None .* kl_gain=0.2"),
    "target": (
        {"kl_coef": 0.0, "target_kl_per_sequence": 3.0},
        "kl_coef=0.0 .* target_kl_per_sequence=3.0",
    ),
    "bound": (
        {"num_epochs": 1, "num_minibatches": 1, "stop_at_kl": 0.1},
        "a rollout of one step .* stop_at_kl=0.1",
    ),
    "running scale": (
        {**KEPT, "score": {"scale": "running"}},
        "value.head='keep' needs score.scale='stored' or 'raw', not 'running'",
    ),
    "another score": (
        {**KEPT, "score": {"of": "length"}},
        "value.head='keep' needs score.of='reward_model', not 'length'",
    ),
    "whitened rewards": (
        {**KEPT, "score": {"whiten": True}},
        "value.head='keep' needs score.whiten=False, not True",
    ),
}


@pytest.mark.parametrize(("changed", "message"), ALONE.values(), ids=ALONE.keys())
def test_settings_that_have_no_use_together_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        config(**changed)


def test_a_schedule_that_does_not_fall_has_no_final_share():
    with pytest.raises(ValueError, match="final_share=0.1 must be left out for decay='constant'"):
        OptimizerConfig(learning_rate=1e-3, decay="constant", final_share=0.1)


def test_a_default_config_of_every_estimator_is_taken():
    for estimator in ("gae", "rloo", "grpo"):
        cfg = config(estimator=estimator, **GROUPS)
        assert cfg.estimator == estimator and cfg.has_critic == (estimator == "gae")
    for scale in ("stored", "raw"):
        score = ScoreConfig(scale=scale, on_truncation="keep", penalty=None)
        assert dataclasses.replace(config(**KEPT), score=score).value.head == "keep"


def test_the_published_settings_of_reinforcement_learning_stand_in_the_cards():
    """HuatuoGPT-o1's PPO (arXiv 2412.18925 and its code), and HuatuoGPT-3's launcher."""
    o1 = load_card("configs/huatuogpt_o1_8b.py").ppo
    assert (o1.rollout.num_answers, o1.num_epochs, o1.num_minibatches) == (128, 3, 1)
    assert (o1.optimizer.learning_rate, o1.kl_coef, o1.gamma, o1.gae_lambda) == (
        5e-7,
        0.03,
        1,
        0.95,
    )
    assert (o1.rollout.max_new_tokens, o1.rollout.temperature) == (1300, 0.5)
    assert 128 * o1.num_iterations == pytest.approx(20_000, abs=128)
    (verifier,) = o1.reward.terms
    assert verifier.settings == {"correct": 1.0, "wrong": 0.1, "invalid": 0.0}
    assert o1.reward.grader is not None
    exact = load_card("configs/huatuogpt_o1_8b.py:mine.jsonl,exact").ppo
    assert exact.data.paths == ("mine.jsonl",) and exact.reward.grader is None
    three = load_card("configs/huatuogpt_3_8b.py").ppo
    assert three.estimator == "grpo" and three.divide_by_deviation and three.kl_coef == 0
    assert (three.rollout.num_prompts, three.rollout.answers_per_prompt) == (128, 8)
    assert three.minibatch_size == 16 * 8 and three.denominator == "tokens"
    assert (three.clip_low, three.clip_high, three.dual_clip) == (0.2, 0.28, 10.0)
    assert three.optimizer.learning_rate == 2e-6 and three.rollout.redraw_rounds == 20
    assert three.reward.grader.temperatures == (0.0, 0.2, 0.4)
