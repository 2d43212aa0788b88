"""Open questions out of exam questions: what has no one checkable answer is left out."""

import json
from collections import Counter

import pytest

from huatuo_jax import synthesize
from huatuo_jax.clinic.files import exam_questions
from huatuo_jax.data.readers import read_prompts
from huatuo_jax.synthesis.jobs import Rejected
from huatuo_jax.synthesis.verifiable import _checkable, read_exam_questions, same_answer
from tests.synthesis import run_synthesis
from tests.synthesis.scripted_examiner import FAULTS, RULES, examine, exams, fault_of
from tests.synthesis.teacher_server import KEY, MODEL, TeacherServer, some_fault


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_question_without_one_checkable_answer_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    count, source = 160, tmp_path / "exams.jsonl"
    made = list(exams(count))
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row, _ in made)
    source.write_text(text, encoding="utf-8")
    with TeacherServer(examine, fault=some_fault(0.2)) as server:
        run_synthesis.run(
            {
                "kind": "verifiable",
                "output": str(tmp_path / "rows.jsonl"),
                "teacher": f"openai:{MODEL}",
                "base_url": server.url,
                "source": (str(source),),
                "num_rows": count,
            }
        )
        asked = {json.loads(call.body)["messages"][-1]["content"] for call in server.calls}
    expected = {}
    for number, (row, rule) in enumerate(made):
        fault = fault_of(number)
        expected[row["id"]] = RULES[rule] if rule else FAULTS[fault] if fault else None
        if rule is not None:  # Nothing is paid for what rules see.
            assert not any(row["question"] in one for one in asked)
    kept = {row["question_id"]: row for row in rows_of(tmp_path / "rows.jsonl")}
    assert kept.keys() == {name for name, reason in expected.items() if reason is None}
    rejected = Counter(one["reason"] for one in rows_of(tmp_path / "rows.jsonl.rejected.jsonl"))
    assert rejected == Counter(filter(None, expected.values()))
    prompts = list(read_prompts(tmp_path / "rows.jsonl"))
    assert len(prompts) == len(kept)
    assert all(one.reference in DISEASES for one in prompts)


DISEASES = {text for row, _ in exams(160) for text in row["options"].values()}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("急性阑尾炎", "急性阑尾炎。", True),
        ("甲状腺功能亢进症（Graves病）", "甲状腺功能亢进", True),
        ("阿莫西林", "阿奇霉素", False),
        ("5天", "7天", False),
        ("Iron deficiency anaemia", "iron-deficiency anemia", True),
        ("左心衰竭", "右心衰竭", False),
        ("肺", "肺炎", False),
    ],
)
def test_short_answers_are_compared(one, other, same):
    assert same_answer(one, other) == same


def test_rules_leave_a_good_part_of_real_questions(shared_data):
    questions = read_exam_questions([f"apollo:{shared_data}/6_exam/apollo_zh_cmexam.jsonl"])
    reasons = Counter()
    for one in questions:
        try:
            _checkable(one)
            reasons["kept"] += 1
        except Rejected as rejected:
            reasons[rejected.rejection.reason] += 1
    print(reasons)
    assert 0.3 * len(questions) < reasons["kept"] < 0.9 * len(questions)


def test_the_clinic_makes_open_questions_of_its_exams(tmp_path):
    source = tmp_path / "exams.jsonl"
    rows = [one.to_json() for one in exam_questions(60, seed=1)]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    source.write_text(text, encoding="utf-8")
    output = tmp_path / "rows.jsonl"
    synthesize.main(
        synthesize.Flags(kind="verifiable", source=(str(source),), output=str(output), num_rows=60)
    )
    rejected = Counter(one["reason"] for one in rows_of(tmp_path / "rows.jsonl.rejected.jsonl"))
    assert len(rows_of(output)) + sum(rejected.values()) == 60
    # Its exams ask 下面哪; the clinic copies the question.
    assert set(rejected) <= {"needs its options", "several answers", "near duplicate"}
