"""The recipe's settings: order of stages, paths of the run's folder, data of one's own."""

import dataclasses

import pytest

from huatuo_jax.clinic.files import ClinicConfig
from huatuo_jax.judge.config import JudgeConfig
from huatuo_jax.ppo.config import JudgingConfig
from huatuo_jax.recipe.config import STAGES, PromptsConfig
from huatuo_jax.recipe.recipe import tell_temperatures
from huatuo_jax.training.initial_model import ModelConfig
from tests.recipe.tiny import CLINIC, tiny_clinic_recipe, tiny_recipe


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe(tmp_path / "mine.jsonl")


def test_the_judgings_of_ppo_have_the_judge_of_the_labels_its_account_and_held_out_prompts(
    recipe, tmp_path
):
    judge = JudgeConfig(base_url="http://host/v1", model="m", max_cost=3.0, max_tokens=77)
    found = dataclasses.replace(recipe, judge=judge).in_workdir(tmp_path).ppo.judging
    assert (found.judge.base_url, found.judge.model) == ("http://host/v1", "m")
    assert (found.judge.max_cost, found.judge.max_tokens) == (3.0, 77)
    assert found.prompts == f"{tmp_path}/judged_prompts.jsonl"
    assert found.spending == f"{tmp_path}/labels.jsonl.spending.jsonl"
    own = JudgingConfig(judge=JudgeConfig(offline="clinic"), prompts="{workdir}/mine.jsonl")
    ppo = dataclasses.replace(recipe.ppo, judging=own)
    found = dataclasses.replace(recipe, ppo=ppo, judge=judge).in_workdir(tmp_path).ppo.judging
    assert (found.judge.offline, found.spending) == ("clinic", None)
    assert found.prompts == f"{tmp_path}/mine.jsonl"
    off = dataclasses.replace(recipe, ppo=dataclasses.replace(recipe.ppo, judging=None))
    assert off.in_workdir(tmp_path).ppo.judging is None


def test_held_out_prompts_are_set_aside_only_for_judgings_that_have_none_of_their_own(
    recipe, tmp_path
):
    def number(judging):
        ppo = dataclasses.replace(recipe.ppo, judging=judging)
        cfg = dataclasses.replace(recipe, ppo=ppo).in_workdir(tmp_path)
        return cfg.num_judged_prompts(tmp_path)

    assert number(JudgingConfig(num_prompts=5)) == 5
    assert number(JudgingConfig(num_prompts=None)) is None
    assert number(JudgingConfig(prompts="mine.jsonl")) == 0
    assert number(None) == 0


def test_the_offline_judge_of_a_run_reaches_the_judgings_of_ppo_where_none_is_named(
    recipe, tmp_path
):
    def judge(judging, of_run=None):
        ppo = dataclasses.replace(recipe.ppo, judging=judging)
        cfg = dataclasses.replace(recipe, ppo=ppo, judge=of_run or recipe.judge)
        return cfg.in_workdir(tmp_path).with_offline_judge("clinic").ppo.judging.judge.offline

    assert judge(JudgingConfig()) == "clinic"
    assert judge(JudgingConfig(judge=JudgeConfig())) == "clinic"
    assert judge(JudgingConfig(judge=JudgeConfig(offline="rubric"))) == "rubric"
    assert judge(JudgingConfig(), JudgeConfig(offline="rubric")) == "rubric"


@pytest.mark.parametrize("stages", [("labels", "sft"), ("sft", "sft"), ("sft", "judge")])
def test_stages_out_of_order_repeated_or_unknown_are_refused(recipe, stages):
    with pytest.raises(ValueError, match="stages=.* must be some of"):
        dataclasses.replace(recipe, stages=stages)


def test_some_of_the_stages_in_order_are_taken(recipe):
    assert dataclasses.replace(recipe, stages=STAGES[3:5]).stages == ("labels", "reward")


def test_stages_that_speak_another_template_are_refused(recipe):
    evaluation = dataclasses.replace(recipe.evaluation, template="chatml")
    with pytest.raises(ValueError, match="evaluation.template='chatml' must be sft.data.template"):
        dataclasses.replace(recipe, evaluation=evaluation)


def test_paths_are_put_into_the_runs_folder_wherever_they_stand(recipe, tmp_path):
    placed = recipe.in_workdir(tmp_path)
    assert placed.answers.model == f"{tmp_path}/sft/model"
    assert placed.reward.data.sources[0].paths == (f"{tmp_path}/comparisons.jsonl",)
    assert placed.ppo.model.directory == f"{tmp_path}/sft/model"
    assert placed.evaluation.base == f"{tmp_path}/base/model"
    assert "{workdir}" not in repr(placed)


def test_the_evaluation_samples_like_ppo_unless_it_is_told_otherwise(recipe, tmp_path, capsys):
    rollout = dataclasses.replace(recipe.ppo.rollout, temperature=0.7)
    cooler = dataclasses.replace(recipe, ppo=dataclasses.replace(recipe.ppo, rollout=rollout))
    assert recipe.in_workdir(tmp_path).evaluation.temperature == 1.0
    tied = cooler.in_workdir(tmp_path)
    assert tied.evaluation.temperature == 0.7
    tell_temperatures(tied)
    assert capsys.readouterr().out == ""
    own = dataclasses.replace(cooler.evaluation, temperature=1.0)
    told = dataclasses.replace(cooler, evaluation=own).in_workdir(tmp_path)
    assert told.evaluation.temperature == 1.0
    tell_temperatures(told)
    message = "evaluation.temperature=1.0 is not ppo.rollout.temperature=0.7"
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "data", "kept"),
    [
        ({}, {}, True),
        ({"tokenizer": "someone/tokenizer"}, {}, False),
        ({"ignore_config_fields": ("hospital",)}, {}, False),
        ({}, {"template": "tokenizer"}, True),
        ({}, {"template": "tokenizer", "template_date": "2025-01-02"}, False),
        ({}, {"template": "tokenizer", "default_system": "医生"}, False),
        ({}, {"default_system": "医生"}, True),
    ],
)
def test_a_base_model_is_evaluated_as_it_stands_or_with_what_the_run_adds_to_it(
    recipe, tmp_path, model, data, kept
):
    data = dataclasses.replace(recipe.sft.data, **data)
    sft = dataclasses.replace(
        recipe.sft, model=ModelConfig(directory="someone/tiny", **model), data=data
    )
    others = {
        name: dataclasses.replace(
            getattr(recipe, name),
            data=dataclasses.replace(getattr(recipe, name).data, template=data.template),
        )
        for name in ("reward", "ppo")
    }
    evaluation = dataclasses.replace(recipe.evaluation, template=data.template)
    changed = dataclasses.replace(recipe, sft=sft, evaluation=evaluation, **others)
    expected = "someone/tiny" if kept else f"{tmp_path}/base/model"
    assert changed.in_workdir(tmp_path).evaluation.base == expected


def test_stages_that_print_another_date_are_refused(recipe):
    reward = dataclasses.replace(
        recipe.reward, data=dataclasses.replace(recipe.reward.data, template_date="2025-01-02")
    )
    with pytest.raises(ValueError, match="reward.data.template_date='2025-01-02' must be None or"):
        dataclasses.replace(recipe, reward=reward)


def test_data_of_ones_own_replaces_the_sources(recipe, tmp_path):
    placed = dataclasses.replace(recipe, data="a/one.jsonl,b/two.csv").in_workdir(tmp_path)
    sources = placed.sft.data.sources
    assert [(source.name, source.paths) for source in sources] == [
        ("one", ("a/one.jsonl",)),
        ("two", ("b/two.csv",)),
    ]


def test_what_the_offline_judge_would_ignore_is_refused():
    with pytest.raises(ValueError, match="max_cost is ignored by the offline judge"):
        JudgeConfig(max_cost=3.0)
    with pytest.raises(ValueError, match="base_url should be like"):
        JudgeConfig(base_url="localhost:8000")


def test_every_stage_has_the_system_text_that_fine_tuning_has(recipe, tmp_path):
    data = dataclasses.replace(recipe.sft.data, default_system="你是医生。")
    told = dataclasses.replace(recipe, sft=dataclasses.replace(recipe.sft, data=data))
    cfg = told.in_workdir(tmp_path)
    assert {
        cfg.reward.data.default_system,
        cfg.ppo.data.default_system,
        cfg.evaluation.default_system,
    } == {"你是医生。"}
    with pytest.raises(ValueError, match="evaluation.default_system='护士' must be None or sft.d"):
        dataclasses.replace(
            told, evaluation=dataclasses.replace(told.evaluation, default_system="护士")
        )


def test_own_files_are_read_in_the_encoding_that_is_named(recipe, tmp_path):
    own = dataclasses.replace(recipe, data="a.csv,b.csv", data_encoding="cp1252")
    sources = own.in_workdir(tmp_path).sft.data.sources
    assert [(one.paths, one.encoding) for one in sources] == [
        (("a.csv",), "cp1252"),
        (("b.csv",), "cp1252"),
    ]


def test_the_clinics_files_are_those_of_the_runs_folder(tmp_path):
    recipe = tiny_clinic_recipe()
    cfg = recipe.in_workdir(tmp_path)
    assert cfg.prompts.files == f"{tmp_path}/clinic/prompts.jsonl"
    assert cfg.prompts.held_out_files == f"{tmp_path}/clinic/held_out_prompts.jsonl"
    assert cfg.sft.clinic == cfg.clinic == CLINIC
    probes = {probe.name: (probe.paths, probe.neutral) for probe in cfg.reward.probes}
    assert probes == {
        "truth": ((f"{tmp_path}/clinic/pairs_truth.jsonl",), False),
        "manner": ((f"{tmp_path}/clinic/pairs_manner.jsonl",), True),
        "length": ((f"{tmp_path}/clinic/pairs_length.jsonl",), True),
    }
    sources = {one.name: (one.paths, one.held_out_by) for one in cfg.sft.data.sources}
    assert sources["real_instruction"] == ((f"{tmp_path}/clinic/real_instruction.jsonl",), "never")
    assert sources["held_out_real_instruction"][1] == "always" and len(sources) == 8


def test_prompts_of_ones_own_stand_in_for_the_clinics(tmp_path):
    prompts = PromptsConfig(files="mine.jsonl")
    cfg = dataclasses.replace(tiny_clinic_recipe(), prompts=prompts).in_workdir(tmp_path)
    assert cfg.prompts.files == "mine.jsonl"
    assert cfg.prompts.held_out_files == f"{tmp_path}/clinic/held_out_prompts.jsonl"


def test_data_of_ones_own_leaves_nothing_of_the_clinic(tmp_path):
    cfg = dataclasses.replace(tiny_clinic_recipe(), data="mine.jsonl").in_workdir(tmp_path)
    assert (cfg.clinic, cfg.sft.clinic, cfg.prompts) == (None, None, PromptsConfig())
    assert f"{tmp_path}/clinic" not in repr(cfg) and not cfg.reward.probes


def test_a_clinic_that_the_recipe_does_not_name_is_refused_in_fine_tuning(recipe):
    sft = dataclasses.replace(recipe.sft, clinic=ClinicConfig(seed=3))
    with pytest.raises(ValueError, match="sft.clinic must be None: .* field is clinic"):
        dataclasses.replace(recipe, sft=sft)
