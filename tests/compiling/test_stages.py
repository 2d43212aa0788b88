"""What is compiled is what the stages run, on the shapes that they give it."""

import pathlib

import jax
import numpy as np
import pytest

from huatuo_jax.backbone.config import preset
from huatuo_jax.backbone.lora import LoraConfig
from huatuo_jax.compiling.programs import Architectures, attended_pairs, programs_of
from huatuo_jax.core.config import load_card, replaced
from huatuo_jax.generation.requests import Answer, Usage
from huatuo_jax.ppo.prompts import TokenPrompt
from huatuo_jax.ppo.roles import _row
from huatuo_jax.ppo.rollout import make_rollout
from huatuo_jax.ppo.targets import plain_layout
from huatuo_jax.ppo.trainer import NUMBERS_OF_TOKENS
from huatuo_jax.preferences.rows import ComparisonRows, RowsConfig, empty_row
from huatuo_jax.training.initial_model import ModelConfig
from huatuo_jax.training.metrics import ModelFlops
from tests.preferences.tiny import token_group

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


def config(name, **changed):
    return replaced(load_card(str(CONFIGS / f"{name}.py")), changed)


ON_EIGHT = {"sft.batch_size": 8, "reward.batch_size": 8}


@pytest.mark.slow
def test_every_program_of_the_recipe_is_traced_from_shapes():
    programs = programs_of(config("rlaif", **ON_EIGHT), jax.devices())
    assert [program.name for program in programs] == [
        "sft/update",
        "reward/update",
        "ppo/prefill",
        "ppo/decode",
        "ppo/score",
        "ppo/policy_pass",
        "ppo/policy_apply",
        "ppo/value_pass",
        "ppo/value_apply",
    ]
    for program in programs:
        program.lower()
        leaves = jax.tree.leaves((program.arguments, program.beside))
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


@pytest.mark.parametrize(
    "lora", [None, LoraConfig(rank=2, alpha=4.0)], ids=["all weights", "adapters"]
)
def test_dpo_is_traced_from_shapes_and_counts_the_reference_s_pass(lora):
    made = config("dpo", **{"sft.batch_size": 8, "dpo.batch_size": 8})
    if lora is not None:
        made = replaced(made, {"dpo.model.lora": lora})
    sft, dpo = programs_of(made, jax.devices())
    assert (sft.name, dpo.name) == ("sft/update", "dpo/update")
    assert (2048, 128) in {leaf.shape for leaf in jax.tree.leaves(dpo.arguments)}
    dpo.lower()
    flops, pairs = ModelFlops.of(dpo.backbone), 8 * (2048 * 2049 / 2)
    forward = flops.of_forward(tokens=dpo.tokens, scored_tokens=dpo.tokens, attended_pairs=pairs)
    head_and_layers = 2 * (flops.layers + flops.head) * dpo.tokens
    trained = 3 * forward if lora is None else 2 * head_and_layers + 3 * (forward - head_and_layers)
    assert dpo.model_flops == pytest.approx(trained + forward)


def test_a_later_stage_has_the_architecture_that_an_earlier_one_trains():
    sft, reward = programs_of(config("rlaif", **ON_EIGHT), jax.devices(), stages=("sft", "reward"))
    assert sft.backbone == reward.backbone
    assert (2048, 128) in {leaf.shape for leaf in jax.tree.leaves(reward.arguments)}


def test_a_stage_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"stages=\['ppo'\].*this config has \['sft'\]"):
        programs_of(config("sft"), jax.devices(), stages=("ppo",))


def test_rows_that_the_mesh_does_not_divide_are_refused():
    with pytest.raises(
        ValueError, match=r"config\.sft\.micro_batch_size=1 rows must be a multiple"
    ):
        programs_of(config("sft"), jax.devices())


def test_published_models_need_no_network():
    section = ModelConfig(directory="baichuan-inc/Baichuan-7B")
    found = Architectures(None).in_place(section, path="config.sft.model")
    assert found.directory is None
    assert found.backbone == preset("baichuan_7b")


@pytest.mark.parametrize(
    "name",
    [
        "huatuogpt_7b",
        "huatuogpt_7b_lora",
        "huatuogpt_13b",
        "qwen2_5_7b",
        "qwen2_5_1_5b",
        "qwen3_0_6b",
        "qwen3_8b",
        "huatuogpt_o1_8b",
        "huatuogpt_3_8b",
    ],
)
def test_every_card_is_of_a_model_that_is_known_without_a_network(name):
    cfg = config(name)
    directory = (cfg.ppo if cfg.sft is None else cfg.sft).model.directory
    assert Architectures(None).of(directory, path="config.sft.model").num_layers >= 28


def test_a_preset_stands_for_a_model_that_is_not_here():
    found = Architectures("llama3.2_1b").of("{workdir}/sft/model", path="config.ppo.model")
    assert found == preset("llama3.2_1b")


def test_a_model_that_nobody_makes_is_an_error_that_names_the_way_out():
    with pytest.raises(ValueError, match=r"config\.ppo\.model.*no stage.*--preset.*baichuan_7b"):
        Architectures(None).of("{workdir}/sft/model", path="config.ppo.model")


def test_a_row_of_comparisons_has_the_shapes_of_one_that_is_read():
    cfg = RowsConfig(row_length=64)
    group = token_group(np.random.default_rng(0), 0, num_answers=3)
    real = ComparisonRows([group], cfg).read(0, num_pairs=4)
    shapes = {name: (array.shape, array.dtype) for name, array in real.items()}
    empty = empty_row(cfg, num_pairs=4)
    assert {name: (array.shape, array.dtype) for name, array in empty.items()} == shapes


def test_a_row_of_ppo_has_the_shapes_of_a_rollouts():
    answer = Answer(
        request_index=0,
        answer_index=0,
        token_ids=[5, 6, 0],
        text=None,
        log_probs=[0.0] * 3,
        sampling_log_probs=[0.0] * 3,
        finish_reason="stop",
        usage=Usage(prompt_tokens=2, completion_tokens=3),
    )
    rollout = make_rollout([TokenPrompt("p", (1, 2))], [answer], lengths=(8,)).rows
    rows = plain_layout(np.array([0]), np.array([5]), width=8).pack(rollout)
    shapes = {name: (array[0].shape, array.dtype) for name, array in rows.items()}
    shapes |= {name: ((8,), np.dtype(np.float32)) for name in NUMBERS_OF_TOKENS}
    assert {name: (array.shape, array.dtype) for name, array in _row(8).items()} == shapes


def test_pairs_are_those_of_causality_and_the_window():
    cfg = preset("baichuan_7b")
    assert attended_pairs(cfg, rows=2, length=5) == 2 * (1 + 2 + 3 + 4 + 5)
    mistral = preset("mistral_7b")
    by_hand = sum(min(place + 1, 4096) for place in range(6000))
    assert attended_pairs(mistral, rows=1, length=6000) == by_hand
