"""Models in a bucket: both forms there and back, as on a disk, and never half of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from huatuo_jax import convert
from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import init_params
from huatuo_jax.checkpoint.models import find_model, fingerprint, load_params, save_orbax
from huatuo_jax.checkpoint.store import CheckpointStore
from huatuo_jax.core import folders
from huatuo_jax.core.files import as_path, copy_file, staged_folder
from huatuo_jax.hf.export import export_model
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.hf.weight_files import open_tensor_source
from tests.tiny import BACKBONE, TOKENIZER


@pytest.fixture
def exported(tmp_path):
    params = init_params(jax.random.key(1), BACKBONE, ComputeConfig())
    target = tmp_path / "model"
    export_model(
        params, BACKBONE, target, head="lm", source_folder=as_path(TOKENIZER), max_shard_size="90KB"
    )
    return target


def same(params, others):
    return all(
        jax.tree.leaves(
            jax.tree.map(
                lambda one, two: np.array_equal(np.asarray(one), np.asarray(two)), params, others
            )
        )
    )


def test_a_model_goes_through_a_bucket_in_both_forms_and_comes_back(exported, bucket, tmp_path):
    first, ours = "gs://bucket/models/first", "gs://bucket/models/ours"
    original = load_params(find_model(exported))
    for source, target in ((exported, tmp_path / "orbax"), (tmp_path / "orbax", first)):
        convert.main(convert.Flags(source=str(source), target=str(target), max_shard_size="90KB"))
    assert fingerprint(as_path(first)) == fingerprint(exported)
    convert.main(convert.Flags(source=first, target=ours))
    assert find_model(ours).form == "orbax" and same(load_params(find_model(ours)), original)
    back = convert.Flags(source=ours, target=str(tmp_path / "back"), max_shard_size="90KB")
    convert.main(back)
    assert fingerprint(tmp_path / "back") == fingerprint(exported)
    assert load_tokenizer(ours).encode("头痛") == load_tokenizer(exported).encode("头痛")
    sizes = [len(data) for name, data in bucket.files("bucket").items() if "model-0" in name]
    on_disk = [file.stat().st_size for file in (tmp_path / "back").glob("model-0*")]
    assert len(sizes) > 2 and sorted(sizes) == sorted(on_disk), "shard by shard"


def test_a_model_is_exported_from_and_to_a_bucket_with_its_tokenizer(exported, bucket):
    source, target = as_path("gs://bucket/ours"), as_path("gs://bucket/export/policy")
    convert.main(convert.Flags(source=str(exported), target=str(source)))
    found = find_model(source)
    export_model(
        load_params(found),
        found.cfg,
        target,
        head="lm",
        source_folder=source,
        max_shard_size="90KB",
    )
    assert fingerprint(target) == fingerprint(exported)


def test_a_models_torch_files_are_read_in_a_bucket(exported, bucket):
    source = open_tensor_source(exported)
    state = {name: torch.from_numpy(source.read(name)) for name in source.names()}
    for name, is_zip in (("new", True), ("old", False)):
        target = as_path(f"gs://bucket/{name}")
        copy_file(exported / "config.json", target / "config.json")
        with staged_folder(target) as folder:
            weights = folder / "pytorch_model.bin"
            torch.save(state, weights, _use_new_zipfile_serialization=is_zip)
        assert same(load_params(find_model(target)), load_params(find_model(exported)))


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_half_a_model_is_never_loaded(exported, bucket, scheme, request):
    if scheme == "s3":
        request.getfixturevalue("s3")
    target = as_path(f"{scheme}://bucket/model")
    params = load_params(find_model(exported))
    with pytest.raises(ZeroDivisionError), folders.writing_directory(target) as folder:
        export_model(params, BACKBONE, folder / "model", head="lm")
        with pytest.raises(FileNotFoundError, match="interrupted write"):
            find_model(target)
        assert target.exists() and not folders.is_written(target)
        raise ZeroDivisionError
    assert not target.exists()
    assert not folders.is_written(target)
    export_model(params, BACKBONE, target, head="lm", max_shard_size="90KB")
    assert folders.is_written(target) and folders.is_written(target / "config.json")
    assert same(load_params(find_model(target)), params)
    place = next(target.glob("model-00001-of-*"))
    whole = place.read_bytes()
    for data in (whole[:-1], whole[:4], b"\xff" * 8 + whole[8:], whole[:8] + b"x" + whole[9:]):
        place.write_bytes(data)
        with pytest.raises(ValueError, match="damaged or cut short"):
            load_params(find_model(target))


def test_orbax_is_not_asked_to_write_where_it_cannot(exported, tmp_path):
    params = load_params(find_model(exported))
    with pytest.raises(ValueError, match="memory://bucket/model: .* disks and to gs:// alone"):
        save_orbax(params, BACKBONE, as_path("memory://bucket/model"), head="lm")


def test_checkpoints_need_no_right_to_see_the_bucket_itself(bucket):
    bucket.refuses = lambda method, path: 403 if path == "/storage/v1/b/bucket" else None
    with CheckpointStore("gs://bucket/checkpoints", keep_newest=1) as store:
        for step in (1, 2):
            store.save(step, {"weights": jnp.ones(3)}, config={})
        assert store.all_steps() == [2]
    assert not any("/1/" in name for name in bucket.files("bucket"))
