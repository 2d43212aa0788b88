import json

import pytest

from huatuo_jax.judge.judgements import JudgementFailed, Reply, sha256
from huatuo_jax.judge.offline import OfflineJudge
from huatuo_jax.judge.questions import pairwise_questions, read_answered, score_questions
from tests.judge.planted_answers import make_answers

JUDGE = OfflineJudge()


@pytest.fixture
def answered(tmp_path):
    make_answers(tmp_path / "answers.jsonl", num_prompts=3, num_answers=4)
    return read_answered(tmp_path / "answers.jsonl")


def test_an_answers_file_is_read_with_its_dialogues_and_references(answered):
    assert [item.prompt.id for item in answered] == ["q000", "q001", "q002"]
    assert len(answered[1].prompt.messages) == 3
    assert answered[1].prompt.reference == "先量血压，注意休息。"
    assert answered[1].answers[2] == "第1问的答复2：多喝水，休息。"


def test_every_answer_is_scored_once_and_every_pair_compared_in_both_orders(answered):
    scored = list(score_questions(answered, JUDGE))
    assert [(q.prompt.id, q.answers) for q in scored] == [
        (f"q00{prompt}", (answer,)) for prompt in range(3) for answer in range(4)
    ]
    compared = list(pairwise_questions(answered, JUDGE))
    assert {(q.prompt.id, q.answers) for q in compared} == {
        (f"q00{prompt}", (a, b))
        for prompt in range(3)
        for a in range(4)
        for b in range(4)
        if a != b
    }
    for question in scored + compared:
        texts = next(item for item in answered if item.prompt is question.prompt).answers
        assert question.texts == tuple(texts[index] for index in question.answers)
    assert len({question.identity for question in scored + compared}) == 12 + 36


def test_at_most_so_many_pairs_are_chosen_by_text_and_not_by_place(answered):
    def chosen(item):
        found = list(pairwise_questions([item], JUDGE, max_pairs=2))
        assert len(found) == 4
        return {frozenset(question.texts) for question in found}

    turned = type(answered[0])(answered[0].prompt, answered[0].answers[::-1])
    assert chosen(turned) == chosen(answered[0]) and len(chosen(turned)) == 2


def test_two_equal_answers_are_no_pair_and_one_question_to_score(answered):
    item = type(answered[0])(answered[0].prompt, ("好。", "坏。", "好。"))
    pairs = {question.answers for question in pairwise_questions([item], JUDGE)}
    assert pairs == {(0, 1), (1, 0), (1, 2), (2, 1)}
    keys = [question.key for question in score_questions([item], JUDGE)]
    assert keys[0] == keys[2] != keys[1]


def test_a_judgement_names_what_was_asked(answered):
    question = list(pairwise_questions(answered, JUDGE))[1]
    usage = {"input_tokens": 5}
    judgement = question.judgement(Reply(p_first=0.75, usage=usage, cost=0.5), paid=True)
    assert (judgement.id, judgement.first, judgement.second) == ("q000", 1, 0)
    assert judgement.p_first == 0.75 and judgement.cost == 0.5 and judgement.usage == usage
    assert judgement.answer_sha256 == tuple(map(sha256, question.texts))
    copy = question.copy_of(judgement)
    assert (copy.p_first, copy.cost, copy.usage) == (0.75, 0.0, None)
    failed = question.judgement(JudgementFailed("prose", raw="嗯", cost=0.25), paid=True)
    assert failed.failed and (failed.error, failed.raw, failed.cost) == ("prose", "嗯", 0.25)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"id": "a", "messages": []}, "a list of answers"),
        ({"id": "a", "messages": [], "answers": "x"}, "a list of answers"),
        ({"id": "a", "messages": [], "answers": ["x"]}, "be an object with a text"),
        ({"id": "a", "messages": [], "answers": [{"text": 1}]}, "be an object with a text"),
        ({"messages": [], "answers": []}, "lacks 'id'"),
        ({"id": 7, "messages": [], "answers": []}, "id is 7"),
        ({"id": "a", "messages": [], "answers": [], "reference": 7}, "reference is 7"),
        ({"id": "a", "messages": "x", "answers": []}, "not a list of role and content"),
    ],
)
def test_a_row_that_is_no_answers_record_is_named(tmp_path, row, why):
    path = tmp_path / "answers.jsonl"
    good = {"id": "good", "messages": [], "source": "s", "answers": []}
    path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"answers.jsonl:2: .*{why}"):
        read_answered(path)


def test_an_id_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    row = {"id": "a", "messages": [], "source": "s", "answers": []}
    path.write_text(f"{json.dumps(row)}\n" * 2, encoding="utf-8")
    with pytest.raises(ValueError, match="answers.jsonl:2: id 'a' is repeated"):
        read_answered(path)
