"""Which judge a run has follows from its prompts, and is said in a line."""

import dataclasses
import json

import pytest

from huatuo_jax.clinic import dialogues as clinic
from huatuo_jax.clinic.judge import ClinicJudge
from huatuo_jax.judge.config import JudgeConfig
from huatuo_jax.judge.offline import open_offline
from huatuo_jax.ppo.config import JudgingConfig
from huatuo_jax.recipe.checks import choose_offline_judge
from huatuo_jax.recipe.prompts import make_prompts, write_prompts
from huatuo_jax.sft import write_clinic_of
from tests.recipe.tiny import tiny_clinic_recipe, tiny_recipe, write_dialogues


def chosen(recipe, workdir, **judge):
    """The config with its judge, and the line that is printed, after the prompts are written."""
    cfg = dataclasses.replace(recipe, judge=JudgeConfig(**judge)).in_workdir(workdir)
    write_clinic_of(workdir, cfg.clinic)
    prompts = make_prompts(cfg.sft.data, cfg.prompts, num_judged=cfg.num_judged_prompts(workdir))
    workdir.mkdir(exist_ok=True)
    write_prompts(workdir / "prompts.jsonl", prompts.train)
    write_prompts(workdir / "held_out_prompts.jsonl", prompts.held_out)
    if prompts.judged:
        write_prompts(workdir / "judged_prompts.jsonl", prompts.judged)
    return choose_offline_judge(cfg, workdir)


@pytest.fixture
def own_data(tmp_path):
    write_dialogues(tmp_path / "mine.jsonl")
    return tiny_recipe(tmp_path / "mine.jsonl")


def judges_of(cfg):
    """Of the labels, of the judgings of PPO, and of the evaluation."""
    return cfg.judge.offline, cfg.ppo.judging.judge.offline, cfg.evaluation.judge


def test_the_clinic_judges_its_own_prompts_and_says_so(tmp_path):
    cfg, told = chosen(tiny_clinic_recipe(), tmp_path / "run")
    assert judges_of(cfg) == ("clinic",) * 3
    assert told == ("judge: the clinic's, which knows the truth (all 20 prompts are the clinic's)")


def test_the_rubric_judges_data_of_ones_own_and_says_why(own_data, tmp_path):
    cfg, told = chosen(own_data, tmp_path / "run")
    assert judges_of(cfg) == ("rubric",) * 3
    assert told.startswith(
        "judge: the rubric, which is fixed (24 of 24 prompts are not the clinic's, such as mine.js"
    )


def test_one_prompt_of_someone_else_is_enough_for_the_rubric(tmp_path):
    """And where it is among those that PPO is judged on, or evaluated on, does not matter."""
    row = {"id": "own", "question": "头疼怎么办？", "diagnosis": "偏头痛"}
    known = [prompt.to_json() for prompt in clinic.prompts(1, seed=1, held_out=True)]
    text = "".join(json.dumps(one) + "\n" for one in (row, *known))
    (tmp_path / "own.jsonl").write_text(text)
    recipe = tiny_clinic_recipe()
    prompts = dataclasses.replace(recipe.prompts, held_out_files=str(tmp_path / "own.jsonl"))
    cfg, told = chosen(dataclasses.replace(recipe, prompts=prompts), tmp_path / "run")
    assert judges_of(cfg) == ("rubric",) * 3
    assert "1 of 14 prompts are not the clinic's, such as own.jsonl:1" in told


def test_prompts_of_ones_own_for_the_judgings_of_ppo_count_too(tmp_path):
    row = {"id": "own", "question": "头疼怎么办？", "diagnosis": "偏头痛"}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    recipe = tiny_clinic_recipe()
    judging = JudgingConfig(prompts=str(tmp_path / "own.jsonl"))
    recipe = dataclasses.replace(recipe, ppo=dataclasses.replace(recipe.ppo, judging=judging))
    cfg, told = chosen(recipe, tmp_path / "run")
    assert judges_of(cfg) == ("rubric",) * 3
    assert "(1 of 21 prompts are not the clinic's, such as " in told and "own.jsonl:1" in told
    assert not (tmp_path / "run" / "judged_prompts.jsonl").exists()


def test_the_clinics_judge_is_refused_for_prompts_of_judgings_that_it_does_not_know(tmp_path):
    row = {"id": "own", "question": "头疼怎么办？"}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    recipe = tiny_clinic_recipe()
    judging = JudgingConfig(
        prompts=str(tmp_path / "own.jsonl"), judge=JudgeConfig(offline="clinic")
    )
    recipe = dataclasses.replace(recipe, ppo=dataclasses.replace(recipe.ppo, judging=judging))
    with pytest.raises(ValueError, match="ppo.judging.judge.offline='clinic' .*own.jsonl") as found:
        chosen(recipe, tmp_path / "run")
    assert "\n" not in str(found.value)


def test_the_clinics_judge_is_refused_for_prompts_that_it_does_not_know(own_data, tmp_path):
    with pytest.raises(ValueError, match="judge.offline='clinic' judges .* mine.jsonl") as error:
        chosen(own_data, tmp_path / "run", offline="clinic")
    assert "\n" not in str(error.value)


def test_a_judge_that_is_named_is_kept(tmp_path):
    cfg, told = chosen(tiny_clinic_recipe(), tmp_path / "run", offline="rubric")
    assert judges_of(cfg) == ("rubric",) * 3
    assert told == "judge: the rubric, which is fixed (judge.offline='rubric')"


def test_a_model_that_labels_leaves_later_answers_to_the_judge_of_the_prompts(tmp_path):
    cfg, told = chosen(tiny_clinic_recipe(), tmp_path / "run", base_url="http://host/v1", model="m")
    assert cfg.evaluation.judge == "clinic"
    assert "of the labels m at http://host/v1; of later answers the clinic's" in told


def test_a_biased_judge_labels_and_the_exact_one_evaluates(tmp_path):
    biased = ClinicJudge(length_bias=1.0)
    cfg, told = chosen(tiny_clinic_recipe(), tmp_path / "run", clinic_judge=biased)
    assert cfg.judge.clinic_judge == cfg.ppo.judging.judge.clinic_judge == biased
    assert told == (
        "judge: of the labels the clinic's with length_bias=1.0; of later answers the clinic's, "
        "which knows the truth (all 20 prompts are the clinic's)"
    )
    assert open_offline(cfg.evaluation.judge).name == "clinic-truth-v1"


def test_fields_of_the_clinics_judge_are_refused_for_prompts_of_someone_else(own_data, tmp_path):
    with pytest.raises(ValueError, match="config.judge: .*length_bias=1.0.*mine.js") as error:
        chosen(own_data, tmp_path / "run", clinic_judge=ClinicJudge(length_bias=1.0))
    assert "\n" not in str(error.value)
