"""Continuations scored together have the log-probabilities that each has alone."""

import jax
import numpy as np
import pytest

from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.evaluation.options import Continuations, ContinuationScorer
from huatuo_jax.training.scoring import GivenAnswer, Scorer
from tests.generation import tiny


def asked(*, several=False):
    draw = np.random.default_rng(1)
    made = []
    for index in range(23):
        context = tiny.prompt(int(draw.integers(1, 200)), seed=index)
        options = [[int(one)] for one in draw.choice(tiny.CFG.vocab_size, 2 + index % 4, False)]
        if several and index % 3 == 0:
            options[0] = [*options[0], 5, 6]
        made.append(Continuations(context, options))
    return made


def scorer(*, mesh=None):
    mesh = mesh or MeshConfig().make(jax.devices()[:1])
    return ContinuationScorer(tiny.MODEL, tiny.variables(), mesh=mesh, rows_at_once=4)


def given(context, continuation):
    return GivenAnswer(np.asarray([*context, *continuation], np.int32), len(context))


def alone(questions):
    """Each continuation behind its context, in a row of its own."""
    plain = Scorer(
        tiny.MODEL,
        tiny.variables(),
        mesh=MeshConfig().make(jax.devices()[:1]),
        rows_at_once=1,
        packed=False,
    )
    return [
        tuple(
            float(plain.log_probs([given(one.context, each)])[0].sum())
            for each in one.continuations
        )
        for one in questions
    ]


@pytest.mark.parametrize("several", [False, True])
def test_options_have_the_log_probabilities_that_each_has_alone(several):
    questions = asked(several=several)
    done = []
    found = scorer()(questions, lambda *told: done.append(told))
    assert done[-1] == (len(questions), len(questions))
    for together, single in zip(found, alone(questions), strict=True):
        np.testing.assert_allclose(together, single, rtol=1e-5, atol=1e-5)


def test_a_mesh_of_eight_devices_gives_the_same():
    questions = asked()
    mesh = MeshConfig(data=4, tensor=2).make(jax.devices()[:8])
    many = ContinuationScorer(tiny.MODEL, tiny.variables(), mesh=mesh, rows_at_once=4)(questions)
    for together, single in zip(many, scorer()(questions), strict=True):
        np.testing.assert_allclose(together, single, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_scored_is_named():
    with pytest.raises(ValueError, match=r"asked\[1\]: context and continuations must hold"):
        scorer()([Continuations([3], [[4]]), Continuations([3], [[4], []])])
    too_long = Continuations(tiny.prompt(tiny.CFG.max_positions), [[4]])
    with pytest.raises(ValueError, match=r"asked\[0\] has a context of 512 tokens"):
        scorer()([too_long])
