import asyncio
import time

import pytest

from huatuo_jax.judge import spending
from huatuo_jax.judge.spending import PastCall, RateLimiter, RateLimits


@pytest.fixture(autouse=True)
def small_margin(monkeypatch):
    monkeypatch.setattr(spending, "_MARGIN_S", 0.1)
    monkeypatch.setattr(spending, "_LOOK_AGAIN_S", 0.02)


def starts_of(limits, tokens, past=(), took=None):
    """When each call was let through, in seconds from the start."""

    async def run():
        limiter = RateLimiter(limits, past)
        began_s = time.monotonic()

        async def call(count):
            passage = await limiter.pass_through(count)
            if took is not None:
                passage.took(took)
            return passage.started_s - began_s, count if took is None else took

        return await asyncio.gather(*map(call, tokens))

    return asyncio.run(run())


def most(starts, window_s, weight):
    return max(
        sum(weight(other) for other in starts if 0 <= other[0] - one[0] < window_s)
        for one in starts
    )


def test_no_window_holds_more_calls_than_allowed():
    starts = starts_of(RateLimits(requests=4, window_s=0.4), [1] * 13)
    assert most(starts, 0.4, lambda start: 1) == 4
    assert 3 * 0.4 < starts[-1][0] < 3 * 0.4 + 2.0


def test_no_window_holds_more_tokens_than_allowed():
    starts = starts_of(RateLimits(tokens=100, window_s=0.3), [60, 30, 30, 50, 90, 10, 5])
    assert most(starts, 0.3, lambda start: start[1]) <= 100
    assert starts[1][0] < 0.3 < starts[2][0]


def test_what_a_call_did_not_take_is_given_back():
    reserved = starts_of(RateLimits(tokens=100, window_s=0.5), [60] * 4)
    settled = starts_of(RateLimits(tokens=100, window_s=0.5), [60] * 4, took=10)
    assert reserved[-1][0] > 1.5 and settled[-1][0] < 0.5


def test_a_call_above_the_limit_goes_alone():
    starts = starts_of(RateLimits(tokens=100, window_s=0.3), [10, 500, 10])
    assert starts[1][0] - starts[0][0] > 0.3 and starts[2][0] - starts[1][0] > 0.3


def test_calls_of_an_earlier_run_still_count():
    limits = RateLimits(requests=2, window_s=0.6)
    past = [PastCall(age_s=0.4, tokens=1), PastCall(age_s=5.0, tokens=1)]
    starts = starts_of(limits, [1, 1, 1], past)
    assert starts[0][0] < 0.2 < starts[1][0] < 0.6 < starts[2][0]


def test_without_limits_nothing_waits():
    assert starts_of(RateLimits(), [10**9] * 50)[-1][0] < 1.0


def test_who_waits_when_all_is_given_up_gets_the_error():
    async def run():
        limiter = RateLimiter(RateLimits(requests=1, window_s=60.0))
        await limiter.pass_through(1)
        waiting = [asyncio.create_task(limiter.pass_through(1)) for _ in range(3)]
        waiting.append(asyncio.create_task(limiter.rest(60.0)))
        await asyncio.sleep(0.05)
        limiter.give_up(ValueError("no key"))
        return await asyncio.gather(*waiting, return_exceptions=True)

    began_s = time.monotonic()
    assert [str(error) for error in asyncio.run(run())] == ["no key"] * 4
    assert time.monotonic() - began_s < 5.0


@pytest.mark.parametrize("fields", [{"requests": 0}, {"tokens": 0}, {"window_s": 0.0}])
def test_limits_that_let_nothing_through_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        RateLimits(**fields)
