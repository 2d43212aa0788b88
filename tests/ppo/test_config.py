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
    "critic's start": ({"value": ValueConfig(start="policy")}, "value.start='policy'"),
    "critic's head": ({"value": ValueConfig(head="keep")}, "value.head='keep'"),
    "critic's clip": ({"value": ValueConfig(clip=None)}, "value.clip=None"),
    "warm-up": ({"value": ValueConfig(warmup_iterations=1)}, "value.warmup_iterations=1"),
    "critic's optimizer": ({"value": ValueConfig(optimizer=OPTIMIZER)}, "value.optimizer"),
    "several": (
        {"gamma": 0.9, "value": ValueConfig(clip=None, warmup_iterations=2)},
        "gamma=0.9, value.clip=None, value.warmup_iterations=2",
    ),
}


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
@pytest.mark.parametrize(("changed", "names"), UNUSED.values(), ids=UNUSED.keys())
def test_what_an_estimator_without_a_critic_does_not_use_is_refused(estimator, changed, names):
    message = f"estimator='{estimator}' has no use for {names}: leave it out"
    with pytest.raises(ValueError, match=re.escape(message)):
        config(estimator=estimator, **GROUPS, **changed)


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
