"""The losses in the production update: what must not change a step changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.core import sharding
from huatuo_jax.ppo.advantages import gae, moments, whiten
from huatuo_jax.ppo.losses import add_entropy_bonus, add_kl_loss, policy_loss, value_loss
from huatuo_jax.ppo.metrics import distinct_sums, rollout_sums
from huatuo_jax.ppo.rewards import have_ended, token_rewards
from huatuo_jax.training.optimizer import OptimizerConfig, make_optimizer
from huatuo_jax.training.update import make_update, new_state
from tests.ppo.ragged import STOP_TOKENS, make_rollout

VOCABULARY = 5
LENGTHS = (3, 1, 0, 6, 4, 2, 6, 5)


def _batch(rollout):
    """What a rollout hands to the update, through the whole chain."""
    names = ("scores_B", "old_BT", "reference_BT", "old_values_BT", "mask_BT", "tokens_BT")
    return _make_batch({name: jnp.asarray(getattr(rollout, name)) for name in names})


@jax.jit
def _make_batch(arrays):
    old_BT, reference_BT, mask_BT = arrays["old_BT"], arrays["reference_BT"], arrays["mask_BT"]
    rewards_BT = token_rewards(arrays["scores_B"], old_BT, reference_BT, mask_BT, kl_coef=0.1)
    found = gae(rewards_BT, arrays["old_values_BT"], mask_BT, gamma=1.0, lambda_=0.95)
    statistics = moments(found.advantages_BT, mask_BT)
    return {
        "tokens": arrays["tokens_BT"],
        "mask": mask_BT,
        "old": old_BT,
        "reference": reference_BT,
        "advantages": whiten(found.advantages_BT, mask_BT, statistics),
        "returns": found.returns_BT,
        "old_values": arrays["old_values_BT"],
    }


def _loss(tokens_allowed):
    """A model of two tables, under names that the partition rules know."""

    def loss(variables, batch):
        params, tokens_BT, mask_BT = variables["params"], batch["tokens"], batch["mask"]
        logits_by_slot, value_by_token = params["lm_head"]["kernel"], params["final_norm"]["scale"]
        slots_BT = jnp.arange(tokens_BT.shape[1])[None, :] % len(logits_by_slot)
        log_table = jax.nn.log_softmax(logits_by_slot)[slots_BT]
        log_probs_BT = jnp.take_along_axis(log_table, tokens_BT[..., None] % VOCABULARY, -1)[..., 0]
        entropies_BT = -(jnp.exp(log_table) * log_table).sum(-1) + jnp.zeros_like(log_probs_BT)
        sums = policy_loss(
            log_probs_BT,
            batch["old"],
            batch["advantages"],
            mask_BT,
            clip_low=0.2,
            clip_high=0.2,
            tokens_allowed=tokens_allowed,
        )
        sums = add_entropy_bonus(sums, entropies_BT, mask_BT, entropy_coef=0.01)
        sums = add_kl_loss(
            sums, log_probs_BT, batch["reference"], mask_BT, kl_coef=0.05, kind="sequence_square"
        )
        critic = value_loss(
            value_by_token[tokens_BT % VOCABULARY],
            batch["old_values"],
            batch["returns"],
            mask_BT,
            clip=0.2,
            tokens_allowed=tokens_allowed,
        )
        return sums._replace(loss=sums.loss + critic.loss, others=sums.others | critic.others)

    return loss


@functools.cache
def _optimizer():
    cfg = OptimizerConfig(learning_rate=0.1, decay="constant", weight_decay=0.0)
    return make_optimizer(cfg, num_steps=10)


@functools.cache
def _update(num_micro_batches, tokens_allowed):
    loss = _loss(tokens_allowed)
    return jax.jit(make_update(loss, _optimizer(), num_micro_batches=num_micro_batches))


def _step(batch, *, num_micro_batches=1, tokens_allowed=None):
    draw = np.random.default_rng(9)
    params = {
        "lm_head": {"kernel": jnp.asarray(draw.normal(size=(8, VOCABULARY)))},
        "final_norm": {"scale": jnp.asarray(draw.normal(size=VOCABULARY))},
    }
    state = new_state(
        {"params": params},
        is_trained=lambda path: True,
        optimizer=_optimizer(),
        key=jax.random.key(0),
    )
    new, metrics = _update(num_micro_batches, tokens_allowed)(state, batch)
    return new, {name: np.asarray(value) for name, value in metrics.items()}


def _assert_same_step(left, right):
    """Same parameters, gradient moments and gauges, up to rounding in float64."""
    for one, other in zip(
        jax.tree.leaves(left[0].opt_state), jax.tree.leaves(right[0].opt_state), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-13)
    assert left[1].keys() == right[1].keys()
    for name, value in left[1].items():
        np.testing.assert_allclose(value, right[1][name], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.fixture
def rollout():
    with jax.enable_x64(True):
        yield make_rollout(lengths=LENGTHS)


@pytest.mark.parametrize("junk", [np.nan, 1e30])
def test_junk_in_masked_slots_changes_no_bit_of_a_step(rollout, junk):
    plain, spoilt = (_step(_batch(one)) for one in (rollout, rollout.with_junk(junk)))
    for one, other in zip(
        jax.tree.leaves(plain[0].trained), jax.tree.leaves(spoilt[0].trained), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert int(spoilt[0].num_updates) == 1
    for name, value in plain[1].items():
        np.testing.assert_array_equal(value, spoilt[1][name], err_msg=name)


def test_junk_in_masked_slots_changes_no_bit_of_the_gauges(rollout):
    def sums(one):
        tokens_BT, mask_BT = jnp.asarray(one.tokens_BT), jnp.asarray(one.mask_BT)
        ended_B = have_ended(tokens_BT, mask_BT, stop_token_ids=STOP_TOKENS)
        arrays = (one.old_BT, one.reference_BT, one.log_probs_BT, one.scores_B)
        return rollout_sums(*arrays, ended_B, mask_BT) | distinct_sums(tokens_BT, mask_BT, n=2)

    plain, spoilt = (
        jax.jit(lambda one=one: sums(one))() for one in (rollout, rollout.with_junk(np.nan))
    )
    for name, value in plain.items():
        np.testing.assert_array_equal(value, spoilt[name], err_msg=name)


@pytest.mark.parametrize(("num_micro_batches", "tokens_allowed"), [(2, 6), (8, None), (8, 6)])
def test_micro_batches_change_only_rounding(rollout, num_micro_batches, tokens_allowed):
    batch = _batch(rollout)
    whole = _step(batch, tokens_allowed=tokens_allowed)
    parts = _step(batch, tokens_allowed=tokens_allowed, num_micro_batches=num_micro_batches)
    _assert_same_step(whole, parts)
    assert whole[1]["num_terms"] == (27 if tokens_allowed is None else 42)


def test_order_and_empty_rows_and_padding_change_only_rounding(rollout):
    plain = _step(_batch(rollout), tokens_allowed=6)
    order = np.array([5, 2, 7, 0, 3, 1, 6, 4])

    def changed(array):
        array = array[order]
        widths = ((0, 3),) + ((0, 12),) * (array.ndim - 1)
        return np.pad(array, widths, constant_values=False if array.dtype == bool else 1)

    fields = {name: changed(value) for name, value in vars(rollout).items()}
    fields["lengths_B"][-3:] = 0
    _assert_same_step(plain, _step(_batch(type(rollout)(**fields)), tokens_allowed=6))


def test_a_mesh_changes_only_rounding(rollout):
    mesh = sharding.make_mesh(fsdp=4, devices=jax.devices()[:4])
    plain = _batch(rollout)
    place = sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        spread = {name: jax.device_put(value, place) for name, value in plain.items()}
        found = _step(spread, num_micro_batches=2)
    _assert_same_step(_step(plain), found)
