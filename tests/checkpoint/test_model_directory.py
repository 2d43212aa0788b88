import errno
import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from huatuo_jax.checkpoint.models import (
    is_model_directory,
    load_model_config,
    load_model_params,
    save_model,
)

CONFIG = {"vocabulary": 32, "名": "华佗", "layers": [1, 2]}


def params_on(shape):
    mesh = jax.make_mesh(
        shape, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    values = {
        "embedding": jax.random.normal(jax.random.key(0), (32, 16), jnp.bfloat16),
        "layers": {"kernel": jax.random.normal(jax.random.key(1), (2, 16, 8))},
    }
    return jax.device_put(values, NamedSharding(mesh, PartitionSpec(None, ("fsdp", "tensor"))))


def abstract(tree):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def assert_same(left, right):
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype and one.sharding == other.sharding
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_model_comes_back_bit_for_bit_on_another_mesh(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    target = tmp_path / "models" / "tiny"
    save_model(
        target,
        params_on((1, 8, 1)),
        config=CONFIG,
        extra_files={"tokenizer.json": tmp_path / "tokenizer.json"},
    )
    assert sorted(path.name for path in target.iterdir()) == [
        "backbone.json",
        "params",
        "tokenizer.json",
    ]
    assert json.loads((target / "backbone.json").read_text(encoding="utf-8")) == CONFIG
    assert "华佗" in (target / "backbone.json").read_text(encoding="utf-8")
    assert is_model_directory(target)
    assert load_model_config(target) == CONFIG
    wanted = params_on((2, 2, 2))
    assert_same(load_model_params(target, abstract(wanted)), wanted)


def test_an_old_model_is_replaced_only_when_asked(tmp_path):
    params = params_on((1, 8, 1))
    save_model(tmp_path / "model", params, config={"n": 1})
    with pytest.raises(FileExistsError, match="not empty"):
        save_model(tmp_path / "model", params, config={"n": 2})
    assert load_model_config(tmp_path / "model") == {"n": 1}
    save_model(tmp_path / "model", params, config={"n": 2}, overwrite=True)
    assert load_model_config(tmp_path / "model") == {"n": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_parameters_are_named(tmp_path):
    save_model(tmp_path / "model", params_on((1, 8, 1)), config={})
    wanted = {"embedding": jnp.zeros((32, 8), jnp.bfloat16), "layers": {"bias": jnp.zeros(8)}}
    with pytest.raises(ValueError) as told:
        load_model_params(tmp_path / "model", wanted)
    assert str(told.value).splitlines()[1:] == [
        "  embedding: saved (32, 16), wanted (32, 8)",
        "  layers/bias: not saved, wanted (8,) float32",
        "  layers/kernel: saved (2, 16, 8) float32, not wanted",
    ]


def test_a_leftover_never_loads_even_if_it_looks_whole(tmp_path):
    params = params_on((1, 8, 1))
    save_model(tmp_path / "model", params, config={})
    leftover = (tmp_path / "model").rename(tmp_path / "model.tmp-00112233")
    assert not is_model_directory(leftover)
    with pytest.raises(FileNotFoundError, match="leftover of an interrupted write"):
        load_model_config(leftover)
    with pytest.raises(FileNotFoundError, match="leftover of an interrupted write"):
        load_model_params(leftover, params)


@pytest.mark.parametrize("missing", ["backbone.json", "params", None])
def test_a_folder_that_is_no_model_is_refused(tmp_path, missing):
    target = tmp_path / "model"
    if missing is not None:
        save_model(target, params_on((1, 8, 1)), config={})
        (target / missing).rename(tmp_path / "away")
    assert not is_model_directory(target)
    with pytest.raises(FileNotFoundError, match="it needs backbone.json and params/"):
        load_model_config(target)


def test_damaged_files_are_one_clear_error(tmp_path):
    target = tmp_path / "model"
    params = params_on((1, 8, 1))
    save_model(target, params, config={})
    (target / "backbone.json").write_text('{"a": ')
    with pytest.raises(OSError, match="backbone.json cannot be read"):
        load_model_config(target)
    (target / "params" / "_METADATA").unlink()
    with pytest.raises(OSError, match="params cannot be read") as told:
        load_model_params(target, params)
    assert "\n" not in str(told.value)


def test_a_full_disk_leaves_no_model(tmp_path):
    params = {"kernel": jax.random.normal(jax.random.key(0), (512, 512))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(OSError, match="params was not written: File too large") as told:
            save_model(tmp_path / "model", params, config={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert told.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "..", "/a", "a/../b", "backbone.json", "params/d"])
def test_extra_files_stay_inside_the_folder_and_take_no_name(tmp_path, name):
    with pytest.raises(ValueError, match="extra_files"):
        save_model(tmp_path / "model", {}, config={}, extra_files={name: "x"})
    assert list(tmp_path.iterdir()) == []


def test_extra_files_may_lie_in_folders(tmp_path):
    (tmp_path / "source").write_text("text")
    files = {"tokenizer/vocabulary/a.json": tmp_path / "source"}
    save_model(tmp_path / "model", {"a": jnp.zeros(1)}, config={}, extra_files=files)
    assert (tmp_path / "model" / "tokenizer" / "vocabulary" / "a.json").read_text() == "text"
