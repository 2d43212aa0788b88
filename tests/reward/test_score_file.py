"""Scores of files, and the exported reward model: the same numbers as transformers gives."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import init_params
from huatuo_jax.checkpoint.convert import convert
from huatuo_jax.checkpoint.models import find_model, save_orbax
from huatuo_jax.data import SAMPLE_FOLDER
from huatuo_jax.data.chat import templates
from huatuo_jax.data.records import Dialogue, Message, answer
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.reward.export import carry_normalization, describe, export_reward_model
from huatuo_jax.reward.score_file import ScoreConfig, score_file
from huatuo_jax.training.scoring import Normalization, load_normalization, save_normalization
from tests.preferences.tiny import BACKBONE, comparisons
from tests.tiny import TOKENIZER, write_rows

NORMALIZATION = Normalization(
    mean=0.25, standard_deviation=0.5, num_answers=9, answers="nine answers"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A reward model of ours whose tokenizer pads with EOS, and its export."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder / "tokenizer")
    params = init_params(jax.random.key(0), BACKBONE, ComputeConfig(), head="score")
    params = jax.tree.map(lambda leaf: leaf * 5 if leaf.ndim > 1 else leaf, params)
    save_orbax(params, BACKBONE, folder / "ours", head="score", source_folder=folder / "tokenizer")
    save_normalization(folder / "ours", NORMALIZATION)
    export_reward_model(folder / "ours", folder / "exported")
    return folder


@pytest.fixture(scope="module")
def dialogues():
    made = [
        Dialogue(f"d{i}", one.chosen_dialogue, None, "talk", {"ward": i})
        for i, one in enumerate(comparisons(7))
    ]
    too_long = (Message("user", "疼" * 300), *answer("嗯。"))
    return [*made, Dialogue("long", too_long, None, "talk")]


@pytest.fixture(scope="module")
def theirs(models, dialogues):
    """transformers' scores of the dialogues, as one batch padded by its own tokenizer."""
    folder = models / "exported"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    template = templates.by_name("huatuogpt")
    ids = [
        template.render(one.messages, load_tokenizer(folder)).token_ids for one in dialogues[:-1]
    ]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits[:, 0].numpy()


def _score(model, records, tmp_path, **options):
    path = write_rows(tmp_path / "in.jsonl", records)
    cfg = ScoreConfig(
        model=str(model), input=path, output=str(tmp_path / "out.jsonl"), rows_at_once=8, **options
    )
    done = score_file(cfg)
    return done, [json.loads(line) for line in open(cfg.output, encoding="utf-8")]


@pytest.mark.parametrize("form", ["ours", "exported"])
def test_raw_scores_equal_those_of_the_exported_model_in_transformers(
    models, dialogues, theirs, form, tmp_path
):
    done, rows = _score(models / form, dialogues, tmp_path)
    found = [row["score"] for row in rows]
    assert np.std(theirs) > 0.05
    np.testing.assert_allclose(found[:-1], theirs, rtol=0, atol=1e-5)
    assert found[-1] is None and rows[-1]["normalized_score"] is None
    for row, dialogue in zip(rows[:-1], dialogues, strict=False):
        assert row["normalized_score"] == pytest.approx((row["score"] - 0.25) / 0.5)
        assert {name: row[name] for name in dialogue.to_json()} == dialogue.to_json()
    assert (done.num_records, done.num_answers, done.num_without) == (8, 8, 1)
    assert done.mean == pytest.approx(np.mean(found[:-1]))


def test_records_of_several_answers_get_their_scores_in_order(models, dialogues, theirs, tmp_path):
    pairs = comparisons(7)
    _, rows = _score(models / "ours", pairs, tmp_path)
    np.testing.assert_allclose([row["scores"][0] for row in rows], theirs, rtol=0, atol=1e-5)
    answers = [
        {
            "id": one.id,
            "messages": one.to_json()["messages"],
            "source": "sft",
            "prompt_token_ids": [1, 2],
            "answers": [
                {"text": text[0].content, "token_ids": [3], "finish_reason": "stop"}
                for text in (one.rejected, one.chosen)
            ],
        }
        for one in pairs
    ]
    _, others = _score(models / "ours", answers, tmp_path)
    for one, row, other in zip(answers, rows, others, strict=True):
        assert other["scores"] == pytest.approx(row["scores"][::-1], abs=1e-5)
        assert len(other["normalized_scores"]) == 2
        assert {name: other[name] for name in one} == one


def test_the_export_carries_the_normalization_in_config_file_and_card(models):
    folder = models / "exported"
    config = transformers.AutoConfig.from_pretrained(folder)
    stored = config.task_specific_params["reward_normalization"]
    assert stored == NORMALIZATION.to_json()
    assert load_normalization(folder) == NORMALIZATION
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| mean | 0.25 |" in card and "nine answers" in card
    # From the config alone too, and a model without one says so.
    (folder / "reward_normalization.json").unlink()
    assert load_normalization(folder) == NORMALIZATION
    assert find_model(folder).head == "score"


def test_a_conversion_can_carry_the_normalization_there_and_back(models, tmp_path):
    convert(str(models / "ours"), tmp_path / "theirs")
    carry_normalization(models / "ours", tmp_path / "theirs")
    assert load_normalization(tmp_path / "theirs") == NORMALIZATION
    convert(str(tmp_path / "theirs"), tmp_path / "back")
    carry_normalization(tmp_path / "theirs", tmp_path / "back")
    assert find_model(tmp_path / "back").form == "orbax"
    assert (tmp_path / "back" / "reward_normalization.json").is_file()
    assert load_normalization(tmp_path / "back") == NORMALIZATION


def test_an_export_without_a_normalization_says_so(tmp_path):
    (tmp_path / "config.json").write_text('{"task_specific_params": {"other": 1}}')
    describe(tmp_path, None)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "task_specific_params": {"other": 1}
    }
    assert "None is stored" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert load_normalization(tmp_path) is None


@pytest.mark.parametrize(
    ("output", "why"), [("", "no name of a file"), (".", "no name of a file"), ("./a", "differ")]
)
def test_an_output_that_would_be_lost_or_lose_the_input_is_refused(output, why):
    with pytest.raises(ValueError, match=why):
        ScoreConfig(model="m", input="a", output=output)


def test_what_cannot_be_scored_ends_in_one_clear_message(models, dialogues, tmp_path):
    prompts = [{"id": "p", "messages": [{"role": "user", "content": "头疼"}], "source": "x"}]
    with pytest.raises(ValueError, match="no assistant turn"):
        _score(models / "ours", prompts, tmp_path)
    cases = [json.loads(line) for line in open(SAMPLE_FOLDER / "cases.jsonl", encoding="utf-8")]
    with pytest.raises(ValueError, match="is a Case, which holds no answer"):
        _score(models / "ours", cases, tmp_path)
    params = init_params(jax.random.key(0), BACKBONE, ComputeConfig())
    save_orbax(params, BACKBONE, tmp_path / "lm", head="lm")
    with pytest.raises(ValueError, match="this model has a token head"):
        _score(tmp_path / "lm", dialogues, tmp_path)
    with pytest.raises(ValueError, match="this model has a token head, a reward model has"):
        export_reward_model(tmp_path / "lm", tmp_path / "export")
    for limit, why in ((4096, "at most the model's 128 positions"), (3, "none of its 8 answers")):
        with pytest.raises(ValueError, match=why):
            _score(models / "ours", dialogues, tmp_path, max_length=limit)
    empty = [{**prompts[0], "answers": []}]
    with pytest.raises(ValueError, match="none of its records has an answer"):
        _score(models / "ours", empty, tmp_path)
    with pytest.raises(ValueError, match="row_length=0 must be at least 1"):
        _score(models / "ours", dialogues, tmp_path, row_length=0)
    assert not (tmp_path / "out.jsonl").exists()


def test_half_a_character_in_an_answer_is_scored_and_written(models, tmp_path):
    record = {
        "id": "a\ud83d",
        "messages": [{"role": "user", "content": "头疼"}],
        "source": "sft",
        "seen": float("nan"),
        "answers": [{"text": "祝好\ud83d"}, {"text": "祝好\ufffd"}],
    }
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(record), encoding="utf-8")
    cfg = ScoreConfig(
        model=str(models / "ours"), input=str(path), output=str(tmp_path / "out.jsonl")
    )
    score_file(cfg)
    (row,) = [json.loads(line) for line in open(cfg.output, encoding="utf-8")]
    assert row["id"] == "a\ufffd" and row["seen"] is None
    assert [answer["text"] for answer in row["answers"]] == ["祝好\ufffd"] * 2
    assert row["scores"][0] == row["scores"][1] is not None
