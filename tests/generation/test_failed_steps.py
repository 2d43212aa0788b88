"""A step that raises loses no request, and one that always fails stops no other."""

import dataclasses
import functools

import pytest

from tests.generation import tiny

PROGRAMS = ("allocate", "prefill", "extend", "insert", "decode")


class Failed(Exception):
    """Stands for any error of a device."""


def poison(engine, program, *, seed, patch):
    """Lets a program fail, after it took its arguments, while a request of this seed is held."""
    run = getattr(engine._programs, program)

    def fails(*arguments, **keywords):
        result = run(*arguments, **keywords)  # What is donated is gone.
        held = [request for _, request in engine._queue]
        held += [running.request for _, running in engine._prefilled]
        held += [running.request for running in engine.running]
        if any(request.seed == seed for request in held):
            raise Failed
        return result

    # Engines of one model share their programs, so what is patched is put back.
    patch.setattr(engine._programs, program, fails)


def requests():
    turns = [
        tiny.request(9 + seed, seed=seed, num_answers=2, max_new_tokens=9 + 4 * seed)
        for seed in range(5)
    ]
    # A later turn, which begins with a cached page.
    longer = [*turns[0].prompt_token_ids, *tiny.prompt(20)]
    return [*turns, dataclasses.replace(turns[0], prompt_token_ids=longer, seed=6)]


@functools.cache
def expected_token_ids():
    """The answers of an engine without a failure, by the request's seed and the answer's index."""
    groups = tiny.engine(page_size=8).generate_in_order(requests())
    return {
        (request.seed, answer.answer_index): answer.token_ids
        for request, group in zip(requests(), groups, strict=True)
        for answer in group
    }


def run(engine, indices):
    """The answers of all requests, until a step fails."""
    answers, failed = {}, False
    while engine.busy and not failed:
        try:
            for answer in engine.step():
                number = indices[answer.request_index], answer.answer_index
                answers[number] = answer.token_ids
        except Failed:
            failed = True
    return answers, failed


@pytest.mark.parametrize(
    ("program", "poisoned"),
    [
        pytest.param("allocate", 2, marks=pytest.mark.slow),
        ("prefill", 2),
        ("extend", 6),
        pytest.param("insert", 6, marks=pytest.mark.slow),
        ("decode", 2),
    ],
)
def test_a_request_that_makes_steps_fail_stops_no_other(program, poisoned, monkeypatch):
    asked, expected = requests(), expected_token_ids()
    engine = tiny.engine(page_size=8, prefix_cache_pages=16)
    list(engine.generate(asked[:2]))  # So that there are pages to begin with.
    poison(engine, program, seed=poisoned, patch=monkeypatch)
    seeds = {engine.submit(request): request.seed for request in asked}
    answers, failed = run(engine, seeds)
    assert failed
    left = engine.reset()
    assert not engine.busy and not engine.running
    done = {number for number in expected if number in answers}
    unfinished = {seed for seed, index in expected if (seed, index) not in done}
    assert {seeds[index] for index in left} == unfinished >= {poisoned}
    assert all(request == asked[list(seeds).index(index)] for index, request in left.items())
    for request in left.values():
        found, failed = run_alone(engine, request)
        if failed:
            assert request.seed == poisoned and not found
            assert list(engine.reset().values()) == [request]
        answers |= found
    others = {number: ids for number, ids in expected.items() if number[0] != poisoned}
    assert {number: ids for number, ids in answers.items() if number in others} == others
    assert not engine.busy


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_failed_step_is_not_followed_by_another_until_its_requests_are_dropped(
    program, monkeypatch
):
    engine, asked = tiny.engine(page_size=8, prefix_cache_pages=16), requests()
    poison(engine, program, seed=6, patch=monkeypatch)
    first, second = engine.submit(asked[0]), engine.submit(asked[-1])
    with pytest.raises(Failed):
        while engine.busy:
            engine.step()
    with pytest.raises(ValueError, match="cannot decode: the step before failed"):
        engine.step()
    engine.abort(first)
    engine.abort(second)
    assert not engine.busy
    ((answer, other),) = engine.generate_in_order(asked[:1])
    expected = expected_token_ids()
    assert (answer.token_ids, other.token_ids) == (expected[0, 0], expected[0, 1])


def token_ids(groups):
    return [[answer.token_ids for answer in group] for group in groups]


def run_alone(engine, request):
    return run(engine, {engine.submit(request): request.seed})


def test_a_failure_of_one_answer_loses_no_other_that_is_complete(tokenizer, monkeypatch):
    model = tiny.Transformer(tiny.config(vocab_size=len(tokenizer)))
    engine = tiny.engine(model=model, tokenizer=tokenizer)
    asked = [tiny.request(9, seed=seed, max_new_tokens=3) for seed in range(3)]
    expected = engine.generate_in_order(asked)
    whole = type(tokenizer).decode

    def fails(self, token_ids, **keywords):
        if list(token_ids) == expected[1][0].token_ids:
            raise Failed
        return whole(self, token_ids, **keywords)

    indices = {engine.submit(request): request.seed for request in asked}
    with monkeypatch.context() as patched:
        patched.setattr(type(tokenizer), "decode", fails)
        assert run(engine, indices) == ({}, True)
        assert [request.seed for request in engine.reset().values()] == [0, 1, 2]
        assert run_alone(engine, asked[1]) == ({}, True)
        engine.reset()
    assert run_alone(engine, asked[2]) == ({(2, 0): expected[2][0].token_ids}, False)


def test_a_failure_within_generate_leaves_the_engine_ready(monkeypatch):
    engine = tiny.engine(page_size=8, prefix_cache_pages=16)
    asked = requests()
    expected = engine.generate_in_order(asked[:2])
    poison(engine, "decode", seed=4, patch=monkeypatch)
    with pytest.raises(Failed):
        list(engine.generate(asked))
    assert not engine.busy
    assert token_ids(engine.generate_in_order(asked[:2])) == token_ids(expected)
