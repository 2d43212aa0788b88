"""Reward functions by name: how they are found, checked and called, and how they fail."""

import asyncio
import math

import numpy as np
import pytest

from huatuo_jax.reward_functions.calling import Asked, Background, RewardCalls
from huatuo_jax.reward_functions.calling import call_all as call_all_in
from huatuo_jax.reward_functions.functions import (
    Call,
    check,
    find,
    identity_of,
    name_of,
    one_by_one,
)

ASKED = Asked(
    prompts=[[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]],
    responses=["one", "three"],
    columns={"reference": ["one", None], "id": ["p0", "p1"]},
)


def call_all(calls, asked):
    background = Background()
    try:
        return call_all_in(calls, asked, background)
    finally:
        background.close()


def lengths(prompts, responses, **columns):
    return [len(one) for one in responses]


def matches(prompts, responses, *, reference, weight=1.0):
    return [
        None if right is None else weight * (one == right)
        for one, right in zip(responses, reference, strict=True)
    ]


async def later(prompts, responses, **columns):
    await asyncio.sleep(0)
    return [float(len(columns["id"])) for _ in responses]


def call(function, **settings):
    return Call(function.__name__, function, settings)


def test_functions_get_the_columns_that_they_take_and_may_give_none():
    found = call_all([call(lengths), call(matches, weight=0.5), call(later)], ASKED)
    assert found == [[3.0, 5.0], [0.5, None], [2.0, 2.0]]


def test_coroutine_functions_wait_together():
    arrived = []

    def waits_for(name, other):
        async def waiting(prompts, responses, **columns):
            arrived.append(name)
            while other not in arrived:
                await asyncio.sleep(0)
            return [1] * len(responses)

        return Call(name, waiting, {})

    assert call_all([waits_for("a", "b"), waits_for("b", "a")], ASKED) == [[1, 1], [1, 1]]


def test_a_loop_that_runs_already_does_not_stand_in_the_way():
    async def notebook():
        return call_all([call(later)], ASKED)

    assert asyncio.run(notebook()) == [[2.0, 2.0]]


def test_an_object_may_be_a_coroutine_function():
    class Later:
        async def __call__(self, prompts, responses, **columns):
            return np.ones(len(responses))

    assert call_all([Call("later", Later(), {})], ASKED) == [[1.0, 1.0]]


def test_functions_of_single_responses_are_called_as_these_are_finished():
    seen = []

    @one_by_one
    async def single(prompts, responses, *, reference, **columns):
        (response,), (right,) = responses, reference
        seen.append(response)
        return [None if right is None else float(response == right)]

    calls = RewardCalls({"single": call(single), "lengths": call(lengths)}, grader=None)
    assert calls.takes
    for _ in range(2):
        calls.begin("iteration")
        calls.take(1, ASKED.one(1))
        calls.wait()
        assert seen == ["three"]
        found = calls.results(ASKED)
        assert found == {"single": [1.0, None], "lengths": [3.0, 5.0]}
        assert sorted(seen) == ["one", "three"]
        seen.clear()
    calls.close()


def test_a_function_of_single_responses_fails_with_its_name():
    @one_by_one
    async def fails(prompts, responses, **columns):
        raise RuntimeError("no server")

    calls = RewardCalls({"fails": call(fails)}, grader=None)
    calls.take(0, ASKED.one(0))
    with pytest.raises(ValueError, match="^fails: raised RuntimeError: no server"):
        calls.wait()
    calls.close()
    with pytest.raises(ValueError, match="must be a coroutine function"):
        one_by_one(lengths)


def test_a_column_that_no_prompt_of_an_iteration_has_is_one_of_none():
    without = ASKED._replace(columns={"id": ["p0", "p1"]})
    assert call_all([call(matches)], without) == [[None, None]]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 rewards for 2 responses"),
        ([1.0, "2"], "returned '2' for response 1"),
        ([1.0, math.nan], "returned nan for response 1; it should be a number, or None"),
        ([math.inf, 1.0], "returned inf for response 0"),
        ([[1.0], [2.0]], r"returned \[1.0\] for response 0"),
        ("ab", "returned str; it should be a list of 2"),
        (None, "returned NoneType; it should be a list of 2"),
        (1.0, "returned float; it should be a list of 2"),
    ],
)
def test_rewards_of_another_form_are_refused(returned, message):
    with pytest.raises(ValueError, match=f"^mine: {message}"):
        call_all([Call("mine", lambda prompts, responses, **columns: returned, {})], ASKED)


def test_a_function_that_fails_is_named_with_its_error():
    def fails(prompts, responses, **columns):
        raise KeyError("dose")

    async def fails_later(prompts, responses, **columns):
        raise RuntimeError("no server")

    with pytest.raises(ValueError, match="^fails: raised KeyError: 'dose'"):
        call_all([call(fails)], ASKED)
    with pytest.raises(ValueError, match="^fails_later: raised RuntimeError: no server"):
        call_all([call(later), call(fails_later)], ASKED)


def test_a_function_is_found_in_a_module_in_a_file_and_as_an_object(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def two(prompts, responses, **columns):\n    return [2] * len(responses)\n")
    assert find("tests.reward_functions.test_functions:lengths") is lengths
    assert call_all([Call("two", find(f"{path}:two"), {})], ASKED) == [[2.0, 2.0]]

    def local(prompts, responses):
        return [0, 0]

    assert find(name_of(local)) is local


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lengths", "must be module:function or FILE.py:function"),
        ("nowhere_at_all:lengths", "nowhere_at_all cannot be imported"),
        ("no_file.py:lengths", "there is no file"),
        ("tests.reward_functions.test_functions:nothing", "has no function 'nothing'"),
        ("tests.reward_functions.test_functions:ASKED", "has no function 'ASKED'"),
    ],
)
def test_a_name_without_a_function_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        find(name)


def test_a_file_that_is_no_python_is_refused_in_one_line(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def two(:\n")
    with pytest.raises(ValueError, match="cannot be imported \\(SyntaxError"):
        find(f"{path}:two")


def no_responses(prompts, **columns):
    return [1.0 for _ in prompts]


@pytest.mark.parametrize(
    ("function", "settings", "columns", "message"),
    [
        (matches, {}, ["id"], "needs reference, which neither the prompts nor settings have"),
        (matches, {"wieght": 2.0}, ["reference"], "has no setting wieght; it takes reference"),
        (lengths, {"reference": "a"}, ["reference"], "settings reference must have other names"),
        (no_responses, {}, [], "it has no 'responses'"),
    ],
)
def test_what_a_function_lacks_is_said_before_anything_runs(function, settings, columns, message):
    with pytest.raises(ValueError, match=message):
        check(call(function, **settings), columns)


def test_what_a_function_needs_may_come_from_settings():
    check(call(matches, reference="fixed"), ["id"])
    check(call(lengths, anything=1), ["id"])


def test_the_identity_of_a_function_is_its_source_or_its_code():
    names = {}
    for name, body in (("one", "1"), ("same", "1"), ("two", "2")):
        exec(f"def fn(prompts, responses): return [{body}]", space := {})
        names[name] = identity_of(space["fn"])
    assert names["one"] == names["same"] != names["two"]
    assert identity_of(lengths) == identity_of(lengths) != identity_of(matches)
