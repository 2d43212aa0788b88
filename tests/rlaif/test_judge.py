"""Which judge a run has, and whether it can be reached."""

import dataclasses
import json

import httpx2
import openai
import pytest

from huatuo_jax.rlaif import judge
from huatuo_jax.rlaif.config import LabelsConfig
from huatuo_jax.rlaif.prompts import make_prompts, write_prompts
from huatuo_jax.sft import write_clinic_of
from tests.rlaif.tiny import tiny_clinic_recipe, tiny_recipe, write_dialogues

KEY = "sk-0123456789abcdef"


@pytest.fixture
def server(monkeypatch):
    """Answers the question for the models with what is put into it."""
    answer = {"status": 200, "content": b""}

    def reply(request):
        return httpx2.Response(**answer)

    def make(**keywords):
        client = httpx2.Client(transport=httpx2.MockTransport(reply))
        return real(**keywords | {"max_retries": 0}, http_client=client)

    real = openai.OpenAI
    monkeypatch.setattr(judge.openai, "OpenAI", make)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def answers(content, status_code=200):
        answer.clear()
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        answer.update(status_code=status_code, content=body)

    return answers


def reach(model="m"):
    return judge.reach_judge(LabelsConfig(base_url="http://host/v1", model=model, max_tokens=77))


def test_the_only_model_of_a_server_is_the_judge(server):
    server({"data": [{"id": "the-judge"}, None, {"id": None}]})
    found = reach(model=None)
    assert (found.model, found.max_tokens) == ("the-judge", 77)


@pytest.mark.parametrize("body", [{"data": None}, {"models": [{"name": "m"}]}, [], "m", {}])
def test_a_server_without_a_list_is_believed_to_have_the_named_model(server, body):
    server(body)
    assert reach().model == "m"
    with pytest.raises(ValueError, match="has several models or none"):
        reach(model=None)


@pytest.mark.parametrize(
    ("content", "status", "why"),
    [
        (b"<html>Sign in</html>", 200, "it begins '<html>Sign in"),
        ({"error": {"message": f"no {KEY}\n\u001b[31m"}}, 401, r"no \[key\]"),
        ({"error": {"message": "Insufficient Balance"}}, 402, "Insufficient Balance"),
        (b"", 503, "503"),
    ],
)
def test_a_server_that_does_not_answer_as_it_should_is_one_line(server, content, status, why):
    server(content, status)
    with pytest.raises(ValueError, match=why) as error:
        reach()
    assert str(error.value).isprintable() and KEY not in str(error.value)


def chosen(recipe, workdir, **labels):
    """The config with its judge, and the line that is printed, after the prompts are written."""
    cfg = dataclasses.replace(recipe, labels=LabelsConfig(**labels)).in_workdir(workdir)
    write_clinic_of(workdir, cfg.clinic)
    prompts = make_prompts(cfg.sft.data, cfg.prompts)
    workdir.mkdir(exist_ok=True)
    write_prompts(workdir / "prompts.jsonl", prompts.train)
    write_prompts(workdir / "held_out_prompts.jsonl", prompts.held_out)
    return judge.choose_offline_judge(cfg, workdir)


@pytest.fixture
def own_data(tmp_path):
    write_dialogues(tmp_path / "mine.jsonl")
    return tiny_recipe(tmp_path / "mine.jsonl")


def judges_of(cfg):
    return cfg.labels.offline, cfg.evaluation.judge


def test_the_clinic_judges_its_own_prompts_and_says_so(tmp_path):
    cfg, told = chosen(tiny_clinic_recipe(), tmp_path / "run")
    assert judges_of(cfg) == ("clinic", "clinic")
    assert told == ("judge: the clinic's, which knows the truth (all 20 prompts are the clinic's)")


def test_the_rubric_judges_data_of_ones_own_and_says_why(own_data, tmp_path):
    cfg, told = chosen(own_data, tmp_path / "run")
    assert judges_of(cfg) == ("rubric", "rubric")
    assert told.startswith(
        "judge: the rubric, which is fixed (24 of 24 prompts are not the clinic's, such as mine.js"
    )


def test_one_prompt_of_someone_else_is_enough_for_the_rubric(tmp_path):
    row = {"id": "own", "question": "头疼怎么办？", "diagnosis": "偏头痛"}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    recipe = tiny_clinic_recipe()
    prompts = dataclasses.replace(recipe.prompts, held_out_files=str(tmp_path / "own.jsonl"))
    cfg, told = chosen(dataclasses.replace(recipe, prompts=prompts), tmp_path / "run")
    assert judges_of(cfg) == ("rubric", "rubric")
    assert "1 of 13 prompts are not the clinic's, such as own.jsonl:1" in told


def test_the_clinics_judge_is_refused_for_prompts_that_it_does_not_know(own_data, tmp_path):
    with pytest.raises(ValueError, match="labels.offline='clinic' judges .* mine.jsonl") as error:
        chosen(own_data, tmp_path / "run", offline="clinic")
    assert "\n" not in str(error.value)


def test_a_judge_that_is_named_is_kept(tmp_path):
    cfg, told = chosen(tiny_clinic_recipe(), tmp_path / "run", offline="rubric")
    assert judges_of(cfg) == ("rubric", "rubric")
    assert told == "judge: the rubric, which is fixed (labels.offline='rubric')"


def test_a_model_that_labels_leaves_later_answers_to_the_judge_of_the_prompts(tmp_path):
    cfg, told = chosen(tiny_clinic_recipe(), tmp_path / "run", base_url="http://host/v1", model="m")
    assert cfg.evaluation.judge == "clinic"
    assert "of the labels m at http://host/v1; of later answers the clinic's" in told
