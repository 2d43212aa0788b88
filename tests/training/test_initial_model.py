"""What a trained model's folder holds beside the weights, wherever each part came from."""

import json
import shutil

import jax
import pytest
import transformers

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.backbone.lora import LoraConfig
from huatuo_jax.checkpoint.convert import convert
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.data.chat.templates import by_name
from huatuo_jax.data.records import Message
from huatuo_jax.hf.tokenizer import load_tokenizer, save_tokenizer
from huatuo_jax.recipe.checks import _say_alike, _tell_other_tokens
from huatuo_jax.training.initial_model import ComputeSection, ModelConfig, open_model
from huatuo_jax.training.optimizer import OptimizerConfig, make_optimizer
from tests import hub_server as hubs
from tests.tiny import TOKENIZER, backbone

TINY = backbone(vocab_size=hubs.VOCAB, num_layers=1, num_kv_heads=1, max_positions=64)
DIALOGUE = [Message("user", "头痛三天了。"), Message("assistant", "多喝水。")]
pytestmark = pytest.mark.usefixtures("on_one_device")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Qwen-like and a LLaMA-like model's folders."""
    root = tmp_path_factory.mktemp("folders")
    for name, save in (("qwen", hubs.save_qwen), ("llama", hubs.save_llama)):
        (root / name).mkdir()
        save(root / name)
    return root


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    made = hubs.Hub(tmp_path / "cache")
    made.add("someone/tiny-chat", folders / "qwen")
    made.patch(monkeypatch)
    return made


def saved(tmp_path, *, template="chatml", head="lm", **section):
    """A model's folder as a stage leaves it, before its first step."""
    model = open_model(ModelConfig(**section), ComputeSection().compute_config(), head=head)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0), num_steps=1)
    state = model.make_state(jax.random.key(0), optimizer, MeshConfig().make())
    chosen = by_name(template)
    tokenizer = model.load_tokenizer("sft", chosen)
    folder = tmp_path / "saved" / head
    model.save(state.variables, folder, template=chosen, tokenizer=tokenizer)
    return folder


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def ids_of(folder):
    return by_name("chatml").render(DIALOGUE, load_tokenizer(folder)).token_ids


@pytest.mark.parametrize("head", ["lm", "score"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, alpha=2.0)])
def test_a_hub_models_files_go_with_what_is_trained(hub, folders, tmp_path, head, lora):
    folder = saved(tmp_path, directory="someone/tiny-chat", head=head, lora=lora)
    assert read(folder, "config.json")["model_type"] == "qwen2"
    assert ids_of(folder) == ids_of(folders / "qwen")
    # And on into what is trained from it, and its export.
    again = saved(tmp_path / "again", directory=str(folder), head=head)
    convert(str(again), tmp_path / "export")
    assert ids_of(tmp_path / "export") == ids_of(folders / "qwen")
    for name in ("config.json", "generation_config.json"):
        assert read(again, name) == read(folder, name)
        assert read(tmp_path / "export", name)["eos_token_id"] == [2, 0]


def test_a_hub_tokenizer_goes_with_a_local_folders_weights(hub, folders, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(folders / "qwen" / name, bare / name)
    folder = saved(tmp_path, directory=str(bare), tokenizer="someone/tiny-chat")
    assert ids_of(folder) == ids_of(folders / "qwen")


def test_a_local_tokenizer_goes_with_a_hub_models_weights(hub, folders, tmp_path):
    own = tmp_path / "own"
    tokenizer = load_tokenizer(folders / "qwen")
    tokenizer.add_tokens(["头痛三天"])
    save_tokenizer(tokenizer, own)
    folder = saved(tmp_path, directory="someone/tiny-chat", tokenizer=str(own))
    assert ids_of(folder) == ids_of(own) != ids_of(folders / "qwen")
    assert read(folder, "config.json")["model_type"] == "qwen2"


def test_a_siblings_folder_gives_its_tokenizer_and_nothing_else(folders, tmp_path):
    sibling = tmp_path / "sibling"
    shutil.copytree(folders / "qwen", sibling)
    sizes = {"hidden_size": 96, "bos_token_id": 77}
    for name in ("config.json", "generation_config.json"):
        content = read(sibling, name) | sizes | {"eos_token_id": 78}
        (sibling / name).write_text(json.dumps(content), encoding="utf-8")
    folder = saved(tmp_path, directory=str(folders / "qwen"), tokenizer=str(sibling))
    own = read(folders / "qwen", "config.json")
    for name in ("config.json", "generation_config.json"):
        found = read(folder, name)
        assert (found["bos_token_id"], found["eos_token_id"]) == (own["bos_token_id"], [2, 0])
    convert(str(folder), tmp_path / "export")
    assert read(tmp_path / "export", "config.json")["hidden_size"] == own["hidden_size"]


def without_its_class(folder, target):
    """A tokenizer's files that leave it to the config.json beside them which class they want."""
    shutil.copytree(folder, target)
    config = read(target, "tokenizer_config.json")
    del config["tokenizer_class"]
    (target / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def test_a_tokenizer_whose_class_its_own_config_tells_is_the_same_elsewhere(folders, tmp_path):
    source = without_its_class(folders / "qwen", tmp_path / "source")
    folder = saved(tmp_path, directory=str(folders / "llama"), tokenizer=str(source))
    assert read(folder, "config.json")["model_type"] == "llama"
    found, wanted = load_tokenizer(folder), load_tokenizer(source)
    texts = ["头痛 三天", " 2 days\n12.5", "<|endoftext|>"]
    assert [found.encode(text) for text in texts] == [wanted.encode(text) for text in texts]


def test_a_tokenizer_that_transformers_reads_as_another_is_refused_before_training(
    folders, tmp_path
):
    section = ModelConfig(directory=str(folders / "qwen"), tokenizer=str(folders / "llama"))
    model = open_model(section, ComputeSection().compute_config())
    with pytest.raises(ValueError, match="read as another one beside a model of type 'qwen2'"):
        model.load_tokenizer("sft", by_name("huatuogpt"))


def test_fresh_weights_have_no_config_of_the_tokenizers_folder(folders, tmp_path):
    folder = saved(tmp_path, backbone=TINY, tokenizer=str(folders / "qwen"))
    assert not (folder / "config.json").exists()
    convert(str(folder), tmp_path / "export")
    exported = read(tmp_path / "export", "config.json")
    assert exported["model_type"] == "llama"
    assert (exported["eos_token_id"], exported["bos_token_id"]) == ([2, 0], None)


def test_the_trained_template_takes_the_place_of_the_tokenizers_own(folders, tmp_path):
    """Which may stand in three places."""
    source = tmp_path / "source"
    shutil.copytree(folders / "qwen", source)
    path = source / "tokenizer_config.json"
    config = read(source, path.name) | {"chat_template": "{{ 'another' }}"}
    path.write_text(json.dumps(config), encoding="utf-8")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ 'rag' }}")
    folder = saved(tmp_path, directory=str(source))
    found = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [message._asdict() for message in DIALOGUE]
    assert found.apply_chat_template(messages, return_dict=False) == ids_of(folder)
    assert read(folder, path.name)["chat_template"] == found.chat_template


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_the_written_template_gives_the_tokens_of_training_or_says_that_it_does_not(
    folders, tmp_path, name, capsys
):
    template = {"qwen": "chatml", "llama": "huatuogpt"}[name]
    folder = saved(tmp_path, template=template, directory=str(folders / name))
    found = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [message._asdict() for message in DIALOGUE]
    trained = by_name(template).render(DIALOGUE, found)
    same = found.apply_chat_template(messages, return_dict=False) == trained.token_ids
    assert same == (name == "qwen")  # LLaMA's own class makes its pipeline anew.
    text = found.apply_chat_template(messages, tokenize=False)
    assert text == by_name(template).text(DIALOGUE, found)
    assert same == ("Its tokens differ" not in found.chat_template)
    _tell_other_tokens(by_name(template), load_tokenizer(folders / name), TINY)
    assert same == ("export: with this tokenizer" not in capsys.readouterr().out)
    again = saved(tmp_path / "again", template=template, directory=str(folder))
    assert load_tokenizer(again).chat_template == found.chat_template


def straddling(shared_data, tmp_path, name):
    """A folder of a tokenizer whose tokens reach over the border of two turns."""
    if name == "baichuan":
        return shared_data / "tokenizers" / "baichuan_rebuilt"
    (tmp_path / "straddling").mkdir()
    hubs.save_straddling_tokenizer(tmp_path / "straddling", template=hubs.QWEN_TEMPLATE)
    return tmp_path / "straddling"


def dialogues():
    """Of one to four exchanges, of the words of the sample."""
    texts = iter(hubs.sample_texts())
    for number in (1, 2, 3, 4) * 5:
        roles = ("user", "assistant") * number
        yield [Message(role, text) for role, text in zip(roles, texts, strict=False)]


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("made", "huatuogpt"),
        pytest.param("baichuan", "huatuogpt", marks=pytest.mark.slow),
        pytest.param("baichuan", "baichuan", marks=pytest.mark.slow),
    ],
)
def test_the_exported_tokenizer_reads_the_template_as_training_does(
    request, tmp_path, name, template
):
    shared = request.getfixturevalue("shared_data") if name == "baichuan" else None
    source, chosen = straddling(shared, tmp_path, name), by_name(template)
    before = load_tokenizer(source)
    cfg = BackboneConfig.from_dict(TINY.to_dict() | {"vocab_size": len(before)})
    folder = saved(tmp_path, template=template, backbone=cfg, tokenizer=str(source))
    convert(str(folder), tmp_path / "export")
    after = load_tokenizer(folder)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    others = 0
    for messages in dialogues():
        trained = chosen.render(messages, before).token_ids
        asked = [message._asdict() for message in messages]
        assert found.apply_chat_template(asked, return_dict=False) == trained
        # The stages that follow tokenise as before.
        assert chosen.render(messages, after).token_ids == trained
        unchanged = before.apply_chat_template(
            asked, chat_template=found.chat_template, return_dict=False
        )
        others += unchanged != trained
    assert others  # Without the changes it would not be so.
    assert _say_alike(before, after, chosen, cfg)
    assert not _say_alike(before, load_tokenizer(TOKENIZER), chosen, cfg)


def with_tokens_past_the_embedding(source, folder, tokens, **roles):
    """A model's folder whose tokenizer has more ids than the model has rows."""
    shutil.copytree(source, folder)
    tokenizer = load_tokenizer(folder)
    spare = [f"<|spare_{number}|>" for number in range(hubs.VOCAB - len(tokenizer))]
    tokenizer.add_tokens([*spare, *tokens], special_tokens=True)
    tokenizer.add_special_tokens(roles)
    tokenizer.save_pretrained(folder)
    assert len(load_tokenizer(folder)) == hubs.VOCAB + len(tokens) + len(roles)
    return folder


def test_a_pad_token_past_the_embedding_trains_as_no_text_holds_it(folders, tmp_path):
    source = with_tokens_past_the_embedding(
        folders / "qwen", tmp_path / "source", [], pad_token="<|pad|>"
    )
    folder = saved(tmp_path, directory=str(source))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id == hubs.VOCAB
    spelled = [Message("user", "<|pad|>"), Message("assistant", "多喝水。<|pad|>")]
    assert max(by_name("chatml").render(spelled, tokenizer).token_ids) < hubs.VOCAB
    # What is written for generation pads with an id that the model has.
    assert read(folder, "generation_config.json")["pad_token_id"] < hubs.VOCAB


def test_tokens_past_the_embedding_that_dialogues_hold_are_refused(folders, tmp_path):
    def refused(source, message):
        model = open_model(ModelConfig(directory=str(source)), ComputeSection().compute_config())
        with pytest.raises(ValueError, match=message):
            model.load_tokenizer("sft", by_name("chatml"))

    marks = ["<|im_start|>", "<|im_end|>"]
    source = with_tokens_past_the_embedding(folders / "llama", tmp_path / "marks", marks)
    refused(source, "config.sft.model.tokenizer: the template 'chatml' needs its token 2049")
    source = with_tokens_past_the_embedding(
        folders / "llama", tmp_path / "bos", marks, bos_token="<|bos|>"
    )
    refused(source, r"has 2051 tokens, .*: '<\|bos\|>' has id 2050 and may occur in a text")
    source = with_tokens_past_the_embedding(folders / "qwen", tmp_path / "word", [])
    tokenizer = load_tokenizer(source)
    tokenizer.add_tokens(["咳嗽"])
    tokenizer.save_pretrained(source)
    refused(source, "'咳嗽' has id 2048 and may occur in a text")


def test_fields_to_ignore_are_left_out_of_all_that_follows(folders, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folders / "qwen", source)
    config = read(source, "config.json") | {"hospital": "third", "license": "apache-2.0"}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="hospital='third'; if they cannot change"):
        saved(tmp_path, directory=str(source))
    folder = saved(tmp_path, directory=str(source), ignore_config_fields=("hospital",))
    convert(str(folder), tmp_path / "export")
    found = read(tmp_path / "export", "config.json")
    assert "hospital" not in found and found["license"] == "apache-2.0"
