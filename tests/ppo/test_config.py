"""Settings that have no use beside others are refused by name, not passed over."""

import dataclasses
import re

import pytest

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
