"""What a user can get wrong ends in one clear line before anything is compiled."""

import dataclasses
import http.server
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import jax
import pytest

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import init_params
from huatuo_jax.checkpoint.models import save_orbax
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.data import SAMPLE_FOLDER
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.recipe import recipe as recipe_module
from huatuo_jax.recipe.checks import check_inputs
from huatuo_jax.recipe.prompts import make_prompts, write_prompts
from huatuo_jax.recipe.recipe import run_rlaif
from tests.recipe.tiny import BACKBONE, CLINIC, tiny_clinic_recipe, tiny_recipe, write_dialogues
from tests.tiny import TOKENIZER

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe of which no stage may be reached."""

    def reached(*_, **__):
        raise AssertionError("a stage was reached")

    monkeypatch.setattr(recipe_module, "run_stages", reached)
    write_dialogues(tmp_path / "mine.jsonl")
    return tiny_recipe(tmp_path / "mine.jsonl")


def refused(cfg, tmp_path, message, error=ValueError, **changes):
    with pytest.raises(error, match=message):
        run_rlaif(dataclasses.replace(cfg, **changes), tmp_path / "run")


def test_the_planted_recipe_itself_reaches_its_stages(recipe, tmp_path):
    with pytest.raises(AssertionError, match="a stage was reached"):
        run_rlaif(recipe, tmp_path / "run")


def test_a_file_of_dialogues_that_is_not_there(recipe, tmp_path):
    refused(recipe, tmp_path, "nowhere.jsonl", (ValueError, OSError), data="nowhere.jsonl")


def test_an_empty_file_of_dialogues(recipe, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    refused(recipe, tmp_path, "empty.jsonl: the file is empty", data=str(tmp_path / "empty.jsonl"))


@pytest.mark.parametrize(
    ("section_name", "field"),
    [
        ("ppo", "config.ppo.rollout.mesh"),
        ("answers", "config.answers.mesh"),
        ("evaluation", "config.evaluation.mesh"),
    ],
)
@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        (MeshConfig(data=-1, fsdp=1, tensor=8), "tensor=8 must divide the model's . key/value"),
        (MeshConfig(data=1, fsdp=1, tensor=3), "needs 3 devices, there are 8"),
    ],
)
def test_a_mesh_of_generation_that_cannot_be(recipe, tmp_path, section_name, field, mesh, said):
    stage = getattr(recipe, section_name)
    if section_name == "ppo":
        changed = dataclasses.replace(stage, rollout=dataclasses.replace(stage.rollout, mesh=mesh))
    else:
        changed = dataclasses.replace(stage, mesh=mesh)
    with pytest.raises(ValueError, match=f"^{field}: .*{said}") as error:
        run_rlaif(dataclasses.replace(recipe, **{section_name: changed}), tmp_path / "run")
    assert "\n" not in str(error.value)


def test_an_export_of_what_no_evaluation_decides(recipe, tmp_path):
    stages = ("sft", "answers", "labels", "reward", "ppo", "export")
    message = "export.policy='released' is what the evaluation decides, and stages=.*: add it, or"
    refused(recipe, tmp_path, message, stages=stages)
    assert not (tmp_path / "run").exists()


def test_an_exported_policy_that_is_neither_a_name_nor_a_folder(recipe, tmp_path):
    export = dataclasses.replace(recipe.export, policy="pqo")
    message = "config.export.policy: pqo: no such folder.*; or one of released, base, sft, best_of_"
    refused(recipe, tmp_path, message, FileNotFoundError, export=export)


def test_an_exported_policy_that_is_a_reward_model(recipe, tmp_path):
    params = init_params(jax.random.key(0), BACKBONE, ComputeConfig(), head="score")
    save_orbax(params, BACKBONE, tmp_path / "scores", head="score")
    export = dataclasses.replace(recipe.export, policy=str(tmp_path / "scores"))
    refused(recipe, tmp_path, "config.export.policy=.* must be a model with a token", export=export)


def test_a_config_of_another_class_or_with_a_field_of_another_type(recipe, tmp_path):
    with pytest.raises(ValueError, match="^config=.* must be a RlaifConfig$"):
        run_rlaif(recipe.sft, tmp_path / "run")
    wrong = dataclasses.replace(recipe.sft, seed="3")
    refused(recipe, tmp_path, "config.sft.seed='3' must be of type int", sft=wrong)


def test_a_judge_without_a_key(recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judge = dataclasses.replace(recipe.judge, base_url="http://127.0.0.1:9/v1")
    refused(recipe, tmp_path, "OPENAI_API_KEY is not set", judge=judge)


def test_a_judge_that_is_down(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    judge = dataclasses.replace(recipe.judge, base_url="http://127.0.0.1:9/v1")
    refused(recipe, tmp_path, "judge at http://127.0.0.1:9/v1 does not answer", judge=judge)


@pytest.fixture
def judges():
    """The address of a server with two models."""

    class Models(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps(
                {
                    "object": "list",
                    "data": [
                        {"id": name, "object": "model", "created": 0, "owned_by": "test"}
                        for name in ("large-judge", "small-judge")
                    ],
                }
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Models)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()


def test_a_judge_that_the_server_does_not_have(recipe, tmp_path, monkeypatch, judges):
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    judge = dataclasses.replace(recipe.judge, base_url=judges, model="medium-judge")
    refused(recipe, tmp_path, "model='medium-judge' is not at .* large-judge", judge=judge)
    judge = dataclasses.replace(recipe.judge, base_url=judges)
    refused(recipe, tmp_path, "several models or none: large-judge, small-judge", judge=judge)


def test_a_budget_of_money_for_a_judge_without_a_price(recipe, tmp_path, monkeypatch, judges):
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    judge = dataclasses.replace(recipe.judge, base_url=judges, model="small-judge", max_cost=1.0)
    refused(recipe, tmp_path, "max_cost=1 needs a price for 'small-judge'", judge=judge)


def test_a_model_of_another_vocabulary(recipe, tmp_path):
    other = dataclasses.replace(BACKBONE, vocab_size=512)
    params = init_params(jax.random.key(0), other, ComputeConfig(), head="lm")
    save_orbax(params, other, tmp_path / "other", head="lm", source_folder=pathlib.Path(TOKENIZER))
    answers = dataclasses.replace(recipe.answers, model=str(tmp_path / "other"))
    refused(recipe, tmp_path, "config.answers.model=.* vocab_size=512", answers=answers)


def test_a_model_trained_elsewhere_is_taken_whatever_chat_template_lies_beside_it(recipe, tmp_path):
    """Its own stage wrote that; what counts is how text becomes tokens, and the run's template."""
    params = init_params(jax.random.key(0), BACKBONE, ComputeConfig(), head="score")
    source = tmp_path / "tokenizer"
    shutil.copytree(TOKENIZER, source)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    save_orbax(params, BACKBONE, tmp_path / "elsewhere", head="score", source_folder=source)
    ppo = dataclasses.replace(recipe.ppo, reward_model=str(tmp_path / "elsewhere"))
    cfg = dataclasses.replace(recipe, ppo=ppo).in_workdir(tmp_path / "run")
    prompts = make_prompts(cfg.sft.data, cfg.prompts, num_judged=2)
    write_prompts(tmp_path / "run" / "prompts.jsonl", prompts.train)
    write_prompts(tmp_path / "run" / "judged_prompts.jsonl", prompts.judged)
    check_inputs(cfg, tmp_path / "run", {"sft", "ppo"})
    tokenizer = load_tokenizer(source)
    tokenizer.add_tokens(["咳嗽"])
    tokenizer.save_pretrained(source)
    save_orbax(params, BACKBONE, tmp_path / "other", head="score", source_folder=source)
    ppo = dataclasses.replace(recipe.ppo, reward_model=str(tmp_path / "other"))
    refused(recipe, tmp_path, "config.ppo.reward_model=.* has another tokenizer", ppo=ppo)


def test_a_reward_model_where_a_policy_should_be(recipe, tmp_path):
    params = init_params(jax.random.key(0), BACKBONE, ComputeConfig(), head="score")
    save_orbax(
        params, BACKBONE, tmp_path / "scores", head="score", source_folder=pathlib.Path(TOKENIZER)
    )
    answers = dataclasses.replace(recipe.answers, model=str(tmp_path / "scores"))
    refused(recipe, tmp_path, "config.answers.model=.* must be a model with", answers=answers)


def test_a_model_that_is_not_there(recipe, tmp_path):
    answers = dataclasses.replace(recipe.answers, model=str(tmp_path / "nowhere"))
    refused(recipe, tmp_path, "nowhere", (ValueError, OSError), answers=answers)


def test_rows_longer_than_the_models_positions(recipe, tmp_path):
    data = dataclasses.replace(recipe.sft.data, row_length=4096)
    sft = dataclasses.replace(recipe.sft, data=data)
    refused(recipe, tmp_path, "config.sft.data.row_length=4096 must be at most .* 256", sft=sft)


def test_answers_of_someone_else_that_are_none(recipe, tmp_path):
    labels = dataclasses.replace(
        recipe.labels, answers=str(SAMPLE_FOLDER / "real_instruction.jsonl")
    )
    refused(recipe, tmp_path, "not an answers record", labels=labels)


def ask_at_length(path, *, characters, count):
    """Adds questions of so many characters, none the beginning of another."""
    text = "头咳胃失腰发耳乏疼嗽胀眠酸烧鸣力" * (-(-characters // 16))
    with path.open("a", encoding="utf-8") as file:
        for number in range(count):
            row = {"question": f"{number}{text[:characters]}", "answer": "休息。"}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def test_one_question_that_is_too_long_stops_nothing(recipe, tmp_path, capsys):
    ask_at_length(tmp_path / "mine.jsonl", characters=400, count=1)
    with pytest.raises(AssertionError, match="a stage was reached"):
        run_rlaif(recipe, tmp_path / "run")
    assert "prompts: 25 rows read, 25 dialogues: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("characters", "limit"),
    [(400, "the model's 256 positions"), (90, "data.max_prompt_tokens=100")],
    ids=["answers", "ppo"],
)
def test_too_many_long_questions_are_named_by_the_users_own_file(
    recipe, tmp_path, characters, limit
):
    ask_at_length(tmp_path / "mine.jsonl", characters=characters, count=12)
    with pytest.raises(ValueError, match=r"max_left_out_share=0\.1 allows .too long ") as error:
        run_rlaif(recipe, tmp_path / "run")
    assert f"prompts cannot be used with {limit}" in str(error.value)
    assert re.search(r"\n  mine\.jsonl:(2[5-9]|3\d): \d+ tokens, at most", str(error.value))


def test_the_clinics_judge_for_data_of_ones_own(recipe, tmp_path):
    judge = dataclasses.replace(recipe.judge, offline="clinic")
    refused(recipe, tmp_path, "config.judge.offline='clinic' judges prompts of the", judge=judge)


def test_another_clinic_in_a_folder_in_which_something_was_trained(recipe, tmp_path):
    clinic = tiny_clinic_recipe()
    with pytest.raises(AssertionError, match="a stage was reached"):
        run_rlaif(clinic, tmp_path / "run")
    (tmp_path / "run" / "sft" / "checkpoints" / "2").mkdir(parents=True)
    other = dataclasses.replace(CLINIC, seed=3)
    refused(clinic, tmp_path, "another clinic than seed=3 .*seed: 0 before, 3 now", clinic=other)


def launch(tmp_path, *flags):
    return subprocess.run(
        [
            sys.executable,
            "launch/train.py",
            "--config=configs/rlaif.py",
            f"--workdir={tmp_path / 'run'}",
            *flags,
        ],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_clinic_that_cannot_be_is_named_by_its_field_from_the_shell(tmp_path):
    found = launch(tmp_path, "--config.clinic.seed=3", "--config.clinic.sizes.prompts=-1")
    assert found.returncode == 1
    assert found.stderr.strip().splitlines()[-1] == (
        "error: config.clinic.sizes: prompts is -1; it should be 0 or more"
    )


@pytest.mark.slow
def test_the_command_ends_in_one_line_and_a_code(tmp_path):
    found = launch(tmp_path, "--config.data=nowhere.jsonl")
    assert found.returncode == 1 and found.stdout == ""
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1
    assert "nowhere.jsonl" in found.stderr


def test_rows_that_the_devices_do_not_divide(recipe, tmp_path):
    reward = dataclasses.replace(recipe.reward, batch_size=4)
    message = "config.reward.micro_batch_size=4 rows must be a multiple of the 8 shards"
    refused(recipe, tmp_path, message, reward=reward)
