import dataclasses
import json

import httpx2
import openai
import pytest

from huatuo_jax.clinic import dialogues as clinic
from huatuo_jax.clinic.dialogues import prompts
from huatuo_jax.clinic.judge import ClinicJudge
from huatuo_jax.core.config import identity
from huatuo_jax.data.records import Message, Prompt
from huatuo_jax.judge import config
from huatuo_jax.judge.config import JudgeConfig

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
    monkeypatch.setattr(config.openai, "OpenAI", make)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def answers(content, status_code=200):
        answer.clear()
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        answer.update(status_code=status_code, content=body)

    return answers


def reach(model="m"):
    return config.reach_judge(
        config.JudgeConfig(base_url="http://host/v1", model=model, max_tokens=77)
    )


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


def test_auto_is_the_clinics_judge_where_all_prompts_are_of_it_and_else_the_rubric():
    auto = config.JudgeConfig()
    prompts = list(clinic.prompts(4, seed=0))
    assert auto.offline_for(prompts) == "clinic"
    for field, value in (("source", "elsewhere"), ("diagnosis", "偏头"), ("diagnosis", None)):
        foreign = dataclasses.replace(prompts[2], **{field: value})
        assert auto.offline_for([*prompts, foreign]) == "rubric"
    named = config.JudgeConfig(offline="rubric")
    assert named.offline_for(prompts) == "rubric"


BIASED = ClinicJudge(length_bias=1.0, self_preference=2.0)


def test_the_fields_of_the_clinics_judge_are_a_section_and_decide_results():
    cfg = JudgeConfig(clinic_judge=BIASED)
    assert identity(cfg)["clinic_judge"]["length_bias"] == 1.0
    assert identity(cfg) != identity(JudgeConfig())


@pytest.mark.parametrize(
    ("other", "judge"),
    [
        ({"offline": "rubric"}, "the rubric"),
        ({"base_url": "http://host/v1"}, "a model behind a server"),
    ],
)
def test_fields_of_the_clinics_judge_are_refused_where_another_one_judges(other, judge):
    with pytest.raises(ValueError, match=f"clinic_judge.length_bias=1.0, .* and {judge} judges"):
        JudgeConfig(clinic_judge=BIASED, **other)
    assert JudgeConfig(**other).clinic_judge == ClinicJudge()


def test_they_are_refused_where_the_prompts_make_it_the_rubric():
    cfg = JudgeConfig(clinic_judge=BIASED)
    own = list(prompts(2, seed=0))
    assert cfg.offline_for(own) == "clinic"
    with pytest.raises(ValueError, match="clinic_judge.length_bias=1.0.* the rubric judges"):
        cfg.offline_for([*own, Prompt("mine", (Message("user", "头疼"),), "mine")])
