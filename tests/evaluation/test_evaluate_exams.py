"""Exams through the command, with a tiny random model behind our engine and the real sets."""

import json
import pathlib

import numpy as np
import pytest

from huatuo_jax import clinic, evaluate
from huatuo_jax.checkpoint.models import save_orbax
from huatuo_jax.evaluation.exam_prompts import default_form, likelihood_prompt
from huatuo_jax.evaluation.exam_sets import read_subject_files
from huatuo_jax.evaluation.respondents import DecodingConfig, SavedRespondent
from huatuo_jax.evaluation.suite_settings import Files
from huatuo_jax.hf.tokenizer import load_tokenizer
from tests.generation import tiny

pytestmark = pytest.mark.usefixtures("on_one_device")
TOKENIZER = pathlib.Path(clinic.__file__).with_name("tokenizer")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny random model with the clinic's tokenizer."""
    cfg = tiny.config(vocab_size=len(load_tokenizer(TOKENIZER)))
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_orbax(tiny.variables(cfg)["params"], cfg, folder, head="lm", source_folder=TOKENIZER)
    return folder


@pytest.fixture()
def cmmlu(shared_data, tmp_path):
    """The development files in the folders of the published set, one subject filled with others."""
    real = shared_data / "6_exam" / "cc_by_nc_sa"
    names = {"anatomy", "clinical_knowledge", "college_medicine", "genetics", "nutrition"}
    names |= {"professional_medicine", "traditional_chinese_medicine", "virology"}
    for split in ("test", "dev"):
        (tmp_path / "cmmlu" / split).mkdir(parents=True)
        for name in names:
            source = real / f"cmmlu_{split}_{name}.csv"
            (tmp_path / "cmmlu" / split / f"{name}.csv").symlink_to(source)
    return tmp_path / "cmmlu"


def rows(folder):
    text = (folder / "records" / "exams.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_exams_by_likelihood_and_by_generation(model_folder, cmmlu, shared_data, tmp_path):
    out = tmp_path / "out"
    flags = evaluate.Flags(
        model=(str(model_folder),),
        suite=("exams",),
        output=str(out),
        files=Files(
            cmmlu=str(cmmlu),
            cmexam=str(shared_data / "6_exam" / "cmexam_test_01_clinical_depart.csv"),
        ),
        exam_by=("likelihood", "generation"),
        template="huatuogpt",
        limit=4,
        max_new_tokens=8,
        slots=2,
    )
    evaluate.main(flags)
    result = json.loads((out / evaluate.RESULTS_FILE).read_text("utf-8"))
    found = rows(out)
    assert len(found) == 2 * 2 * 4
    for name in ("cmmlu", "cmexam"):
        (by_model,) = result["suites"]["exams"]["sets"][name]["models"].values()
        for by in ("likelihood", "generation"):
            own = [row for row in found if (row["set"], row["by"]) == (name, by)]
            right = sum(row["right"] for row in own)
            assert by_model[by]["accuracy"]["value"] == pytest.approx(right / 4)
            assert all(row["right"] == (row["key"] == row["extracted"]) for row in own)
            unparsed = sum(row["extracted"] is None for row in own)
            assert by_model[by]["unparsed"]["value"] == pytest.approx(unparsed / 4)
    # The likeliest option is that of the scorer on the same text.
    real = cmmlu / "test" / "anatomy.csv"
    questions = {}
    for path in real.parent.iterdir():
        for one in read_subject_files({path: path.stem}, exam="cmmlu").questions:
            questions[one.id] = one
    respondent = SavedRespondent(
        str(model_folder), DecodingConfig(max_new_tokens=8), template="huatuogpt"
    )
    scored = [row for row in found if (row["set"], row["by"]) == ("cmmlu", "likelihood")]
    scored = [row for row in scored if not row["too_long"]]
    assert scored
    prompts = [
        likelihood_prompt(questions[row["id"]], default_form(questions[row["id"]]))
        for row in scored
    ]
    alone = respondent.option_log_probs([(one.context, one.continuations) for one in prompts])
    for row, prompt, values in zip(scored, prompts, alone, strict=True):
        np.testing.assert_allclose(row["log_probs"], values, rtol=1e-4, atol=1e-4)
        assert row["extracted"] == sorted(prompt.answers[int(np.argmax(values))])
    # Everything is there: the second run reads no weights.
    text = (out / evaluate.RESULTS_FILE).read_text("utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SavedRespondent, "_loaded", None)
        evaluate.main(flags)
    assert (out / evaluate.RESULTS_FILE).read_text("utf-8") == text


def test_worked_examples_come_from_the_dev_folder_or_are_asked_for(
    model_folder,
    cmmlu,
    shared_data,
    tmp_path,
    capsys,
):
    given = {
        "model": (str(model_folder),),
        "suite": ("exams",),
        "output": str(tmp_path / "out"),
        "num_examples": 5,
        "dry_run": True,
        "template": "huatuogpt",
    }
    evaluate.main(evaluate.Flags(files=Files(cmmlu=str(cmmlu)), **given))
    assert "exams/cmmlu/generation: 1149 responses of tiny" in capsys.readouterr().out
    cmexam = str(shared_data / "6_exam" / "cmexam_test_01_clinical_depart.csv")
    with pytest.raises(ValueError, match="no examples for cmexam; give --examples.cmexam"):
        evaluate.main(evaluate.Flags(files=Files(cmexam=cmexam), **given))


def test_a_set_in_another_layout_is_one_line(model_folder, tmp_path):
    path = tmp_path / "medqa.jsonl"
    path.write_text('{"text": "x"}\n', "utf-8")
    with pytest.raises(ValueError, match=r"medqa.jsonl: .*question"):
        evaluate.main(
            evaluate.Flags(
                model=(str(model_folder),),
                suite=("exams",),
                output=str(tmp_path / "out"),
                files=Files(medqa_us=str(path)),
            )
        )


def test_a_response_fills_the_room_that_is_left_and_a_prompt_without_room_is_told(
    model_folder, tmp_path, capsys
):
    def evaluated(**fields):
        flags = evaluate.Flags(
            model=(str(model_folder),),
            suite=("clinic",),
            output=str(tmp_path / "out"),
            template="huatuogpt",
            clinic_cases=2,
            slots=2,
            **fields,
        )
        evaluate.main(flags)
        result = json.loads((tmp_path / "out" / evaluate.RESULTS_FILE).read_text("utf-8"))
        return result["suites"]["clinic"]["models"]["tiny"]["responses"]

    # As many new tokens as there are positions, which the prompts take a part of.
    assert evaluated(max_length=128, max_new_tokens=128)["num_missing"] == 0
    capsys.readouterr()
    found = evaluated(max_length=8, max_new_tokens=8)
    assert set(found["missing"].values()) == {"too long"} and found["num_missing"] == 2
    assert "clinic: 2 of 2 prompts leave tiny no room to answer" in capsys.readouterr().err
