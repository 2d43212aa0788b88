"""Every card in configs/ at tiny size, from a base model in a Hub cache to the exported models.

Only sizes are changed, and what would leave the machine: the data set and the judge's server.
"""

import json
import pathlib
import subprocess
import sys

import jax
import pytest
import torch
import transformers

from huatuo_jax.checkpoint.convert import convert
from huatuo_jax.core import sharding
from huatuo_jax.core.config import load_card, replaced
from huatuo_jax.data.chat.templates import by_name
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.data.records import Message
from huatuo_jax.generation.samples import SamplesConfig
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.recipe.config import STAGE_RUNS
from huatuo_jax.recipe.recipe import run_rlaif
from huatuo_jax.reward.export import export_reward_model
from huatuo_jax.sft import run_sft
from huatuo_jax.training.dialogue_data import SourceConfig
from huatuo_jax.training.loop import LoopConfig
from tests import hub_server as hubs
from tests.recipe.tiny import CLINIC, write_dialogues

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
ROW, ANSWER = 320, 8
DIALOGUE = [Message("user", "咳嗽三天了。"), Message("assistant", "多喝水。")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name in ("baichuan", "llama", "qwen"):
        (root / name).mkdir()
        getattr(hubs, f"save_{name}")(root / name)
    return root


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    made = hubs.Hub(tmp_path / "cache")
    made.add(hubs.BAICHUAN, folders / "baichuan")
    made.add(hubs.ZIYA, folders / "llama")
    made.add(hubs.QWEN, folders / "qwen")
    made.patch(monkeypatch)
    return made


@pytest.fixture
def one_device(monkeypatch):
    """Meshes of all devices have one, in this test and not in the next."""
    make_mesh = sharding.make_mesh

    def make(*, devices=None, **sizes):
        return make_mesh(**sizes, devices=devices or jax.devices()[:1])

    monkeypatch.setattr(sharding, "make_mesh", make)


@pytest.fixture
def data(tmp_path):
    write_dialogues(tmp_path / "mine.jsonl", count=40)
    return str(tmp_path / "mine.jsonl")


def card(name, *argument):
    return load_card(":".join([str(CONFIGS / f"{name}.py"), *argument]))


LOOP = LoopConfig(evaluate_every=2, checkpoint_every=2, log_every=1, tensorboard=False)
HELD_OUT = HeldOutConfig(share=0.25)


def shrink(config, *, batch=8):
    """Few steps of short rows, in every stage that the card has."""
    changes = {}
    if "sft" in config.stages:
        changes |= {
            "sft.data.row_length": ROW,
            "sft.data.held_out": HELD_OUT,
            "sft.data.num_threads": 0,
            "sft.num_steps": 2,
            "sft.batch_size": batch,
            "sft.loop": LOOP,
            "sft.samples": SamplesConfig(num_prompts=1, max_new_tokens=ANSWER),
        }
    for name in {"reward", "dpo"} & set(config.stages):
        changes |= {
            f"{name}.data.max_length": ROW,
            f"{name}.data.row_length": 2 * ROW,
            f"{name}.data.held_out": HELD_OUT,
            # The sample's answers are longer than these rows, above all in another vocabulary.
            f"{name}.data.max_left_out_share": 1.0,
            f"{name}.loop": LOOP,
            f"{name}.num_steps": 2,
            f"{name}.batch_size": batch,
        }
    if "ppo" in config.stages:
        changes |= {
            "ppo.rollout.num_prompts": batch,
            "ppo.rollout.max_new_tokens": ANSWER,
            "ppo.data.max_prompt_tokens": 300,
            "ppo.num_iterations": 1,
            "ppo.num_epochs": 1,
            "ppo.num_minibatches": 1,
            "ppo.value.warmup_iterations": 0,
            "ppo.optimizer.warmup_steps": 0,
            "ppo.loop.checkpoint_every": 1,
            "ppo.loop.tensorboard": False,
        }
        if config.ppo.value.optimizer is not None:
            changes["ppo.value.optimizer.warmup_steps"] = 0
    return replaced(config, changes)


def shrink_recipe(config, data):
    return replaced(
        shrink(config),
        {
            "data": data,
            "judge.base_url": None,
            "prompts.limit": 8,
            "prompts.held_out_limit": 4,
            "answers.num_samples": 3,
            "answers.sampling.max_new_tokens": ANSWER,
            "evaluation.num_samples": 2,
            "evaluation.max_new_tokens": ANSWER,
        },
    )


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def check_policy(export, trained, *, template, tokenizer):
    """It loads, says a dialogue as in training, and stops where training did."""
    found = load_tokenizer(export)
    expected = by_name(template).render(DIALOGUE, load_tokenizer(tokenizer)).token_ids
    assert by_name(template).render(DIALOGUE, found).token_ids == expected
    assert by_name(template).render(DIALOGUE, load_tokenizer(trained)).token_ids == expected
    stops = [*by_name(template).stop_token_ids(found)]
    for name in ("config.json", "generation_config.json"):
        ids = read(export, name)["eos_token_id"]
        assert (ids if isinstance(ids, list) else [ids]) == stops
    theirs = transformers.AutoTokenizer.from_pretrained(export)
    messages = [message._asdict() for message in DIALOGUE]
    text = theirs.apply_chat_template(messages, tokenize=False)
    assert text == by_name(template).text(DIALOGUE, found)
    model = transformers.AutoModelForCausalLM.from_pretrained(export)
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([expected])).logits.float()).all()


def check_recipe(workdir, *, template, tokenizer):
    check_policy(
        workdir / "export" / "policy",
        workdir / "ppo" / "model",
        template=template,
        tokenizer=tokenizer,
    )
    for stage in ("sft", "reward"):
        found = load_tokenizer(workdir / stage / "model")
        assert found.get_vocab() == load_tokenizer(tokenizer).get_vocab()
    reward = transformers.AutoModelForSequenceClassification.from_pretrained(
        workdir / "export" / "reward"
    )
    assert reward.config.num_labels == 1
    assert (workdir / "report.html").is_file()


def run_recipe(config, workdir, **expected):
    run_rlaif(config, workdir)
    check_recipe(workdir, **expected)


@pytest.mark.parametrize("cards", ["rlaif.py", pytest.param("*.py", marks=pytest.mark.slow)])
def test_reading_cards_and_taking_a_base_model_leave_the_devices_alone(folders, cards):
    """Several processes join before jax looks for devices, which it does only once."""
    read_all = """
import pathlib, sys
from jax._src import xla_bridge
from huatuo_jax.core.config import load_card, replaced
from huatuo_jax.recipe.base_model import adapted

for path in sorted(pathlib.Path(sys.argv[1]).glob(sys.argv[3])):
    load_card(str(path))
    assert not xla_bridge.backends_are_initialized(), path.name
adapted(replaced(load_card(f"{sys.argv[1]}/rlaif.py"), {"base_model": sys.argv[2]}))
assert not xla_bridge.backends_are_initialized(), "a base model"
"""
    command = [sys.executable, "-c", read_all, str(CONFIGS), str(folders / "qwen"), cards]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_7b_card_runs_from_its_hub_id_to_its_export(hub, data, tmp_path):
    """Fine-tuning, then the export: the shortest way through what a Hub id has to carry."""
    config = card("huatuogpt_7b")
    assert config.sft.model.directory == hubs.BAICHUAN
    sources = (SourceConfig(name="mine", paths=(data,)),)
    config = replaced(shrink(config), {"sft.data.sources": sources})
    run_sft(config.sft, tmp_path / "run")
    trained, export = tmp_path / "run" / "sft" / "model", tmp_path / "export"
    convert(str(trained), export)
    check_policy(export, trained, template="huatuogpt", tokenizer=hubs.BAICHUAN)
    assert not list(export.glob("*.py"))


@pytest.mark.slow
def test_the_7b_recipe_runs_from_its_hub_id_to_its_export(hub, data, tmp_path):
    config = card("huatuogpt_7b")
    config = shrink_recipe(config, data)
    run_recipe(config, tmp_path / "run", template="huatuogpt", tokenizer=hubs.BAICHUAN)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_the_7b_card_with_adapters_runs_on_its_one_device(hub, data, tmp_path):
    config = card("huatuogpt_7b_lora")
    config = shrink_recipe(config, data)
    assert config.sft.model.lora is not None
    run_recipe(config, tmp_path / "run", template="huatuogpt", tokenizer=hubs.BAICHUAN)


@pytest.mark.slow
def test_the_13b_card_runs_from_its_hub_id(hub, data, tmp_path):
    config = card("huatuogpt_13b")
    config = shrink_recipe(config, data)
    run_recipe(config, tmp_path / "run", template="huatuogpt", tokenizer=hubs.ZIYA)


@pytest.mark.slow
def test_the_13b_card_runs_from_a_delta_and_its_base(hub, folders, data, tmp_path):
    """Both on the Hub; the delta has no tokenizer, as its base has one."""
    for name in ("delta", "base"):
        (tmp_path / name).mkdir()
        hubs.save_llama(tmp_path / name)
    (tmp_path / "delta" / "tokenizer.model").unlink()
    (tmp_path / "delta" / "tokenizer_config.json").unlink()
    hubs.rewrite_weights(
        tmp_path / "delta",
        lambda tensors: [tensor.mul_(0.25) for name, tensor in tensors.items() if "layers" in name],
    )
    hub.add("someone/delta", tmp_path / "delta")
    hub.add("someone/base", tmp_path / "base")
    convert("someone/delta", tmp_path / "whole", delta_base="someone/base")
    config = card("huatuogpt_13b")
    config = replaced(shrink_recipe(config, data), {"sft.model.directory": str(tmp_path / "whole")})
    run_recipe(config, tmp_path / "run", template="huatuogpt", tokenizer="someone/base")


@pytest.mark.slow
def test_the_qwen_card_runs_in_the_template_of_its_tokenizer(hub, data, tmp_path):
    config = card("qwen2_5_7b")
    config = shrink_recipe(config, data)
    run_recipe(config, tmp_path / "run", template="tokenizer", tokenizer=hubs.QWEN)
    template = load_tokenizer(tmp_path / "run" / "export" / "policy").chat_template
    assert template == hubs.QWEN_TEMPLATE


@pytest.mark.slow
def test_the_demo_card_runs_to_its_export(data, tmp_path):
    config = card("rlaif")
    tokenizer = config.sft.model.tokenizer
    config = replaced(
        shrink(config),
        {
            "clinic": CLINIC,
            "prompts.limit": 8,
            "prompts.held_out_limit": 4,
            "evaluation.num_samples": 2,
            "answers.sampling.max_new_tokens": ANSWER,
            "evaluation.max_new_tokens": ANSWER,
        },
    )
    run_recipe(config, tmp_path / "run", template="huatuogpt", tokenizer=tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ppo"])
def test_a_card_of_single_stages_runs_to_the_export(name, tmp_path):
    config = card(name)
    tokenizer = config.sft.model.tokenizer
    run_stages(config, tmp_path / "run")
    assert config.stages[-1] == name
    export_last(name, tmp_path, tokenizer=tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reward", "dpo", "ppo"])
def test_a_card_of_single_stages_takes_a_hub_id_for_its_model(name, hub, folders, tmp_path):
    argument = hubs.BAICHUAN
    if name == "ppo":
        run_stages(card("reward", hubs.BAICHUAN), tmp_path / "before")
        hub.add("someone/reward", tmp_path / "before" / "reward" / "model")
        prompts = [{"id": str(n), "question": f"第{n}天还咳嗽。"} for n in range(8)]
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in prompts)
        (tmp_path / "prompts.jsonl").write_text(text, encoding="utf-8")
        argument = f"{hubs.BAICHUAN},{tmp_path / 'before' / 'reward' / 'model'}"
        argument += f",{tmp_path / 'prompts.jsonl'}"
    config = card(name, argument)
    assert config.stages == (name,)
    run_stages(config, tmp_path / "run")
    export_last(name, tmp_path, tokenizer=hubs.BAICHUAN)


def run_stages(config, workdir):
    config = shrink(config)
    for stage in config.stages:
        STAGE_RUNS[stage](getattr(config, stage), workdir)


def export_last(name, folder, *, tokenizer):
    trained, export = folder / "run" / name / "model", folder / "export"
    if name == "reward":
        export_reward_model(trained, export)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(export)
        assert model.config.pad_token_id == load_tokenizer(export).pad_token_id
        return
    convert(str(trained), export)
    check_policy(export, trained, template="huatuogpt", tokenizer=tokenizer)
