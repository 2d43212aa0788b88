"""What the losses read of a model: log-probabilities, entropies and values, each at its token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.ppo.losses import PolicyObjective, policy_row_loss, value_row_loss
from huatuo_jax.training.initial_model import ModelConfig, open_model
from huatuo_jax.training.losses import next_tokens, token_scores
from huatuo_jax.training.optimizer import OptimizerConfig, make_optimizer
from huatuo_jax.training.scoring import padded_batch
from tests.ppo.tiny import BACKBONE, config
from tests.tiny import one_device

TEMPERATURE = 0.7
PROMPTS, LENGTHS, WIDTH = (2, 1, 3), (6, 2, 8), 9
OBJECTIVE = PolicyObjective(
    temperature=TEMPERATURE,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
    entropy_coef=0.5,
    kl_loss=None,
    num_answers=3,
    tokens_allowed=None,
    chunk=4,
)


def _open(head):
    section = ModelConfig(backbone=BACKBONE, tokenizer="none")
    model = open_model(section, config().compute.compute_config(), head=head)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0), num_steps=1)
    return model.transformer, model.make_state(jax.random.key(2), optimizer, one_device()).variables


def _rows():
    ids_BT = np.random.default_rng(1).integers(0, BACKBONE.vocab_size, (3, WIDTH))
    batch = padded_batch(
        jnp.asarray(ids_BT, jnp.int32),
        prompt_lengths_B=jnp.array(PROMPTS),
        lengths_B=jnp.array(LENGTHS),
    )
    zeros_BT = jnp.zeros((3, WIDTH))
    return batch | {
        "mask": batch["trained_mask"],
        **dict.fromkeys(("old_log_probs", "advantages", "old_values", "returns"), zeros_BT),
    }


def _one_row(model, variables, rows, row, *, method):
    """What the model makes of a row with nothing beside it: its logits or its scores."""

    @jax.jit
    def run(variables, ids_1T):
        return model.apply(variables, model.apply(variables, ids_1T), method=method)[0]

    return run(variables, rows["token_ids"][row : row + 1, : LENGTHS[row]])


def test_log_probs_and_entropy_are_those_of_the_plain_softmax_at_the_temperature():
    model, variables = _open("lm")
    rows = _rows()
    loss = jax.jit(policy_row_loss(model, OBJECTIVE))
    sums, outputs = loss(variables, rows, jnp.float32(0.0))
    expected_BT, entropy = np.zeros((3, WIDTH)), 0.0
    for row in range(3):
        logits_TV = _one_row(model, variables, rows, row, method="logits")[:, : BACKBONE.vocab_size]
        table_TV = np.asarray(jax.nn.log_softmax(logits_TV / TEMPERATURE), np.float64)
        for place in range(PROMPTS[row], LENGTHS[row]):
            expected_BT[row, place] = table_TV[place - 1, int(rows["token_ids"][row, place])]
            entropy -= (np.exp(table_TV[place - 1]) * table_TV[place - 1]).sum()
    np.testing.assert_allclose(outputs["log_probs"], expected_BT, rtol=0, atol=1e-5)
    assert float(sums.others["entropy"]) == pytest.approx(entropy, rel=1e-5)
    # No advantage: the loss is the entropy bonus alone.
    assert float(sums.loss) == pytest.approx(-0.5 * entropy, rel=1e-5)


def test_the_entropys_gradient_is_that_of_the_plain_softmax():
    draw = np.random.default_rng(0)
    hidden_BTD = jnp.asarray(draw.normal(size=(2, 5, 4)), jnp.float32)
    kernel_DV = jnp.asarray(draw.normal(size=(4, 7)), jnp.float32)
    wanted_BT = jnp.asarray(draw.uniform(size=(2, 5)) < 0.6)
    targets_BT = jnp.zeros((2, 5), jnp.int32)

    def ours(kernel_DV):
        scores = token_scores(
            *(jnp.matmul, kernel_DV),
            hidden_BTD,
            targets_BT,
            wanted_BT,
            temperature=0.5,
            chunk=2,
            entropy=True,
        )
        return scores.entropies_BT.sum()

    def plain(kernel_DV):
        table = jax.nn.log_softmax(hidden_BTD @ kernel_DV / 0.5)
        return jnp.where(wanted_BT, -(jnp.exp(table) * table).sum(-1), 0).sum()

    for left, right in zip(
        jax.jit(jax.value_and_grad(ours))(kernel_DV),
        jax.jit(jax.value_and_grad(plain))(kernel_DV),
        strict=True,
    ):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)


def test_entropies_are_left_out_where_nobody_asks():
    hidden_BTD, kernel_DV = jnp.ones((1, 4, 3)), jnp.ones((3, 6))
    ones_BT = jnp.ones((1, 4), jnp.int32)
    scores = token_scores(jnp.matmul, kernel_DV, hidden_BTD, ones_BT, ones_BT > 0)
    assert not scores.entropies_BT.any() and scores.log_probs_BT.all()


def test_values_are_those_of_the_state_before_each_token():
    model, variables = _open("score")
    rows = _rows()
    run = jax.jit(value_row_loss(model, clip=None, tokens_allowed=None))
    _, outputs = run(variables, rows, jnp.float32(0.0))
    for row in range(3):
        after_T = _one_row(model, variables, rows, row, method="scores")
        first, end = PROMPTS[row], LENGTHS[row]
        np.testing.assert_allclose(
            outputs["values"][row, first:end], after_T[first - 1 : end - 1], rtol=0, atol=1e-6
        )
        np.testing.assert_allclose(
            outputs["values_after"][row, first:end], after_T[first:end], rtol=0, atol=1e-6
        )
    assert not np.array_equal(next_tokens(outputs["values"])[:, :-1], outputs["values"][:, :-1])
