import asyncio
import collections
import json

import pytest

from huatuo_jax.judge.judgements import (
    CRITERIA,
    Estimate,
    JudgementFailed,
    JudgeUnusable,
    LabelsFile,
    Reply,
    current,
    read_judgements,
)
from huatuo_jax.judge.labelling import LabelConfig, label, make_plan, questions_of
from huatuo_jax.judge.questions import Answered, read_answered
from tests.judge.planted_answers import make_answers


class ScriptedJudge:
    """Scores by the text's length; fails, or ends, where its script says."""

    name = "scripted"

    def __init__(self, script=lambda text, count: None, version=1):
        self.script, self.settings = script, {"version": version}
        self.asked, self.under_way, self.most_under_way, self.closed = [], 0, 0, False

    def template_hash(self, protocol):
        return f"template of {protocol}"

    def estimate(self, prompt, texts):
        return Estimate(
            calls=1,
            input_tokens=10,
            max_input_tokens=20,
            max_output_tokens=5,
            cost=0.25,
            max_cost=0.5,
        )

    async def score(self, prompt, answer):
        await self.reply(answer)
        return Reply(scores=dict.fromkeys(CRITERIA, float(len(answer))), cost=0.125)

    async def compare(self, prompt, first, second):
        await self.reply(first + second)
        return Reply(p_first=0.75 if first > second else 0.25, cost=0.125)

    async def reply(self, text):
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        self.asked.append(text)
        error = self.script(text, self.asked.count(text))
        await asyncio.sleep(0.001 * (sum(text.encode()) % 5))
        self.under_way -= 1
        if error is not None:
            raise error

    async def close(self):
        self.closed = True


@pytest.fixture
def answered(tmp_path):
    make_answers(tmp_path / "answers.jsonl", num_prompts=5, num_answers=3)
    return read_answered(tmp_path / "answers.jsonl")


def run(answered, judge, output, *, protocol="both", concurrency=4, **keywords):
    questions = questions_of(LabelConfig(protocol=protocol), answered, judge)
    labels = label(questions, judge, output, concurrency=concurrency, **keywords)
    assert judge.closed
    return labels


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines()


def test_every_question_gets_one_judgement(answered, tmp_path):
    output, seen = tmp_path / "deep" / "labels.jsonl", []
    judge = ScriptedJudge()
    labels = run(answered, judge, output, on_progress=lambda *counts: seen.append(counts))
    num_scores, num_pairs = 5 * 3, 5 * 3 * 2
    assert len(labels.judgements) == len(lines_of(output)) == num_scores + num_pairs
    assert len({judgement.identity for judgement in labels.judgements}) == num_scores + num_pairs
    assert (labels.asked, labels.failed, labels.missing) == (45, 0, 0)
    assert 1 < judge.most_under_way <= 4
    assert seen == [(count, 45) for count in range(1, 46)]
    for judgement in labels.judgements:
        texts = next(item for item in answered if item.prompt.id == judgement.id).answers
        shown = [texts[index] for index in judgement.answers]
        if judgement.protocol == "score":
            assert set(judgement.scores.values()) == {float(len(shown[0]))}
        else:
            assert judgement.p_first == (0.75 if shown[0] > shown[1] else 0.25)


def test_what_stands_does_not_depend_on_the_order_of_arrival(answered, tmp_path):
    one = run(answered, ScriptedJudge(), tmp_path / "one.jsonl", concurrency=1)
    many = run(answered, ScriptedJudge(), tmp_path / "many.jsonl", concurrency=16)
    assert one.judgements == many.judgements
    assert lines_of(tmp_path / "one.jsonl") != lines_of(tmp_path / "many.jsonl")


def test_a_complete_file_asks_nothing_and_is_left_alone(answered, tmp_path):
    output = tmp_path / "labels.jsonl"
    first = run(answered, ScriptedJudge(), output)
    before = output.read_bytes()
    judge = ScriptedJudge()
    assert run(answered, judge, output).judgements == first.judgements
    assert judge.asked == [] and output.read_bytes() == before


@pytest.mark.parametrize("cut_at", [0.0, 0.31, 0.5, 0.77, 0.999])
def test_a_file_that_was_cut_anywhere_goes_on_without_asking_twice(answered, tmp_path, cut_at):
    output = tmp_path / "labels.jsonl"
    whole = run(answered, ScriptedJudge(), output)
    data = output.read_bytes()
    kept = data[: int(cut_at * len(data))]
    output.write_bytes(kept)
    judge = ScriptedJudge()
    again = run(answered, judge, output)
    assert again.judgements == whole.judgements
    assert len(judge.asked) == 45 - kept.count(b"\n")
    assert output.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert len(lines_of(output)) == 45


def test_failed_judgements_are_null_and_asked_again_in_the_next_run(answered, tmp_path):
    output = tmp_path / "labels.jsonl"
    bad = answered[1].answers[2]

    def fails(text, count):
        return JudgementFailed("prose", raw="嗯", cost=0.5) if bad in text else None

    first = run(answered, ScriptedJudge(fails), output)
    failed = [judgement for judgement in first.judgements if judgement.failed]
    assert first.failed == len(failed) == 1 + 4
    for line in map(json.loads, lines_of(output)):
        assert (line["error"] is None) == (
            (line["scores"] if line["protocol"] == "score" else line["p_first"]) is not None
        )
    second = run(answered, ScriptedJudge(fails), output)
    assert (second.asked, second.failed, len(lines_of(output))) == (5, 5, 50)
    judge = ScriptedJudge()
    third = run(answered, judge, output)
    assert third.failed == 0 and len(judge.asked) == 5 and len(lines_of(output)) == 55
    counts = collections.Counter(
        judgement.identity for judgement in read_judgements(output) if not judgement.failed
    )
    assert set(counts.values()) == {1} and len(counts) == 45
    assert current(read_judgements(output)) == third.judgements


def test_equal_questions_are_paid_for_once(answered, tmp_path):
    twins = [Answered(answered[0].prompt, ("好好休息。", "坏。", "好好休息。"))]
    judge = ScriptedJudge()
    labels = run(twins, judge, tmp_path / "labels.jsonl", protocol="score")
    assert sorted(judge.asked) == ["坏。", "好好休息。"]
    assert [judgement.answer for judgement in labels.judgements] == [0, 1, 2]
    assert sorted(judgement.cost for judgement in labels.judgements) == [0.0, 0.125, 0.125]
    one, _, other = labels.judgements
    assert one.scores == other.scores and one.key == other.key
    # A kill between the two lines: the other is copied, and nobody is asked.
    output = tmp_path / "labels.jsonl"
    lines = [line for line in lines_of(output) if json.loads(line)["answer"] != 2]
    output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    judge = ScriptedJudge()
    assert len(run(twins, judge, output, protocol="score").judgements) == 3 and not judge.asked


def test_a_judge_that_cannot_go_on_ends_the_run_and_keeps_what_came(answered, tmp_path):
    output = tmp_path / "labels.jsonl"
    counter = iter(range(100))

    def ends(text, count):
        return JudgeUnusable("max_requests=10 is spent") if next(counter) >= 10 else None

    labels = run(answered, ScriptedJudge(ends), output)
    assert "max_requests=10" in str(labels.error)
    assert len(labels.judgements) == 10 == len(lines_of(output)) and labels.missing == 35
    assert labels.failed == 0
    assert run(answered, ScriptedJudge(), output).missing == 0


def test_an_error_of_any_kind_ends_the_run_and_loses_no_reply_of_the_others(answered, tmp_path):
    output = tmp_path / "labels.jsonl"
    counter = iter(range(100))
    judge = ScriptedJudge(lambda text, count: KeyError("bug") if next(counter) == 9 else None)
    labels = run(answered, judge, output, concurrency=8)
    assert isinstance(labels.error, KeyError)
    assert len(judge.asked) == labels.asked == len(lines_of(output)) + 1 <= 17
    assert labels.failed == 0 and labels.verdicts == len(lines_of(output)) >= 9


def test_a_judge_that_never_started_leaves_no_file(answered, tmp_path):
    output = tmp_path / "labels.jsonl"
    labels = run(answered, ScriptedJudge(lambda text, count: JudgeUnusable("no key")), output)
    assert "no key" in str(labels.error) and labels.judgements == []
    assert list(tmp_path.iterdir()) == [tmp_path / "answers.jsonl"]


def test_other_settings_ask_anew_and_judgements_of_others_do_not_come_along(answered, tmp_path):
    output = tmp_path / "labels.jsonl"
    run(answered, ScriptedJudge(), output, protocol="score")
    judge = ScriptedJudge(version=2)
    labels = run(answered, judge, output, protocol="score")
    assert len(judge.asked) == 15 == len(labels.judgements) and len(lines_of(output)) == 30


def test_a_plan_counts_what_is_to_be_asked_and_what_it_costs(answered, tmp_path):
    output = tmp_path / "labels.jsonl"
    judge = ScriptedJudge()
    run(answered[:2], judge, output, protocol="score")
    questions = questions_of(LabelConfig(protocol="score"), answered, judge)
    with LabelsFile(output) as file:
        plan = make_plan(questions, file.found, judge)
    assert (len(plan.questions), plan.done, len(plan.groups), plan.others) == (15, 6, 9, 0)
    estimate = plan.estimate
    assert (estimate.calls, estimate.input_tokens, estimate.max_output_tokens) == (9, 90, 45)
    assert (estimate.cost, estimate.max_cost) == (2.25, 4.5)
    assert "15 judgements: 6 done" in str(plan) and "about 2.25" in str(plan)


def test_two_runs_cannot_share_a_file(answered, tmp_path):
    output = tmp_path / "labels.jsonl"
    run(answered, ScriptedJudge(), output)
    with LabelsFile(output), pytest.raises(ValueError, match="another process writes this file"):
        run(answered, ScriptedJudge(), output)


def test_another_file_is_refused_and_left_as_it_is(answered, tmp_path):
    output = tmp_path / "labels.jsonl"
    output.write_text('{"id": "x"}\n{"id"', encoding="utf-8")
    with pytest.raises(ValueError, match="labels.jsonl:1: not a judgement"):
        run(answered, ScriptedJudge(), output)
    assert output.read_text(encoding="utf-8") == '{"id": "x"}\n{"id"'


def test_half_a_character_in_a_reply_comes_back_from_the_file(answered, tmp_path):
    output = tmp_path / "labels.jsonl"
    script = iter([JudgementFailed("prose", raw="半\ud800个")])
    run(answered[:1], ScriptedJudge(lambda text, count: next(script, None)), output)
    assert any(judgement.raw == "半\ud800个" for judgement in read_judgements(output))


@pytest.mark.parametrize("fields", [{"protocol": "vote"}, {"max_pairs": 0}, {"concurrency": 0}])
def test_a_config_that_cannot_be_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        LabelConfig(**fields)
