"""The loss on rows of answers: against each pair by itself, and at the first step."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.backbone.lora import LoraConfig
from huatuo_jax.dpo import REFERENCE, both, numbers, row_loss
from huatuo_jax.preferences.rows import ComparisonRows, RowsConfig
from huatuo_jax.training.optimizer import make_optimizer
from huatuo_jax.training.update import make_update
from tests.dpo.tiny import config, tiny_job, tiny_model
from tests.preferences.tiny import token_groups
from tests.tiny import one_device

BETA = 0.3
MAX_LENGTH = 20
GROUPS = token_groups([2, 3, 4, 2, 2, 3, 2], soft=True)
LORA = LoraConfig(rank=2, alpha=4.0)


def _batch(*, num_rows=8, junk=0, **settings):
    """All rows as one batch, filled up with empty ones."""
    rows = ComparisonRows(GROUPS, RowsConfig(pad_token_id=junk, **settings))
    number = rows.first_row(1)
    assert number <= num_rows
    read = [
        rows.read(row if row < number else None, num_pairs=rows.most_pairs(number) + 2)
        for row in range(num_rows)
    ]
    return {name: jnp.asarray(np.stack([row[name] for row in read])) for name in read[0]}


def _moved(variables, *, of, size=0.3):
    """The variables with noise on some collections, so that policy and reference differ."""
    leaves, tree = jax.tree.flatten({name: variables[name] for name in of})
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noisy = [
        leaf + size * jax.random.normal(key, leaf.shape, leaf.dtype)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return variables | jax.tree.unflatten(tree, noisy)


@pytest.fixture(scope="module")
def variables(tmp_path_factory):
    job = tiny_job(config(), tmp_path_factory.mktemp("first"), GROUPS)
    return job.make_state().variables


def _answer_log_prob(model):
    """The function from variables and an answer to the sum of its tokens' log-probabilities.

    Each answer is alone in the model, and the log-softmax is over all logits. What follows an
    answer's last token in its row does not reach it: one length, so one program for all.
    """

    @jax.jit
    def all_log_probs(variables, token_ids_1T):
        logits_1TV = model.apply(variables, model.apply(variables, token_ids_1T), method="logits")
        return jax.nn.log_softmax(logits_1TV[0])

    def of_answer(variables, answer):
        row_1T = np.zeros((1, MAX_LENGTH), np.int32)
        row_1T[0, : len(answer.token_ids)] = answer.token_ids
        log_probs_TV = np.asarray(all_log_probs(variables, row_1T), np.float64)
        return sum(
            log_probs_TV[t - 1, answer.token_ids[t]]
            for t in range(1, len(answer.token_ids))
            if answer.is_answer[t]
        )

    return of_answer


@pytest.mark.parametrize(
    "settings",
    [
        {"row_length": 100},
        pytest.param({"row_length": 40, "num_rows": 16}, marks=pytest.mark.slow),
    ],
)
def test_the_loss_is_that_of_each_pair_by_itself(variables, settings):
    variables = _moved(variables, of=("params",))
    model = tiny_model(config()).transformer
    policy, reference = both(variables)
    log_prob = _answer_log_prob(model)
    total = chosen_total = agreed = 0.0
    num_pairs = 0
    for group in GROUPS:
        ours, theirs = (
            [log_prob(side, answer) for answer in group.answers] for side in (policy, reference)
        )
        for pair in group.pairs:
            margin = (ours[pair.chosen] - theirs[pair.chosen]) - (
                ours[pair.rejected] - theirs[pair.rejected]
            )
            p_won = 1 / (1 + math.exp(-BETA * margin))
            total -= pair.p_chosen * math.log(p_won) + (1 - pair.p_chosen) * math.log(1 - p_won)
            chosen_total += ours[pair.chosen]
            agreed += (margin > 0) == (pair.p_chosen > 0.5)
            num_pairs += 1
    loss = jax.jit(functools.partial(row_loss, model, beta=BETA, chunk=16))
    sums = loss(variables, _batch(**settings))
    assert float(sums.num_terms) == num_pairs
    np.testing.assert_allclose(sums.loss, total, rtol=1e-5)
    found = numbers(jax.device_get(sums.others), prefix="dpo")
    np.testing.assert_allclose(found["dpo/chosen_log_prob"], chosen_total / num_pairs, rtol=1e-5)
    assert found["dpo/accuracy"] == pytest.approx(agreed / num_pairs)
    assert found["dpo/margin"] == pytest.approx(
        found["dpo/chosen_reward"] - found["dpo/rejected_reward"]
    )


@pytest.mark.parametrize("denominator", ["pairs", "prompts"])
def test_forms_of_a_mean_token_and_fine_tuning_are_those_of_each_pair(variables, denominator):
    variables = _moved(variables, of=("params",))
    model = tiny_model(config()).transformer
    log_prob = _answer_log_prob(model)
    total = weights = sft = 0.0
    for group in GROUPS:
        ours, theirs = (
            [log_prob(side, one) / sum(one.is_answer) for one in group.answers]
            for side in both(variables)
        )
        weight = 1.0 if denominator == "pairs" else 1 / len(group.pairs)
        for pair in group.pairs:
            chosen, rejected = (ours[at] - theirs[at] for at in (pair.chosen, pair.rejected))
            p = pair.p_chosen + 0.1 * (1 - 2 * pair.p_chosen)
            margin, goal = chosen - rejected, 1 / (2 * BETA)
            total += weight * (p * (margin - goal) ** 2 + (1 - p) * (margin + goal) ** 2)
            better = pair.p_chosen * ours[pair.chosen] + (1 - pair.p_chosen) * ours[pair.rejected]
            sft -= weight * better
            weights += weight
    loss = functools.partial(
        row_loss,
        model,
        beta=BETA,
        form="square",
        label_smoothing=0.1,
        per_token=True,
        sft_coef=0.5,
        chunk=16,
    )
    sums = jax.jit(loss)(variables, _batch(row_length=100, denominator=denominator))
    assert float(sums.num_terms) == pytest.approx(weights)
    np.testing.assert_allclose(sums.loss, total + 0.5 * sft, rtol=1e-5)
    np.testing.assert_allclose(sums.others["sft_loss"], sft, rtol=1e-5)


@pytest.mark.parametrize(
    ("changed", "tolerance"),
    [
        ({}, 1e-6),
        pytest.param({"lora": LORA}, 1e-6, marks=pytest.mark.slow),
        pytest.param({"compute_dtype": "bfloat16"}, 1e-6, marks=pytest.mark.slow),
        ({"compute_dtype": "bfloat16", "lora": LORA}, 1e-6),
    ],
    ids=["weights", "adapters", "weights in bfloat16", "adapters in bfloat16"],
)
def test_at_the_first_step_the_margin_is_0_and_the_loss_log_2(tmp_path, changed, tolerance):
    cfg = config(**changed)
    job = tiny_job(cfg, tmp_path, GROUPS)
    state = job.make_state()
    _, metrics = job.update(state, next(job.batches))
    fields = job.report({name: np.asarray(value) for name, value in metrics.items()}).fields
    assert fields["dpo/margin"] == pytest.approx(0, abs=tolerance)
    assert fields["train/loss"] == pytest.approx(math.log(2), abs=tolerance)
    assert fields["dpo/chosen_log_prob"] < -1  # There is something to differ in.


def test_nothing_flows_into_the_reference_and_the_policy_moves(tmp_path, variables):
    job = tiny_job(config(), tmp_path, GROUPS)
    before = jax.tree.map(np.asarray, job.make_state().variables)
    state, _ = job.update(job.make_state(), next(job.batches))
    for left, right in zip(
        jax.tree.leaves(before[REFERENCE]),
        jax.tree.leaves(state.variables[REFERENCE]),
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)
    moved = jax.tree.map(
        lambda a, b: bool(np.any(a != np.asarray(b))), before["params"], state.variables["params"]
    )
    assert all(jax.tree.leaves(moved))
    model = tiny_model(config()).transformer
    batch = _batch(row_length=100)
    gradients = jax.jit(
        jax.grad(lambda all_of_it: row_loss(model, all_of_it, batch, beta=BETA).loss)
    )(_moved(variables, of=("params",)))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients[REFERENCE]))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradients["params"]))


@pytest.mark.slow
def test_padding_micro_batches_and_mesh_change_nothing_but_rounding(tmp_path):
    cfg = config(batch_size=8)
    job = tiny_job(cfg, tmp_path / "one", GROUPS)
    model = tiny_model(cfg).transformer
    loss = functools.partial(row_loss, model, beta=BETA, chunk=16)
    state = job.make_state()
    variables = _moved(state.variables, of=("params",), size=0.05)
    plain = _batch(row_length=100)
    padded = _batch(row_length=120, junk=7)
    np.testing.assert_allclose(loss(variables, plain).loss, loss(variables, padded).loss, rtol=1e-5)
    optimizer = make_optimizer(cfg.optimizer, num_steps=6)
    with jax.set_mesh(one_device()):
        whole, parts = (
            make_update(loss, optimizer, num_micro_batches=number)(state, plain)[1]
            for number in (1, 4)
        )
    for name in ("loss", "grad_norm", "pairs", "agreed"):
        np.testing.assert_allclose(whole[name], parts[name], rtol=1e-5, atol=1e-6)
