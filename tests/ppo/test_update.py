"""What must not change a step changes nothing: junk, order, micro-batches, mesh, a rate of 0."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from huatuo_jax.core import sharding
from huatuo_jax.ppo.losses import PolicyObjective, policy_row_loss, value_row_loss
from huatuo_jax.ppo.trainer import Learner, compile_apply, compile_pass
from huatuo_jax.training.initial_model import ModelConfig, open_model
from huatuo_jax.training.loop import put_on_mesh
from huatuo_jax.training.optimizer import OptimizerConfig, is_decayed, make_optimizer
from huatuo_jax.training.scoring import padded_batch
from tests.ppo.tiny import BACKBONE, config, tiny_job
from tests.tiny import one_device

ROWS, LENGTH = 8, 12
COMPUTE = config().compute.compute_config()
OBJECTIVE = PolicyObjective(
    temperature=0.8,
    clip_low=0.2,
    clip_high=0.3,
    dual_clip=None,
    entropy_coef=0.05,
    kl_loss="k3",
    num_answers=ROWS,
    tokens_allowed=None,
    chunk=4,
)


def _optimizer():
    return make_optimizer(OptimizerConfig(learning_rate=1e-2, decay="constant"), num_steps=10)


def _model(head):
    return open_model(
        ModelConfig(backbone=BACKBONE, tokenizer="none"), COMPUTE, head=head, head_init=1.0
    )


def _loss(head, *, by_answer=False):
    model = _model(head).transformer
    if head == "lm":
        return policy_row_loss(model, dataclasses.replace(OBJECTIVE, mean_per_answer=by_answer))
    return value_row_loss(model, clip=0.2, tokens_allowed=None, mean_per_answer=by_answer)


def _rows(*, junk=None):
    """Rows of many lengths with numbers of a rollout; junk goes wherever nothing may look."""
    draw = np.random.default_rng(5)
    prompts_B, answers_B = draw.integers(1, 5, ROWS), draw.integers(1, 8, ROWS)
    lengths_B = prompts_B + answers_B
    ids_BT = draw.integers(0, BACKBONE.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    batch = padded_batch(
        jnp.asarray(ids_BT), prompt_lengths_B=prompts_B, lengths_B=jnp.asarray(lengths_B)
    )
    rows = {name: np.asarray(batch[name]) for name in ("token_ids", "segment_ids", "positions")}
    mask_BT = rows["mask"] = np.asarray(batch["trained_mask"])
    rows["answers"] = np.broadcast_to(np.arange(ROWS, dtype=np.int32)[:, None], mask_BT.shape)
    names = ("old_log_probs", "reference_log_probs", "advantages", "old_values", "returns")
    for name in names:
        noise_BT = draw.normal(size=mask_BT.shape).astype(np.float32)
        log_prob = -np.log(BACKBONE.vocab_size) if name.endswith("log_probs") else 0.0
        rows[name] = np.where(mask_BT, log_prob + 0.3 * noise_BT, 0 if junk is None else junk)
        rows[name] = rows[name].astype(np.float32)
    if junk is not None:
        rows["token_ids"] = np.where(rows["segment_ids"] > 0, ids_BT, ids_BT[::-1, ::-1])
        assert np.any(rows["token_ids"] != ids_BT)
    return rows


def _pass(head, rows, *, num_micro_batches=1, mesh=None, by_answer=False):
    """Sums, outputs and gradients as numpy."""
    mesh = mesh or one_device()
    state = _model(head).make_state(jax.random.key(1), _optimizer(), mesh)
    run = compile_pass(
        _loss(head, by_answer=by_answer),
        state,
        mesh,
        rows_at_once=len(rows["mask"]) // num_micro_batches,
    )
    found = run(state.trained, state.frozen, put_on_mesh(rows, mesh), jnp.float32(0.1), True)
    return jax.device_get(found)


def _assert_close(found, expected, *, tolerance=1e-5):
    for left, right in zip(
        jax.tree.leaves(found.gradients), jax.tree.leaves(expected.gradients), strict=True
    ):
        assert np.linalg.norm(left - right) <= tolerance * max(np.linalg.norm(right), 1e-3)
    for name, value in expected.sums.others.items():
        np.testing.assert_allclose(found.sums.others[name], value, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.sums.loss, expected.sums.loss, rtol=1e-5)


@pytest.fixture(scope="module", params=["lm", "score"], ids=["policy", "critic"])
def head(request):
    return request.param


@pytest.fixture(scope="module")
def expected(head):
    found = _pass(head, _rows())
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(found.gradients)) > 0.1
    return found


@pytest.mark.parametrize("junk", [np.nan, pytest.param(1e30, marks=pytest.mark.slow)])
def test_junk_in_masked_slots_changes_no_bit(head, expected, junk):
    mask_BT = _rows()["mask"]
    found = _pass(head, _rows(junk=junk))
    for left, right in zip(
        jax.tree.leaves((found.sums, found.gradients)),
        jax.tree.leaves((expected.sums, expected.gradients)),
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)
    for name, array_BT in expected.outputs.items():
        np.testing.assert_array_equal(found.outputs[name][mask_BT], array_BT[mask_BT])


def test_junk_that_is_in_the_mask_is_seen(head, expected):
    rows = _rows()
    spoilt = {**rows, "mask": rows["segment_ids"] > 0}
    found = _pass(head, spoilt)
    differences = jax.tree.map(np.subtract, found.gradients, expected.gradients)
    assert optax.tree.norm(differences) > 0.05 * optax.tree.norm(expected.gradients)


def test_the_order_of_rows_changes_only_rounding(head, expected):
    order = np.random.default_rng(0).permutation(ROWS)
    rows = {name: array[order] for name, array in _rows().items()}
    found = _pass(head, rows)
    _assert_close(found, expected)
    for name, array_BT in expected.outputs.items():
        mask_BT = rows["mask"]
        np.testing.assert_allclose(
            found.outputs[name][mask_BT], array_BT[order][mask_BT], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("number", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_micro_batches_change_only_rounding(head, expected, number):
    found = _pass(head, _rows(), num_micro_batches=number)
    _assert_close(found, expected)
    mask_BT = _rows()["mask"]
    for name, array_BT in expected.outputs.items():
        np.testing.assert_allclose(
            found.outputs[name][mask_BT], array_BT[mask_BT], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("number", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_a_mean_of_answers_is_that_of_the_whole_step_whatever_its_micro_batches(head, number):
    whole, parts = (_pass(head, _rows(), num_micro_batches=n, by_answer=True) for n in (1, number))
    _assert_close(parts, whole)
    assert int(whole.sums.num_terms) == int(parts.sums.num_terms) == ROWS
    assert float(whole.sums.loss) != pytest.approx(float(_pass(head, _rows()).sums.loss), rel=1e-2)


@pytest.mark.parametrize(
    ("sizes", "number"),
    [
        pytest.param({"fsdp": 8}, 1, marks=pytest.mark.slow),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 2),
    ],
)
def test_the_mesh_changes_only_rounding(head, expected, sizes, number):
    found = _pass(head, _rows(), num_micro_batches=number, mesh=sharding.make_mesh(**sizes))
    _assert_close(found, expected)


def test_a_pass_without_gradient_gives_the_same_numbers_to_the_bit(head, expected):
    mesh = one_device()
    state = _model(head).make_state(jax.random.key(1), _optimizer(), mesh)
    run = compile_pass(_loss(head), state, mesh, rows_at_once=ROWS)
    found = run(state.trained, state.frozen, put_on_mesh(_rows(), mesh), jnp.float32(0.1), False)
    assert not any(leaf.any() for leaf in jax.tree.leaves(jax.device_get(found.gradients)))
    for name, array_BT in expected.outputs.items():
        np.testing.assert_array_equal(found.outputs[name], array_BT)


def test_the_gradient_is_that_of_the_summed_loss_and_the_step_is_adamws(head):
    mesh = one_device()
    model, optimizer = _model(head), _optimizer()
    state = model.make_state(jax.random.key(1), optimizer, mesh)
    rows = put_on_mesh(_rows(), mesh)

    @jax.jit
    def expected_step(trained, opt_state):
        def mean_loss(trained):
            sums, _ = _loss(head)(trained, rows, jnp.float32(0.1))
            return sums.loss / sums.num_terms

        gradients = jax.grad(mean_loss)(trained)
        clipped, _ = optax.clip_by_global_norm(1.0).update(gradients, optax.EmptyState())
        changes, _ = optimizer.transformation.update(clipped, opt_state, trained)
        return optax.apply_updates(trained, changes)

    expected = jax.device_get(expected_step(state.trained, state.opt_state))
    run = compile_pass(_loss(head), state, mesh, rows_at_once=ROWS)
    apply = compile_apply(optimizer, state, mesh)
    found = run(state.trained, state.frozen, rows, jnp.float32(0.1), True)
    new, metrics = apply(state, found.sums, found.gradients)
    assert int(metrics["num_updates"]) == 1
    for left, right in zip(jax.tree.leaves(new.trained), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_a_learning_rate_of_0_leaves_every_bit_of_policy_and_critic(tmp_path):
    cfg = config(num_epochs=2, entropy_coef=0.1)
    job = tiny_job(cfg, tmp_path)
    state, trainer = job.make_state(), job.make_trainer()

    def still(learner, part):
        optimizer = _optimizer()
        transformation = optax.adamw(lambda _: 0.0, weight_decay=0.1, mask=is_decayed)
        apply = compile_apply(optimizer._replace(transformation=transformation), part, one_device())
        return Learner(run_pass=learner.run_pass, apply=apply)

    before = jax.device_get((state.policy.trained, state.value.trained))
    stopped = dataclasses.replace(
        trainer,
        policy=still(trainer.policy, state.policy),
        value=still(trainer.value, state.value),
    )
    state, report = stopped.iterate(state)
    after = jax.device_get((state.policy.trained, state.value.trained))
    for left, right in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert left.tobytes() == right.tobytes()
    assert int(state.policy.num_updates) == int(state.value.num_updates) == 4
    fields = report.fields()
    assert fields["ppo/policy_grad_norm"] > 0 and fields["ppo/ratio"] == 1.0
    # The same iteration with a learning rate moves both.
    moved, _ = trainer.iterate(tiny_job(cfg, tmp_path / "other").make_state())
    for part in (moved.policy, moved.value):
        assert any(
            np.any(np.asarray(leaf) != old)
            for leaf, old in zip(
                jax.tree.leaves(part.trained),
                jax.tree.leaves(before[part is moved.value]),
                strict=True,
            )
        )
