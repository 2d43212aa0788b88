"""The fields that the stages share, and the documentation that each of them has in `--help`."""

import dataclasses

import pytest
from docstring_parser import DocstringStyle, parse

from huatuo_jax.core.config import identity
from huatuo_jax.data import SAMPLE_FOLDER
from huatuo_jax.dpo import DpoConfig
from huatuo_jax.ppo.config import PpoConfig
from huatuo_jax.preferences.data import ComparisonsConfig, ComparisonSource
from huatuo_jax.reward.config import RewardConfig
from huatuo_jax.sft import SftConfig
from huatuo_jax.training.initial_model import ModelConfig
from huatuo_jax.training.loop import BaseLoopConfig, LoopConfig
from huatuo_jax.training.optimizer import OptimizerConfig
from huatuo_jax.training.stage import StageConfig, TrainingConfig

CONFIGS = (SftConfig, RewardConfig, DpoConfig, PpoConfig)


def _documented(config):
    return {
        one.arg_name
        for cls in config.__mro__
        if dataclasses.is_dataclass(cls)
        for one in parse(cls.__doc__, style=DocstringStyle.GOOGLE).params
    }


def _dpo(**changed):
    settings = {
        "model": ModelConfig(directory=str(SAMPLE_FOLDER)),
        "data": ComparisonsConfig(sources=(ComparisonSource(paths=("none",)),)),
        "optimizer": OptimizerConfig(learning_rate=1e-3),
    }
    return DpoConfig(**(settings | changed))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_of_a_stage_is_documented_where_it_is_declared_or_above(config):
    fields = {field.name for field in dataclasses.fields(config)}
    assert fields == fields & _documented(config)
    shared = StageConfig if config is PpoConfig else TrainingConfig
    assert {field.name for field in dataclasses.fields(shared)} < fields


def test_shared_fields_that_decide_no_result_stay_outside_of_the_identity():
    operational = {"micro_batch_size", "mesh", "loop"}
    found = identity(_dpo())
    assert not operational & found.keys()
    assert {"model", "data", "optimizer", "seed", "compute", "num_steps", "beta"} < found.keys()
    assert found == identity(_dpo(micro_batch_size=8, loop=LoopConfig(log_every=3)))
    assert found != identity(_dpo(seed=1))


def test_rows_at_once_are_the_rows_of_a_step_until_a_number_is_given():
    assert _dpo(batch_size=12).rows_at_once == 12
    assert _dpo(batch_size=12, micro_batch_size=4).rows_at_once == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_epochs": 0}, "num_epochs=0 must be at least 1"),
        ({"num_steps": 0}, "num_steps=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"batch_size": 8, "micro_batch_size": 3}, "micro_batch_size=3 must divide batch_size=8"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_with_its_field(changed, message):
    with pytest.raises(ValueError, match=message):
        _dpo(**changed)


def test_a_loop_of_any_stage_refuses_numbers_that_are_too_small():
    with pytest.raises(ValueError, match=r"BaseLoopConfig\.keep_checkpoints=0 must be at least 1"):
        BaseLoopConfig(keep_checkpoints=0)
