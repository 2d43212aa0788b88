"""A question that cannot be judged is one failed judgement; what every question meets is the end.

Whole runs of the command against a mocked server, and again on what they left.
"""

import asyncio
import json

import httpx2
import pytest

from huatuo_jax.judge.judgements import read_judgements
from tests.judge.mocked_server import MockedServer, completion, label, respond, verdict
from tests.judge.planted_answers import make_answers

# Refusals of one question's texts, by real servers and by one that nobody knows.
REFUSALS = [
    (400, {"error": {"code": "data_inspection_failed", "message": "Input data may be bad."}}),
    (400, {"error": {"message": "Content Exists Risk", "type": "invalid_request_error"}}),
    (400, {"error": {"type": "exceed_context_size_error", "message": "9000 tokens"}}),
    (403, {"error": {"code": 403, "message": "Moderated", "metadata": {"reasons": ["violence"]}}}),
    (403, b"<html>Request blocked. Incident 77</html>"),
    (413, {"message": "Payload"}),
    (422, {"detail": [{"loc": ["body"], "msg": "Value error"}]}),
    (400, {"error": {"message": "Nobody knows these words"}}),
    (200, {"base_resp": {"status_code": 1026, "status_msg": "input new_sensitive"}}),
]
# What every question meets.
ENDS = [
    (401, {"error": {"message": "Invalid token"}}, "refuses the key"),
    (403, {"error": {"message": "Forbidden"}}, "refuses the key"),
    (400, {"error": {"message": "API key not valid."}}, "refuses the key"),
    (404, {"error": {"message": "no such thing"}}, "does not know the model"),
    (400, {"error": {"message": "Model Not Exist"}}, "does not know the model"),
    (402, {"error": {"message": "Insufficient Balance"}}, "nothing left for this key"),
    (402, b"", "nothing left for this key"),
    (429, {"error": {"code": "insufficient_quota"}}, "nothing left for this key"),
    (403, {"code": 30001, "message": "account balance is insufficient"}, "nothing left"),
    (200, {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}, "nothing"),
]


@pytest.fixture
def make(tmp_path):
    """Makes an answers file of so many prompts with so many answers; returns it and the labels."""

    def of(num_prompts, num_answers=1):
        make_answers(tmp_path / "answers.jsonl", num_prompts=num_prompts, num_answers=num_answers)
        return tmp_path / "answers.jsonl", tmp_path / "labels.jsonl"

    return of


def number_of(texts):
    """Of the prompt that a text answers."""
    return int(texts[0].split("第")[1].split("问")[0])


def refusing(status, body, which):
    """Refuses the prompts of these numbers, and judges all others."""

    def reply(number, texts, _):
        if number_of(texts) in which:
            return respond(body, status)
        return respond(completion(verdict(texts)))

    return reply


@pytest.mark.parametrize(("status", "body"), REFUSALS)
def test_refused_questions_are_failed_judgements_also_where_they_are_the_first(
    status, body, make, monkeypatch
):
    answers, output = make(20)
    # A bare 403 is mostly a key without the right to ask: three of them are no chance.
    num_refused = 2 if isinstance(body, bytes) else 7
    MockedServer(monkeypatch, refusing(status, body, range(num_refused)))
    ran = label(answers, output)
    assert ran.error is None
    failed = [line for line in ran.lines if line.failed]
    assert len(ran.lines) == 20 and len(failed) == num_refused
    assert {line.failure for line in failed} == {"refused"}
    for words in ("Input data", "Exists Risk", "9000", "Moderated violence", "Incident 77"):
        assert words not in str(body) or all(words in line.error for line in failed)
    counts = f"{20 - num_refused} verdicts, {num_refused} failed judgements, 0 not asked"
    assert counts in ran.told


@pytest.mark.parametrize(("status", "body"), REFUSALS)
def test_the_next_command_makes_comparisons_and_the_one_after_asks_nothing(
    status, body, make, monkeypatch, tmp_path
):
    answers, output = make(6, 2)
    server = MockedServer(
        monkeypatch,
        lambda number, texts, _: (
            respond(body, status)
            if number_of(texts) == 0
            else respond(completion(verdict(texts, score=3 + ("复0" in texts[0]))))
        ),
    )
    assert label(answers, output).error is None and len(server.requests) == 12
    comparisons = tmp_path / "comparisons.jsonl"
    ran = label(answers, output, comparisons=comparisons)
    assert ran.error is None and comparisons.read_text(encoding="utf-8").count("\n") == 5
    assert len(server.requests) == 14
    assert "2 were refused in two runs and are not asked again" in ran.told
    ran = label(answers, output, comparisons=comparisons)
    assert ran.error is None and len(server.requests) == 14
    assert "0 to get by 0 questions" in ran.told and "10 verdicts" in ran.told


def test_a_question_that_failed_is_asked_after_those_that_were_not(make, monkeypatch):
    answers, output = make(3)
    server = MockedServer(monkeypatch, refusing(400, {"message": "content_filter"}, {0}))
    label(answers, output)
    answers, _ = make(9)
    label(answers, output, concurrency=1)
    asked = [body["messages"][-1]["content"] for body in server.requests[3:]]
    assert len(asked) == 7 and "第0问" in asked[-1] and "第0问" not in "".join(asked[:-1])


@pytest.mark.parametrize(("status", "body", "why"), ENDS)
@pytest.mark.parametrize("num_good", [0, 2])
def test_what_every_question_meets_ends_the_run_and_keeps_what_is_paid(
    status, body, why, num_good, make, monkeypatch
):
    if num_good and status in (403, 404) and "balance" not in str(body):
        pytest.skip("a key or an address that worked a moment ago is not the matter")
    answers, output = make(40)
    server = MockedServer(
        monkeypatch,
        lambda number, texts, _: (
            respond(completion(verdict(texts))) if number < num_good else respond(body, status)
        ),
    )
    ran = label(answers, output, concurrency=4)
    assert why in str(ran.error) and "\n" not in str(ran.error)
    assert len(server.requests) <= num_good + 4
    assert len(ran.lines) == num_good and not any(line.failed for line in ran.lines)


def test_refusals_that_nobody_understands_end_a_run_that_gets_no_answer(make, monkeypatch):
    answers, output = make(200)
    server = MockedServer(monkeypatch, lambda *_: respond({"message": "Not so."}, 400))
    ran = label(answers, output)
    assert "20 questions were refused and none was answered" in str(ran.error)
    assert "Not so." in str(ran.error) and len(server.requests) <= 28
    assert not output.exists()  # They may be good questions.


def test_a_few_refusals_and_nothing_else_are_asked_again_until_something_is_answered(
    make, monkeypatch
):
    answers, output = make(5)
    server = MockedServer(monkeypatch, lambda *_: respond({"message": "Not so."}, 400))
    for run in range(1, 4):
        ran = label(answers, output)
        assert "no judgement succeeded: all 5 failed" in str(ran.error)
        assert len(server.requests) == 5 * run
        assert ran.lines[-1].failure == "unanswered" and "Not so." in ran.lines[-1].error
    server.reply = lambda number, texts, _: respond(completion(verdict(texts)))
    assert label(answers, output).labels.verdicts == 5


@pytest.mark.parametrize("answered", [True, False])
def test_the_first_refusals_wait_for_what_the_calls_under_way_say(answered, make, monkeypatch):
    answers, output = make(30)

    async def reply(number, texts, _):
        await asyncio.sleep(50.0 if number_of(texts) == 3 else 1.0)
        if answered and number_of(texts) == 3:
            return respond(completion(verdict(texts)))
        return respond({"message": "Forbidden"}, 403)

    server = MockedServer(monkeypatch, reply)
    ran = label(answers, output)
    assert (ran.error is None) == answered
    # Three end the run, of eight that were asked at once; two may have gone on before the third.
    assert len(server.requests) == 30 if answered else len(server.requests) <= 8 + 2
    assert len(ran.lines) == (30 if answered else 0)


def test_a_run_whose_every_judgement_failed_is_an_error(make, monkeypatch):
    answers, output = make(5)
    server = MockedServer(monkeypatch, lambda *_: respond(completion("两条都还可以。")))
    ran = label(answers, output)
    assert "no judgement succeeded: all 5 failed, 5 of them so: the reply is not JSON" in str(
        ran.error
    )
    assert len(ran.lines) == 5 and all(line.raw == "两条都还可以。" for line in ran.lines)
    server.reply = lambda number, texts, _: respond(completion(verdict(texts)))
    assert label(answers, output).error is None and len(server.requests) == 10


def raises(error):
    def reply(number, texts, _):
        raise error

    return reply


@pytest.mark.parametrize(
    "reply",
    [
        lambda *_: respond(b"", 429, {"retry-after": "99999999999999999999999 Jan 2020 00:00:00"}),
        lambda *_: respond({"choices": None}),
        lambda *_: respond({"choices": [{"message": None}]}),
        lambda *_: respond({"choices": {"0": 1}, "usage": [10**400]}),
        lambda *_: respond(b'{"choices": [{"message": {"content": "x'),
        lambda *_: respond(b"<html>Sign in</html>"),
        lambda *_: respond(completion(None)),
        lambda *_: respond(completion(["x", 5])),
        lambda *_: respond(completion("\ud83d")),
        lambda *_: respond(completion('{"\ud83d\\u001b": 1}')),
        lambda *_: respond(b"x", 200, {"content-encoding": "gzip"}),
        lambda *_: respond(b"", 302),
        lambda *_: respond(b"", 302, {"location": "http://["}),
        lambda *_: respond({"error": "\ud83d\u001b[31m"}, 400),
        raises(OverflowError("int too large")),
        raises(KeyError("x")),
        raises(httpx2.ReadError("cut")),
        raises(httpx2.ReadTimeout("late")),
    ],
)
def test_whatever_a_server_sends_is_one_failed_judgement(reply, make, monkeypatch):
    answers, output = make(16)

    def one_bad(number, texts, body):
        if number_of(texts) == 2:
            return reply(number, texts, body)
        return respond(completion(verdict(texts)))

    MockedServer(monkeypatch, one_bad)
    ran = label(answers, output)
    assert ran.error is None and len(ran.lines) == 16
    (failed,) = [line for line in ran.lines if line.failed]
    assert failed.error.isprintable()
    ran.told.encode()


def test_the_words_of_an_error_with_status_200_and_of_a_refusal_are_kept(make, monkeypatch):
    answers, output = make(3)
    refusal = completion(None)
    refusal["choices"][0]["message"]["refusal"] = "I'm sorry, I can't."

    def reply(number, texts, _):
        if number_of(texts) == 0:
            return respond({"error": {"message": "Upstream said: blue smoke", "code": 500}})
        return respond(completion(verdict(texts)) if number_of(texts) == 1 else refusal)

    MockedServer(monkeypatch, reply)
    label(answers, output)
    lines = {line.id: line for line in read_judgements(output)}
    assert "blue smoke" in lines["q000"].error and lines["q000"].failure == "unanswered"
    assert lines["q001"].error is None
    assert "the model refuses: I'm sorry, I can't." in lines["q002"].error
    assert lines["q002"].raw == "I'm sorry, I can't." and lines["q002"].failure == "refused"


def test_truncated_replies_alone_are_bought_again_and_only_with_more_tokens(make, monkeypatch):
    answers, output = make(12)

    def reply(number, texts, body):
        text = verdict(texts)
        if number_of(texts) < 3 and body["max_tokens"] < 500:
            return respond(completion(text[:40], finish_reason="length"))
        return respond(completion(text))

    server = MockedServer(monkeypatch, reply)
    first = label(answers, output, max_tokens=200)
    truncated = [line for line in first.lines if line.failed]
    assert {(line.failure, line.max_tokens) for line in truncated} == {("truncated", 200)}
    assert len(truncated) == 3 and len(server.requests) == 12
    assert "3 have a truncated reply: ask again with more --max_tokens" in first.told
    for max_tokens in (200, 100):  # The same reply would be paid for again.
        assert "9 verdicts, 3 failed" in label(answers, output, max_tokens=max_tokens).told
        assert len(server.requests) == 12
    assert "9 verdicts, 3 failed" in label(answers, output, max_tokens=400).told
    assert len(server.requests) == 15
    last = label(answers, output, max_tokens=800)
    assert "12 verdicts, 0 failed" in last.told and len(server.requests) == 18
    assert [body["max_tokens"] for body in server.requests[15:]] == [800] * 3
    label(answers, output, max_tokens=50)
    assert len(server.requests) == 18


def test_thoughts_beyond_the_completion_count_against_the_budget(make, monkeypatch, tmp_path):
    answers, output = make(40)
    prices = tmp_path / "prices.json"
    table = {
        "currency": "CNY",
        "per_tokens": 1,
        "models": {"planted-judge": {"input": 0, "output": 1}},
    }
    prices.write_text(json.dumps(table), encoding="utf-8")

    def reply(number, texts, _):
        body = completion(verdict(texts))
        body["usage"]["total_tokens"] = 10 + 1005
        return respond(body)

    server = MockedServer(monkeypatch, reply)
    fields = {"prices": str(prices), "max_tokens": 100, "concurrency": 1, "max_cost": 5000.0}
    ran = label(answers, output, **fields)
    assert "max_cost=5000 does not allow the next call: 4020 are spent and it may cost 1005" in str(
        ran.error
    )
    assert len(server.requests) == 4 == len(ran.lines)
    assert sum(line.cost for line in ran.lines) == 4020.0


def tokens_of(text, alternatives=None):
    """Log-probabilities of a text's characters; those of the last digit are given."""
    content = [{"token": one, "logprob": 0.0, "top_logprobs": []} for one in text]
    place = max(index for index, one in enumerate(text) if one.isdigit())
    content[place] |= {"top_logprobs": alternatives}
    return {"content": content}


PAIR = [{"token": "1", "logprob": -0.105360515}, {"token": "2", "logprob": -2.302585093}]


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        {},
        {"content": None},
        {"content": [None]},
        tokens_of(verdict(("a", "b"), better=2), PAIR),
        tokens_of(verdict(("a", "b")), [{"token": "2"}, {"token": "1", "logprob": -9.0}]),
        tokens_of(verdict(("a", "b")), [{"token": "2", "logprob": -0.1}, PAIR[1] | {"token": "1"}]),
    ],
)
def test_a_judgement_without_a_probability_that_fits_its_verdict_fails_alone(
    logprobs, make, monkeypatch
):
    answers, output = make(5, 2)

    def reply(number, texts, _):
        text = verdict(texts, better=1)
        given = logprobs if number == 3 else tokens_of(text, PAIR)
        return respond(completion(text, logprobs=given))

    MockedServer(monkeypatch, reply)
    ran = label(answers, output, protocol="pairwise", log_probs=True)
    assert ran.error is None and len(ran.lines) == 10
    assert sum(line.failed for line in ran.lines) == 1
    good = [line.p_first for line in ran.lines if not line.failed]
    assert good == pytest.approx([0.9] * 9, abs=1e-6)


def test_log_probabilities_that_are_null_beside_a_good_one_do_no_harm(make, monkeypatch):
    answers, output = make(1, 2)

    def reply(number, texts, _):
        text = verdict(texts, better=1)
        given = tokens_of(text, [*PAIR, {"token": "0", "logprob": None}, None])
        for one in given["content"][:-2]:
            one |= {"top_logprobs": None, "logprob": None}
        return respond(completion(text, logprobs=given))

    MockedServer(monkeypatch, reply)
    ran = label(answers, output, protocol="pairwise", log_probs=True)
    assert [line.p_first for line in ran.lines] == pytest.approx([0.9] * 2, abs=1e-6)


def test_a_server_without_log_probabilities_ends_the_run_soon_and_every_reply_is_kept(
    make, monkeypatch
):
    answers, output = make(20, 2)
    server = MockedServer(monkeypatch, lambda n, texts, _: respond(completion(verdict(texts))))
    ran = label(answers, output, protocol="pairwise", log_probs=True, concurrency=4)
    assert "gives no log-probabilities with 'planted-judge': ask without" in str(ran.error)
    assert len(server.requests) == len(ran.lines) <= 7
    assert all(line.raw == verdict(("a", "b")) for line in ran.lines)
