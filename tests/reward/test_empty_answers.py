"""An answer that says nothing is an answer, through every file from the policy to the score."""

import json
import pathlib

import jax
import numpy as np
import pytest

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import init_params
from huatuo_jax.checkpoint.models import save_orbax
from huatuo_jax.core import files
from huatuo_jax.data.chat import templates
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.data.readers import read_comparisons, read_dialogues
from huatuo_jax.data.records import Dialogue, Message, Prompt, answer
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.judge.labelling import LabelConfig
from huatuo_jax.preferences.data import ComparisonsConfig, ComparisonSource, open_comparisons
from huatuo_jax.preferences.from_judgements import ComparisonConfig
from huatuo_jax.preferences.label import LabelRun, run_labels
from huatuo_jax.reward.score_file import ScoreConfig, read_answers, score_file
from tests.preferences.tiny import BACKBONE
from tests.tiny import TOKENIZER, write_rows

GOOD = "建议先去医院检查，注意休息，多喝水。"
TEXTS = (GOOD, "", " \n", "没事。")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Prompts whose second and third answers are empty."""
    rows = []
    for index in range(6):
        messages = (Message("user", f"我头疼{index}天了，怎么办？"),)
        prompt = Prompt(f"p{index}", messages, "mine", reference=GOOD)
        rows.append(prompt.to_json() | {"answers": [{"text": text} for text in TEXTS]})
    return write_rows(tmp_path_factory.mktemp("answers") / "answers.jsonl", rows)


@pytest.fixture(scope="module", params=["score", "pairwise"])
def comparisons_file(request, answers, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    run = LabelRun(
        answers=answers,
        output=str(folder / "labels.jsonl"),
        label=LabelConfig(protocol=request.param),
        comparisons=str(folder / "comparisons.jsonl"),
        comparison=ComparisonConfig(),
    )
    run_labels(run, lambda line: None)
    return run.comparisons


def test_the_judge_and_the_comparisons_keep_empty_answers_as_the_worst(comparisons_file):
    rows = files.read_rows(comparisons_file, unfinished="read")
    # Of four answers six pairs, less the one of the two that say nothing.
    assert len(rows) == 6 * 5
    empty = [row for row in rows if not row["rejected"].strip()]
    assert len(empty) == 6 * 4 and all(row["p_chosen"] > 0.5 for row in empty)
    assert not any(not row["chosen"].strip() for row in rows)


def test_reward_training_and_dpo_see_an_empty_answer_as_the_end_of_its_turn(comparisons_file):
    reading = read_comparisons(comparisons_file)
    assert len(list(reading)) == 30 and not reading.errors
    tokenizer = load_tokenizer(TOKENIZER)
    cfg = ComparisonsConfig(
        sources=(ComparisonSource(paths=(comparisons_file,)),),
        max_length=128,
        row_length=256,
        held_out=HeldOutConfig(share=0.0),
    )
    found = open_comparisons(cfg, tokenizer)
    assert not +found.dropped and [len(group.answers) for group in found.train] == [4] * 6
    asked = (Message("user", "我头疼0天了，怎么办？"),)
    template = templates.by_name(cfg.template)
    ids = template.render((*asked, *answer("")), tokenizer).token_ids
    group = next(one for one in found.train if one.id.startswith("p0:"))
    (nothing,) = (one for one in group.answers if one.token_ids.tolist() == ids)
    assert nothing.num_characters == 0 and nothing.is_answer[-1]
    assert nothing.token_ids[-1] == template.stop_token_ids(tokenizer)[0]


def test_empty_answers_are_scored_and_normalised_in_every_form_of_file(answers, tmp_path):
    folder = tmp_path / "model"
    params = init_params(jax.random.key(0), BACKBONE, ComputeConfig(), head="score")
    save_orbax(params, BACKBONE, folder, head="score", source_folder=pathlib.Path(TOKENIZER))

    def scores(path):
        output = str(tmp_path / "scored.jsonl")
        done = score_file(ScoreConfig(model=str(folder), input=path, output=output))
        assert done.num_without == 0
        return files.read_rows(output, unfinished="read")

    of_answers = scores(answers)
    assert all(np.isfinite(row["scores"]).all() and len(row["scores"]) == 4 for row in of_answers)
    rows = files.read_rows(answers, unfinished="read")
    dialogues = [
        Dialogue(f"{row['id']}-{i}", (Message(**row["messages"][0]), *answer(text)), None, "mine")
        for row in rows
        for i, text in enumerate(TEXTS)
    ]
    path = write_rows(tmp_path / "dialogues.jsonl", dialogues)
    flat = [score for row in of_answers for score in row["scores"]]
    assert [row["score"] for row in scores(path)] == pytest.approx(flat, abs=1e-6)
    pairs = [
        {"messages": row["messages"], "chosen": GOOD, "rejected": "", "id": row["id"]}
        for row in rows
    ]
    of_pairs = scores(write_rows(tmp_path / "pairs.jsonl", pairs))
    for pair, row in zip(of_pairs, of_answers, strict=True):
        assert pair["scores"] == pytest.approx(row["scores"][:2], abs=1e-6)
    cfg = ComparisonsConfig(sources=(ComparisonSource(paths=("x",)),), max_length=128)
    assert len(read_answers(answers, cfg, load_tokenizer(TOKENIZER))) == 24


def test_training_on_dialogues_still_refuses_them(tmp_path):
    row = {"question": "头疼", "answer": " "}
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.jsonl:1: turn 2 \(assistant\) is empty"):
        list(read_dialogues(path))
