"""The production arithmetic, fed exact expectations, against the objective it stands for."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.dpo import dpo_loss
from huatuo_jax.ppo.advantages import gae, grpo_advantages, rloo_advantages
from huatuo_jax.ppo.losses import add_kl_loss, policy_loss
from huatuo_jax.ppo.rewards import answer_scores, have_ended, k3, log_ratios, token_rewards
from huatuo_jax.training.losses import answer_mask, over_tokens, sum_by_answer
from tests.ppo.enumerable import ANSWERS, END, LONGEST, NUM_SLOTS, answer_arrays, make_world

SEEDS = (0, 1)


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


def log_probs(logits, index=slice(None)):
    """Of the answers' tokens, NaN in slots past their ends."""
    tokens_BT, rows_BT, lengths_B = (array[index] for array in answer_arrays())
    log_probs_BT = jax.nn.log_softmax(jnp.asarray(logits))[rows_BT, tokens_BT]
    return jnp.where(answer_mask(lengths_B, NUM_SLOTS), log_probs_BT, jnp.nan)


def mask_of(index=slice(None)):
    return answer_mask(jnp.asarray(answer_arrays()[2][index]), NUM_SLOTS)


def rewards_of(world, logits, *, kl_coef):
    """Each answer's rewards, as the loop would make them."""
    tokens_BT, _, _ = answer_arrays()
    ended_B = have_ended(jnp.asarray(tokens_BT), mask_of(), stop_token_ids=[END])
    scores_B = answer_scores(jnp.asarray(world.rewards), ended_B, on_truncation="keep")
    reference_BT = log_probs(world.reference)
    return token_rewards(scores_B, log_probs(logits), reference_BT, mask_of(), kl_coef=kl_coef)


def estimates_of(world, logits, values, *, lambda_, kl_coef):
    """GAE of all answers with the critic's value of each state."""
    _, rows_BT, _ = answer_arrays()
    values_BT = jnp.where(mask_of(), jnp.asarray(values)[rows_BT], jnp.nan)
    rewards_BT = rewards_of(world, logits, kl_coef=kl_coef)
    return gae(rewards_BT, values_BT, mask_of(), gamma=1.0, lambda_=lambda_)


def gradient_of(world, logits, advantages_BT, **settings):
    gradient = functools.partial(_gradient_of, world, **settings)
    return np.asarray(jax.jit(gradient)(jnp.asarray(logits), advantages_BT))


def _gradient_of(world, logits, advantages_BT, *, index=None, weights_B=None, kl_loss=None):
    """The gradient of the production loss of each answer, times the answer's probability."""
    index = np.arange(len(ANSWERS)) if index is None else index
    old_BT, reference_BT = log_probs(logits, index), log_probs(world.reference, index)
    if weights_B is None:
        weights_B = jnp.exp(sum_by_answer(old_BT, mask_of(index)))

    def row_loss(new_T, old_T, reference_T, advantages_T, mask_T):
        new_BT, mask_BT = new_T[None], mask_T[None]
        clips = {"clip_low": 0.2, "clip_high": 0.2, "tokens_allowed": LONGEST}
        sums = policy_loss(new_BT, old_T[None], advantages_T[None], mask_BT, **clips)
        if kl_loss is not None:
            sums = add_kl_loss(
                sums, new_BT, reference_T[None], mask_BT, kl_coef=world.beta, kind=kl_loss
            )
        return sums.loss / sums.num_terms

    def expected_loss(logits):
        new_BT = log_probs(logits, index)
        losses_B = jax.vmap(row_loss)(new_BT, old_BT, reference_BT, advantages_BT, mask_of(index))
        return (weights_B * losses_B).sum()

    return jax.grad(expected_loss)(logits)


def off_line(gradient, objective_gradient):
    """How far the loss's gradient is from any multiple of the objective's, as a share."""
    scale = (gradient * objective_gradient).sum() / (objective_gradient**2).sum()
    assert scale < 0, "the loss must fall where the objective rises"
    rest = gradient - scale * objective_gradient
    return np.linalg.norm(rest) / np.linalg.norm(gradient), scale


def random_critic(seed):
    return np.random.default_rng(seed + 100).normal(size=7)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("lambda_", "critic"), [(1.0, "random"), (0.95, "exact"), (0.0, "exact")])
def test_ppo_follows_the_gradient_of_the_regularised_objective(seed, lambda_, critic):
    world, logits = make_world(seed)
    values = random_critic(seed) if critic == "random" else world.values(logits, world.beta)
    found = estimates_of(world, logits, values, lambda_=lambda_, kl_coef=world.beta)
    gradient = gradient_of(world, logits, found.advantages_BT)
    share, scale = off_line(gradient, world.objective_gradient(logits))
    assert share < 1e-6
    np.testing.assert_allclose(scale, -1 / LONGEST, rtol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_ppo_is_biased_by_a_wrong_critic_where_lambda_is_below_1(seed):
    world, logits = make_world(seed)
    found = estimates_of(world, logits, random_critic(seed), lambda_=0.95, kl_coef=world.beta)
    share, _ = off_line(
        gradient_of(world, logits, found.advantages_BT), world.objective_gradient(logits)
    )
    assert share > 1e-2


@pytest.mark.parametrize("seed", SEEDS)
def test_at_the_optimum_every_advantage_is_zero_and_the_objective_is_beta_log_z(seed):
    world, _ = make_world(seed)
    best, beta_log_z = world.best()
    assert world.objective(best) == pytest.approx(beta_log_z, abs=1e-12)
    values = world.values(best, world.beta)
    for lambda_ in (0.0, 0.95, 1.0):
        found = estimates_of(world, best, values, lambda_=lambda_, kl_coef=world.beta)
        np.testing.assert_allclose(found.advantages_BT, 0, atol=1e-12)
    np.testing.assert_allclose(gradient_of(world, best, found.advantages_BT), 0, atol=1e-12)
    elsewhere = estimates_of(
        world,
        world.reference,
        world.values(world.reference, world.beta),
        lambda_=1.0,
        kl_coef=world.beta,
    )
    assert np.abs(elsewhere.advantages_BT).max() > 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_the_half_square_of_the_answers_log_ratio_is_the_same_penalty_as_a_loss(seed):
    world, logits = make_world(seed)
    found = estimates_of(world, logits, random_critic(seed), lambda_=1.0, kl_coef=0.0)
    gradient = gradient_of(world, logits, found.advantages_BT, kl_loss="sequence_square")
    share, scale = off_line(gradient, world.objective_gradient(logits))
    assert share < 1e-6
    np.testing.assert_allclose(scale, -1 / LONGEST, rtol=1e-6)


def _total_variation(world, left, right):
    return np.abs(world.probabilities(left) - world.probabilities(right)).sum() / 2


def _k3_gradient(world, logits):
    values = world.values(logits, 0.0)
    found = estimates_of(world, logits, values, lambda_=1.0, kl_coef=0.0)
    return gradient_of(world, logits, found.advantages_BT, kl_loss="k3")


@pytest.mark.parametrize("seed", SEEDS)
def test_k3_as_a_loss_rests_at_the_optimum_of_backward_induction_and_at_no_other(seed):
    world, _ = make_world(seed, beta=1.0)
    own = world.best_with_k3_loss()
    np.testing.assert_allclose(_k3_gradient(world, own), 0, atol=1e-12)
    best, _ = world.best()
    assert _total_variation(world, own, best) > 0.01
    assert np.abs(_k3_gradient(world, best)).max() > 1e-3


@pytest.mark.parametrize("kl_loss", [None, "sequence_square", "k3"])
def test_descent_ends_where_its_penalty_says(kl_loss):
    world, logits = make_world(0, beta=1.0)
    kl_coef = world.beta if kl_loss is None else 0.0

    def step(_, logits):
        found = estimates_of(world, logits, np.zeros(7), lambda_=1.0, kl_coef=kl_coef)
        return logits - _gradient_of(world, logits, found.advantages_BT, kl_loss=kl_loss)

    reached = jax.jit(lambda start: jax.lax.fori_loop(0, 10_000, step, start))(jnp.asarray(logits))
    ends = {"pi*": world.best()[0], "k3": world.best_with_k3_loss()}
    distances = {name: _total_variation(world, reached, end) for name, end in ends.items()}
    here, there = ("k3", "pi*") if kl_loss == "k3" else ("pi*", "k3")
    assert distances[here] < 1e-4 and distances[there] > 0.01


def _group_gradient(world, logits, advantages_of):
    """All pairs of answers to the one prompt, each with its probability."""
    rewards_B = sum_by_answer(rewards_of(world, logits, kl_coef=world.beta), mask_of())
    pairs = np.array(list(itertools.product(range(len(ANSWERS)), repeat=2)))
    advantages_BG = advantages_of(rewards_B[pairs])
    index = pairs.reshape(-1)
    advantages_BT = over_tokens(advantages_BG.reshape(-1), mask_of(index))
    weights = world.probabilities(logits)[pairs].prod(axis=1)
    return gradient_of(
        world, logits, advantages_BT, index=index, weights_B=np.repeat(weights, 2) / 2
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_rloo_and_grpo_without_deviation_follow_the_objective_and_with_it_do_not(seed):
    world, logits = make_world(seed)
    objective_gradient = world.objective_gradient(logits)
    share, scale = off_line(_group_gradient(world, logits, rloo_advantages), objective_gradient)
    assert share < 1e-6
    np.testing.assert_allclose(scale, -1 / LONGEST, rtol=1e-6)
    plain = functools.partial(grpo_advantages, divide_by_deviation=False)
    share, scale = off_line(_group_gradient(world, logits, plain), objective_gradient)
    assert share < 1e-6
    np.testing.assert_allclose(scale, -1 / (2 * LONGEST), rtol=1e-6)
    divided = functools.partial(grpo_advantages, divide_by_deviation=True)
    share, _ = off_line(_group_gradient(world, logits, divided), objective_gradient)
    assert share > 1e-2


def _dpo(world, logits, weights):
    """Loss of all pairs of answers, labelled by their rewards."""
    pairs = np.array(list(itertools.combinations(range(len(ANSWERS)), 2)))
    chosen, rejected = pairs.T
    p_chosen_B = jax.nn.sigmoid(jnp.asarray(world.rewards[chosen] - world.rewards[rejected]))
    reference_B = sum_by_answer(log_probs(world.reference), mask_of())

    def row_loss(*row):
        sums = dpo_loss(*(value[None] for value in row), jnp.ones(1, bool), beta=world.beta)
        return sums.loss / sums.num_terms

    def loss(logits):
        policy_B = sum_by_answer(log_probs(logits), mask_of())
        losses_B = jax.vmap(row_loss)(
            policy_B[chosen],
            policy_B[rejected],
            reference_B[chosen],
            reference_B[rejected],
            p_chosen_B,
        )
        return (weights * losses_B).sum() / weights.sum()

    entropy_B = jax.scipy.special.entr(p_chosen_B) + jax.scipy.special.entr(1 - p_chosen_B)
    least = (weights * entropy_B).sum() / weights.sum()
    found, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(logits))
    return float(found), float(least), np.asarray(gradient)


@pytest.mark.parametrize("seed", SEEDS)
def test_dpo_with_exact_labels_is_least_at_the_optimum_of_ppo(seed):
    world, logits = make_world(seed)
    weights = np.random.default_rng(seed).random(len(ANSWERS) * (len(ANSWERS) - 1) // 2)
    found, least, gradient = _dpo(world, world.best()[0], weights)
    assert found == pytest.approx(least, abs=1e-12)
    np.testing.assert_allclose(gradient, 0, atol=1e-12)
    found, least, gradient = _dpo(world, logits, weights)
    assert found > least + 1e-3 and np.abs(gradient).max() > 1e-3


def _penalty_gradient(world, estimate, *, distance):
    """The policy gradient of a penalty alone, put in the reward by hand, near the reference."""
    logits = world.reference.copy()
    logits[0, 1] -= distance  # Token 1 has become less likely at the start.
    ratios_BT = log_ratios(log_probs(logits), log_probs(world.reference), mask_of())
    zeros_BT = jnp.zeros_like(ratios_BT)
    found = gae(-estimate(ratios_BT), zeros_BT, mask_of(), gamma=1.0, lambda_=1.0)
    return gradient_of(world, logits, found.advantages_BT)


@pytest.mark.parametrize(("estimate", "order"), [(lambda ratio: ratio, 1), (k3, 2)])
def test_only_k1_in_the_reward_pulls_back_near_the_reference(estimate, order):
    world, _ = make_world(0)
    far = _penalty_gradient(world, estimate, distance=2e-3)
    near = _penalty_gradient(world, estimate, distance=1e-3)
    assert np.linalg.norm(far) / np.linalg.norm(near) == pytest.approx(2**order, rel=0.01)
    raises_it = -near[0, 1] > 0  # A descent of the loss raises the logit that had fallen.
    assert raises_it == (order == 1)
