"""Settings of an evaluation: what decides nothing is refused, in one line that names the field."""

import dataclasses
import itertools

import pytest

from huatuo_jax.evaluation.exam_files import ExampleFiles
from huatuo_jax.evaluation.opening import ModelChoice, check_models
from huatuo_jax.evaluation.suite_settings import (
    SUITE_FILES,
    Files,
    SuiteSettings,
    check_settings,
    given_files,
)
from huatuo_jax.judge.config import JudgeConfig

JUDGE = JudgeConfig(offline="rubric")
OF_SUITES = {
    "lexical": {
        "tokenizer": "jieba",
        "nfkc": True,
        "average": "sentence",
        "smoothing": 2,
        "conventions": True,
    },
    "exams": {"exam_by": ("likelihood",), "exam_form": "cmb", "num_examples": 3},
    "single_turn": {"human": True, "ratings": ("a.json",)},
    "multi_turn": {"patient": "clinic", "ending": "exchanges", "max_exchanges": 2},
    "clinical": {"history": "model"},
    "healthbench": {"calls": "row", "subset": "hard"},
    "clinic": {"clinic_cases": 3},
}


def refused(**fields):
    with pytest.raises(ValueError) as error:
        check_settings(SuiteSettings(**fields), flag="--")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_file_belongs_to_one_suite():
    names = list(itertools.chain.from_iterable(SUITE_FILES.values()))
    assert sorted(names) == sorted(one.name for one in dataclasses.fields(Files))
    assert set(OF_SUITES) == set(SUITE_FILES)


@pytest.mark.parametrize("suite", SUITE_FILES)
def test_the_file_of_a_suite_that_is_not_run_is_named(suite):
    for name in SUITE_FILES[suite]:
        path = ("x",) if name == "apollo" else "x"
        other = "exams" if suite == "clinic" else "clinic"
        assert refused(suite=(other,), files=Files(**{name: path})) == (
            f"--files.{name} is of the suite {suite}, which is not run: leave it out, or add the"
            " suite to --suite"
        )


@pytest.mark.parametrize("suite", SUITE_FILES)
def test_the_setting_of_a_suite_that_is_not_run_is_named(suite):
    other = "exams" if suite == "clinic" else "clinic"
    for field, value in OF_SUITES[suite].items():
        assert refused(suite=(other,), **{field: value}).startswith(f"--{field} is of the suite")
        fields = {field: value} | ({"patient": "clinic"} if field == "clinic_cases" else {})
        runs = (suite, "multi_turn") if field == "clinic_cases" else (suite,)
        check_settings(SuiteSettings(suite=runs, **fields), flag="--")


def test_a_judge_whom_no_suite_asks_is_named():
    told = refused(suite=("clinic", "exams"), judge=JUDGE)
    assert told.startswith(
        "--judge is of the suites single_turn, multi_turn, clinical, healthbench"
    )
    told = refused(suite=("clinical",), judge=JUDGE, second_judge=JUDGE)
    assert told.startswith("--second_judge is of the suites single_turn, multi_turn, none of which")


def test_cases_for_a_patient_that_is_not_asked_are_named():
    files = Files(med_dialog="cases.json")
    assert refused(suite=("multi_turn",), patient="clinic", files=files) == (
        "--files.med_dialog holds cases for --patient=judge, and --patient=clinic draws its own:"
        " leave one of the two out"
    )
    assert refused(suite=("multi_turn",), clinic_cases=5) == (
        "--clinic_cases decides nothing with --patient=judge: leave it out, or give"
        " --patient=clinic"
    )
    check_settings(SuiteSettings(suite=("multi_turn",), files=files), flag="--")
    check_settings(
        SuiteSettings(suite=("multi_turn",), patient="clinic", clinic_cases=5), flag="--"
    )


def test_files_that_complete_no_set_and_examples_of_none_are_named():
    exams = {"suite": ("exams",)}
    assert refused(**exams, files=Files(cmb_answers="a")) == (
        "--files.cmb_answers needs --files.cmb, the questions"
    )
    assert refused(**exams, files=Files(cmb="q"), examples=ExampleFiles(cmb="e")) == (
        "--examples.cmb decides nothing with --num_examples=0: leave it out, or give a number"
    )
    some = {"num_examples": 2, "files": Files(cmb="q")}
    assert refused(**exams, **some, examples=ExampleFiles(cmb="e", cmexam="e")) == (
        "--examples.cmexam needs --files.cmexam"
    )
    assert refused(**exams, **some) == (
        "--num_examples=2, and there are no examples for cmb; give --examples.cmb"
    )


def test_settings_of_models_that_are_not_there_are_named():
    saved, server = ModelChoice("folder"), ModelChoice("openai:m")

    def told(models, **fields):
        with pytest.raises(ValueError) as error:
            check_models(SuiteSettings(**fields), dict(enumerate(models)), flag="--")
        return str(error.value)

    assert told([saved], base_url="http://x/v1") == (
        "--base_url is for models named openai:NAME, and there are none: leave it out"
    )
    assert told([saved], max_cost=1.0).startswith("--max_cost is for models named openai:NAME")
    for field in ({"template": "chatml"}, {"max_length": 9}, {"top_p": 0.5}):
        (name,) = field
        found = told([server], base_url="http://x/v1", **field)
        assert found == f"--{name} is for saved models, and there are none: leave it out"
    both = SuiteSettings(base_url="http://x/v1", template="chatml", max_cost=1.0)
    check_models(both, {"a": saved, "b": server}, flag="--")


def test_files_are_told_with_their_paths():
    assert given_files(Files(cmb="a", apollo=("b", "c"))) == {"cmb": ("a",), "apollo": ("b", "c")}
