"""The clinic's judge in the labels: its verdicts are the table's, and no other prompt is judged."""

import asyncio
import json

import pytest

from huatuo_jax.clinic.dialogues import prompts
from huatuo_jax.clinic.diseases import DISEASES
from huatuo_jax.clinic.judge import ClinicJudge
from huatuo_jax.core import files
from huatuo_jax.data.records import Message, Prompt
from huatuo_jax.evaluation.stage import truth_values
from huatuo_jax.judge.labelling import LabelConfig
from huatuo_jax.judge.offline import TRUTHS, TruthJudge
from huatuo_jax.judge.questions import Answered
from huatuo_jax.preferences.label import LabelRun, run_labels

PROMPTS = list(prompts(24, seed=0))


def _other(prompt):
    """The doctor's answer with another disease in it."""
    wrong = next(name for name in DISEASES if name != prompt.diagnosis)
    return f"考虑{wrong}。"


def _write_answers(path, asked=PROMPTS):
    rows = [
        prompt.to_json() | {"answers": [{"text": prompt.reference}, {"text": _other(prompt)}]}
        for prompt in asked
    ]
    files.write_rows(path, rows)
    return str(path)


@pytest.mark.parametrize("protocol", ["score", "pairwise"])
def test_labels_and_comparisons_prefer_the_true_answer(tmp_path, protocol):
    cfg = LabelRun(
        answers=_write_answers(tmp_path / "answers.jsonl"),
        output=str(tmp_path / "labels.jsonl"),
        offline="clinic",
        label=LabelConfig(protocol=protocol),
        comparisons=str(tmp_path / "comparisons.jsonl"),
    )
    said = []
    labels = run_labels(cfg, said.append)
    assert all(one.judge == "clinic-truth-v1" for one in labels.judgements)
    pairs = files.read_rows(cfg.comparisons, unfinished="read")
    right = {prompt.id: prompt.reference for prompt in PROMPTS}
    assert len(pairs) == len(PROMPTS)
    assert all(one["chosen"] == right[one["id"].split(":")[0]] for one in pairs)
    assert not any("measures only the form" in line for line in said)


def test_prompts_of_elsewhere_are_refused_by_name_before_anything_is_judged(tmp_path):
    stranger = Prompt("mine", (Message("user", "头疼"),), "mine", "休息。", "一种没有的病")
    cfg = LabelRun(
        answers=_write_answers(tmp_path / "answers.jsonl", [*PROMPTS[:1], stranger]),
        output=str(tmp_path / "labels.jsonl"),
        offline="clinic",
    )
    with pytest.raises(ValueError, match="'mine': diagnosis is '一种没有的病'; the clinic's judge"):
        run_labels(cfg, lambda line: None)
    assert not (tmp_path / "labels.jsonl").exists() or not (tmp_path / "labels.jsonl").read_text()


def test_verdicts_are_the_clinics_and_biases_are_part_of_the_judges_settings():
    prompt, exact, biased = PROMPTS[0], TruthJudge(), TruthJudge(ClinicJudge(position_bias=2.0))
    first, second = prompt.reference, _other(prompt)

    async def ask(judge, *texts):
        return (await judge.compare(prompt, *texts)).p_first

    assert asyncio.run(ask(exact, first, second)) == pytest.approx(
        1 - asyncio.run(ask(exact, second, first))
    )
    assert asyncio.run(ask(biased, second, first)) > asyncio.run(ask(exact, second, first))
    assert exact.template_hash("score") != biased.template_hash("score")
    json.dumps(dict(exact.settings))


def test_what_is_true_of_answers_is_told_by_prompt():
    answered = [Answered(one, (one.reference, _other(one), "")) for one in PROMPTS]
    found = truth_values(answered, TruthJudge())
    assert set(found) == {f"truth_{name}" for name in TRUTHS}
    told = [v for v in found["truth_diagnosis_right"].values() if v[0] is not None]
    assert told and all(values == [1.0, 0.0, 0.0] for values in told)
    asked = [v for v in found["truth_asks_when_needed"].values() if v[0] is not None]
    assert asked and all(values == [1.0, 0.0, 0.0] for values in asked)
    assert len(told) + len(asked) == len(PROMPTS)


def test_the_labels_and_their_report_name_the_biases_of_the_judge(tmp_path):
    cfg = LabelRun(
        answers=_write_answers(tmp_path / "answers.jsonl"),
        output=str(tmp_path / "labels.jsonl"),
        offline="clinic",
        clinic_judge=ClinicJudge(length_bias=50.0, with_reference=False),
        label=LabelConfig(protocol="pairwise"),
        comparisons=str(tmp_path / "comparisons.jsonl"),
    )
    said = []
    labels = run_labels(cfg, said.append)
    name = "clinic-truth-v1 (length_bias=50.0, with_reference=False)"
    assert {one.judge for one in labels.judgements} == {name}
    report = json.loads((tmp_path / "labels.jsonl.report.json").read_text(encoding="utf-8"))
    (part,) = report["judges"]
    assert part["judge"] == name and any(name in line for line in said)
    assert part["longer_wins"]["value"] == 1.0
    pairs = files.read_rows(cfg.comparisons, unfinished="read")
    assert all(len(one["chosen"]) > len(one["rejected"]) for one in pairs)


def test_a_seed_without_noise_makes_no_other_judge():
    assert TruthJudge(ClinicJudge(seed=3)).name == TruthJudge().name == "clinic-truth-v1"
    assert TruthJudge(ClinicJudge(seed=3, noise=0.5)).name == "clinic-truth-v1 (noise=0.5, seed=3)"
