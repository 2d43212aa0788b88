"""Exams by likelihood have the same answers in our evaluator, in lm-evaluation-harness and torch.

The harness's own task files make the prompts, from development files of real exams.
"""

import csv
import json
import pathlib

import lm_eval.tasks
import numpy as np
import pytest
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

import huatuo_jax as hj
from huatuo_jax.evaluation import exam_sets
from huatuo_jax.evaluation.exam_prompts import PUBLISHED_FORMS, likelihood_prompt
from huatuo_jax.evaluation.harness import HuatuoLM
from huatuo_jax.evaluation.respondents import DecodingConfig, SavedRespondent
from tests.evaluation.test_harness import save

BUNDLED = pathlib.Path(lm_eval.tasks.__file__).parent
NEAR_TIE = 1e-4
SUBJECTS = ("anatomy", "clinical_knowledge")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "qwen3", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("exported") / "hf"
    hj.load_model(folder).save(target)
    return target


def json_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def csv_rows(path):
    """The cells without the white space around them, which our readers take off, too."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: cell.strip() for name, cell in row.items()} for row in csv.DictReader(file)]


def real_sets(shared_data):
    """Task file of the harness, rows in the columns that it wants, questions, form."""
    folder = shared_data / "6_exam"
    for subject in SUBJECTS:
        path = folder / "cc_by_nc_sa" / f"cmmlu_test_{subject}.csv"
        found = exam_sets.read_subject_files({path: subject}, exam="cmmlu")
        yield f"cmmlu/cmmlu_{subject}.yaml", csv_rows(path), found.questions, "cmmlu"
    path = folder / "medqa_us_4opt_test.jsonl"
    rows = [
        {"sent1": row["question"].strip(), "label": "ABCD".index(row["answer_idx"])}
        | {f"ending{place}": row["options"]["ABCD"[place]].strip() for place in range(4)}
        for row in json_rows(path)
    ]
    yield "medqa/medqa.yaml", rows, exam_sets.read_medqa(path, region="us").questions, "medqa"
    path = folder / "pubmedqa_ori_pqal.json"
    columns = ("QUESTION", "CONTEXTS", "final_decision")
    rows = [
        {name: row[name] for name in columns}
        for row in json.loads(path.read_text(encoding="utf-8")).values()
    ]
    yield "pubmedqa/pubmedqa.yaml", rows, exam_sets.read_pubmedqa(path).questions, "pubmedqa"


def bundled_task(file, rows):
    """A task of the harness on our rows."""
    config = load_yaml(BUNDLED / file)
    for name in ("training_split", "validation_split", "fewshot_split", "fewshot_config"):
        config.pop(name, None)
    config["custom_dataset"] = lambda **_: {"test": Dataset.from_list(rows)}
    return config


def in_harness(model, file, rows, *, limit, **options):
    """Of each prompt the log-likelihoods of its answers."""
    task = bundled_task(file, rows)
    manager = TaskManager(include_defaults=False)
    found = simple_evaluate(
        model, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=0, **options
    )
    (samples,) = found["samples"].values()
    return {
        sample["arguments"][0][0]: [float(log_prob) for log_prob, _ in sample["filtered_resps"]]
        for sample in samples
    }


def in_our_evaluator(respondent, questions, form):
    prompts = [likelihood_prompt(one, PUBLISHED_FORMS[form]) for one in questions]
    found = respondent.option_log_probs([(one.context, one.continuations) for one in prompts])
    return {one.context: values for one, values in zip(prompts, found, strict=True)}


def compare(name, ours, theirs):
    """All answers but near-ties have to be equal."""
    ties = differ = 0
    for prompt, values in theirs.items():
        mine = np.asarray(ours[prompt])
        np.testing.assert_allclose(mine, values, atol=1e-3, err_msg=prompt)
        best, second = np.sort(values)[-1], np.sort(values)[-2]
        if mine.argmax() != np.argmax(values):
            differ += 1
            assert best - second < NEAR_TIE, (prompt, mine, values)
        ties += best - second < NEAR_TIE
    print(f"{name}: {len(theirs)} questions, {ties} near-ties, {differ} of them answered apart")


@pytest.mark.slow
def test_our_model_in_the_harness_answers_as_our_evaluator(folder, shared_data, on_one_device):
    model, respondent = HuatuoLM(folder), SavedRespondent(str(folder), DecodingConfig())
    for file, rows, questions, form in real_sets(shared_data):
        if form == "pubmedqa":  # Long, and so left to the test with torch.
            continue
        theirs = in_harness(model, file, rows, limit=12)
        kept = [one for one in questions][:12]
        compare(file, in_our_evaluator(respondent, kept, form), theirs)


@pytest.mark.slow
def test_torch_in_the_harness_answers_as_we_do(folder, exported, shared_data, on_one_device):
    pytest.importorskip("accelerate", reason="lm-evaluation-harness needs it for torch")
    model = HuatuoLM(folder, rows_at_once=2)
    respondent = SavedRespondent(str(folder), DecodingConfig())
    for file, rows, questions, form in real_sets(shared_data):
        limit = 40 if form == "pubmedqa" else 100  # Its abstracts are long.
        ours = in_our_evaluator(respondent, questions[:limit], form)
        in_jax = in_harness(model, file, rows, limit=limit)
        in_torch = in_harness(
            "hf",
            file,
            rows,
            limit=limit,
            model_args={"pretrained": str(exported), "dtype": "float32"},
            device="cpu",
            batch_size=2,
        )
        compare(f"{file}, our evaluator and torch", ours, in_torch)
        compare(f"{file}, our model in the harness and torch", in_jax, in_torch)
