"""A base model of one's own in the recipe: which settings follow from it, and what is refused."""

import dataclasses
import json

import pytest

from huatuo_jax.backbone.config import preset
from huatuo_jax.checkpoint.models import find_model
from huatuo_jax.core.command_line import parse_with_config
from huatuo_jax.core.config import checked, load_card
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.recipe import base_model
from huatuo_jax.recipe.base_model import SIZES, adapted, num_parameters, recipe
from huatuo_jax.recipe.config import STAGES, RlaifConfig
from huatuo_jax.recipe.recipe import run_rlaif
from huatuo_jax.training.loop import check_rows
from tests import hub_server as hubs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workdir:
    workdir: str = "w"


def parse(*arguments):
    """The config as `launch/train.py` has it."""
    _, config = parse_with_config(
        Workdir,
        ["--config=configs/rlaif.py", *arguments],
        name="x",
        first=base_model.FIRST,
        adapt=adapted,
    )
    return checked(config, RlaifConfig, path="config")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    hubs.save_qwen(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    hubs.save_llama(folder)
    return str(folder)


def test_without_a_base_model_the_card_stays_as_it_is():
    assert parse("--config.base_model=None") == load_card("rlaif")


def test_the_rows_of_the_demo_divide_over_eight_devices():
    card = load_card("rlaif")
    for section in (card.sft, card.reward, card.ppo):
        check_rows(section.rows_at_once, name="rows", mesh=section.mesh.make())


def test_template_model_and_settings_follow_from_the_base_model(qwen):
    cfg = parse(f"--config.base_model={qwen}", "--config.data=mine.jsonl")
    card = load_card("rlaif")
    assert (cfg.sft.model.directory, cfg.sft.model.backbone) == (qwen, None)
    templates = {cfg.sft.data.template, cfg.reward.data.template, cfg.ppo.data.template}
    assert templates | {cfg.evaluation.template} == {"tokenizer"}
    # The demo's own model takes one device, another one all there are.
    assert {cfg.sft.mesh, cfg.reward.mesh, cfg.ppo.mesh} == {MeshConfig()}
    assert cfg.sft.optimizer.learning_rate == SIZES[0].rates[0]
    assert cfg.sft.data.row_length == hubs.POSITIONS
    assert cfg.ppo.data.max_prompt_tokens + cfg.ppo.rollout.max_new_tokens == hubs.POSITIONS
    kept = ("data", "clinic", "judge", "labels", "stages", "export", "report")
    assert [getattr(cfg, name) for name in kept] == [
        "mine.jsonl",
        *(getattr(card, name) for name in kept[1:]),
    ]


def test_a_tokenizer_without_a_template_speaks_huatuogpts(llama):
    assert parse(f"--config.base_model={llama}").sft.data.template == "huatuogpt"


# As Qwen3's: the last answer has a block for thoughts, and those before it have none.
THINKING_TEMPLATE = hubs.QWEN_TEMPLATE.replace(
    "message['content']",
    "('<think>\\n\\n</think>\\n\\n' if loop.last and message['role'] == 'assistant' else '') +"
    " message['content']",
)


def test_a_template_that_conversations_cannot_be_trained_in_gives_way_to_chatml(tmp_path):
    hubs.save_qwen(tmp_path, template=THINKING_TEMPLATE)
    assert parse(f"--config.base_model={tmp_path}").sft.data.template == "chatml"


def test_a_template_that_cannot_be_trained_in_gives_way_to_huatuogpts_without_chatmls_tokens(
    tmp_path,
):
    hubs.save_llama(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.chat_template = THINKING_TEMPLATE.replace("<|im_end|>", "</s>")
    tokenizer.save_pretrained(tmp_path)
    assert parse(f"--config.base_model={tmp_path}").sft.data.template == "huatuogpt"


def test_fields_given_beside_a_base_model_replace_what_follows_from_it(qwen):
    cfg = parse("--config.sft.num_epochs=1", f"--config.base_model={qwen}", "--config.ppo.seed=7")
    assert (cfg.sft.num_epochs, cfg.ppo.seed, cfg.sft.batch_size) == (1, 7, SIZES[0].rows[0])


def test_adapters_are_trained_where_asked_for_and_in_models_too_large_for_all_weights(qwen):
    cfg = parse(f"--config.base_model={qwen}", "--config.trained=adapters")
    assert None not in {cfg.sft.model.lora, cfg.reward.model.lora, cfg.ppo.model.lora}
    assert (cfg.ppo.value.start, cfg.sft.batch_size) == ("shared", SIZES[0].rows[0])
    large = adapted(dataclasses.replace(load_card("rlaif"), base_model="Qwen/Qwen2.5-7B"))
    assert large.sft.model.lora == base_model.LORA
    weights = dataclasses.replace(load_card("rlaif"), base_model="Qwen/Qwen2.5-7B")
    weights = adapted(dataclasses.replace(weights, trained="weights"))
    assert weights.sft.model.lora is None and weights.sft.optimizer.learning_rate == 5e-5


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch, qwen):
    """A Hub with the tokenizer that a published name has."""
    made = hubs.Hub(tmp_path / "cache")
    made.add("Qwen/Qwen2.5-7B", qwen)
    made.patch(monkeypatch)


def test_parameters_are_counted_as_they_are_stored(qwen):
    weights = json.loads((find_model(qwen).folder / "config.json").read_text(encoding="utf-8"))
    assert num_parameters(find_model(qwen).cfg) >= weights["vocab_size"] * weights["hidden_size"]
    assert num_parameters(preset("qwen2.5_0.5b")) == pytest.approx(494e6, rel=0.01)
    assert num_parameters(preset("baichuan_7b")) == pytest.approx(7.0e9, rel=0.01)


def test_fields_of_all_stages_stand_once_and_a_stages_own_replaces_them(qwen):
    cfg = parse(
        "--config.template=chatml",
        "--config.max_length=256",
        "--config.compute.remat=full",
        "--config.mesh.fsdp=4",
        "--config.mesh.data=2",
        "--config.reward.compute.remat=none",
        "--config.ppo.rollout.max_new_tokens=56",
    )
    assert {cfg.sft.data.template, cfg.ppo.data.template, cfg.evaluation.template} == {"chatml"}
    assert [getattr(cfg, name).compute.remat for name in ("sft", "reward", "ppo")] == [
        "full",
        "none",
        "full",
    ]
    assert {getattr(cfg, name).mesh for name in ("sft", "reward", "ppo")} == {
        MeshConfig(data=2, fsdp=4)
    }
    assert (cfg.sft.data.row_length, cfg.reward.data.max_length) == (256, 256)
    assert cfg.ppo.data.max_prompt_tokens == 256 - 100  # The card's responses.
    with pytest.raises(ValueError, match="max_length=50 must be more than ppo.rollout.max_new_"):
        parse("--config.max_length=50")


def test_a_field_that_no_stage_follows_is_refused(tmp_path):
    config = dataclasses.replace(load_card("rlaif"), template="chatml")
    with pytest.raises(ValueError, match="config.template='chatml' is followed by no stage; hua"):
        run_rlaif(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    base_model.check_adapted(recipe(template="chatml"))


def test_from_python_the_same_fields_make_the_same_config(qwen):
    made = recipe(base_model=qwen, data="mine.jsonl", sft__num_epochs=1)
    arguments = (f"--config.base_model={qwen}", "--config.data=mine.jsonl")
    assert made == parse(*arguments, "--config.sft.num_epochs=1")


@pytest.mark.parametrize("card", ["sft", "reward", "dpo", "ppo"])
def test_cards_of_single_stages_take_the_same_fields(card, qwen):
    cfg = recipe(card, base_model=qwen, data="mine.jsonl", max_length=256)
    assert cfg.sft.model.directory == qwen and cfg.sft.data.sources[0].paths == ("mine.jsonl",)
    last = getattr(cfg, cfg.stages[-1])
    assert last.data.template == "tokenizer" and cfg.stages == load_card(card).stages
    if card != "sft":
        assert last.model.directory == "{workdir}/sft/model"


@pytest.mark.parametrize("card", ["reward", "dpo"])
def test_a_stage_of_its_own_starts_from_the_base_model_and_reads_the_data(card, qwen):
    cfg = recipe(f"{card}:some/model,some.jsonl", base_model=qwen, data="mine.jsonl")
    stage = getattr(cfg, card)
    assert (stage.model.directory, stage.data.sources[0].paths) == (qwen, ("mine.jsonl",))


def test_what_cannot_be_a_base_model_is_one_clear_message(tmp_path, qwen):
    with pytest.raises(OSError, match="config.base_model='nowhere/at-all': "):
        parse("--config.base_model=nowhere/at-all")
    with pytest.raises(ValueError, match="is a preset, .*: give sft.model.tokenizer"):
        adapted(
            dataclasses.replace(load_card("configs/huatuogpt_7b.py"), base_model="qwen2.5_0.5b")
        )
    with pytest.raises(ValueError, match="trained='adapters' needs a base_model"):
        parse("--config.trained=adapters")
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}', encoding="utf-8")
    with pytest.raises(ValueError, match="config.base_model=.*mamba"):
        parse(f"--config.base_model={tmp_path}")
    with pytest.raises(ValueError, match="invalid choice 'some' for argument '--config.trained'"):
        parse(f"--config.base_model={qwen}", "--config.trained=some")


ONE, EIGHT = "qwen3_0_6b", "qwen3_0_6b:v5e-8"


@pytest.mark.parametrize(
    ("card", "base", "template"),
    [
        (ONE, "Qwen/Qwen3-0.6B", "chatml"),
        (EIGHT, "Qwen/Qwen3-0.6B", "chatml"),
        ("qwen2_5_1_5b", "Qwen/Qwen2.5-1.5B", "tokenizer"),
        ("qwen2_5_1_5b:v5e-8", "Qwen/Qwen2.5-1.5B", "tokenizer"),
    ],
)
def test_a_card_of_small_hardware_is_the_recipe_of_its_base_model_without_a_network(
    card, base, template, monkeypatch
):
    monkeypatch.setattr(base_model, "load_tokenizer", None)
    cfg = checked(load_card(card), RlaifConfig, path="config")
    assert cfg.base_model == cfg.sft.model.directory == base and cfg.stages == STAGES
    assert cfg.sft.data.template == cfg.evaluation.template == template
    assert cfg.sft.data.sources == load_card("rlaif").sft.data.sources
    assert cfg.sft.data.row_length == SIZES[1].row_length
    assert cfg.answers.slots == cfg.ppo.rollout.slots == cfg.evaluation.slots is not None


def test_one_device_trains_adapters_and_eight_train_weights_in_rows_that_they_divide():
    one, eight = load_card(ONE), load_card(EIGHT)
    assert one.sft.model.lora == one.ppo.value.lora == base_model.LORA
    assert eight.sft.model.lora is eight.ppo.value.lora is None
    stages = (eight.sft, eight.reward, eight.ppo)
    assert all(stage.micro_batch_size % 8 == 0 for stage in stages)
    assert eight.sft.optimizer.learning_rate == SIZES[1].rates[0]


def test_hardware_that_a_card_does_not_know_is_refused_with_what_it_knows():
    with pytest.raises(ValueError, match="hardware='v5e-4' must be one of one, v5e-8"):
        load_card("qwen3_0_6b:v5e-4")


def test_a_card_of_small_hardware_gives_way_to_another_base_model(qwen):
    flags, cfg = parse_with_config(
        Workdir,
        ["--config=qwen3_0_6b:v5e-8", f"--config.base_model={qwen}"],
        name="x",
        first=base_model.FIRST,
        adapt=adapted,
    )
    assert cfg.sft.model.directory == qwen and cfg.sft.data.template == "tokenizer"
    assert cfg.sft.model.lora is None
