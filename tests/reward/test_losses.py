"""The loss: against plain loops, and against what statistics says its minimum has to be."""

import functools
import itertools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn.linear_model import LogisticRegression

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import Transformer, init_params
from huatuo_jax.core import sharding
from huatuo_jax.preferences.data import Answer, Group, Pair
from huatuo_jax.preferences.rows import ComparisonRows, RowsConfig
from huatuo_jax.reward.stage import pair_losses, reward_loss
from huatuo_jax.training.optimizer import OptimizerConfig, make_optimizer
from huatuo_jax.training.update import (
    abstract,
    compile_update,
    make_sharded,
    make_update,
    new_state,
)
from tests.preferences.tiny import SMALL, token_groups

MODEL = Transformer(SMALL, ComputeConfig())


def _plain_loss(chosen, rejected, p_chosen, margin, centring):
    """With the formula as it stands in the papers."""
    probability = 1 / (1 + math.exp(-(chosen - rejected - margin)))
    loss = -p_chosen * math.log(probability) - (1 - p_chosen) * math.log(1 - probability)
    return loss + centring * (chosen + rejected) ** 2


def test_pair_losses_equal_the_formula():
    draw = np.random.default_rng(0)
    columns = (
        draw.normal(size=40),
        draw.normal(size=40),
        draw.uniform(size=40),
        draw.normal(size=40),
    )
    expected = [_plain_loss(*row, 0.3) for row in zip(*columns, strict=True)]
    chosen, rejected, p_chosen, margin = columns
    with jax.enable_x64(True):
        found = pair_losses(
            jnp.asarray(chosen),
            jnp.asarray(rejected),
            p_chosen=jnp.asarray(p_chosen),
            margin=jnp.asarray(margin),
            centring=0.3,
        )
        assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_swapping_the_answers_of_a_pair_changes_nothing():
    chosen, rejected, p_chosen, margin = jax.random.normal(jax.random.key(0), (4, 20))
    p_chosen = jax.nn.sigmoid(p_chosen)
    there = pair_losses(chosen, rejected, p_chosen=p_chosen, margin=margin, centring=0.1)
    back = pair_losses(rejected, chosen, p_chosen=1 - p_chosen, margin=-margin, centring=0.1)
    np.testing.assert_allclose(there, back, rtol=1e-5, atol=1e-6)


def test_far_apart_scores_have_a_finite_loss_and_gradient():
    far = jnp.array([1e4, -1e4])

    def summed(chosen):
        return pair_losses(chosen, jnp.zeros(2), p_chosen=jnp.ones(2)).sum()

    loss, gradient = jax.value_and_grad(summed)(far)
    np.testing.assert_allclose(loss, 1e4)
    np.testing.assert_allclose(gradient, [0, -1], atol=1e-6)


@pytest.fixture(scope="module")
def params():
    made = init_params(jax.random.key(1), SMALL, ComputeConfig(), head="score")
    return jax.tree.map(lambda leaf: leaf * 6 if leaf.ndim > 1 else leaf, made)


@pytest.fixture(scope="module")
def groups():
    return token_groups([2, 3, 4, 2, 2, 3, 2, 2, 3, 2, 2], soft=True)


def _batch(groups, num_rows=8, **settings):
    """All rows of the groups as one batch, filled up with empty ones."""
    rows = ComparisonRows(groups, RowsConfig(pad_token_id=2, **settings))
    number = rows.first_row(1)
    assert number <= num_rows
    read = [
        rows.read(row if row < number else None, num_pairs=rows.most_pairs(number) + 2)
        for row in range(num_rows)
    ]
    return {name: jnp.asarray(np.stack([row[name] for row in read])) for name in read[0]}


@pytest.mark.parametrize("margin", [-0.8, 0.0, 0.8])
def test_the_loss_of_a_tie_is_least_where_the_scores_differ_by_its_margin(margin):
    differences = np.linspace(-2.0, 2.0, 41)
    losses = pair_losses(
        jnp.asarray(differences), jnp.zeros(41), p_chosen=jnp.full(41, 0.5), margin=margin
    )
    assert differences[np.argmin(losses)] == pytest.approx(margin)


def test_a_negative_margin_asks_less_of_the_chosen_answer_and_never_turns_the_preference():
    differences = jnp.linspace(-3.0, 3.0, 25)

    def slopes(margin):
        def total(differences):
            return pair_losses(
                differences, jnp.zeros(25), p_chosen=jnp.ones(25), margin=margin
            ).sum()

        return np.asarray(jax.grad(total)(differences))

    assert (slopes(-0.8) < 0).all()
    assert (np.abs(slopes(-0.8)) < np.abs(slopes(0.0))).all()
    assert (np.abs(slopes(0.0)) < np.abs(slopes(0.8))).all()


def _loop_loss(params, groups, *, margin_scale, centring, denominator):
    """Every pair by itself, each of its answers alone in the model."""

    @jax.jit
    def score(ids_1T):
        variables = {"params": params}
        return MODEL.apply(variables, MODEL.apply(variables, ids_1T), method="scores")[0, -1]

    total, terms = 0.0, 0.0
    for group in groups:
        for pair in group.pairs:
            chosen, rejected = (
                float(score(jnp.asarray(group.answers[one].token_ids[None])))
                for one in (pair.chosen, pair.rejected)
            )
            weight = 1 / len(group.pairs) if denominator == "prompts" else 1
            margin = margin_scale * (pair.margin or 0.0)
            total += weight * _plain_loss(chosen, rejected, pair.p_chosen, margin, centring)
            terms += weight
    return total, terms


@pytest.mark.parametrize(
    ("packed", "row_length", "num_rows", "denominator"),
    [
        (True, 100, 8, "pairs"),
        pytest.param(False, 60, 12, "prompts", marks=pytest.mark.slow),
        (True, 36, 24, "prompts"),
    ],
)
def test_the_loss_is_that_of_each_pair_by_itself(
    params, groups, packed, row_length, num_rows, denominator
):
    settings = {"margin_scale": 0.5, "centring": 0.02}
    batch = _batch(groups, num_rows, packed=packed, row_length=row_length, denominator=denominator)
    sums = jax.jit(functools.partial(reward_loss, MODEL, **settings))({"params": params}, batch)
    expected, terms = _loop_loss(params, groups, denominator=denominator, **settings)
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-5)
    np.testing.assert_allclose(sums.num_terms, terms, rtol=1e-6)
    assert sums.others["pairs"] == sum(len(group.pairs) for group in groups)


def test_accuracy_counts_the_preferred_answer_and_equal_scores_half():
    groups = token_groups([2, 2, 2, 2])
    labels = [1.0, 0.2, 0.5, 0.9]
    groups = [
        Group(g.id, g.case, g.answers, (g.pairs[0]._replace(p_chosen=p),))
        for g, p in zip(groups, labels, strict=True)
    ]
    # The score of an answer is that of its last token but one in this stub.
    scores = {
        g.answers[i].token_ids.tobytes(): s
        for g, two in zip(groups, [(3, 1), (4, 1), (2, 1), (5, 5)], strict=True)
        for i, s in enumerate(two)
    }
    batch = _batch(groups, 4, packed=False, row_length=60, shuffled=False)

    class Looked:
        cfg = types.SimpleNamespace(sliding_window=None)

        def apply(self, variables, values, *, method=None, **_):
            if method is None:
                table = np.zeros((*values.shape, 1), np.float32)
                for row, group in enumerate(groups):
                    end = 0
                    for one in group.answers:
                        end += len(one.token_ids)
                        table[row, end - 1] = scores[one.token_ids.tobytes()]
                return jnp.asarray(table)
            return values[..., 0]

    others = reward_loss(Looked(), {}, batch).others
    assert others["labelled"] == 3  # One is a tie.
    assert others["correct"] == 1.5  # Right, wrong, equal.
    assert others["difference"] == 2 - 3 + 0


def _update(mesh, num_micro_batches):
    cfg = OptimizerConfig(learning_rate=1e-3, weight_decay=0.0, clip_norm=None)
    optimizer = make_optimizer(cfg, num_steps=5)

    def make(key, params):
        return new_state(
            {"params": params}, is_trained=lambda path: True, optimizer=optimizer, key=key
        )

    update = make_update(
        functools.partial(reward_loss, MODEL), optimizer, num_micro_batches=num_micro_batches
    )

    def run(params, batch):
        key = jax.random.key(0)
        state = make_sharded(make, mesh, key, params)
        shape = abstract(make, mesh, key, params)
        new, metrics = compile_update(update, shape, mesh)(state, batch)
        mu = next(
            part.mu
            for part in jax.tree.leaves(new.opt_state, is_leaf=lambda one: hasattr(one, "mu"))
            if hasattr(part, "mu")
        )
        return jax.device_get(mu), {name: float(value) for name, value in metrics.items()}

    return run


def test_micro_batches_packing_and_mesh_change_a_step_by_rounding_only(params, groups):
    one = sharding.make_mesh(devices=jax.devices()[:1])
    several = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    packed = _batch(groups, 8, packed=True, row_length=100)
    loose = _batch(groups, 16, packed=False, row_length=60)
    gradients, expected = _update(one, 1)(params, packed)
    assert expected["grad_norm"] > 0.01
    found, metrics = _update(several, 2)(params, loose)
    for name in ("loss", "num_terms", "grad_norm", "correct", "tokens"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5), name
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-6)


class Utilities:
    """Stands for a model: the score of an item, which is one token, is a parameter."""

    cfg = types.SimpleNamespace(sliding_window=None)

    def apply(self, variables, values, *, method=None, **_):
        return values[..., 0] if method == "scores" else variables["utilities"][values][..., None]


NUM_ITEMS, NUM_COMPARISONS = 6, 1000
ITEM_PAIRS = list(itertools.combinations(range(NUM_ITEMS), 2))


def _item_row(pairs):
    """The production row of items, each an answer of one token, and these comparisons."""
    answers = tuple(
        Answer(np.array([item], np.int32), 1, 1, np.array([True])) for item in range(NUM_ITEMS)
    )
    group = Group("items", "items", answers, tuple(pairs))
    rows = ComparisonRows([group], RowsConfig(row_length=NUM_ITEMS))
    read = rows.read(0, num_pairs=rows.most_pairs(1))
    # In float64, as statistics are compared here and not rounding.
    return {
        name: jnp.asarray(values[None], jnp.float64 if values.dtype == np.float32 else None)
        for name, values in read.items()
    }


@jax.jit
def _fit(batch):
    """Utilities that minimise the production loss, the first one 0: Newton's method."""

    def loss(free):
        utilities = jnp.concatenate([jnp.zeros(1, free.dtype), free])
        return reward_loss(Utilities(), {"utilities": utilities}, batch).loss

    def step(free, _):
        return free - jnp.linalg.solve(jax.hessian(loss)(free), jax.grad(loss)(free)), None

    free, _ = jax.lax.scan(step, jnp.zeros(NUM_ITEMS - 1, jnp.float64), None, length=12)
    return jnp.concatenate([jnp.zeros(1, free.dtype), free]), jnp.abs(jax.grad(loss)(free)).max()


def _simulated(utilities, seed):
    """How often the first of each pair of items won."""
    draw = np.random.default_rng(seed)
    first, second = np.array(ITEM_PAIRS).T
    return draw.binomial(NUM_COMPARISONS, 1 / (1 + np.exp(utilities[second] - utilities[first])))


def _fisher_error(fitted, utilities):
    """The squared error in the metric of the Fisher information at the truth."""
    error = fitted - utilities
    total = 0.0
    for first, second in ITEM_PAIRS:
        probability = 1 / (1 + math.exp(utilities[second] - utilities[first]))
        information = NUM_COMPARISONS * probability * (1 - probability)
        total += information * (error[first] - error[second]) ** 2
    return total


def test_fitted_utilities_err_as_statistics_says_over_200_seeds():
    utilities = np.array([0.0, 0.8, -0.5, 1.3, 0.2, -1.1])
    errors = []
    with jax.enable_x64(True):
        for seed in range(200):
            wins = _simulated(utilities, seed)
            pairs = [
                Pair(first, second, float(share), None, "")
                for (first, second), share in zip(ITEM_PAIRS, wins / NUM_COMPARISONS, strict=True)
            ]
            batch = _item_row(pairs)
            # The row holds labels in float32; the fit shall see the simulated ones.
            batch["p_chosen"] = jnp.asarray([[pair.p_chosen for pair in pairs]])
            fitted, slope = _fit(batch)
            assert slope < 1e-9
            errors.append(_fisher_error(np.asarray(fitted), utilities))
    found = scipy.stats.kstest(errors, scipy.stats.chi2(NUM_ITEMS - 1).cdf).pvalue
    assert found > 0.05, found
    # The test could tell: one degree of freedom more or less does not fit.
    for degrees in (NUM_ITEMS - 2, NUM_ITEMS):
        assert scipy.stats.kstest(errors, scipy.stats.chi2(degrees).cdf).pvalue < 1e-3


def test_many_hard_comparisons_fit_as_their_soft_label():
    utilities = np.array([0.0, 0.8, -0.5, 1.3, 0.2, -1.1])
    wins = _simulated(utilities, 7)
    soft = [
        Pair(first, second, won / NUM_COMPARISONS, None, "")
        for (first, second), won in zip(ITEM_PAIRS, wins, strict=True)
    ]
    hard = [
        Pair(*(pair if number < won else pair[::-1]), 1.0, None, "")
        for pair, won in zip(ITEM_PAIRS, wins, strict=True)
        for number in range(NUM_COMPARISONS)
    ]
    with jax.enable_x64(True):
        (from_soft, _), (from_hard, _) = _fit(_item_row(soft)), _fit(_item_row(hard))
    np.testing.assert_allclose(from_soft, from_hard, atol=1e-6)


def test_a_linear_head_on_a_frozen_trunk_is_logistic_regression_on_feature_differences(params):
    groups = token_groups([2] * 120, seed=4)
    draw = np.random.default_rng(5)
    labels = draw.integers(0, 2, len(groups)).astype(float)
    groups = [
        Group(g.id, g.case, g.answers, (g.pairs[0]._replace(p_chosen=float(label)),))
        for g, label in zip(groups, labels, strict=True)
    ]
    with jax.enable_x64(True):
        wide = ComputeConfig(
            param_dtype=jnp.float64, compute_dtype=jnp.float64, output_dtype=jnp.float64
        )
        model = Transformer(SMALL, wide)
        frozen = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)
        batch = _batch(groups, 32, packed=True, row_length=128)

        @jax.jit
        def newton(kernel_D):
            def loss(kernel_D):
                head = {"score_head": {"kernel": kernel_D[:, None]}}
                return reward_loss(model, {"params": frozen | head}, batch).loss

            change = jnp.linalg.solve(jax.hessian(loss)(kernel_D), jax.grad(loss)(kernel_D))
            return kernel_D - change, jnp.abs(change).max()

        kernel_D = jnp.zeros(SMALL.hidden_size, jnp.float64)
        for _ in range(12):
            kernel_D, change = newton(kernel_D)
        assert change < 1e-9

        # Without rows or segments: what stands behind an answer cannot reach it.
        answers = [one for group in groups for one in group.answers]
        ids = np.zeros((len(answers), max(len(one.token_ids) for one in answers)), np.int32)
        for row, one in enumerate(answers):
            ids[row, : len(one.token_ids)] = one.token_ids
        hidden_BTD = np.asarray(jax.jit(model.apply)({"params": frozen}, jnp.asarray(ids)))
    features = [hidden_BTD[row, len(one.token_ids) - 1] for row, one in enumerate(answers)]
    differences = np.array(features[0::2]) - np.array(features[1::2])
    regression = LogisticRegression(
        C=np.inf, fit_intercept=False, solver="newton-cholesky", tol=1e-12, max_iter=500
    ).fit(differences, labels)
    assert np.abs(regression.coef_).max() > 0.1
    np.testing.assert_allclose(kernel_D, regression.coef_[0], rtol=0, atol=1e-4)
