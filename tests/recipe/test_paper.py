"""The recipe at real size: its cards hold together, and what the paper tells stands in them."""

import pathlib

import jax
import numpy as np
import pytest

from huatuo_jax.backbone.config import preset
from huatuo_jax.core.config import checked, load_card
from huatuo_jax.core.sharding import AXES
from huatuo_jax.generation.weights import mesh_for
from huatuo_jax.recipe.config import STAGES, RlaifConfig

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def recipe(name):
    return checked(load_card(str(CONFIGS / f"{name}.py")), RlaifConfig, path="config")


@pytest.mark.parametrize(
    "name, base, template",
    [
        ("huatuogpt_7b", "baichuan-inc/Baichuan-7B", "huatuogpt"),
        ("huatuogpt_7b_lora", "baichuan-inc/Baichuan-7B", "huatuogpt"),
        ("huatuogpt_13b", "IDEA-CCNL/Ziya-LLaMA-13B-Pretrain-v1", "huatuogpt"),
        ("qwen2_5_7b", "Qwen/Qwen2.5-7B", "tokenizer"),
        ("qwen3_8b", "Qwen/Qwen3-8B", "chatml"),
    ],
)
def test_a_card_is_the_whole_recipe_of_its_base_model(name, base, template, tmp_path):
    cfg = recipe(name)
    assert cfg.stages == STAGES
    assert cfg.sft.model.directory == base and cfg.sft.data.template == template
    assert cfg.in_workdir(tmp_path).evaluation.base == base


def test_with_adapters_no_stage_trains_all_weights_and_the_policys_are_there_once():
    cfg = recipe("huatuogpt_7b_lora")
    assert cfg.sft.model.lora == cfg.reward.model.lora == cfg.ppo.model.lora == cfg.ppo.value.lora
    assert cfg.sft.model.lora is not None and cfg.ppo.value.start == "shared"
    assert cfg.sft.batch_size == recipe("huatuogpt_7b").sft.batch_size


def test_the_papers_settings_of_fine_tuning_stand_in_the_cards():
    sft = recipe("huatuogpt_7b").sft
    assert (sft.batch_size, sft.num_epochs, sft.data.row_length) == (128, 3, 2048)
    optimizer = sft.optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.clip_norm) == (5e-5, 0.1, 1)
    assert (optimizer.decay, optimizer.warmup_share) == ("cosine", 0.05)
    assert sft.compute.compute_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("name", "architecture", "num_devices"),
    [
        ("huatuogpt_7b", "baichuan_7b", 64),
        ("huatuogpt_7b", "baichuan_7b", 8),
        ("huatuogpt_13b", "ziya_llama_13b", 16),
        ("qwen2_5_7b", "qwen2.5_7b", 64),
        ("qwen2_5_7b", "qwen2.5_7b", 8),
        ("qwen3_8b", "qwen3_8b", 64),
        ("qwen3_8b", "qwen3_8b", 8),
    ],
)
def test_weights_are_not_gathered_for_each_token_on_the_hardware_of_a_card(
    name, architecture, num_devices
):
    cfg, devices = recipe(name), np.array([jax.devices()[0]] * num_devices)
    mesh = jax.sharding.Mesh(devices.reshape(1, num_devices, 1), AXES)
    for section in (cfg.answers, cfg.ppo.rollout, cfg.evaluation):
        found = mesh_for(preset(architecture), section.mesh, mesh, field="mesh")
        assert found.shape["fsdp"] == 1 and found.shape["tensor"] >= 4


def test_answers_fit_the_models_rows_in_every_stage():
    cfg = recipe("huatuogpt_13b")
    assert cfg.ppo.max_length == cfg.reward.data.max_length == cfg.sft.data.row_length
