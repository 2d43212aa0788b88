"""The best tokens at every place of an answer, against a full forward pass."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from huatuo_jax.core import sharding
from huatuo_jax.generation.requests import Request
from tests.generation import tiny

SAMPLINGS = (
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9},
    {"temperature": 1.3, "repetition_penalty": 1.5, "min_new_tokens": 9, "stop_token_ids": (1, 2)},
)
COUNTS = (20, 3, 1)


def requests():
    return [
        dataclasses.replace(
            tiny.request(5 + 9 * number, seed=number, max_new_tokens=12, **sampling),
            num_top_log_probs=count,
            num_answers=2,
        )
        for number, (sampling, count) in enumerate(zip(SAMPLINGS, COUNTS, strict=True))
    ]


def assert_best_of_a_full_pass(request, answer):
    start, temperature = len(request.prompt_token_ids), request.sampling.temperature or 1.0
    (logits_TV,) = tiny.full_logits([[*request.prompt_token_ids, *answer.token_ids]])
    scores_TV = tiny.log_softmax(logits_TV[start - 1 : -1, : tiny.CFG.vocab_size] / temperature)
    assert len(answer.top_log_probs) == len(answer.token_ids)
    for token, log_prob, best, scores_V in zip(
        answer.token_ids, answer.log_probs, answer.top_log_probs, scores_TV, strict=True
    ):
        ids, log_probs = zip(*best, strict=True)
        assert ids == tuple(np.argsort(-scores_V)[: request.num_top_log_probs])
        np.testing.assert_allclose(log_probs, scores_V[list(ids)], atol=1e-5)
        # The very number that the token has among the answer's own.
        assert dict(best).get(token, log_prob) == log_prob


def test_the_best_tokens_are_those_of_the_full_forward_pass():
    asked = requests()
    for request, answers in zip(asked, tiny.engine().generate_in_order(asked), strict=True):
        for answer in answers:
            assert_best_of_a_full_pass(request, answer)


def test_the_best_tokens_on_eight_devices_are_those_of_the_full_forward_pass():
    asked = requests()
    engine = tiny.engine(slots=8, mesh=sharding.make_mesh(data=4, tensor=2))
    for request, answers in zip(asked, engine.generate_in_order(asked), strict=True):
        for answer in answers:
            assert_best_of_a_full_pass(request, answer)


def test_an_answer_is_the_same_with_and_without_the_best_tokens():
    engine, asked = tiny.engine(), requests()
    without = [dataclasses.replace(request, num_top_log_probs=0) for request in asked]
    alone = engine.generate_in_order(without)
    mixed = engine.generate_in_order([*asked[1:], *without])
    assert [answer.token_ids for group in mixed[2:] for answer in group] == [
        answer.token_ids for group in alone for answer in group
    ]
    assert [answer.token_ids for answer in mixed[0]] == [answer.token_ids for answer in alone[1]]
    for answer in (answer for group in (*alone, *mixed[2:]) for answer in group):
        assert answer.top_log_probs == [[]] * len(answer.token_ids)


def test_unfinished_answers_have_the_best_tokens_so_far():
    engine = tiny.engine()
    engine.submit(dataclasses.replace(tiny.request(9, max_new_tokens=40), num_top_log_probs=2))
    engine.step()
    (running,) = engine.running
    assert [len(best) for best in running.top_log_probs] == [2] * len(running.token_ids)


def test_the_best_tokens_are_searched_under_a_condition_alone():
    """A step whose answers do not want them runs no search."""
    engine = tiny.engine()
    table, pool = engine._table, engine._pool
    pool.make_room(np.full(4, 96))
    traced = jax.make_jaxpr(engine._programs._run_decode)(
        engine._variables, pool.cache, pool.pages_of(np.arange(4)), table.progress, table.settings
    )

    def searches(jaxpr, *, under_condition):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "top_k":
                yield under_condition
            inner = under_condition or equation.primitive.name == "cond"
            for part in jaxprs_in_params(equation.params):
                yield from searches(part, under_condition=inner)

    assert list(searches(traced.jaxpr, under_condition=False)) == [True]


def test_more_best_tokens_than_there_can_be_are_refused():
    with pytest.raises(ValueError, match=r"Request.num_top_log_probs=21 must lie between 0 and 20"):
        Request(prompt_token_ids=[1], num_top_log_probs=21)
    few = tiny.Transformer(tiny.config(vocab_size=12))
    with pytest.raises(ValueError, match="num_top_log_probs=13; the model has 12 tokens"):
        tiny.engine(model=few).check(Request(prompt_token_ids=[1], num_top_log_probs=13))
