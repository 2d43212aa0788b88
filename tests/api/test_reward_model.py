"""A reward model from Python gives the scores that the command writes."""

import json

import numpy as np
import pytest
import torch
import transformers

import huatuo_jax as hj
from huatuo_jax.reward.score_file import ScoreConfig, score_file
from huatuo_jax.training.scoring import load_normalization
from tests.api import tiny

RESPONSES = ["先多喝水，注意休息。", "去医院检查。", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("models") / "reward", "score", seed=2)


@pytest.fixture(scope="module")
def model(folder):
    return hj.load_reward_model(folder)


def test_scores_are_those_of_the_score_command(model, folder, tmp_path):
    dialogues = [[{"role": "user", "content": tiny.QUESTION}], tiny.TURNS, tiny.TURNS]
    records = [
        {"messages": [*dialogue, {"role": "assistant", "content": response}]}
        for dialogue, response in zip(dialogues, RESPONSES, strict=True)
    ]
    given = tmp_path / "in.jsonl"
    given.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    score_file(ScoreConfig(model=str(folder), input=str(given), output=str(tmp_path / "out.jsonl")))
    rows = [json.loads(line) for line in open(tmp_path / "out.jsonl", encoding="utf-8")]
    raw = model.score_batch(dialogues, RESPONSES, raw=True)
    np.testing.assert_allclose(raw, [row["score"] for row in rows], rtol=0, atol=1e-5)
    normalized = model.score_batch(dialogues, RESPONSES)
    np.testing.assert_allclose(normalized, [row["normalized_score"] for row in rows], atol=1e-5)
    assert np.std(raw) > 0.01
    assert model.score(tiny.QUESTION, RESPONSES[0]) == pytest.approx(normalized[0], abs=1e-5)
    assert model.score(tiny.QUESTION, RESPONSES[0], raw=True) == pytest.approx(raw[0], abs=1e-5)
    assert model.score_batch([], []) == []


def test_a_response_is_scored_as_it_was_sampled(model, tmp_path):
    policy = hj.load_model(tiny.save(tmp_path / "policy", "lm"))
    ((response,),) = policy.generate([tiny.QUESTION], max_new_tokens=5)
    answers = [{"text": response.text, "token_ids": list(response.token_ids)}]
    answers[0]["finish_reason"] = response.finish_reason
    record = {
        "id": "a",
        "messages": [{"role": "user", "content": tiny.QUESTION}],
        "source": "s",
        "prompt_token_ids": list(response.prompt_token_ids),
        "answers": answers,
    }
    given, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text(json.dumps(record) + "\n", encoding="utf-8")
    done = score_file(ScoreConfig(model=str(model.folder), input=str(given), output=str(output)))
    assert done.num_as_sampled == 1
    (row,) = [json.loads(line) for line in open(output, encoding="utf-8")]
    assert model.score(tiny.QUESTION, response, raw=True) == pytest.approx(
        row["scores"][0], abs=1e-5
    )


@pytest.mark.parametrize("format", ["hf", "orbax"])
def test_a_saved_reward_model_keeps_scores_and_normalization(model, tmp_path, format):
    model.save(tmp_path / "saved", format=format)
    again = hj.load_reward_model(tmp_path / "saved")
    assert again.normalization == tiny.NORMALIZATION == load_normalization(tmp_path / "saved")
    wanted = model.score(tiny.TURNS, RESPONSES[0], raw=True)
    assert again.score(tiny.TURNS, RESPONSES[0], raw=True) == wanted
    if format == "hf":
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "saved"
        ).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
        dialogue = [*tiny.TURNS, {"role": "assistant", "content": RESPONSES[0]}]
        ids = tokenizer.apply_chat_template(dialogue, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            assert float(theirs(ids).logits[0, 0]) == pytest.approx(wanted, abs=1e-5)


def test_without_a_normalization_scores_are_raw(folder, tmp_path):
    plain = tiny.save(tmp_path / "plain", "score", seed=2)
    (plain / "reward_normalization.json").unlink()
    model = hj.load_reward_model(plain)
    assert model.normalization is None
    assert model.score(tiny.QUESTION, "好。") == model.score(tiny.QUESTION, "好。", raw=True)


def test_what_cannot_be_scored_or_loaded_ends_in_one_clear_message(model, tmp_path):
    for call, message in (
        (lambda: model.score("", "好"), r"^dialogue: turn 1 \(user\) is empty"),
        (lambda: model.score(tiny.TURNS[:2], "好"), "^dialogue: the prompt ends with a turn of"),
        (lambda: model.score("a", "疼" * 300), "^response: more than 256 tokens with its dialogue"),
        (lambda: model.score_batch("ab", "cd"), "^dialogues is a str; it should be a list of them"),
        (lambda: hj.load_reward_model(tiny.save(tmp_path / "lm", "lm")), "has a token head"),
        (lambda: hj.load_reward_model(tmp_path / "none"), "none is no model"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
