"""A function in place of a reward model: how `hj.ppo` makes the reward of a run of it."""

import pytest

import huatuo_jax as hj
from huatuo_jax.api import stages
from huatuo_jax.ppo.prompts import Prompts, TokenPrompt
from huatuo_jax.ppo.reward_mix import check_functions
from huatuo_jax.ppo.reward_terms import RewardMixConfig, RewardTerm
from huatuo_jax.reward_functions.functions import find
from tests.api import tiny
from tests.docs import pages

FIELDS = {"workdir": "none", "prompts": ["a"], "estimator": "rloo", "max_prompt_tokens": 8}


@pytest.fixture
def config_of(monkeypatch, tmp_path):
    """The config of the run that a call would make."""

    def made(reward, **fields):
        found = []
        monkeypatch.setattr(stages, "_trained", lambda run, cfg, *rest: found.append(cfg))
        rollout = stages.RolloutConfig(num_prompts=1, answers_per_prompt=2, max_new_tokens=4)
        settings = FIELDS | {"rollout": rollout, "workdir": tmp_path} | fields
        model = stages.ModelConfig(backbone=tiny.BACKBONE, tokenizer=str(tiny.TOKENIZER))
        hj.ppo(model, reward=reward, **settings)
        return found[0]

    return made


def test_the_function_of_the_documentation_is_the_reward_of_a_run(config_of):
    (page,) = (one for one in pages.PAGES if one.name == "rewards.md")
    block = pages.blocks(page, "python")[0]
    assert len(block.strip().splitlines()) == 3
    names = {"__name__": "a_notebook"}
    exec(compile(block, str(page), "exec"), names)
    cfg = config_of(names["brief"])
    (term,) = cfg.reward.terms
    assert term.label == "brief" and find(term.of) is names["brief"]
    assert not cfg.needs_reward_model
    assert find(term.of)([], ["ab", "abcd"], id=["p", "q"]) == [-0.02, -0.04]
    assert set(check_functions(cfg.reward, Prompts([TokenPrompt("p", (1,))], ()))) == {"brief"}


def test_a_sum_of_terms_takes_its_reward_model_by_a_field(config_of):
    mix = RewardMixConfig(terms=(RewardTerm(), RewardTerm(of="length")))
    cfg = config_of(mix, reward_model="somewhere")
    assert cfg.reward is mix and cfg.reward_model == "somewhere" and cfg.needs_reward_model


def test_a_reward_model_is_named_once(config_of):
    assert config_of("somewhere").reward_model == "somewhere"
    assert config_of("somewhere").reward is None
    with pytest.raises(ValueError, match="reward_model: give the reward model as reward"):
        config_of("somewhere", reward_model="elsewhere")
