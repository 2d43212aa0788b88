import asyncio
import dataclasses
import json
import math

import pytest

from huatuo_jax.data.records import Message, Prompt
from huatuo_jax.judge.judgements import JudgementFailed, JudgeUnusable
from huatuo_jax.judge.openai import OpenAIJudge, OpenAIJudgeConfig
from huatuo_jax.judge.server import ServerConfig
from huatuo_jax.judge.spending import BudgetConfig, RateLimits
from tests.judge import planted_server as planted
from tests.judge.planted_server import KEY, MODEL, Planted, PlantedServer

PROMPT = Prompt(
    id="p",
    messages=(Message("user", "医生，我头疼。"),),
    source="invented",
    reference="先量血压。",
)
UTILITIES = {"多休息。": 1.2, "不用管。": -0.7, "量量血压吧。": 0.1}


def config(server, **changed):
    own = {"model": MODEL}
    of_server = {
        "base_url": server.url,
        "timeout_s": 1.0,
        "first_delay_s": 0.02,
        "max_delay_s": 0.1,
    }
    for name, value in changed.items():
        names = {field.name for field in dataclasses.fields(ServerConfig)}
        (of_server if name in names else own)[name] = value
    return OpenAIJudgeConfig(**own, server=ServerConfig(**of_server))


@pytest.fixture
def prices(tmp_path):
    path = tmp_path / "prices.json"
    models = {MODEL: {"input": 2.0, "output": 8.0}}
    table = {"currency": "CNY", "per_tokens": 1000, "models": models}
    path.write_text(json.dumps(table), encoding="utf-8")
    return str(path)


def ask(server, ask_judge, *, key=KEY, spending=None, **changed):
    """What one judge does; returns it with the judge's totals."""

    async def run():
        judge = OpenAIJudge(config(server, **changed), key=key, spending=spending)
        try:
            return await ask_judge(judge), judge.totals
        finally:
            await judge.close()

    return asyncio.run(run())


def failing(*outcomes, **fields):
    """A server whose first calls end so, and all others well."""
    kinds = dict(enumerate(outcomes))
    return Planted(utilities=UTILITIES, fault=lambda n: kinds.get(n), **fields)


def test_scores_and_verdicts_are_those_of_the_server(prices):
    what = Planted(utilities=UTILITIES)
    pairs = [(first, second) for first in UTILITIES for second in UTILITIES]

    async def all_of_them(judge):
        scored = [await judge.score(PROMPT, text) for text in UTILITIES]
        return scored, [await judge.compare(PROMPT, *pair) for pair in pairs]

    with PlantedServer(what) as server:
        (scored, compared), totals = ask(server, all_of_them, prices=prices)
        calls = server.calls
    for reply, text in zip(scored, UTILITIES, strict=True):
        assert reply.scores == planted.scores(what, text) and reply.reason.count("说明") == 5
    for reply, pair in zip(compared, pairs, strict=True):
        assert reply.p_first == (planted.verdict(what, *pair) == 1)
    costs = [call.input_tokens * 0.002 + call.output_tokens * 0.008 for call in calls]
    assert [reply.cost for reply in (*scored, *compared)] == pytest.approx(costs, abs=1e-9)
    assert totals.cost == pytest.approx(sum(costs), abs=1e-9)
    assert totals.usage.input_tokens == sum(call.input_tokens for call in calls)
    assert totals.usage.output_tokens == sum(call.output_tokens for call in calls)
    assert (totals.requests, totals.unknown_requests) == (12, 0)


def test_log_probabilities_give_the_verdict_as_a_probability():
    what = Planted(utilities=UTILITIES, position_bias=0.4, noise=False)
    with PlantedServer(what) as server:
        reply, _ = ask(
            server, lambda judge: judge.compare(PROMPT, "不用管。", "多休息。"), log_probs=True
        )
    assert reply.p_first == pytest.approx(1 / (1 + math.exp(1.9 - 0.4)), abs=1e-9)


def test_the_whole_dialogue_and_the_reference_are_asked_about():
    prompt = Prompt(
        id="p",
        messages=(
            Message("user", "胃疼。"),
            Message("assistant", "多久了？"),
            Message("user", "两天。"),
        ),
        source="invented",
        diagnosis="胃炎",
    )
    with PlantedServer(Planted(utilities=UTILITIES)) as server:
        ask(server, lambda judge: judge.score(prompt, "多休息。"), low=1, high=5)
        body = server.requests[-1]
    user = body["messages"][-1]["content"]
    order = ["患者：胃疼。", "医生：多久了？", "患者：两天。", "医生的诊断：胃炎", "多休息。"]
    assert [user.index(text) for text in order] == sorted(user.index(text) for text in order)
    assert body["temperature"] == 0 and body["max_tokens"] == 1024
    form = body["response_format"]["json_schema"]
    assert form["strict"] and set(form["schema"]["required"]) == set(planted.CRITERIA)


@pytest.mark.parametrize("fault", ["429", "500", "time-out", "cut"])
def test_a_call_that_fails_on_the_way_is_made_again(fault, prices):
    with PlantedServer(failing(fault, time_out_s=1.5, retry_after="0.3")) as server:
        reply, totals = ask(server, lambda judge: judge.score(PROMPT, "多休息。"), prices=prices)
        first, second = server.calls
    assert reply.scores is not None
    assert (first.outcome, second.outcome) == (fault, "ok")
    unknown = fault in planted.UNDELIVERED
    assert totals.requests == 2 and totals.unknown_requests == unknown
    assert totals.usage.input_tokens == second.input_tokens
    counted = sum(c.input_tokens * 0.002 + c.output_tokens * 0.008 for c in server.calls)
    assert totals.cost <= counted + 1e-9 <= totals.cost + totals.unknown_cost + 2e-9
    assert unknown or totals.cost == pytest.approx(counted, abs=1e-9)
    if fault == "429":
        assert second.arrived_s - first.arrived_s >= 0.3


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("truncated", "not JSON"),
        ("scale", "the score of accurate is 10, outside 1 to 5"),
        ("prose", "not JSON"),
        ("empty", "the reply is empty"),
    ],
)
def test_a_reply_that_is_not_what_was_asked_for_has_no_verdict_and_is_paid(fault, why, prices):
    with PlantedServer(failing(fault)) as server:
        with pytest.raises(JudgementFailed, match=why) as failure:
            ask(server, lambda judge: judge.score(PROMPT, "多休息。"), prices=prices)
        call = server.calls[0]
    cost = call.input_tokens * 0.002 + call.output_tokens * 0.008
    assert failure.value.cost == pytest.approx(cost, abs=1e-9)
    assert failure.value.usage["output_tokens"] == call.output_tokens


def test_a_server_that_always_fails_ends_in_a_failed_judgement_after_all_attempts():
    with PlantedServer(failing(*["500"] * 3)) as server:
        with pytest.raises(JudgementFailed, match="3 attempts failed, .*HTTP 500"):
            ask(server, lambda judge: judge.score(PROMPT, "多休息。"), max_attempts=3)
        assert len(server.calls) == 3


def test_delays_grow():
    with PlantedServer(failing(*["500"] * 5)) as server:
        ask(server, lambda judge: judge.score(PROMPT, "多休息。"), first_delay_s=0.1, max_delay_s=9)
        times = [call.arrived_s for call in server.calls]
    for doubling, (a, b) in enumerate(zip(times, times[1:], strict=False)):
        assert b - a >= 0.05 * 2**doubling


def test_who_asks_to_wait_too_long_ends_the_run():
    with PlantedServer(failing("429", retry_after="3600")) as server:
        with pytest.raises(JudgeUnusable, match="asks to wait 3600 s"):
            ask(server, lambda judge: judge.score(PROMPT, "多休息。"))


def test_everyone_waits_when_the_server_asks_one_to():
    async def three(judge):
        first = asyncio.create_task(judge.score(PROMPT, "多休息。"))
        while not server.calls:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        await asyncio.gather(first, judge.score(PROMPT, "不用管。"))

    with PlantedServer(failing("429", retry_after="1")) as server:
        ask(server, three)
        first, *others = [call.arrived_s for call in server.calls]
    assert len(others) == 2 and all(other - first >= 1.0 for other in others)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"key": "sk-wrong-fedcba9876543210"}, "refuses the key in OPENAI_API_KEY"),
        ({"model": "unheard-of"}, "does not know the model 'unheard-of'"),
        ({"structured": "none"}, "response_format is needed"),
        ({"base_url": "http://127.0.0.1:9/v1", "max_attempts": 2}, "no server answers at"),
    ],
)
def test_what_can_never_work_stops_at_once_and_tells_no_key(changed, why, tmp_path):
    spending = tmp_path / "spending.jsonl"
    with PlantedServer(Planted(utilities=UTILITIES)) as server:
        with pytest.raises(JudgeUnusable, match=why) as error:
            ask(server, lambda judge: judge.score(PROMPT, "多休息。"), spending=spending, **changed)
        assert len(server.calls) <= 1
    told = f"{error.value!r} {error.value.__cause__!r} {error.value.__context__!r}"
    assert KEY not in told and "wrong" not in told and "sk-" not in told
    assert not spending.exists()


def test_a_budget_of_requests_counts_failed_calls_and_those_of_earlier_runs(tmp_path):
    spending = tmp_path / "spending.jsonl"
    budget = BudgetConfig(max_requests=3)

    def once(judge):
        return judge.score(PROMPT, "多休息。")

    with PlantedServer(failing("500")) as server:
        ask(server, once, budget=budget, spending=spending)
        ask(server, once, budget=budget, spending=spending)
        with pytest.raises(JudgeUnusable, match="max_requests=3 is spent: 3 requests were sent"):
            ask(server, once, budget=budget, spending=spending)
        assert len(server.calls) == 3


def test_a_budget_of_money_is_never_exceeded_by_calls_side_by_side(prices):
    async def many(judge):
        asked = [judge.score(PROMPT, "多休息。") for _ in range(40)]
        return await asyncio.gather(*asked, return_exceptions=True)

    with PlantedServer(Planted(utilities=UTILITIES, delay_s=0.02)) as server:
        outcomes, totals = ask(
            server, many, prices=prices, budget=BudgetConfig(max_cost=60.0), max_tokens=400
        )
        counted = sum(c.input_tokens * 0.002 + c.output_tokens * 0.008 for c in server.calls)
    unanswered = [outcome for outcome in outcomes if isinstance(outcome, JudgeUnusable)]
    assert unanswered and all("max_cost=60" in str(error) for error in unanswered)
    assert totals.cost == pytest.approx(counted, abs=1e-9) and counted <= 60.0
    # The most a call may take was left over, and not more.
    judge = OpenAIJudge(config(server, prices=prices, max_tokens=400), key=KEY, spending=None)
    assert 60.0 - counted < judge.estimate(PROMPT, ["多休息。"]).max_cost


def test_no_call_takes_more_than_its_estimate():
    async def both(judge):
        await judge.score(PROMPT, "多休息。")
        await judge.compare(PROMPT, "多休息。", "不用管。")
        return [judge.estimate(PROMPT, texts) for texts in (["多休息。"], ["多休息。", "不用管。"])]

    with PlantedServer(Planted(utilities=UTILITIES)) as server:
        estimates, _ = ask(server, both)
        for estimate, call in zip(estimates, server.calls, strict=True):
            assert call.input_tokens <= estimate.max_input_tokens
            assert estimate.input_tokens <= estimate.max_input_tokens
            assert (estimate.calls, estimate.max_output_tokens) == (1, 1024)
            assert estimate.cost is None is estimate.max_cost


def test_money_without_a_price_is_refused_before_anything_is_sent():
    with PlantedServer(Planted(utilities=UTILITIES)) as server:
        with pytest.raises(ValueError, match="max_cost=1 needs a price.*'planted-judge'"):
            ask(server, lambda judge: None, budget=BudgetConfig(max_cost=1.0))


def test_the_key_is_taken_out_of_what_the_server_says():
    what = Planted(utilities=UTILITIES, prefix=f"key {KEY} ")
    with PlantedServer(what) as server:
        with pytest.raises(JudgementFailed) as failure:
            ask(server, lambda judge: judge.score(PROMPT, "多休息。"))
    assert KEY not in str(failure.value) and KEY not in failure.value.raw
    assert "[key]" in failure.value.raw


def test_settings_tell_what_decides_the_verdict_and_nothing_else():
    with PlantedServer(Planted(utilities=UTILITIES)) as server:
        one = OpenAIJudge(config(server), key=KEY, spending=None)
        moved = OpenAIJudge(
            config(server, base_url="http://elsewhere:1/v1", limits=RateLimits(requests=5)),
            key="sk-another",
            spending=None,
        )
        warmer = OpenAIJudge(config(server, temperature=0.5), key=KEY, spending=None)
    assert one.settings == moved.settings != warmer.settings
    assert KEY not in repr(one.settings)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"model": ""}, "model is empty"),
        ({"structured": "xml"}, "structured is 'xml'"),
        ({"low": 5, "high": 5}, "low=5 and high=5"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"base_url": "localhost:8000"}, "base_url should be like"),
        ({"base_url": "http://me:secret@host/v1"}, "base_url must not hold a secret"),
        ({"timeout_s": 0}, "timeout_s=0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changed, why):
    with PlantedServer(Planted(utilities=UTILITIES)) as server:
        with pytest.raises(ValueError, match=why) as error:
            config(server, **changed)
    assert "secret@" not in str(error.value)
