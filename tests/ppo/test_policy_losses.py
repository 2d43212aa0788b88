"""Losses of policy, critic and preferences against plain loops, gradients included."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.dpo import dpo_loss
from huatuo_jax.ppo import losses
from tests.ppo.ragged import make_rollout


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


CLIPS = {"clip_low": 0.2, "clip_high": 0.28}


def _policy(rollout, log_probs_BT=None, **settings):
    log_probs_BT = rollout.log_probs_BT if log_probs_BT is None else log_probs_BT
    arrays = (rollout.old_BT, rollout.advantages_BT, rollout.mask_BT)
    return losses.policy_loss(log_probs_BT, *arrays, **(CLIPS | settings))


def _policy_by_hand(rollout, *, dual_clip=None):
    """The loss, its derivative at each token, and how many tokens each clip stops."""
    loss, slopes_BT, low, high, dual = 0.0, np.zeros_like(rollout.old_BT), 0, 0, 0
    for row, slots in rollout.places():
        for t in slots:
            advantage = rollout.advantages_BT[row, t]
            ratio = math.exp(rollout.log_probs_BT[row, t] - rollout.old_BT[row, t])
            clipped = min(max(ratio, 0.8), 1.28)
            gain = min(ratio * advantage, clipped * advantage)
            moves = gain == ratio * advantage
            low += advantage < 0 and ratio < 0.8
            high += advantage > 0 and ratio > 1.28
            if dual_clip is not None and advantage < 0 and gain < dual_clip * advantage:
                gain, moves, dual = dual_clip * advantage, False, dual + 1
            loss -= gain
            slopes_BT[row, t] = -gain if moves else 0.0
    return loss, slopes_BT, low, high, dual


@pytest.mark.parametrize("dual_clip", [None, 1.2])
def test_the_policy_loss_and_its_gradient_equal_a_loop(dual_clip):
    rollout = make_rollout(5).with_junk(np.nan)
    loss, slopes_BT, low, high, dual = _policy_by_hand(rollout, dual_clip=dual_clip)
    assert low and high and (slopes_BT[rollout.mask_BT] != 0).any()  # Every case is met.

    def summed(log_probs_BT):
        sums = _policy(rollout, log_probs_BT, dual_clip=dual_clip)
        return sums.loss, sums

    (found, sums), gradient_BT = jax.value_and_grad(summed, has_aux=True)(rollout.log_probs_BT)
    assert found == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(gradient_BT, slopes_BT, rtol=1e-12)
    assert sums.num_terms == sums.others["tokens"] == 16
    assert (sums.others["clipped_low"], sums.others["clipped_high"]) == (low, high)
    assert sums.others["dual_clipped"] == dual and bool(dual) == (dual_clip is not None)
    assert _policy(rollout, tokens_allowed=50).num_terms == 250


@pytest.mark.parametrize("direction", [1, -1])
def test_a_ratio_past_all_range_leaves_the_gradient_of_a_clipped_token_finite(direction):
    with jax.enable_x64(False):
        old_BT = jnp.zeros((1, 2), jnp.float32)
        advantages_BT = jnp.full((1, 2), float(direction), jnp.float32)

        def loss(log_probs_BT):
            mask_BT = jnp.ones((1, 2), bool)
            return losses.policy_loss(log_probs_BT, old_BT, advantages_BT, mask_BT, **CLIPS).loss

        far_BT = jnp.array([[direction * 1000.0, direction * 90.0]], jnp.float32)
        found, gradient_BT = jax.value_and_grad(loss)(far_BT)
    np.testing.assert_allclose(found, -2.56 if direction > 0 else 1.6, rtol=1e-6)
    np.testing.assert_array_equal(gradient_BT, 0)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("log_ratio", [-3e38, -1e4, -89.0, 0.0, 89.0, 1e4, 3e38])
def test_an_advantage_of_0_has_loss_0_and_gradient_0_at_any_ratio(log_ratio, dual_clip):
    with jax.enable_x64(False):
        zeros_BT = jnp.zeros((1, 2), jnp.float32)
        mask_BT = jnp.ones((1, 2), bool)

        def loss(log_probs_BT):
            return losses.policy_loss(
                log_probs_BT, zeros_BT, zeros_BT, mask_BT, dual_clip=dual_clip, **CLIPS
            ).loss

        far_BT = jnp.array([[log_ratio, 0.5]], jnp.float32)
        found, gradient_BT = jax.jit(jax.value_and_grad(loss))(far_BT)
    assert found == 0
    np.testing.assert_array_equal(gradient_BT, 0)


def test_a_log_probability_that_is_no_number_is_not_hidden_by_an_advantage_of_0():
    zeros_BT, mask_BT = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    spoilt_BT = jnp.array([[jnp.nan, 0.0]])
    sums = losses.policy_loss(spoilt_BT, zeros_BT, zeros_BT, mask_BT, **CLIPS)
    assert np.isnan(sums.loss)


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["k3", "sequence_square"])
@pytest.mark.parametrize("log_ratio", [-1e4, -89.0, 89.0, 1e4])
def test_no_log_ratio_makes_a_loss_or_a_gauge_that_is_no_number(log_ratio, kind, kl_coef):
    """Float32 may be too small for one and give infinity: such a step is skipped and counted."""
    with jax.enable_x64(False):
        zeros_BT = jnp.zeros((1, 2), jnp.float32)
        mask_BT = jnp.ones((1, 2), bool)

        def loss(log_probs_BT):
            sums = losses.policy_loss(log_probs_BT, zeros_BT, zeros_BT, mask_BT, **CLIPS)
            sums = losses.add_kl_loss(
                sums, log_probs_BT, zeros_BT, mask_BT, kl_coef=jnp.float32(kl_coef), kind=kind
            )
            return sums.loss, sums.others

        far_BT = jnp.array([[log_ratio, 0.5]], jnp.float32)
        (found, gauges), gradient_BT = jax.jit(jax.value_and_grad(loss, has_aux=True))(far_BT)
    assert not np.isnan(found) and not np.isnan(gradient_BT).any()
    assert not any(np.isnan(value) for value in gauges.values())
    if kl_coef == 0:
        assert found == 0 and not gradient_BT.any()
        assert gauges["kl_loss"] > 0


def test_at_the_policy_that_sampled_the_ratio_is_one_and_nothing_is_clipped():
    rollout = make_rollout()
    sums = _policy(rollout, rollout.old_BT)
    others = {name: float(value) for name, value in sums.others.items()}
    assert others == {
        "answers": 5,
        "tokens": 16,
        "ratio": 16,
        "clipped_low": 0,
        "clipped_high": 0,
        "dual_clipped": 0,
        "approximate_kl_k1": 0,
        "approximate_kl_k3": 0,
    }
    assert sums.loss == pytest.approx(-rollout.advantages_BT[rollout.mask_BT].sum())


def test_the_entropy_bonus_and_the_penalty_have_the_denominator_of_the_loss():
    rollout = make_rollout().with_junk(np.nan)
    sums = _policy(rollout)
    entropy = sum(rollout.entropies_BT[row, t] for row, slots in rollout.places() for t in slots)
    both = losses.add_entropy_bonus(sums, rollout.entropies_BT, rollout.mask_BT, entropy_coef=0.01)
    penalty = 0.0
    for row, slots in rollout.places():
        difference = sum(rollout.log_probs_BT[row, t] - rollout.reference_BT[row, t] for t in slots)
        penalty += difference**2 / 2
    both = losses.add_kl_loss(
        both,
        rollout.log_probs_BT,
        rollout.reference_BT,
        rollout.mask_BT,
        kl_coef=0.05,
        kind="sequence_square",
    )
    assert both.loss == pytest.approx(float(sums.loss) - 0.01 * entropy + 0.05 * penalty, rel=1e-12)
    assert both.num_terms == sums.num_terms
    assert both.others["entropy"] == pytest.approx(entropy)
    assert both.others["kl_loss"] == pytest.approx(penalty)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_value_loss_and_its_gradient_equal_a_loop(clip):
    rollout = make_rollout(1).with_junk(np.nan)
    loss, slopes_BT, clipped = 0.0, np.zeros_like(rollout.values_BT), 0
    for row, slots in rollout.places():
        for t in slots:
            value, old = rollout.values_BT[row, t], rollout.old_values_BT[row, t]
            error = value - rollout.rewards_BT[row, t]
            near = error
            if clip is not None:
                near = old + min(max(value - old, -clip), clip) - rollout.rewards_BT[row, t]
            stopped = near**2 > error**2 and abs(value - old) > (clip or math.inf)
            loss += max(error**2, near**2) / 2
            slopes_BT[row, t] = 0 if stopped else error
            clipped += stopped
    arrays = (rollout.old_values_BT, rollout.rewards_BT, rollout.mask_BT)

    def summed(values_BT):
        sums = losses.value_loss(values_BT, *arrays, clip=clip)
        return sums.loss, sums

    (found, sums), gradient_BT = jax.value_and_grad(summed, has_aux=True)(rollout.values_BT)
    assert found == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(gradient_BT, slopes_BT, rtol=1e-12)
    assert sums.num_terms == 16 and sums.others["value_clipped"] == clipped
    assert bool(clipped) == (clip is not None)
    fixed = losses.value_loss(rollout.values_BT, *arrays, clip=clip, tokens_allowed=50)
    assert fixed.num_terms == 250


@pytest.mark.parametrize("kind", ["k3", "sequence_square"])
def test_the_mean_of_each_answers_mean_equals_a_loop_gradients_included(kind):
    """As GRPO was published: each answer is the mean over its own tokens, then all are alike."""
    rollout = make_rollout(5).with_junk(np.nan)
    _, slopes_BT, *_ = _policy_by_hand(rollout)
    loss, critic, num_answers = 0.0, 0.0, 0
    expected_BT = np.zeros_like(slopes_BT)
    for row, slots in rollout.places():
        if not slots:
            continue
        num_answers += 1
        whole = sum(rollout.log_probs_BT[row, t] - rollout.reference_BT[row, t] for t in slots)
        of_answer = 0.05 * whole**2 / 2 if kind == "sequence_square" else 0.0
        of_critic = 0.0
        for t in slots:
            advantage = rollout.advantages_BT[row, t]
            ratio = math.exp(rollout.log_probs_BT[row, t] - rollout.old_BT[row, t])
            of_answer -= min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
            of_answer -= 0.01 * rollout.entropies_BT[row, t]
            apart = rollout.log_probs_BT[row, t] - rollout.reference_BT[row, t]
            slope = whole if kind == "sequence_square" else 1 - math.exp(-apart)
            if kind == "k3":
                of_answer += 0.05 * (math.exp(-apart) - 1 + apart)
            expected_BT[row, t] = (slopes_BT[row, t] + 0.05 * slope) / len(slots)
            of_critic += (rollout.values_BT[row, t] - rollout.rewards_BT[row, t]) ** 2 / 2
        loss += of_answer / len(slots)
        critic += of_critic / len(slots)

    def summed(log_probs_BT):
        sums = _policy(rollout, log_probs_BT, mean_per_answer=True)
        sums = losses.add_entropy_bonus(
            sums, rollout.entropies_BT, rollout.mask_BT, entropy_coef=0.01, mean_per_answer=True
        )
        sums = losses.add_kl_loss(
            sums,
            log_probs_BT,
            rollout.reference_BT,
            rollout.mask_BT,
            kl_coef=0.05,
            kind=kind,
            mean_per_answer=True,
        )
        return sums.loss, sums

    (found, sums), gradient_BT = jax.value_and_grad(summed, has_aux=True)(rollout.log_probs_BT)
    assert found == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(gradient_BT, expected_BT, rtol=1e-10, atol=1e-14)
    assert sums.num_terms == num_answers == 5
    # Gauges stay those of all tokens alike.
    assert sums.others["entropy"] == pytest.approx(rollout.entropies_BT[rollout.mask_BT].sum())
    arrays = (rollout.values_BT, rollout.old_values_BT, rollout.rewards_BT, rollout.mask_BT)
    valued = losses.value_loss(*arrays, clip=None, mean_per_answer=True)
    assert valued.loss == pytest.approx(critic, rel=1e-12) and valued.num_terms == 5


def _pairs():
    draw = np.random.default_rng(0)
    chosen, rejected, reference_chosen, reference_rejected = -10 * draw.random((4, 5))
    p_chosen = np.array([1.0, 0.5, 0.8, 0.3, np.nan])
    mask = np.array([True, True, True, True, False])
    rejected[4], reference_chosen[4] = np.nan, np.nan
    return chosen, rejected, reference_chosen, reference_rejected, p_chosen, mask


def test_the_dpo_loss_equals_a_loop_and_empty_rows_count_nowhere():
    arrays = _pairs()
    chosen, rejected, reference_chosen, reference_rejected, p_chosen, _ = arrays
    loss, agreed, chosen_reward = 0.0, 0.0, 0.0
    for pair in range(4):
        mine, other = (
            0.1 * (policy[pair] - reference[pair])
            for policy, reference in ((chosen, reference_chosen), (rejected, reference_rejected))
        )
        likely = 1 / (1 + math.exp(-(mine - other)))
        label = p_chosen[pair]
        loss -= label * math.log(likely) + (1 - label) * math.log(1 - likely)
        agreed += 0.5 if label == 0.5 else (mine > other) == (label > 0.5)
        chosen_reward += mine
    sums = dpo_loss(*arrays, beta=0.1)
    assert sums.loss == pytest.approx(loss, rel=1e-12)
    assert sums.num_terms == sums.others["pairs"] == 4
    assert sums.others["agreed"] == agreed
    assert sums.others["chosen_reward"] == pytest.approx(chosen_reward)

    def total(*given):
        return dpo_loss(*given, *arrays[2:], beta=0.1).loss

    gradients = jax.grad(total, argnums=(0, 1))(*arrays[:2])
    np.testing.assert_allclose(gradients[0], -gradients[1])
    assert gradients[0][4] == 0 and np.isfinite(gradients[0]).all() and gradients[0][:4].all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("form", ["sigmoid", "square"])
def test_a_pairs_loss_is_least_at_the_margin_of_its_closed_form(form, label_smoothing):
    """DPO: the log-odds of the label over beta; IPO: twice the label less 1, over twice beta."""
    beta, labels = (
        0.2,
        np.array([0.9, 0.7, 0.5, 0.2] + [1.0] * (form == "square" or label_smoothing > 0)),
    )
    p = labels + label_smoothing * (1 - 2 * labels)
    if form == "sigmoid":
        margins = np.log(p / (1 - p)) / beta
    else:
        margins = (2 * p - 1) / (2 * beta)
    zeros, mask = np.zeros_like(labels), np.ones(len(labels), bool)

    def loss(chosen, weight_B=None):
        return dpo_loss(
            chosen,
            zeros - 1.0,
            zeros + 0.5,
            zeros - 0.5,
            labels,
            mask,
            beta=beta,
            form=form,
            label_smoothing=label_smoothing,
            weight_B=weight_B,
        )

    def total(chosen):
        return loss(chosen).loss

    np.testing.assert_allclose(np.asarray(jax.grad(total)(margins)), 0, atol=1e-12)
    least = float(total(margins))
    for step in (-1e-2, 1e-2):
        assert float(total(margins + step)) > least
    found = np.asarray(jax.grad(total)(margins + 0.3))
    step = 1e-6
    for place in range(len(labels)):
        moved = np.eye(len(labels))[place] * step
        sides = [float(total(margins + 0.3 + sign * moved)) for sign in (1, -1)]
        assert found[place] == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-5)
    weights = np.arange(1.0, len(labels) + 1)
    each = _each(loss, margins + 0.3, len(labels))
    weighted = loss(margins + 0.3, weight_B=weights)
    assert float(weighted.loss) == pytest.approx(float(np.dot(weights, each)))
    assert float(weighted.num_terms) == weights.sum()


def _each(loss, margins, number):
    """The loss of each pair, by weights that leave the others out."""
    return [float(loss(margins, weight_B=np.eye(number)[place]).loss) for place in range(number)]


def test_the_dpo_loss_stays_finite_far_out():
    with jax.enable_x64(False):
        arrays = [jnp.array([value], jnp.float32) for value in (-1e5, 0.0, 0.0, -1e5, 1.0)]

        def loss(chosen_B):
            return dpo_loss(chosen_B, *arrays[1:], jnp.ones(1, bool), beta=1.0).loss

        found, gradient_B = jax.value_and_grad(loss)(arrays[0])
    assert found == 2e5 and gradient_B[0] == -1


def test_what_was_known_before_the_step_is_not_differentiated():
    rollout = make_rollout()
    mask_BT = rollout.mask_BT

    def policy(old_BT, advantages_BT, reference_BT):
        sums = losses.policy_loss(rollout.log_probs_BT, old_BT, advantages_BT, mask_BT, **CLIPS)
        penalty = {"kl_coef": 0.1, "kind": "k3"}
        return losses.add_kl_loss(sums, rollout.log_probs_BT, reference_BT, mask_BT, **penalty).loss

    known = (rollout.old_BT, rollout.advantages_BT, rollout.reference_BT)
    for gradient in jax.grad(policy, argnums=(0, 1, 2))(*known):
        assert not gradient.any()

    def value(old_BT, returns_BT):
        return losses.value_loss(rollout.values_BT, old_BT, returns_BT, mask_BT, clip=0.2).loss

    for gradient in jax.grad(value, argnums=(0, 1))(rollout.old_values_BT, rollout.rewards_BT):
        assert not gradient.any()
    arrays = _pairs()

    def preference(*known):
        return dpo_loss(*arrays[:2], *known, arrays[-1], beta=0.1).loss

    for gradient in jax.grad(preference, argnums=(0, 1, 2))(*arrays[2:5]):
        assert not gradient.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_low": 1.0}, "clip_low=1.0 must be above 0 and below 1"),
        ({"clip_high": 0.0}, "clip_high=0.0 must be above 0"),
        ({"dual_clip": 1.0}, "dual_clip=1.0 must be above 1"),
        ({"tokens_allowed": 0}, "tokens_allowed=0 must be at least 1"),
    ],
)
def test_a_clip_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        _policy(make_rollout(), **settings)


def test_other_settings_that_cannot_be_are_refused():
    rollout = make_rollout()
    arrays = (rollout.values_BT, rollout.old_values_BT, rollout.rewards_BT, rollout.mask_BT)
    with pytest.raises(ValueError, match="clip=0.0 must be above 0"):
        losses.value_loss(*arrays, clip=0.0)
    with pytest.raises(ValueError, match="beta=0.0 must be above 0"):
        dpo_loss(*_pairs(), beta=0.0)
    with pytest.raises(ValueError, match="form='hinge' must be"):
        dpo_loss(*_pairs(), beta=0.1, form="hinge")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_losses_are_in_at_least_float32(dtype):
    rollout = make_rollout()
    wanted = jnp.promote_types(dtype, jnp.float32)
    cast = functools.partial(jnp.asarray, dtype=dtype)
    arrays = [cast(getattr(rollout, f"{name}_BT")) for name in ("log_probs", "old", "advantages")]
    sums = losses.policy_loss(*arrays, rollout.mask_BT, **CLIPS)
    sums = losses.add_entropy_bonus(
        sums, cast(rollout.entropies_BT), rollout.mask_BT, entropy_coef=0.1
    )
    sums = losses.add_kl_loss(
        sums, arrays[0], cast(rollout.reference_BT), rollout.mask_BT, kl_coef=0.1, kind="k3"
    )
    assert sums.loss.dtype == wanted
    assert losses.value_loss(*arrays, rollout.mask_BT, clip=0.2).loss.dtype == wanted
