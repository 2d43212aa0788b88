"""One optimizer step: what must not change it, and what must leave the model alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.lora import LoraConfig, init_adapters
from huatuo_jax.backbone.matmul import store_as_computed
from huatuo_jax.backbone.transformer import Transformer, init_params
from huatuo_jax.core import sharding
from huatuo_jax.sft import token_loss
from huatuo_jax.training.loop import put_on_mesh
from huatuo_jax.training.optimizer import Optimizer, OptimizerConfig, make_optimizer
from huatuo_jax.training.update import LossSums, compile_update, make_update, new_state, split
from tests.training.tiny import TINY, arrays_of, dialogues, random_batch, rows_of

LORA = LoraConfig(rank=2, alpha=4.0)
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)]


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def _one_device():
    return sharding.make_mesh(fsdp=1, devices=jax.devices()[:1])


def _loss(cfg=TINY, compute=None, lora=None, chunk=8):
    return functools.partial(
        token_loss, Transformer(cfg, compute or ComputeConfig(), lora), chunk=chunk
    )


@functools.cache
def _params():
    return jax.tree.map(np.asarray, init_params(jax.random.key(0), TINY, ComputeConfig()))


def _make_state(*, mesh, is_trained=lambda path: True, lora=None, optimizer=None):
    optimizer = optimizer or make_optimizer(OptimizerConfig(learning_rate=1e-2), num_steps=10)
    key = jax.random.key(0)
    variables = {"params": _params()}
    if lora is not None:
        variables["lora"] = init_adapters(key, TINY, lora)
    state = new_state(variables, is_trained=is_trained, optimizer=optimizer, key=key)
    return jax.device_put(state, sharding.parameter_shardings(state, mesh)), optimizer


class _KeepGradient:
    """An optimizer that changes nothing and keeps the gradient as its state."""

    @staticmethod
    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    @staticmethod
    def update(gradients, opt_state, params):
        return jax.tree.map(jnp.zeros_like, gradients), gradients


def _gradient_step(batch, *, mesh=None, num_micro_batches=1):
    """Loss and gradient of a batch, through the update itself."""
    mesh = mesh or _one_device()
    cfg = OptimizerConfig(learning_rate=1.0, clip_norm=None)
    state, optimizer = _make_state(mesh=mesh, optimizer=Optimizer(cfg, 10, _KeepGradient))
    update = compile_update(
        make_update(_loss(), optimizer, num_micro_batches=num_micro_batches), state, mesh
    )
    state, metrics = update(state, put_on_mesh(batch, mesh))
    return float(metrics["loss"] / metrics["num_terms"]), arrays_of(state.opt_state)


def _assert_same(found, expected, *, tolerance=1e-5):
    loss, gradient = found
    expected_loss, expected_gradient = expected
    assert abs(loss - expected_loss) <= tolerance * abs(expected_loss)
    for path, g in expected_gradient.items():
        difference = np.linalg.norm(gradient[path] - g)
        assert difference <= tolerance * np.linalg.norm(g), (path, difference)


@pytest.fixture(scope="module")
def groups():
    draw = np.random.default_rng(4)
    texts = dialogues(draw.choice([5, 8, 11], 32), seed=4)
    return [texts[start : start + 4] for start in range(0, 32, 4)]


@pytest.fixture(scope="module")
def packed(groups):
    return rows_of(groups, row_length=48)


@pytest.fixture(scope="module")
def expected(packed):
    with jax.default_matmul_precision("highest"):
        return _gradient_step(packed)


def test_the_loss_and_gradient_are_those_of_a_plain_loop_over_dialogues(groups, expected):
    """Each dialogue alone, no packing, no padding, no chunks: the definition."""
    params = _params()
    model = Transformer(TINY)

    @jax.jit
    @jax.value_and_grad
    def of_one(params, ids_1T, trained_1T):
        logits_1TV = model.apply(
            {"params": params}, model.apply({"params": params}, ids_1T), method="logits"
        )
        log_probs = jax.nn.log_softmax(logits_1TV[:, :-1], axis=-1)
        picked = jnp.take_along_axis(log_probs, ids_1T[:, 1:, None], axis=-1)[..., 0]
        return -(picked * trained_1T[:, 1:]).sum()

    total, terms, gradient = 0.0, 0, None
    for ids, trained, _ in (one for group in groups for one in group):
        value, one = jax.device_get(of_one(params, ids[None], trained[None]))
        total, terms = total + float(value), terms + int(trained[1:].sum())
        gradient = one if gradient is None else jax.tree.map(np.add, gradient, one)
    gradient = arrays_of({"params": jax.tree.map(lambda leaf: leaf / terms, gradient)})
    _assert_same(expected, (total / terms, gradient))


def test_unpacked_rows_give_the_loss_and_gradient_of_packed_ones(groups, expected):
    alone = [[one] for group in groups for one in group]
    _assert_same(_gradient_step(rows_of(alone, row_length=16)), expected)


def test_another_order_of_rows_changes_nothing(packed, expected):
    order = np.random.default_rng(0).permutation(8)
    shuffled = {name: rows[order] for name, rows in packed.items()}
    _assert_same(_gradient_step(shuffled), expected)


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_micro_batch_size_changes_nothing(packed, expected, rows):
    _assert_same(_gradient_step(packed, num_micro_batches=8 // rows), expected)


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_the_mesh_changes_nothing(packed, expected, axes):
    data, fsdp, tensor = axes
    mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    _assert_same(_gradient_step(packed, mesh=mesh), expected)


def test_micro_batches_on_a_mesh_change_nothing(packed, expected):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    _assert_same(_gradient_step(packed, mesh=mesh, num_micro_batches=2), expected)


def _updated(batch, *, loss=None, steps=1, compute=None, **kwargs):
    """State before and after some updates on one batch, and the metrics of each."""
    mesh = _one_device()
    state, optimizer = _make_state(mesh=mesh, **kwargs)
    before = arrays_of(state)
    loss = loss or _loss(lora=kwargs.get("lora"), compute=compute)
    update = compile_update(make_update(loss, optimizer, num_micro_batches=1), state, mesh)
    seen = []
    for _ in range(steps):
        state, metrics = update(state, put_on_mesh(batch, mesh))
        seen.append({name: np.asarray(value) for name, value in metrics.items()})
    return before, arrays_of(state), seen


def _changed(before, after):
    return {path for path in before if not np.array_equal(before[path], after[path])}


def test_a_step_without_trained_tokens_is_skipped_and_counted():
    batch = random_batch(0)
    batch["trained_mask"][:] = False
    before, after, metrics = _updated(batch)
    assert _changed(before, after) == {"step", "num_empty"}
    assert metrics[0]["num_empty"] == 1 and metrics[0]["num_not_finite"] == 0


def test_a_step_whose_loss_is_not_finite_is_skipped_and_counted():
    batch = random_batch(0)
    batch["token_ids"][0, 0] = -1  # An unknown id makes the model answer NaN.
    before, after, metrics = _updated(batch, steps=3)
    assert _changed(before, after) == {"step", "num_not_finite", "not_finite_in_a_row"}
    assert [int(one["not_finite_in_a_row"]) for one in metrics] == [1, 2, 3]
    assert [float(one["learning_rate"]) for one in metrics] == pytest.approx([1e-2] * 3)


def test_a_step_whose_gradient_alone_is_not_finite_is_skipped():
    plain = _loss()

    def loss(variables, batch):
        scale = variables["params"]["final_norm"]["scale"]
        sums = plain(variables, batch)
        # Zero in value, infinite in slope.
        return LossSums(sums.loss + jnp.sqrt(scale - scale).sum(), sums.num_terms, sums.others)

    before, after, metrics = _updated(random_batch(0), loss=loss)
    assert _changed(before, after) == {"step", "num_not_finite", "not_finite_in_a_row"}
    assert np.isfinite(metrics[0]["loss"])


def test_a_good_step_ends_a_row_of_bad_ones():
    mesh = _one_device()
    state, optimizer = _make_state(mesh=mesh)
    update = compile_update(make_update(_loss(), optimizer, num_micro_batches=1), state, mesh)
    good, bad = random_batch(0), random_batch(1)
    bad["token_ids"][0, 0] = -1
    seen = []
    for batch in (bad, bad, good, bad):
        state, metrics = update(state, put_on_mesh(batch, mesh))
        seen.append(int(metrics["not_finite_in_a_row"]))
    assert seen == [1, 2, 0, 1]
    assert int(state.num_updates) == 1 and int(state.num_not_finite) == 3


def test_frozen_embeddings_stay_and_have_no_optimizer_state():
    before, after, _ = _updated(
        random_batch(0), is_trained=lambda path: path != "params/embedding/table"
    )
    assert "frozen/params/embedding/table" not in _changed(before, after)
    assert not any("opt_state" in path and "embedding" in path for path in before)
    trained = {path for path in before if path.startswith("trained/")}
    assert trained <= _changed(before, after)


def test_with_lora_only_the_adapters_are_trained():
    before, after, _ = _updated(
        random_batch(0), lora=LORA, is_trained=lambda path: path.startswith("lora/"), steps=2
    )
    changed = _changed(before, after)
    assert not any(path.startswith("frozen/") for path in changed)
    assert {path for path in before if path.startswith("trained/lora/")} <= changed
    assert not any("opt_state" in path and "params" in path for path in before)


def test_a_frozen_trunk_in_the_compute_dtype_gives_the_same_logits():
    compute = ComputeConfig(compute_dtype=jnp.bfloat16)
    params = _params()
    _, frozen = split({"params": params}, lambda path: False)
    stored = store_as_computed(frozen, jnp.bfloat16)
    assert stored["params"]["layers"]["mlp"]["down"]["kernel"].dtype == jnp.bfloat16
    assert stored["params"]["final_norm"]["scale"].dtype == jnp.float32
    model, ids_BT = Transformer(TINY, compute), random_batch(0)["token_ids"]

    def logits(variables):
        return model.apply(variables, model.apply(variables, ids_BT), method="logits")

    np.testing.assert_array_equal(jax.jit(logits)(frozen), jax.jit(logits)(stored))


def test_bfloat16_compute_trains_float32_weights():
    batch = random_batch(0)
    compute = ComputeConfig(compute_dtype=jnp.bfloat16)
    _, after, metrics = _updated(batch, compute=compute, steps=8)
    _, _, wide = _updated(batch)
    assert all(leaf.dtype == np.float32 for path, leaf in after.items() if "trained" in path)
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]
    assert metrics[0]["loss"] == pytest.approx(wide[0]["loss"], rel=2e-2)
    assert metrics[0]["grad_norm"] == pytest.approx(wide[0]["grad_norm"], rel=5e-2)
