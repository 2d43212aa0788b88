"""The updates of a call: the newest state of each answer, seldom, and the end at once."""

import asyncio

import pytest

from huatuo_jax.generation.requests import Answer, Request, Running, Usage
from huatuo_jax.serving import calls
from huatuo_jax.serving.calls import Call, Growing, Update

REQUEST = Request(prompt_token_ids=[1])


def growing(num_tokens):
    return Update(0, 0, Growing(Running(0, REQUEST, 0, token_ids=[7] * num_tokens), num_tokens))


def complete():
    return Update(
        0,
        0,
        Answer(
            request_index=0,
            answer_index=0,
            token_ids=[7] * 9,
            text="a",
            log_probs=[],
            sampling_log_probs=[],
            finish_reason="stop",
            usage=Usage(1, 9),
        ),
    )


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_reader_is_woken_for_the_first_update_and_for_the_end_and_seldom_between(monkeypatch):
    monkeypatch.setattr(calls, "_EVERY_S", 1000.0)

    async def read():
        call = Call([REQUEST])
        updates = call.updates()
        call.put(growing(1))
        assert (await anext(updates))[0].state.num_tokens == 1
        coming = asyncio.ensure_future(anext(updates))
        for num_tokens in (2, 3, 4):
            call.put(growing(num_tokens))
            await settle()
            assert not coming.done()
        call.put(complete())
        ((_, _, state),) = await coming
        assert isinstance(state, Answer)
        assert await anext(updates, None) is None

    asyncio.run(read())


def test_after_a_while_a_reader_gets_the_newest_state(monkeypatch):
    monkeypatch.setattr(calls, "_EVERY_S", 0.01)

    async def read():
        call = Call([REQUEST])
        updates = call.updates()
        call.put(growing(1))
        await anext(updates)
        call.put(growing(2))
        call.put(growing(5))
        assert [one.state.num_tokens for one in await anext(updates)] == [5]

    asyncio.run(read())


def test_a_reader_that_waits_long_gets_an_empty_list(monkeypatch):
    monkeypatch.setattr(calls, "_QUIET_S", 0.0)

    async def read():
        call = Call([REQUEST])
        updates = call.updates()
        assert await anext(updates) == [] and await anext(updates) == []
        call.put(growing(1))
        assert len(await anext(updates)) == 1

    asyncio.run(read())


def test_a_call_that_fails_while_its_reader_rests_raises_at_once(monkeypatch):
    monkeypatch.setattr(calls, "_EVERY_S", 1000.0)

    async def read():
        call = Call([REQUEST])
        updates = call.updates()
        call.put(growing(1))
        await anext(updates)
        coming = asyncio.ensure_future(anext(updates))
        await settle()
        call.fail(RuntimeError("it failed"))
        with pytest.raises(RuntimeError, match="it failed"):
            await coming

    asyncio.run(read())
