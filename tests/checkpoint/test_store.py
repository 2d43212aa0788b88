import errno
import json
import os
import pathlib
import resource
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from huatuo_jax.checkpoint.store import CheckpointStore

CONFIG = {"mlp": {"hidden": 64, "activation": "silu"}, "axes": ("data", "fsdp")}
MESHES = [(8, 1, 1), (1, 2, 4), (2, 2, 2), (1, 8, 1)]


def mesh_of(shape):
    return jax.make_mesh(
        shape, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )


def sharding_of(leaf, mesh):
    """Shards by rank, so that the same leaf lies differently on every mesh; None is one device."""
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[3])
    spec = {
        3: PartitionSpec(None, "fsdp", "tensor"),
        2: PartitionSpec(("data", "fsdp"), "tensor"),
    }
    if leaf.ndim == 1 and leaf.shape[0] % 8 == 0:
        return NamedSharding(mesh, PartitionSpec(("data", "fsdp", "tensor")))
    return NamedSharding(mesh, spec.get(leaf.ndim, PartitionSpec()))


def abstract_on(state, mesh):
    def abstract(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(leaf, mesh))

    return jax.tree.map(abstract, state)


def training_state(mesh):
    """Everything a training step carries: three dtypes, optax's named tuples, typed keys."""
    key = jax.random.key(7)
    params = {
        "layers": {
            "qkv": {"kernel": jax.random.normal(key, (3, 16, 24))},
            "norm": {"scale": jax.random.normal(key, (16,), jnp.bfloat16)},
        },
        "embedding": jax.random.normal(key, (32, 16), jnp.bfloat16),
    }
    optimizer = optax.adamw(1e-3)
    gradients = jax.tree.map(jnp.sin, params)
    _, optimizer_state = optimizer.update(gradients, optimizer.init(params), params)
    state = {
        "params": params,
        "optimizer": optimizer_state,
        "step": jnp.asarray(17, jnp.int32),
        "ids": jnp.arange(32, dtype=jnp.int32).reshape(8, 4),
        "key": key,
        "keys": jax.random.split(jax.random.key(3, impl="rbg"), 8),
    }
    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding_of(leaf, mesh)), state)


def raw_bytes(leaf):
    if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_bit_for_bit(restored, saved):
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
        want = dict(jax.tree_util.tree_leaves_with_path(saved))[path]
        assert leaf.dtype == want.dtype and leaf.shape == want.shape, path
        assert raw_bytes(leaf) == raw_bytes(want), path


@pytest.fixture
def latch(monkeypatch):
    """Holds every save before its first file, until the event is set."""
    latch = threading.Event()
    mkdir = os.mkdir

    def held(path, *rest, **named):
        if ".orbax-checkpoint-tmp" in os.fspath(path):
            assert latch.wait(timeout=60)
        return mkdir(path, *rest, **named)

    monkeypatch.setattr(os, "mkdir", held)
    return latch


def small(value):
    return {"params": {"kernel": jnp.full((4, 8), value, jnp.float32)}}


def save_small(store, step, *, metrics=None):
    store.save(step, small(step), config=CONFIG, metrics=metrics)


@pytest.mark.parametrize("shape", [*MESHES, None], ids=str)
def test_a_state_restores_bit_for_bit_on_any_other_mesh(tmp_path, shape):
    state = training_state(mesh_of((8, 1, 1)))
    with CheckpointStore(tmp_path) as store:
        store.save(5, state, config=CONFIG, extra={"position": 123}, metrics={"loss": 0.5})
    abstract = abstract_on(state, None if shape is None else mesh_of(shape))
    with CheckpointStore(tmp_path) as store:
        restored = store.restore(abstract_state=abstract, config=CONFIG)
    assert_bit_for_bit(restored.state, state)
    for leaf, wanted in zip(
        jax.tree.leaves(restored.state), jax.tree.leaves(abstract), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
        assert leaf.committed
    assert (restored.step, restored.extra, restored.metrics) == (
        5,
        {"position": 123},
        {"loss": 0.5},
    )
    assert restored.config["axes"] == ["data", "fsdp"]


def test_a_restored_key_draws_the_same_numbers(tmp_path):
    state = training_state(mesh_of((8, 1, 1)))
    with CheckpointStore(tmp_path) as store:
        store.save(0, state, config={})
        restored = store.restore(abstract_state=abstract_on(state, mesh_of((2, 2, 2)))).state
    assert str(jax.random.key_impl(restored["keys"])) == "rbg"
    for name in ("key", "keys"):
        draw = jax.random.uniform if name == "key" else jax.vmap(jax.random.uniform)
        np.testing.assert_array_equal(draw(restored[name]), draw(state[name]))


def test_numbers_and_numpy_arrays_come_back_as_what_they_were(tmp_path, latch):
    state = {
        "epoch": 3, "rate": 0.1, "done": True,
        "count": np.int64(2**40), "table": np.arange(6, dtype=np.int16).reshape(2, 3),
    }  # fmt: skip
    with CheckpointStore(tmp_path) as store:
        store.save(1, state, config={})
        wanted = state["table"].copy()
        state["table"] += 100  # before anything is written
        latch.set()
        restored = store.restore(abstract_state=state).state
    assert {name: type(value) for name, value in restored.items()} == {
        name: type(value) for name, value in state.items()
    }
    assert [restored[name] for name in ("epoch", "rate", "done", "count")] == [3, 0.1, True, 2**40]
    np.testing.assert_array_equal(restored["table"], wanted)
    assert restored["table"].dtype == np.int16


def test_an_abstract_leaf_without_a_sharding_lands_on_the_first_device(tmp_path):
    with CheckpointStore(tmp_path) as store:
        save_small(store, 1)
        abstract = jax.eval_shape(lambda: small(0))
        kernel = store.restore(abstract_state=abstract).state["params"]["kernel"]
    assert kernel.devices() == {jax.devices()[0]}


def test_a_donated_update_after_the_save_does_not_reach_the_disk(tmp_path, latch):
    spec = PartitionSpec(("data", "fsdp"), "tensor")
    values = np.arange(512 * 1024, dtype=np.float32).reshape(512, 1024)
    state = {
        "sharded": jax.device_put(values, NamedSharding(mesh_of((2, 2, 2)), spec)),
        "single": jax.device_put(values.copy(), jax.devices()[1]),
        "key": jax.random.split(jax.random.key(0), 1024),
    }
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
    expected_keys = np.array(jax.random.key_data(state["key"]))
    update = jax.jit(lambda leaf: leaf * 0 - 1, donate_argnums=0)
    draw = jax.jit(jax.vmap(lambda key: jax.random.fold_in(key, 1)), donate_argnums=0)
    with CheckpointStore(tmp_path) as store:
        store.save(1, state, config={})
        for _ in range(3):  # in the end the memory of the saved arrays is free to be reused
            state = {
                "sharded": update(state["sharded"]),
                "single": update(state["single"]),
                "key": draw(state["key"]),
            }
        jax.block_until_ready(state)
        assert (np.asarray(state["sharded"]) == -1).all()
        assert (np.asarray(state["single"]) == -1).all()
        assert os.listdir(tmp_path) == []  # nothing was written so far
        latch.set()
        restored = store.restore(abstract_state=abstract).state
    np.testing.assert_array_equal(restored["sharded"], values)
    np.testing.assert_array_equal(restored["single"], values)
    np.testing.assert_array_equal(jax.random.key_data(restored["key"]), expected_keys)


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 4)])
def test_the_newest_and_the_best_are_kept(tmp_path, mode, best):
    values = {1: 5.0, 2: 1.0, 3: float("nan"), 4: 9.0, 5: None, 6: 5.0, 7: 5.0}
    with CheckpointStore(tmp_path, keep_newest=2, best_metric="loss", best_mode=mode) as store:
        for step, value in values.items():
            save_small(store, step, metrics=None if value is None else {"loss": value})
        assert store.all_steps() == [best, 6, 7]
        assert store.best_step() == best
        kernel = store.restore(best, abstract_state=small(0)).state["params"]["kernel"]
        assert (np.asarray(kernel) == best).all()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted([str(best), "6", "7"])
    with CheckpointStore(tmp_path, keep_newest=2, best_metric="loss", best_mode=mode) as store:
        assert (store.best_step(), store.latest_step()) == (best, 7)


def test_of_equally_good_steps_the_newest_is_the_best(tmp_path):
    with CheckpointStore(tmp_path, keep_newest=1, best_metric="loss") as store:
        for step, loss in enumerate([3.0, 1.0, 1.0, 2.0]):
            save_small(store, step, metrics={"loss": loss})
        assert (store.best_step(), store.all_steps()) == (2, [2, 3])


def test_without_a_measured_metric_no_step_is_the_best(tmp_path):
    with CheckpointStore(tmp_path, keep_newest=1, best_metric="loss") as store:
        assert store.best_step() is None
        for step in range(3):
            save_small(store, step, metrics={"other": 1.0})
        assert (store.best_step(), store.all_steps()) == (None, [2])


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    with CheckpointStore(tmp_path / "new" / "checkpoints") as store:
        assert (store.latest_step(), store.all_steps()) == (None, [])
        with pytest.raises(FileNotFoundError, match="no checkpoint in .*new/checkpoints"):
            store.restore(abstract_state=small(0))
        save_small(store, 4)
        with pytest.raises(FileNotFoundError, match="no checkpoint of step 3 in .*: 4"):
            store.restore(3, abstract_state=small(0))


def test_another_config_is_told_field_by_field(tmp_path):
    with CheckpointStore(tmp_path) as store:
        save_small(store, 1)
        other = {"mlp": {"hidden": 128, "activation": "silu"}, "axes": ["data", "fsdp"], "new": 1}
        with pytest.raises(ValueError) as told:
            store.restore(abstract_state=small(0), config=other)
        assert str(told.value).splitlines()[1:] == [
            "  mlp.hidden: saved 64, now 128",
            "  new: saved absent, now 1",
        ]
        store.restore(abstract_state=small(0), config=CONFIG)


def test_arrays_that_do_not_fit_are_named_by_path(tmp_path):
    state = {
        "layers": {"qkv": {"kernel": jnp.zeros((2, 8)), "bias": jnp.zeros(8)}},
        "key": jax.random.key(0),
        "old": jnp.zeros(3),
    }
    wanted = {
        "layers": {"qkv": {"kernel": jnp.zeros((2, 16)), "bias": jnp.zeros(8, jnp.bfloat16)}},
        "key": jax.random.key(0, impl="rbg"),
        "new": [jnp.zeros(4)],
    }
    with CheckpointStore(tmp_path) as store:
        store.save(1, state, config={})
        with pytest.raises(ValueError) as told:
            store.restore(abstract_state=wanted)
    assert str(told.value).splitlines()[1:] == [
        "  key: saved key<fry>, wanted key<rbg>",
        "  layers/qkv/bias: saved float32, wanted bfloat16",
        "  layers/qkv/kernel: saved (2, 8), wanted (2, 16)",
        "  new/0: not saved, wanted (4,) float32",
        "  old: saved (3,) float32, not wanted",
    ]


def test_the_parameters_alone_can_be_read(tmp_path):
    state = training_state(mesh_of((8, 1, 1)))
    wanted = {"params": abstract_on(state["params"], mesh_of((1, 2, 4)))}
    with CheckpointStore(tmp_path) as store:
        store.save(1, state, config={})
        restored = store.restore(abstract_state=wanted, partial=True).state
    assert_bit_for_bit(restored, {"params": state["params"]})


def test_a_reader_sees_new_steps_and_leaves_the_writers_files_alone(tmp_path):
    unfinished = tmp_path / "9.orbax-checkpoint-tmp"
    with CheckpointStore(tmp_path) as writer:
        save_small(writer, 1)
        writer.wait()
        unfinished.mkdir()
        with CheckpointStore(tmp_path, read_only=True) as reader:
            assert reader.all_steps() == [1]
            save_small(writer, 2)
            writer.wait()
            assert reader.all_steps() == [1, 2]
            with pytest.raises(ValueError, match="read_only"):
                save_small(reader, 3)
    assert unfinished.is_dir()
    with CheckpointStore(tmp_path) as writer:
        save_small(writer, 10)
        assert writer.all_steps() == [1, 2, 10]
    assert not unfinished.exists()


def test_a_reader_makes_no_folder(tmp_path):
    with CheckpointStore(tmp_path / "absent", read_only=True) as reader:
        assert reader.latest_step() is None
    assert not (tmp_path / "absent").exists()


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    with CheckpointStore(tmp_path) as store:
        save_small(store, 3)
        for step in (2, 3):
            with pytest.raises(ValueError, match=f"step: {step} is not past .* step 3"):
                save_small(store, step)
        for state, message in [
            (jnp.zeros(3), "single leaf"),
            ({"a": {}}, "at least one array"),
            ({"a": jnp.zeros((0, 3))}, "a has no elements"),
            ({"a/b": jnp.zeros(1)}, "slash"),
            ({"": jnp.zeros(1)}, "empty"),
        ]:
            with pytest.raises(ValueError, match=message):
                store.save(4, state, config={})
        with pytest.raises(ValueError, match="config: .*JSON"):
            store.save(4, small(4), config={"dtype": jnp.float32})
        with pytest.raises(ValueError, match="extra: .*JSON"):
            store.save(4, small(4), config={}, extra={"when": object()})
        assert store.all_steps() == [3]
        save_small(store, 4)
        assert store.all_steps() == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


@pytest.mark.parametrize("wrong", [{"keep_newest": 0}, {"keep_newest": 1.5}, {"best_mode": "low"}])
def test_wrong_arguments_are_named(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CheckpointStore(tmp_path, **wrong)


def test_a_folder_that_cannot_be_written_is_told_on_opening(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "below", pathlib.Path("/proc/nowhere")):
        with pytest.raises(OSError, match=f"{place} cannot be written") as told:
            CheckpointStore(place)
        assert "\n" not in str(told.value)


@pytest.fixture
def full_disk():
    """No file may grow past 64 KiB, which fails writes in the background as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda full: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16 if full else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("asynchronous", "next_call"),
    [(True, "save"), (True, "wait"), (True, "close"), (True, "latest_step"), (False, "no")],
)
def test_a_failed_save_is_raised_by_the_next_call_and_can_be_repeated(
    tmp_path, full_disk, caplog, asynchronous, next_call
):
    state = {"kernel": jax.random.normal(jax.random.key(0), (512, 512))}
    store = CheckpointStore(tmp_path, keep_newest=1, asynchronous=asynchronous)
    store.save(1, small(1), config={})
    store.wait()
    calls = {
        "save": lambda: store.save(3, state, config={}),
        "wait": store.wait,
        "close": store.close,
        "latest_step": store.latest_step,
    }
    full_disk(True)
    with pytest.raises(OSError, match="step 2 was not saved in .*: File too large") as told:
        store.save(2, state, config={})
        calls[next_call]()
    full_disk(False)
    assert told.value.errno == errno.EFBIG and "\n" not in str(told.value)
    assert caplog.records == []  # the error is raised, not dumped as well
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]
    if next_call == "close":
        store = CheckpointStore(tmp_path, keep_newest=1)
    with store:
        assert store.all_steps() == [1]
        store.restore(abstract_state=small(0))
        store.save(2, state, config={})
        assert store.all_steps() == [2]
        assert_bit_for_bit(store.restore(abstract_state=state).state, state)


def test_an_error_of_the_run_is_not_hidden_by_a_failed_save(tmp_path, full_disk):
    state = {"kernel": jax.random.normal(jax.random.key(0), (512, 512))}
    with pytest.raises(ZeroDivisionError) as told, CheckpointStore(tmp_path) as store:
        full_disk(True)
        store.save(2, state, config={})
        raise ZeroDivisionError
    assert "step 2 was not saved" in told.value.__notes__[0]


def test_a_damaged_checkpoint_is_one_clear_error(tmp_path):
    with CheckpointStore(tmp_path) as store:
        save_small(store, 1)
        store.wait()
        for data in (tmp_path / "1" / "state" / "d").iterdir():
            data.write_bytes(data.read_bytes()[:-7])
        with pytest.raises(OSError, match="1/state cannot be read") as told:
            store.restore(abstract_state=small(0))
        assert "\n" not in str(told.value)
        (tmp_path / "1" / "config" / "config.json").write_text("{")
        with pytest.raises(OSError, match="config.json cannot be read"):
            store.restore(abstract_state=small(0))


def test_a_step_can_be_read_by_hand(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(3, small(3), config={"名": "值"}, extra={"row": 5}, metrics={"loss": 0.25})
    step = tmp_path / "3"
    assert json.loads((step / "config" / "config.json").read_text()) == {"名": "值"}
    assert json.loads((step / "extra" / "extra.json").read_text()) == {"row": 5}
    assert json.loads((step / "metrics" / "metrics").read_text()) == {"loss": 0.25}
    assert (step / "state").is_dir()
