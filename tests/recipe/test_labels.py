"""The recipe's labels stage before a server that counts its calls."""

import dataclasses
import json

from huatuo_jax.recipe.recipe import Journal, run_rlaif
from tests.judge.planted_answers import make_answers
from tests.judge.planted_server import KEY, MODEL, Planted, PlantedServer
from tests.recipe.tiny import tiny_recipe, write_dialogues


def test_a_servers_judge_is_asked_once_about_each_answer_whatever_is_run_again(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    write_dialogues(tmp_path / "mine.jsonl")
    answers = tmp_path / "answers_of_someone_else.jsonl"
    utilities = make_answers(
        answers, num_prompts=3, num_answers=3, utility=lambda prompt, answer: answer - 1
    )
    with PlantedServer(Planted(utilities=utilities, noise=False)) as server:
        cfg = tiny_recipe(tmp_path / "mine.jsonl")
        labels = dataclasses.replace(cfg.labels, answers=str(answers))
        judge = dataclasses.replace(cfg.judge, base_url=server.url, model=MODEL)
        config = dataclasses.replace(cfg, labels=labels, judge=judge, stages=("labels",))
        run_rlaif(config, tmp_path / "run")
        assert len(server.calls) == 9
        (tmp_path / "run" / "comparisons.jsonl").unlink()  # So that the stage is run again.
        run_rlaif(config, tmp_path / "run")
        assert len(server.calls) == 9
    lines = (tmp_path / "run" / "comparisons.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 9 and all(row["judge"] == MODEL for row in rows)
    assert all(utilities[row["chosen"]] > utilities[row["rejected"]] for row in rows)
    assert Journal(tmp_path / "run").stages["labels"]["result"] == {"comparisons": 9}
