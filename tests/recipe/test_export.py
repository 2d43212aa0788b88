"""What a run releases: written, read back and compared in the host's memory."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import transformers

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import init_params
from huatuo_jax.checkpoint import convert, models
from huatuo_jax.core import sharding
from huatuo_jax.recipe import export
from huatuo_jax.recipe.config import STAGES, ExportConfig
from huatuo_jax.recipe.recipe import Journal, run_stages, unfinished_stages
from huatuo_jax.recipe.stages import make_stages
from tests import hub_server as hubs
from tests.hf.tiny_checkpoints import edit_config
from tests.recipe.tiny import BACKBONE, tiny_recipe
from tests.tiny import TOKENIZER

HOST = 5  # The device that stands for the host's CPU: no other of the eight may hold a weight.


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of models of different weights, which no test changes."""
    folder = tmp_path_factory.mktemp("models")
    heads = {"base": "lm", "sft": "lm", "ppo": "lm", "other": "lm", "reward": "score"}
    for seed, (name, head) in enumerate(heads.items()):
        params = init_params(jax.random.key(seed), BACKBONE, ComputeConfig(), head=head)
        models.save_orbax(
            params, BACKBONE, folder / name, head=head, source_folder=pathlib.Path(TOKENIZER)
        )
    return folder


@pytest.fixture
def cfg(tmp_path, made):
    return recipe(tmp_path, made, policy=str(made / "other"))


def chosen(cfg):
    return export.Policy("folder", cfg.export.policy, {"policy": "folder", "sentence": "As told."})


@pytest.fixture
def places(monkeypatch):
    """The devices of every model that is loaded."""
    found, load_params = [], models.load_params

    def load(*arguments, **keywords):
        params = load_params(*arguments, **keywords)
        found.append({device for leaf in jax.tree.leaves(params) for device in leaf.devices()})
        return params

    host = sharding.make_mesh(devices=jax.devices()[HOST : HOST + 1])
    monkeypatch.setattr(sharding, "host_mesh", lambda: host)
    for module in (models, convert):
        monkeypatch.setattr(module, "load_params", load)
    return found


def test_an_export_needs_the_memory_of_the_host_alone(cfg, made, places, tmp_path):
    found = export.run_export(cfg, chosen(cfg), tmp_path / "export")
    for name, source in (("policy", "other"), ("reward", "reward")):
        params = models.load_params(models.find_model(made / source))
        assert found[name]["weights"] == sum(leaf.size for leaf in jax.tree.leaves(params))
        assert found[name]["transformers"]["num_tokens"] > 0  # It was compared.
        assert places.pop() != {jax.devices()[HOST]}, "what this very test has read"
    # Each is written, compared with what it came from, and with transformers.
    assert places == 2 * 4 * [{jax.devices()[HOST]}]


def test_an_export_that_differs_is_refused(cfg, places, monkeypatch, tmp_path):
    load_params = models.load_params

    def load(model, **keywords):
        params = load_params(model, **keywords)
        if model.form == "hugging_face":
            params["final_norm"]["scale"] += np.float32(1e-7)
        return params

    monkeypatch.setattr(models, "load_params", load)
    with pytest.raises(ValueError, match="export/policy: written, but its weights are not those"):
        export.run_export(cfg, chosen(cfg), tmp_path / "export")


def weights_of(folder):
    return models.load_params(models.find_model(folder), mesh=sharding.host_mesh())


def recipe(tmp_path, made, *, policy="released", stages=STAGES):
    """A recipe whose evaluation has those models."""
    tiny = tiny_recipe(tmp_path / "mine.jsonl")
    reward = str(made / "reward")
    evaluation = dataclasses.replace(
        tiny.evaluation,
        base=str(made / "base"),
        sft=str(made / "sft"),
        ppo=str(made / "ppo"),
        reward=reward,
    )
    exported = ExportConfig(policy=policy, reward=reward)
    changed = dataclasses.replace(tiny, evaluation=evaluation, export=exported, stages=stages)
    return changed.in_workdir(tmp_path / "run").with_offline_judge("rubric")


def write_decision(folder, pick):
    folder.mkdir(exist_ok=True)
    decision = {"pick": pick, "reason": f"{pick} is released: a judge says so.", "warnings": []}
    figures = {
        "num_prompts": 30,
        "judge": "a-judge",
        "models": {name: {} for name in ("base", "sft", "best_of_n", "ppo")},
        "win_rates": {},
        "held_out_loss": {},
        "kl": {"per_sequence": None},
        "sampling": {"num_samples": 1, "temperature": 1.0, "max_new_tokens": 12},
        "release": decision,
    }
    text = json.dumps(figures)
    (folder / "evaluation.json").write_text(text, encoding="utf-8")


def run_stage(cfg, folder):
    """The export as a run does it, if it is to be run."""
    (stage,) = (one for one in make_stages(cfg, folder) if one.name == "export")
    journal = Journal(folder)
    wanted = unfinished_stages([stage], journal)
    run_stages([stage], journal, wanted)
    return "export" in wanted


def read(folder):
    return json.loads((folder / "export" / "release.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "picks",
    [("ppo", "base"), pytest.param(("sft", "ppo", "best_of_n", "base"), marks=pytest.mark.slow)],
)
def test_what_the_evaluation_decides_is_exported_and_anew_where_it_changes(tmp_path, made, picks):
    cfg, run = recipe(tmp_path, made), tmp_path / "run"
    for pick in picks:
        write_decision(run, pick)
        assert run_stage(cfg, run)
        exported = weights_of(run / "export" / "policy")
        source = "sft" if pick == "best_of_n" else pick
        jax.tree.map(np.testing.assert_array_equal, exported, weights_of(made / source))
        assert read(run)["policy"] == pick
        assert read(run)["sentence"] == f"{pick} is released: a judge says so."
        assert not run_stage(cfg, run)
    card = (run / "export" / "policy" / "README.md").read_text(encoding="utf-8")
    assert "base is released: a judge says so." in card
    assert "not what was released" not in card


def test_best_of_n_says_that_its_weights_are_not_all_of_it(tmp_path, made):
    cfg, run = recipe(tmp_path, made), tmp_path / "run"
    write_decision(run, "best_of_n")
    run_stage(cfg, run)
    assert read(run)["best_of_n"] == {
        "n": 2,
        "temperature": 1.0,
        "max_new_tokens": cfg.evaluation.max_new_tokens,
        "score": dataclasses.asdict(cfg.evaluation.score),
    }
    card = (run / "export" / "policy" / "README.md").read_text(encoding="utf-8")
    assert "alone they are not what was released" in card
    assert "For each prompt 2 answers are drawn at temperature 1" in card


@pytest.mark.parametrize(
    "policy",
    [*(pytest.param(one, marks=pytest.mark.slow) for one in ("base", "sft")), "ppo", "other"],
)
def test_a_policy_that_the_config_names_is_exported_all_the_same(tmp_path, made, policy):
    given = str(made / policy) if policy == "other" else policy
    cfg, run = recipe(tmp_path, made, policy=given), tmp_path / "run"
    write_decision(run, "best_of_n")
    run_stage(cfg, run)
    exported = weights_of(run / "export" / "policy")
    jax.tree.map(np.testing.assert_array_equal, exported, weights_of(made / policy))
    found = read(run)
    assert found["policy"] == ("folder" if policy == "other" else policy)
    assert f"config.export.policy={given!r} is exported" in found["sentence"]
    assert "best_of_n is released: a judge says so." in found["sentence"]
    # Another choice is another export, and no reason to refuse the run.
    assert run_stage(recipe(tmp_path, made, policy="released"), run)
    assert read(run)["policy"] == "best_of_n"


def test_a_base_model_as_it_stands_is_exported_as_the_run_talks_to_it(tmp_path, made):
    """Though its folder brings a template, settings and ids of its own."""
    base = tmp_path / "hub_base"
    base.mkdir()
    hubs.save_qwen(base)
    generation = {"eos_token_id": 9, "bos_token_id": 8, "pad_token_id": 7, "of_its_code": 5}
    generation |= {"do_sample": True, "temperature": 1.3, "top_k": 3, "repetition_penalty": 1.7}
    generation |= {"max_length": 9, "num_beams": 2, "transformers_version": "4.40.0"}
    (base / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    edit_config(base, temperature=1.3, repetition_penalty=1.7, use_cache=True)
    cfg, run = recipe(tmp_path, made, policy="base"), tmp_path / "run"
    sft = dataclasses.replace(
        cfg.sft, data=dataclasses.replace(cfg.sft.data, default_system="Say little.")
    )
    evaluation = dataclasses.replace(
        cfg.evaluation, base=str(base), temperature=0.6, max_new_tokens=17
    )
    cfg = dataclasses.replace(cfg, sft=sft, evaluation=evaluation)
    write_decision(run, "sft")
    run_stage(cfg, run)
    policy = run / "export" / "policy"
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy)
    messages = [{"role": "user", "content": "咳嗽"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "Say little.<病人>：咳嗽 <HuatuoGPT>："
    found = json.loads((policy / "generation_config.json").read_text(encoding="utf-8"))
    assert found == {
        "eos_token_id": [tokenizer.eos_token_id, 9],
        "bos_token_id": 8,
        "pad_token_id": tokenizer.pad_token_id,
        "of_its_code": 5,
        "transformers_version": "4.40.0",
        "do_sample": True,
        "max_new_tokens": 17,
        "temperature": 0.6,
        "top_p": 1.0,
        "top_k": hubs.VOCAB,  # All tokens, in the words of all that read it.
    }
    config = json.loads((policy / "config.json").read_text(encoding="utf-8"))
    assert {name: config[name] for name in ("eos_token_id", "pad_token_id", "use_cache")} == {
        "eos_token_id": found["eos_token_id"],
        "pad_token_id": found["pad_token_id"],
        "use_cache": True,
    }
    assert not {"temperature", "repetition_penalty"} & config.keys()
    model = transformers.AutoModelForCausalLM.from_pretrained(policy)
    assert model.generation_config.temperature == 0.6


def test_without_an_evaluation_the_policy_has_to_be_named(tmp_path, made):
    without = tuple(name for name in STAGES if name != "evaluation")
    message = "export.policy='released' is what the evaluation decides, and stages=.* has no"
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, made, stages=without)
    cfg, run = recipe(tmp_path, made, policy="sft", stages=without), tmp_path / "run"
    run.mkdir()
    run_stage(cfg, run)
    sentence = "config.export.policy='sft' is exported, as the config says."
    assert read(run) == {"policy": "sft", "sentence": sentence, "decision": None}


def test_best_of_n_is_not_released_with_another_reward_model_than_chose(tmp_path):
    cfg = tiny_recipe(tmp_path / "mine.jsonl")
    other = ExportConfig(reward="someone/else")
    with pytest.raises(ValueError, match="export.reward='someone/else' must be evaluation.reward"):
        dataclasses.replace(cfg, export=other)
    other = dataclasses.replace(other, policy="ppo")
    assert dataclasses.replace(cfg, export=other).export.choice == "ppo"


def test_an_export_that_was_interrupted_says_nothing_of_the_one_before(tmp_path, made, monkeypatch):
    cfg, run = recipe(tmp_path, made), tmp_path / "run"
    write_decision(run, "sft")
    run_stage(cfg, run)
    write_decision(run, "ppo")
    monkeypatch.setattr(export, "_checked", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        run_stage(cfg, run)
    assert not (run / "export" / "release.json").exists()
    monkeypatch.undo()
    assert run_stage(cfg, run) and read(run)["policy"] == "ppo"
