"""The stage of the recipe that evaluates the run's models by suites."""

import dataclasses
import json
import pathlib
import re
import signal
import time

import jax
import pytest

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import init_params
from huatuo_jax.checkpoint.models import save_orbax
from huatuo_jax.core import distributed
from huatuo_jax.evaluation.suite_settings import Files
from huatuo_jax.judge.config import JudgeConfig
from huatuo_jax.judge.server import KEY_VARIABLE
from huatuo_jax.recipe.checks import check_inputs
from huatuo_jax.recipe.config import STAGES, SuitesConfig
from huatuo_jax.recipe.recipe import Journal, run_rlaif
from huatuo_jax.recipe.stages import make_stages
from tests.evaluation import killed_runs, planted_judge
from tests.evaluation.scripted_server import KEY, ScriptedServer
from tests.recipe.tiny import BACKBONE, RUN_STAGES, TOKENIZER, tiny_recipe, write_dialogues

start = pytest.fixture(killed_runs.start)
CLINIC = SuitesConfig(suite=("clinic",), models=("base", "sft"), clinic_cases=2, max_new_tokens=4)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)


@pytest.fixture
def folder(tmp_path):
    """A run's folder that holds the models of its training stages."""
    write_dialogues(tmp_path / "mine.jsonl")
    for number, name in enumerate(("base", "sft", "ppo")):
        params = init_params(jax.random.key(number), BACKBONE, ComputeConfig(), head="lm")
        place = tmp_path / "run" / name / "model"
        save_orbax(params, BACKBONE, place, head="lm", source_folder=pathlib.Path(TOKENIZER))
    return tmp_path / "run"


def recipe(folder, suites, *, stages=("suites", "report")):
    cfg = tiny_recipe(folder.parent / "mine.jsonl")
    evaluation = dataclasses.replace(cfg.evaluation, base=str(folder / "base" / "model"))
    return dataclasses.replace(cfg, stages=stages, suites=suites, evaluation=evaluation)


def results(folder):
    return json.loads((folder / "suites" / "evaluation.json").read_text("utf-8"))


def test_the_stage_is_there_where_suites_are_named(folder):
    def names(suites):
        cfg = recipe(folder, suites, stages=STAGES).in_workdir(folder).with_offline_judge("rubric")
        return tuple(one.name for one in make_stages(cfg, folder))

    assert names(SuitesConfig()) == RUN_STAGES and len(RUN_STAGES) == 8
    assert ("synthesis", *names(CLINIC)) == STAGES
    assert STAGES.index("evaluation") < STAGES.index("suites") < STAGES.index("export")


@pytest.mark.usefixtures("on_one_device")
def test_the_runs_models_are_evaluated_and_the_report_shows_their_figures(folder, capsys):
    run_rlaif(recipe(folder, CLINIC), folder)
    assert "stage 1 of 2: suites\n" in capsys.readouterr().out
    found = results(folder)
    assert list(found["models"]) == ["base", "sft"] and list(found["suites"]) == ["clinic"]
    assert {one["model"] for one in found["models"].values()} == {
        str(folder / name / "model") for name in ("base", "sft")
    }
    assert all("huatuogpt" in one["template"].lower() for one in found["models"].values())
    figures = found["suites"]["clinic"]["models"]
    values = Journal(folder).stages["suites"]["result"]
    for name in ("base", "sft"):
        right = figures[name]["figures"]["diagnosis_right"]["value"]
        assert values[f"clinic: diagnosis right: {name}"] == right
    page = (folder / "report.html").read_text("utf-8")
    shown = re.findall(r'<data value="([^"]+)" data-name="(\w+)_clinic_diagnosis_right">', page)
    assert {name: float(value) for value, name in shown} == {
        name: 100 * figures[name]["figures"]["diagnosis_right"]["value"] for name in figures
    }
    assert 'href="suites/report.html"' in page and (folder / "suites" / "report.html").is_file()
    # It is finished, until another setting asks for more; responses that are there are taken.
    run_rlaif(recipe(folder, CLINIC), folder)
    assert "stage 1 of 2: suites, finished before" in capsys.readouterr().out

    def responses():
        return {path: path.read_bytes() for path in (folder / "suites").glob("responses/*")}

    before = responses()
    more = dataclasses.replace(CLINIC, limit=1)
    run_rlaif(recipe(folder, more), folder)
    assert "stage 1 of 2: suites\n" in capsys.readouterr().out
    assert results(folder)["suites"]["clinic"]["num"] == 1
    assert responses() == before
    # A run that names none no longer shows them.
    run_rlaif(recipe(folder, SuitesConfig()), folder)
    assert "stage 1 of 1: report" in capsys.readouterr().out
    assert 'id="suites"' not in (folder / "report.html").read_text("utf-8")


RECIPE = """
import dataclasses, pathlib, sys
from huatuo_jax.evaluation.suite_settings import Files
from huatuo_jax.judge.config import JudgeConfig
from huatuo_jax.recipe.config import SuitesConfig
from huatuo_jax.recipe.recipe import run_rlaif
from tests.recipe.tiny import tiny_recipe

def run():
    data, workdir, url, questions = sys.argv[1:]
    suites = SuitesConfig(
        suite=("single_turn",), models=("openai:jia", "openai:yi"), base_url=url, concurrency=1,
        judge=JudgeConfig(base_url=url, model="judge"), files=Files(kuake_qic=questions),
    )
    cfg = tiny_recipe(pathlib.Path(data))
    run_rlaif(dataclasses.replace(cfg, stages=("suites", "report"), suites=suites), workdir)
"""


@pytest.mark.slow
def test_killed_in_that_stage_it_pays_for_nothing_twice(folder, start):
    planted, kill_at, count = planted_judge.Planted(faults=0.0), (5, 14), 5
    questions = folder.parent / "kuake.json"
    questions.write_text(json.dumps(planted_judge.questions(count)), encoding="utf-8")

    def reply(body, number):
        runs.kill_at(number in kill_at)
        return planted.reply(body, number)

    def wait():
        while server.under_way > 1:
            time.sleep(0.01)

    with ScriptedServer(reply) as server:
        data = str(folder.parent / "mine.jsonl")
        runs = start(RECIPE, [data, str(folder), server.url, str(questions)])
        assert runs.run_while_killed(wait) == [-signal.SIGKILL] * len(kill_at) + [0]
        assert server.paid == 4 * count
    assert results(folder)["suites"]["single_turn"]["num"] == count
    assert len(Journal(folder).stages["suites"]["starts"]) == len(kill_at) + 1


def test_what_the_suites_lack_is_one_line_before_anything_is_trained(tmp_path, monkeypatch):
    write_dialogues(tmp_path / "mine.jsonl")
    folder = tmp_path / "run"

    def refused(error=ValueError, **fields):
        fields = {"suite": ("clinic",), "clinic_cases": 2} | fields
        cfg = recipe(folder, SuitesConfig(**fields), stages=STAGES)
        cfg = cfg.in_workdir(folder).with_offline_judge("rubric")
        with pytest.raises(error) as raised:
            check_inputs(cfg, folder, {"suites"})
        assert "\n" not in str(raised.value)
        return str(raised.value)

    absent = str(tmp_path / "absent.json")
    exams = {"suite": ("exams",), "clinic_cases": 200}
    flag = "--config.suites."
    assert refused(files=Files(cmb=absent)).startswith(f"{flag}files.cmb is of the suite exams")
    assert refused(**exams).startswith(f"exams needs a set: give one of {flag}files.cmb")
    told = refused(**exams, files=Files(cmb=absent))
    assert told == f"{absent}: there is no such file or folder"
    assert refused(models=("sft", "sft")) == f"{flag}models: 'sft' is given twice"
    assert refused(models=("openai:m",)) == (
        f"openai:m is behind a server: give its {flag}base_url"
    )
    assert absent in refused(FileNotFoundError, models=("sft", absent))
    judged = {"suite": ("single_turn",), "clinic_cases": 200}
    path = tmp_path / "kuake.json"
    path.write_text(json.dumps(planted_judge.questions(2)), encoding="utf-8")
    files = Files(kuake_qic=str(path))
    assert refused(**judged, files=files).startswith(
        f"single_turn needs a judge: give {flag}judge.base_url"
    )
    nobody = JudgeConfig(base_url="http://127.0.0.1:1/v1", model="judge")
    told = refused(**judged, files=files, judge=nobody)
    assert f"({flag}judge.base_url, and the key in OPENAI_API_KEY)" in told
    # A file of a suite that is not run is refused where no suite is run at all, too.
    told = refused(suite=(), clinic_cases=200, files=files)
    assert told.startswith(f"{flag}files.kuake_qic is of the suite single_turn, which is not run")
    monkeypatch.setattr(distributed, "count", lambda: 2)
    assert refused().startswith(f"{flag}suite=clinic needs one process, and there are 2: leave it")


def test_models_of_the_run_and_others_stand_side_by_side(folder):
    def models(*names):
        cfg = recipe(folder, dataclasses.replace(CLINIC, models=names), stages=STAGES)
        found = cfg.in_workdir(folder).suite_models
        return {name: (one.source, one.template) for name, one in found.items()}

    own = str(folder / "sft" / "model")
    assert models("sft", "openai:gpt", "/else/where/sft") == {
        "sft": (own, "huatuogpt"),
        "gpt": ("openai:gpt", None),
        "/else/where/sft": ("/else/where/sft", None),
    }
