"""Answers generated on another mesh than that of training are the same answers."""

import dataclasses
import json
import math
import re
import signal

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.backbone.config import PRESETS, ComputeConfig
from huatuo_jax.backbone.layers import KERNEL_BY_OUTPUT
from huatuo_jax.backbone.lora import LoraConfig
from huatuo_jax.backbone.transformer import init_params
from huatuo_jax.core import sharding
from huatuo_jax.core.config import identity
from huatuo_jax.core.sharding import MeshConfig, make_mesh
from huatuo_jax.generation import weights
from huatuo_jax.training.loop import Interrupted, train
from huatuo_jax.training.metrics import read_rows
from tests.multi_host import metrics
from tests.ppo.tiny import BACKBONE, Table, config, table, tiny_job
from tests.tiny import one_device

HEADS = dataclasses.replace(BACKBONE, num_heads=4, num_kv_heads=4, head_dim=4)
IN_TENSOR = MeshConfig(data=2, fsdp=1, tensor=4)
NUM_ITERATIONS = 3


def settings(mesh, **changed):
    fields = {
        "backbone": HEADS,
        "num_iterations": NUM_ITERATIONS,
        "rollout": {"num_prompts": 16, "mesh": mesh},
        "loop": {"checkpoint_every": 1, "samples_per_iteration": 16},
    }
    return config(**(fields | changed))


def run(workdir, cfg, **options):
    """A run whose state is split over fsdp=8."""
    train(tiny_job(cfg, workdir, mesh=make_mesh(fsdp=8), **options), cfg.loop)
    return workdir


class Interrupting(Table):
    """Sends this process the signal to stop after some rollouts."""

    def __init__(self, *, calls):
        super().__init__(table(longest=3).rewards)
        self._left = calls

    def scores(self, answers):
        self._left -= 1
        if self._left == 0:
            signal.raise_signal(signal.SIGTERM)
        return super().scores(answers)


@pytest.fixture(scope="module")
def on_one_mesh(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), settings(None))


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"), settings(IN_TENSOR))


def assert_same_run(workdir, other):
    found, expected = ([json.loads(line) for line in samples(one)] for one in (workdir, other))
    assert len(found) == 16 * NUM_ITERATIONS
    assert [one["answer"] for one in found] == [one["answer"] for one in expected]
    metrics.assert_same(*(one / "ppo" / "metrics.jsonl" for one in (workdir, other)), at_least=60)


def samples(workdir):
    return (workdir / "ppo" / "samples.jsonl").read_text().splitlines()


@pytest.mark.slow
def test_answers_and_losses_are_those_of_one_mesh(on_one_mesh, on_two):
    assert_same_run(on_two, on_one_mesh)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=8, fsdp=1)])
def test_answers_and_losses_are_those_of_one_mesh_on_any_other(on_one_mesh, tmp_path, mesh):
    run(tmp_path, settings(mesh))
    assert_same_run(tmp_path, on_one_mesh)


@pytest.mark.slow
def test_the_first_policy_is_its_reference_and_the_sampler_agrees_with_the_trainer(on_two):
    rows = read_rows(on_two / "ppo" / "metrics.jsonl")
    assert rows[0]["ppo/kl_per_sequence"] == 0.0
    # A mean of exp|sampler - trainer|.
    assert all(1 <= row["ppo/sampler_mismatch"] < 1 + 1e-5 for row in rows)
    assert rows[-1]["ppo/kl_per_sequence"] > 0.0


@pytest.mark.slow
@pytest.mark.parametrize("start", ["policy", "shared"])
def test_adapters_travel_too(tmp_path, start):
    lora = LoraConfig(rank=2, alpha=4.0)
    value = {"start": start, "lora": lora}
    for folder, mesh in (("one", None), ("two", IN_TENSOR)):
        run(tmp_path / folder, settings(mesh, lora=lora, value=value))
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_on_another_mesh_of_generation(on_one_mesh, tmp_path):
    """The field is operational: half of the iterations by each."""
    with pytest.raises(Interrupted):
        run(tmp_path, settings(None), scorer=Interrupting(calls=2))
    run(tmp_path, settings(IN_TENSOR))
    assert_same_run(tmp_path, on_one_mesh)
    run_settings = identity(settings(None)), identity(settings(IN_TENSOR))
    assert run_settings[0] == run_settings[1]


@pytest.mark.slow
def test_later_iterations_compile_nothing_and_leave_nothing_behind(tmp_path):
    cfg = settings(IN_TENSOR, num_iterations=5)
    job = tiny_job(cfg, tmp_path, mesh=make_mesh(fsdp=8))
    state, trainer = job.make_state(), job.make_trainer()
    compiled, held = [], []

    def count(name, _, **__):
        compiled.append(name) if name.endswith("backend_compile_duration") else None

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for _ in range(4):
            state, _ = trainer.iterate(state)
            held.append((len(compiled), sum(array.nbytes for array in jax.live_arrays())))
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    programs, num_bytes = zip(*held, strict=True)
    assert programs[0] > 0 and programs[1] == programs[2] == programs[3]
    assert num_bytes[1] == num_bytes[2] == num_bytes[3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("split_layers", [False, True])
def test_weights_move_between_devices_alone_and_bit_for_bit(dtype, split_layers):
    compute = ComputeConfig(compute_dtype=jnp.dtype(dtype))
    params = init_params(jax.random.key(3), HEADS, compute)
    training = make_mesh(fsdp=8)
    variables = {"params": params}
    placed = jax.device_put(variables, sharding.parameter_shardings(variables, training))
    mesh = IN_TENSOR.over(training)

    def move(tree):
        return weights.place(tree, HEADS, compute, mesh=mesh, cast=True, split_layers=split_layers)

    def refused(*_, **__):
        raise AssertionError("jax.device_put may go through the host's memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_put", refused)
        moved = move(placed)
    expected = weights.place(
        variables, HEADS, compute, mesh=None, cast=True, split_layers=split_layers
    )
    for leaf, value in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == value.dtype and leaf.sharding.mesh == mesh
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(value))
    layers = moved["params"]["layers"]
    if split_layers:  # Their kernels have the outputs first.
        kernel, shape = layers[0]["mlp"]["down"][KERNEL_BY_OUTPUT], (16, 24 // 4)
    else:
        kernel, shape = layers["mlp"]["down"]["kernel"], (2, 24 // 4, 16)
    assert kernel.addressable_shards[0].data.shape == shape


def test_no_array_is_whole_on_a_device_on_its_way():
    """Cut over fsdp before and over tensor after: the compiler may gather neither's whole."""
    training = make_mesh(fsdp=8)
    place = jax.NamedSharding(IN_TENSOR.over(training), jax.P(None, "tensor", "fsdp"))
    for dtype in ("float32", "bfloat16"):
        leaf = jax.ShapeDtypeStruct(
            (2, 64, 128), dtype, sharding=jax.NamedSharding(training, place.spec)
        )
        text = weights.moving(place, jnp.dtype("bfloat16")).lower(leaf).compile().as_text()
        sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", text)]
        assert max(sizes) <= 2 * 64 * 128 // 4


def test_the_devices_keep_their_order():
    training = make_mesh(fsdp=8)
    reordered = jax.sharding.Mesh(
        training.devices.reshape(-1)[::-1].reshape(1, 8, 1), training.axis_names
    )
    for mesh in (training, reordered):
        found = MeshConfig(data=-1, fsdp=1, tensor=4).over(mesh)
        assert dict(found.shape) == {"data": 2, "fsdp": 1, "tensor": 4}
        assert found.devices.flatten().tolist() == mesh.devices.flatten().tolist()


def test_weights_on_devices_in_another_order_arrive_too():
    training = make_mesh(fsdp=8)
    order = [3, 1, 0, 2, 7, 5, 4, 6]
    mesh = IN_TENSOR.over(
        jax.sharding.Mesh(training.devices.reshape(-1)[order].reshape(1, 8, 1), training.axis_names)
    )
    compute = ComputeConfig()
    variables = {"params": init_params(jax.random.key(3), HEADS, compute)}
    placed = jax.device_put(variables, sharding.parameter_shardings(variables, training))
    moved = weights.place(placed, HEADS, compute, mesh=mesh, cast=True, split_layers=False)
    jax.tree.map(np.testing.assert_array_equal, moved, variables)


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        (
            MeshConfig(data=1, fsdp=1, tensor=8),
            "tensor=8 must divide the model's 4 key/value heads",
        ),
        (MeshConfig(data=1, fsdp=1, tensor=4), "needs 4 devices, there are 8"),
        (MeshConfig(data=-1, fsdp=1, tensor=3), "take 3 devices, which does not divide the 8"),
    ],
)
def test_a_mesh_that_cannot_be_is_told_before_anything_is_made(tmp_path, mesh, said):
    with pytest.raises(ValueError, match=said) as error:
        tiny_job(settings(mesh), tmp_path, mesh=make_mesh(fsdp=8))
    message = str(error.value)
    assert message.startswith("config.ppo.rollout.mesh: ") and "\n" not in message


def test_on_fewer_devices_than_tensor_the_field_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.ppo\.rollout\.mesh: .* 4 devices.* the 1 there"):
        tiny_job(settings(MeshConfig(data=-1, fsdp=1, tensor=4)), tmp_path, mesh=one_device())


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_what_is_refused_is_what_the_partition_rules_cannot_cut(name):
    cfg, compute = PRESETS[name], ComputeConfig()
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), cfg, compute))
    for fsdp, tensor in ((1, 8), (1, 4), (2, 4), (8, 1)):
        wanted = MeshConfig(data=-1, fsdp=fsdp, tensor=tensor)

        def check(wanted=wanted):
            weights.mesh_for(cfg, wanted, make_mesh(fsdp=8), field="mesh")

        def cut(wanted=wanted):
            sharding.parameter_shardings({"params": params}, wanted.make())

        assert is_refused(check) == is_refused(cut), (fsdp, tensor)


def is_refused(function):
    try:
        function()
    except ValueError:
        return True
    return False
