import asyncio

import pytest

from huatuo_jax.judge.spending import PastCall, RateLimiter, RateLimits


class Clock:
    """A clock that only sleeping moves on."""

    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s

    async def sleep(self, seconds):
        until_s = self.now_s + seconds
        await asyncio.sleep(0)  # Others may act in the meantime.
        self.now_s = max(self.now_s, until_s)


def starts_of(limits, tokens, past=(), took=None):
    """The seconds from the beginning after which each call was let through."""

    async def run():
        clock = Clock()
        limiter = RateLimiter(limits, past, clock=clock, sleep=clock.sleep)
        began_s = clock()

        async def call(count):
            passage = await limiter.pass_through(count)
            if took is not None:
                passage.took(took)
            return passage.started_s - began_s

        return await asyncio.gather(*map(call, tokens))

    return asyncio.run(run())


# A window of 60 s is kept for 61, as calls do not arrive as evenly as they leave.
def test_no_window_holds_more_calls_than_allowed():
    starts = starts_of(RateLimits(requests=4, window_s=60.0), [1] * 13)
    assert starts == [0.0] * 4 + [61.0] * 4 + [122.0] * 4 + [183.0]


def test_no_window_holds_more_tokens_than_allowed():
    starts = starts_of(RateLimits(tokens=100, window_s=60.0), [60, 30, 30, 50, 90, 10, 5])
    assert starts == [0.0, 0.0, 61.0, 61.0, 122.0, 122.0, 183.0]


def test_what_a_call_did_not_take_is_given_back():
    limits = RateLimits(tokens=100, window_s=60.0)
    assert starts_of(limits, [60] * 4) == [0.0, 61.0, 122.0, 183.0]
    assert starts_of(limits, [60] * 4, took=10) == [0.0] * 4


def test_a_call_above_the_limit_goes_alone():
    starts = starts_of(RateLimits(tokens=100, window_s=60.0), [10, 500, 10])
    assert starts == [0.0, 61.0, 122.0]


def test_calls_of_an_earlier_run_still_count():
    limits = RateLimits(requests=2, window_s=60.0)
    past = [PastCall(age_s=40.0, tokens=1), PastCall(age_s=500.0, tokens=1)]
    assert starts_of(limits, [1, 1, 1], past) == [0.0, 21.0, 61.0]


def test_no_call_passes_while_the_server_asks_to_wait():
    async def run():
        clock = Clock()
        limiter = RateLimiter(RateLimits(), clock=clock, sleep=clock.sleep)
        limiter.hold(7.5)
        return (await limiter.pass_through(1)).started_s - 1000.0

    assert asyncio.run(run()) == 7.5


def test_without_limits_nothing_waits():
    assert starts_of(RateLimits(), [10**9] * 50) == [0.0] * 50


def test_who_waits_when_all_is_given_up_gets_the_error():
    async def run():
        clock = Clock()
        limiter = RateLimiter(RateLimits(requests=1, window_s=60.0), clock=clock, sleep=clock.sleep)
        await limiter.pass_through(1)
        waiting = [asyncio.create_task(limiter.pass_through(1)) for _ in range(3)]
        waiting.append(asyncio.create_task(limiter.rest(60.0)))
        await asyncio.sleep(0)
        limiter.give_up(ValueError("no key"))
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        return errors, clock() - 1000.0

    errors, waited_s = asyncio.run(run())
    assert [str(error) for error in errors] == ["no key"] * 4
    assert waited_s < 1.0


@pytest.mark.parametrize("fields", [{"requests": 0}, {"tokens": 0}, {"window_s": 0.0}])
def test_limits_that_let_nothing_through_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        RateLimits(**fields)
