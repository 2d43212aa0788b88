"""The stage as a user runs it: sample data, a model to start from, a folder with the results."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from huatuo_jax.backbone.lora import LoraConfig
from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.checkpoint.models import find_model, load_params
from huatuo_jax.clinic.files import TOKENIZER as TOKENIZER_OF_CLINIC
from huatuo_jax.clinic.files import ClinicConfig, ClinicSizes
from huatuo_jax.core import sharding
from huatuo_jax.core.config import replaced
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.data import SAMPLE_FOLDER
from huatuo_jax.data.chat import templates
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.data.readers import read_dialogues
from huatuo_jax.data.records import KINDS
from huatuo_jax.generation.samples import SamplesConfig, read_samples
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.sft import SftConfig, abstract_rows, clinic_sources, run_sft, sft_step
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig
from huatuo_jax.training.initial_model import ModelConfig, open_model
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.metrics import read_rows
from huatuo_jax.training.optimizer import OptimizerConfig
from huatuo_jax.training.programs import MEMORY_VARIABLE
from huatuo_jax.training.update import update_program
from tests import made_up_memory, shared_programs
from tests.tiny import TOKENIZER, backbone

ROOT = pathlib.Path(__file__).parents[1]
BACKBONE = backbone(num_kv_heads=1)


def _config(cache, **model):
    model = model or {"backbone": BACKBONE}
    sources = tuple(
        SourceConfig(name=kind, paths=(str(SAMPLE_FOLDER / f"{kind}.jsonl"),), kind=kind)
        for kind in KINDS
    )
    settings = SftConfig(
        model=ModelConfig(tokenizer=TOKENIZER, **model),
        data=DataConfig(
            sources=sources,
            row_length=256,
            held_out=HeldOutConfig(share=0.1),
            cache=str(cache),
            num_processes=1,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-2, warmup_steps=2),
        num_steps=8,
        batch_size=8,
        samples=SamplesConfig(num_prompts=3, max_new_tokens=8),
        loop=LoopConfig(evaluate_every=4, checkpoint_every=4, tensorboard=False),
    )
    return settings


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, run_sft(_config(cache), workdir)


def test_held_out_loss_falls_and_is_told_for_each_kind(trained):
    workdir, result = trained
    rows = [row for row in read_rows(workdir / "sft" / "metrics.jsonl") if "eval/loss" in row]
    assert [row["step"] for row in rows] == [4, 8]
    assert result["eval/loss"] < rows[0]["eval/loss"] < np.log(2048)
    assert {f"eval/loss/{kind}" for kind in KINDS} <= set(result)
    assert result["step"] == 8


def test_what_became_of_each_row_stands_beside_the_metrics(trained):
    workdir, _ = trained
    account = json.loads((workdir / "sft" / "data.json").read_text(encoding="utf-8"))
    assert account["rows"] == account["rows_used"] == account["records"] > 100
    assert account["records"] == sum(
        sum(account[name].values()) for name in ("used", "set_aside", "left_out")
    )


def test_samples_of_every_evaluation_are_what_the_model_would_say(trained):
    workdir, _ = trained
    rows = read_samples(workdir / "sft" / "samples.jsonl")
    assert [(row["step"], row["id"]) for row in rows] == [
        (step, row["id"]) for step in (4, 8) for row in rows[:3]
    ]
    assert len({row["id"] for row in rows}) == 3
    # The prompt of the ids of training is the one that a user's question would give.
    found = find_model(workdir / "sft" / "model")
    tokenizer = load_tokenizer(TOKENIZER)
    template = templates.by_name("huatuogpt")
    dialogues = {
        dialogue.id: dialogue
        for kind in KINDS
        for dialogue in read_dialogues(SAMPLE_FOLDER / f"{kind}.jsonl", source=kind)
    }
    model, params = Transformer(found.cfg), load_params(found)
    read = jax.jit(model.apply)
    for row in rows[3:]:
        messages = dialogues[row["id"]].messages
        # Long dialogues have lost their oldest turns.
        possible = {
            tokenizer.decode(ids): ids
            for start in range(0, len(messages) - 1, 2)
            for ids in [template.prompt(messages[start:-1], tokenizer)]
        }
        prompt_ids = possible[row["prompt"]]
        assert row["reference"].strip() == messages[-1].content.strip()
        logits_BTV = (
            read({"params": params}, jnp.asarray([prompt_ids])) @ params["lm_head"]["kernel"]
        )
        best = int(logits_BTV[0, -1, :2048].argmax())
        assert row["answer"].startswith(tokenizer.decode([best], skip_special_tokens=True))


def test_the_model_it_leaves_is_the_last_state_and_loads_by_itself(trained):
    workdir, _ = trained
    model = find_model(workdir / "sft" / "model")
    assert model.cfg == BACKBONE and model.form == "orbax"
    params = load_params(model)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    assert len(load_tokenizer(str(workdir / "sft" / "model"))) == 2048


def test_a_finished_stage_is_not_run_again(trained, cache):
    workdir, result = trained
    before = (workdir / "sft" / "metrics.jsonl").stat().st_mtime_ns
    assert run_sft(_config(cache), workdir) == result
    assert (workdir / "sft" / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_setting_that_decides_results_may_not_change(trained, cache):
    changes = {"optimizer.learning_rate": 1e-4, "data.template": "chatml"}
    config = replaced(_config(cache), changes)
    with pytest.raises(ValueError) as error:
        run_sft(config, trained[0])
    message = str(error.value)
    assert "stage 'sft'" in message
    assert "optimizer.learning_rate: saved 0.03, now 0.0001" in message
    assert 'data.template: saved "huatuogpt", now "chatml"' in message


def test_settings_of_the_machine_may_change(trained, cache):
    workdir, result = trained
    config = replaced(
        _config(cache),
        {
            "micro_batch_size": 4,
            "mesh": MeshConfig(data=1, fsdp=4, tensor=2),
            "compute.remat": "full",
            "loop.evaluate_every": 2,
        },
    )
    # One key/value head does not divide over two tensor shards: but nothing is run again.
    assert run_sft(config, workdir) == result


@pytest.mark.slow
def test_auto_takes_the_most_rows_that_fit_and_changes_no_number(
    cache, tmp_path, monkeypatch, capsys, caplog
):
    make_mesh = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda *, devices=None, **axes: make_mesh(**axes))
    small = {"num_steps": 2, "batch_size": 4, "samples.num_prompts": 0, "loop.evaluate_every": 2}
    config = replaced(_config(cache), small)
    model = open_model(config.model, config.compute.compute_config())
    mesh = config.mesh.make()

    def programs(size):
        step = sft_step(replaced(config, {"micro_batch_size": size}), model, mesh, num_steps=2)
        return [update_program("sft", step, abstract_rows(config, mesh), mesh)]

    expected = run_sft(config, tmp_path / "whole")
    made_up_memory.make_up(monkeypatch, programs_of=programs, fits=2, too_large=4)
    capsys.readouterr()
    shared_programs.apart(monkeypatch)
    jax.config.update("jax_log_compiles", True)
    try:
        found = run_sft(config, tmp_path / "auto")
    finally:
        jax.config.update("jax_log_compiles", False)
    assert made_up_memory.told("sft", size=2, rows=4) in capsys.readouterr().err
    # The program that was tried is the one that runs, and is compiled once.
    compiled = [one for one in caplog.messages if "XLA compilation of jit(update)" in one]
    assert len(compiled) == len({4, 1, 2})
    assert found == pytest.approx(expected, rel=1e-5)
    losses = [
        [row["train/loss"] for row in read_rows(tmp_path / run / "sft" / "metrics.jsonl")[:2]]
        for run in ("auto", "whole")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    settings = json.loads((tmp_path / "auto" / "config.json").read_text())["sft"]
    assert settings["settings"]["micro_batch_size"] == "auto"
    # Another start may choose another: with a memory for less, or for all.
    monkeypatch.setenv(MEMORY_VARIABLE, "1000")
    longer = replaced(config, {"num_steps": 2, "loop.log_every": 1})
    assert run_sft(longer, tmp_path / "auto") == found


def _changed(cache, path, value):
    return replaced(_config(cache), {path: value})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optimiser", {}, "SftConfig has no field 'optimiser'; it has .*batch_size"),
        ("optimizer.lr", 1e-3, "OptimizerConfig has no field 'lr'"),
        ("batch_size", 12, "micro_batch_size=12 rows must be a multiple of the 8 shards"),
        ("mesh.fsdp", 3, "mesh data=1 x fsdp=3 x tensor=1 needs 3 devices, there are 8"),
        ("micro_batch_size", 3, "micro_batch_size=3 must divide batch_size=8"),
        ("data.row_length", 512, "row_length=512 must be at most the model's 256 positions"),
        ("data.template", "alpaca", "template: 'alpaca' is not known"),
        ("model.preset", "llama_7b", "given by preset and backbone; give exactly one"),
        ("model.backbone.vocab_size", 2000, "has 2048 tokens, more than the model's"),
        ("optimizer.warmup_steps", 9, "warmup_steps=9 must be at most the 8 updates"),
    ],
)
def test_a_wrong_setting_ends_in_one_clear_message(cache, tmp_path, path, value, message):
    with pytest.raises(ValueError, match=message):
        run_sft(_changed(cache, path, value), tmp_path)
    assert not (tmp_path / "sft" / "metrics.jsonl").exists()


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_adapters_are_trained_beside_a_model_from_disk_and_merged(base_model, cache, tmp_path):
    config = _config(cache, directory=str(base_model), lora=LoraConfig(rank=4, alpha=8.0))
    run_sft(replaced(config, {"num_steps": 2}), tmp_path)
    before = load_params(find_model(base_model))
    after = load_params(find_model(tmp_path / "sft" / "model"))
    for name, is_adapted in (("qkv", True), ("output", True)):
        kernels = [tree["layers"]["attention"][name]["kernel"] for tree in (before, after)]
        assert np.array_equal(*kernels) != is_adapted
    np.testing.assert_array_equal(before["embedding"]["table"], after["embedding"]["table"])


def test_a_model_from_disk_is_told_by_its_content_not_by_its_place(base_model, cache, tmp_path):
    from huatuo_jax.checkpoint.models import fingerprint

    moved = tmp_path / "moved"
    moved.mkdir()
    for path in base_model.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert fingerprint(moved) == fingerprint(base_model)
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert fingerprint(moved) != fingerprint(base_model)


def _launch(*arguments):
    environment = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu")
    return subprocess.run(
        [sys.executable, "launch/train.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.slow
def test_the_clinic_is_written_before_it_is_read_and_found_again(tmp_path):
    cfg = _config(tmp_path / "cache")
    sizes = ClinicSizes(
        dialogues=24, held_out_dialogues=12, prompts=2, held_out_prompts=2, cases=2, exams=2
    )
    cfg = dataclasses.replace(
        cfg,
        clinic=ClinicConfig(seed=4, sizes=sizes),
        model=dataclasses.replace(cfg.model, tokenizer=str(TOKENIZER_OF_CLINIC)),
        data=dataclasses.replace(cfg.data, sources=clinic_sources()),
        num_steps=2,
        samples=SamplesConfig(num_prompts=0),
    )
    result = run_sft(cfg, tmp_path / "run")
    assert result["step"] == 2 and {f"eval/loss/{kind}" for kind in KINDS} <= set(result)
    assert (tmp_path / "run" / "clinic" / "clinic.json").is_file()
    assert run_sft(cfg, tmp_path / "run") == result
    other = dataclasses.replace(cfg, clinic=ClinicConfig(seed=5, sizes=sizes))
    with pytest.raises(ValueError, match="another clinic .*seed: 4 before, 5 now"):
        run_sft(other, tmp_path / "run")


@pytest.mark.slow
def test_the_command_runs_the_default_config_for_a_few_steps(tmp_path):
    done = _launch(
        "--config=configs/sft.py",
        f"--workdir={tmp_path}",
        "--config.sft.num_steps=2",
        "--config.sft.batch_size=2",
        "--config.sft.clinic.seed=3",
        "--config.sft.clinic.sizes.dialogues=60",
    )
    assert done.returncode == 0, done.stderr
    clinic = json.loads((tmp_path / "clinic" / "clinic.json").read_text())
    assert (clinic["seed"], clinic["sizes"]["dialogues"]) == (3, 60)
    assert "sft: finished in" in done.stdout and "eval/loss" in done.stdout
    assert json.loads((tmp_path / "config.json").read_text())["sft"]["settings"]["batch_size"] == 2


@pytest.mark.slow
def test_the_command_refuses_a_bad_setting_in_one_line(tmp_path):
    done = _launch("--config=configs/sft.py", f"--workdir={tmp_path}", "--config.sft.batch_size=0")
    assert done.returncode == 1
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith("error: config.sft: batch_size=0 must be")
