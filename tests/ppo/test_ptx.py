"""The loss of fine-tuning beside PPO's: its gradient, its rows, and what it keeps of a policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.data.batches import pack_row
from huatuo_jax.data.tokenizing import UNKNOWN_KIND, Example
from huatuo_jax.ppo.ptx import PtxConfig
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig
from huatuo_jax.training.initial_model import open_model
from huatuo_jax.training.metrics import read_rows
from huatuo_jax.training.update import LossSums, join
from tests.ppo.tiny import END, PROMPT, Table, config, exact_log_probs, run_tiny, tiny_job

DATA = DataConfig(sources=(SourceConfig(name="none", paths=("none",)),), row_length=12)
ANSWER = (3, END)
ROWS = [[(3, END), (2, 2, END)], [(4, END)], [(1, 3, END)]]


def row_of(answers):
    """A row of prompts with these answers, which are trained on."""
    examples = []
    for answer in answers:
        ids = np.array((*PROMPT.token_ids, *answer), np.int32)
        trained = np.arange(len(ids)) >= len(PROMPT.token_ids)
        examples.append(Example(ids, trained, UNKNOWN_KIND, ""))
    return pack_row(examples, row_length=12, pad_token_id=0)


def mean_loss(cfg, variables, answers):
    """Of the answers' tokens, each dialogue by itself."""
    model = open_model(cfg.model, cfg.compute.compute_config()).transformer
    total, number, start = 0.0, 0, len(PROMPT.token_ids)
    for answer in answers:
        ids_1T = jnp.array([(*PROMPT.token_ids, *answer)])
        hidden_1TD = model.apply(variables, ids_1T)
        logits_1TV = model.apply(variables, hidden_1TD, method="logits")
        log_probs_TV = jax.nn.log_softmax(logits_1TV[0])
        for place, token in enumerate(answer):
            total -= log_probs_TV[start - 1 + place, token]
            number += 1
    return total / number


def test_the_gradient_is_that_of_both_means(tmp_path):
    cfg = config(ptx=PtxConfig(data=DATA, coef=0.7, batch_size=2))
    read = []
    job = tiny_job(cfg, tmp_path, ptx_rows=lambda row: (read.append(row), row_of(ROWS[row % 3]))[1])
    trainer, state = job.make_trainer(), job.make_state().policy

    def both(trained):
        return mean_loss(cfg, join(trained, state.frozen), [*ROWS[1], *ROWS[2]])

    loss, wanted = jax.jit(jax.value_and_grad(both))(state.trained)
    own = jax.tree.map(jnp.ones_like, state.trained)
    sums = LossSums(jnp.float32(2.0), jnp.int32(5), {"tokens": jnp.int32(5)})
    found, gradients = trainer.ptx.added(state, sums, own, step=2)
    assert read == [4, 5] and found.others["ptx_tokens"] == 5 and found.num_terms == 5
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        # The step divides by the policy's 5 terms, of whose loss the gradient is 1 here.
        np.testing.assert_allclose(one / 5, 1 / 5 + 0.7 * other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.loss / 5, 2 / 5 + 0.7 * loss, rtol=1e-6)


@pytest.mark.slow
def test_a_policy_without_a_reward_becomes_that_of_the_dialogues(tmp_path):
    nothing = Table({})
    nothing.scores = lambda answers: np.zeros(len(answers), np.float32)
    read = []

    def rows(number):
        read.append(number)
        return row_of([ANSWER])

    cfg = config(
        ptx=PtxConfig(data=DATA, coef=1.0, batch_size=2),
        estimator="rloo",
        rollout={"num_prompts": 2, "answers_per_prompt": 4},
        kl_coef=0.0,
        num_iterations=12,
        optimizer={"learning_rate": 2e-2},
    )
    state, _ = run_tiny(cfg, tmp_path, scorer=nothing, ptx_rows=rows)
    probability = np.exp(exact_log_probs(cfg, state.policy.variables, [ANSWER]))[0]
    assert probability > 0.9
    assert read == list(range(12 * 4 * 2))  # Each row once, in the order of the plan.
    losses = [row["ppo/ptx_loss"] for row in read_rows(tmp_path / "ppo" / "metrics.jsonl")]
    assert losses[-1] < 0.1 < losses[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"coef": 0.0}, "coef=0.0 must be above 0"), ({"batch_size": 0}, "batch_size=0 must be")],
)
def test_a_wrong_weight_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PtxConfig(data=DATA, **fields)
