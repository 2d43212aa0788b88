"""Where a card says that a model comes from: its licence, its languages, names and no paths."""

import json

import pytest

from huatuo_jax.recipe.model_cards import (
    License,
    base_in_words,
    find_license,
    find_origin,
    hub_id,
    languages_of,
)
from huatuo_jax.training.dialogue_data import SourceConfig
from huatuo_jax.training.initial_model import ModelConfig
from tests import hub_server as hubs


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = hubs.Hub(tmp_path / "cache")
    made.patch(monkeypatch)
    return made


def model_folder(folder, card):
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def test_only_a_name_of_the_hub_is_one(tmp_path, monkeypatch):
    assert hub_id("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    (tmp_path / "mine" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for place in ("mine/model", str(tmp_path), "./absent", "/a/b", "a/b/c", None):
        assert hub_id(place) is None


def test_a_base_model_of_the_hub_is_named_with_the_licence_of_its_card(hub, tmp_path):
    card = "---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\n# Qwen\n"
    hub.add("someone/base", model_folder(tmp_path / "base", card))
    found = find_origin(
        ModelConfig(directory="someone/base"),
        [SourceConfig(name="one", paths=("someone/dialogues",))],
        [],
        license=None,
        languages=(),
        is_clinic=False,
    )
    assert (found.base_model, found.datasets) == ("someone/base", ("someone/dialogues",))
    assert found.base == "[someone/base](https://huggingface.co/someone/base)"
    link = "https://huggingface.co/someone/base/blob/main/LICENSE"
    assert found.license == License("other", "qwen", link, "the base model's card")
    assert found.languages == ()


@pytest.mark.parametrize(
    "card", [None, "# No metadata\n", "---\nlicense: [\n---\n", "---\nlanguage: zh\n---\n"]
)
def test_a_licence_that_no_card_names_is_unknown_unless_the_config_gives_it(tmp_path, card):
    folder = model_folder(tmp_path / "a_folder", card)
    assert find_license(str(folder), None) == License()
    assert find_license(None, None) == License()
    assert find_license(str(folder), "mit") == License("mit", told_by="the config of the run")
    told = base_in_words(ModelConfig(directory=str(folder)))
    assert "a\\_folder" in told and str(tmp_path) not in told


ENGLISH = "I have had a headache for three days, and it is worse in the morning. What can I do?"
FRENCH = "J'ai mal de tête depuis trois jours et cela empire le matin. Que puis-je faire?"


@pytest.mark.parametrize(
    ("texts", "languages"),
    [
        (["头痛三天了，怎么办？"], ("zh",)),
        (["头痛三天了，吃了 ibuprofen 不管用"], ("zh",)),
        ([ENGLISH], ("en",)),
        (["头痛三天了", "咳嗽", ENGLISH], ("zh", "en")),
        ([*30 * ["头痛三天了"], ENGLISH], ("zh",)),
        (["三日前から頭が痛いのですが、どうすればいいですか", FRENCH, "123", ""], ()),
        ([], ()),
    ],
)
def test_languages_are_told_by_the_texts(texts, languages):
    assert languages_of(texts) == languages


def test_languages_are_those_of_dialogues_and_prompts_where_the_config_names_none(tmp_path):
    data, prompts = tmp_path / "mine.jsonl", tmp_path / "prompts.jsonl"
    row = {"question": ENGLISH, "answer": "You should rest, and drink some water with it."}
    data.write_text(json.dumps(row) + "\n", encoding="utf-8")
    prompts.write_text(json.dumps({"question": "头痛？"}) + "\n", encoding="utf-8")
    sources = [SourceConfig(name="mine", paths=(str(data),))]
    given = {"license": None, "is_clinic": False}
    model = ModelConfig(preset="llama_7b", tokenizer="x")
    absent = tmp_path / "absent.jsonl"
    found = find_origin(model, sources, [prompts, absent], languages=(), **given)
    assert set(found.languages) == {"zh", "en"}
    assert (found.base_model, found.datasets) == (None, ())
    found = find_origin(model, sources, [prompts], languages=("yue",), **given)
    assert found.languages == ("yue",)
