"""Continuations scored together have the log-probabilities that each has alone."""

import jax
import numpy as np
import pytest

from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.evaluation import options
from huatuo_jax.evaluation.options import Continuations, ContinuationScorer
from huatuo_jax.training.scoring import GivenAnswer, Scorer
from tests.generation import tiny


def asked(*, several=False):
    draw = np.random.default_rng(1)
    made = []
    for index in range(23):
        context = tiny.prompt(int(draw.integers(1, 200)), seed=index)
        listed = [[int(one)] for one in draw.choice(tiny.CFG.vocab_size, 2 + index % 4, False)]
        if several and index % 3 == 0:
            listed[0] = [*listed[0], 5, 6]
            listed += [[*listed[0], 7], listed[0][:2], [*listed[1], 5]]
        made.append(Continuations(context, listed))
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


def with_shared_starts():
    """Contexts that begin alike, that are others' beginnings, and that are the same."""
    draw = np.random.default_rng(3)
    examples = [tiny.prompt(150, seed=50), tiny.prompt(40, seed=51)]
    made = [Continuations(examples[0], [[4], [7, 8]])]
    for index in range(30):
        start = [*examples[index % 2], *tiny.prompt(7 * (index % 3), seed=52)]
        context = [*start, *tiny.prompt(int(draw.integers(1, 60)), seed=index)]
        ends = [tiny.prompt(int(draw.integers(1, 20)), seed=1000 + 4 * index + n) for n in range(4)]
        made.append(Continuations(context, ends))
    return [*made, made[5], Continuations(made[6].context, [[1], [2, 3]])]


def test_contexts_that_begin_alike_are_scored_as_each_alone():
    questions = with_shared_starts()
    for together, single in zip(scorer()(questions), alone(questions), strict=True):
        np.testing.assert_allclose(together, single, rtol=1e-5, atol=1e-5)


def test_what_sequences_begin_with_takes_its_place_once_in_a_row():
    flops = options.ModelFlops.of(tiny.CFG)
    draw = np.random.default_rng(0)
    start, other = tiny.prompt(100), tiny.prompt(90, seed=1)
    sequences = sorted([*start, *draw.integers(0, 99, 12).tolist()] for _ in range(30))
    # 100 + 30 * 12 tokens, a few less where two go on alike.
    assert options._plan(sequences, [512], flops=flops) == ([list(range(30))], 512)
    mixed = sorted([*sequences, *([*other, index] for index in range(20))])
    rows, _ = options._plan(mixed, [512], flops=flops)
    assert len(rows) == 2


def test_rows_of_trees_hold_each_sequence_once_and_never_too_much():
    draw = np.random.default_rng(0)
    for _ in range(20):
        sequences = sorted(
            draw.integers(0, 2, int(draw.integers(1, 30))).tolist()
            for _ in range(int(draw.integers(1, 300)))
        )
        lengths = np.array([len(one) for one in sequences])
        shared = np.array([0, *map(options._num_shared, sequences, sequences[1:])])
        rows = options.rows_of_trees(lengths, shared, row_length=40)
        assert sorted(index for row in rows for index in row) == list(range(len(sequences)))
        for row in rows:
            assert row == sorted(row)
            held = [sequences[index] for index in row]
            beginnings = {tuple(one[:end]) for one in held for end in range(1, 1 + len(one))}
            assert len(beginnings) <= 40


def test_what_cannot_be_scored_is_named():
    with pytest.raises(ValueError, match=r"asked\[1\]: context and continuations must hold"):
        scorer()([Continuations([3], [[4]]), Continuations([3], [[4], []])])
    too_long = Continuations(tiny.prompt(tiny.CFG.max_positions), [[4], [4, 5]])
    with pytest.raises(ValueError, match=r"asked\[0\] has 513 tokens before the last one"):
        scorer()([too_long])


def test_the_last_token_needs_no_position_of_its_own():
    context = tiny.prompt(tiny.CFG.max_positions)
    ((found,),) = scorer()([Continuations(context, [[4]])])
    (logits_TV,) = tiny.full_logits([context])
    np.testing.assert_allclose(found, tiny.log_softmax(logits_TV)[-1, 4], rtol=1e-5)


def greedy(context, num_tokens):
    ids = list(context)
    for _ in range(num_tokens):
        ids.append(int(tiny.full_logits([ids])[0][-1].argmax()))
    return ids[len(context) :]


def test_a_continuation_is_greedy_where_each_of_its_tokens_is_the_likeliest():
    questions = []
    for index in range(6):
        context = tiny.prompt(9 + index, seed=index)
        best = greedy(context, 3)
        other = (best[0] + 1) % tiny.CFG.vocab_size
        # Some end early, some leave it at the first, the middle or the last token.
        questions.append(
            Continuations(
                context,
                [
                    best,
                    best[:1],
                    best[:2],
                    [other, *best[1:]],
                    [best[0], (best[1] + 1) % tiny.CFG.vocab_size, best[2]],
                    [*best[:2], (best[2] + 1) % tiny.CFG.vocab_size],
                ],
            )
        )
    for one in scorer().score(questions):
        assert [each.is_greedy for each in one] == [True, True, True, False, False, False]


def test_what_continuations_have_in_common_is_computed_once():
    question = Continuations([7, 8], [[1], [2], [1, 3], [1, 3, 4], [2, 5], [2, 6], [9]])
    segments, places = options._segments(question)
    assert [list(one.token_ids) for one in segments] == [[7, 8, 2], [7, 8, 1, 3]]
    assert places[3] == 1 and places[4] == places[5] == 0


def test_rows_of_more_places_than_are_held_at_once_are_scored():
    question = Continuations(tiny.prompt(3), [tiny.prompt(300, seed=1), [4]])
    np.testing.assert_allclose(scorer()([question])[0], alone([question])[0], rtol=1e-5)
