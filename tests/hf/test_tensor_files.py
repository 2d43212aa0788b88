import concurrent.futures
import json
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

import huatuo_jax
from huatuo_jax.hf.weight_files import open_tensor_source

REPOSITORY = pathlib.Path(huatuo_jax.__file__).resolve().parents[1]
SAFE_INDEX, TORCH_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"


def tiny_model() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def write_index(folder, filename, weight_map):
    (folder / filename).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def two_safetensors_shards(folder) -> dict[str, str]:
    safetensors.numpy.save_file({"a": np.ones(2), "b": np.ones(3)}, folder / "one.safetensors")
    safetensors.numpy.save_file({"c": np.ones(4)}, folder / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    write_index(folder, SAFE_INDEX, weight_map)
    return weight_map


def assert_holds(source, state_dict):
    assert sorted(source.names()) == sorted(state_dict)
    for name, tensor in state_dict.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == np.float32
        np.testing.assert_array_equal(source.read(name), tensor.numpy(), strict=True)


@pytest.mark.parametrize("max_shard_size", ["20KB", "5GB"])
def test_what_save_pretrained_wrote_is_read_exactly(tmp_path, max_shard_size):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / SAFE_INDEX).exists() == (max_shard_size == "20KB")
    assert_holds(open_tensor_source(tmp_path), model.state_dict())


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_shards_of_torch_files_are_read_exactly(tmp_path, is_zip):
    state_dict = tiny_model().state_dict()
    names = sorted(state_dict)
    weight_map = {}
    for number in range(3):
        shard_name = f"pytorch_model-{number + 1:05d}-of-00003.bin"
        shard = {name: state_dict[name] for name in names[number::3]}
        torch.save(shard, tmp_path / shard_name, _use_new_zipfile_serialization=is_zip)
        weight_map |= dict.fromkeys(shard, shard_name)
    write_index(tmp_path, TORCH_INDEX, weight_map)
    assert_holds(open_tensor_source(tmp_path), state_dict)


def test_a_single_torch_file_is_read_exactly(tmp_path):
    state_dict = tiny_model().state_dict()
    torch.save(state_dict, tmp_path / "pytorch_model.bin")
    assert_holds(open_tensor_source(tmp_path), state_dict)


def test_safetensors_are_preferred_to_torch_files(tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    two_safetensors_shards(tmp_path)
    assert open_tensor_source(tmp_path).names() == ("a", "b", "c")
    safetensors.numpy.save_file({"w": np.ones(2)}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(open_tensor_source(tmp_path).read("w"), [1, 1])


def test_a_tensor_beside_the_index_counts_as_present(tmp_path):
    weight_map = two_safetensors_shards(tmp_path)
    del weight_map["b"]
    write_index(tmp_path, SAFE_INDEX, weight_map)
    assert open_tensor_source(tmp_path).names() == ("a", "b", "c")


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no weights here; there must be model.safetensors"):
        open_tensor_source(tmp_path)


def test_an_absent_shard_is_named(tmp_path):
    two_safetensors_shards(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="two.safetensors: missing, though model.safetens"):
        open_tensor_source(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    weight_map = two_safetensors_shards(tmp_path)
    write_index(tmp_path, SAFE_INDEX, weight_map | {"d": "two.safetensors"})
    with pytest.raises(ValueError, match="two.safetensors: lacks tensor d, which model.safeten"):
        open_tensor_source(tmp_path)
    write_index(tmp_path, SAFE_INDEX, weight_map | {"a": "two.safetensors"})
    with pytest.raises(ValueError, match="two.safetensors: lacks tensor a, which model.safeten"):
        open_tensor_source(tmp_path)


def test_a_tensor_in_two_shards_is_named(tmp_path):
    two_safetensors_shards(tmp_path)
    safetensors.numpy.save_file({"c": np.ones(4), "a": np.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="two.safetensors: holds tensor a, which one.safetensors"):
        open_tensor_source(tmp_path)


@pytest.mark.parametrize("shard", ["../one.safetensors", "/etc/passwd", "", "sub/one", ".."])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, shard):
    write_index(tmp_path, SAFE_INDEX, {"a": shard})
    with pytest.raises(ValueError, match="must be a plain file name"):
        open_tensor_source(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}'])
def test_a_broken_index_is_refused(tmp_path, text):
    (tmp_path / SAFE_INDEX).write_text(text)
    with pytest.raises(ValueError, match="index.json: not an index of weights"):
        open_tensor_source(tmp_path)


@pytest.mark.parametrize("filename", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_recognised(tmp_path, filename):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    (tmp_path / filename).write_text(pointer)
    with pytest.raises(ValueError, match=f"{filename}: a Git LFS pointer"):
        open_tensor_source(tmp_path)


def test_a_cut_shard_is_noticed_before_anything_is_read(tmp_path):
    two_safetensors_shards(tmp_path)
    content = (tmp_path / "two.safetensors").read_bytes()
    (tmp_path / "two.safetensors").write_bytes(content[:-1])
    with pytest.raises(ValueError, match="two.safetensors: damaged or cut short"):
        open_tensor_source(tmp_path)


def test_many_threads_read_what_one_does(tmp_path):
    arrays = {f"t{i}": np.full((100, 100), i, np.float32) for i in range(50)}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    source = open_tensor_source(tmp_path)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for name, array in zip(arrays, pool.map(source.read, arrays), strict=True):
            np.testing.assert_array_equal(array, arrays[name])


# Resident memory is told by the kernel's high-water mark of this program alone: ru_maxrss starts
# from that of the process which started it.
MEASURE_GROWTH = """
    import pathlib, re, sys
    import numpy as np
    from huatuo_jax.hf.safetensors_files import TensorToWrite, write_safetensors
    from huatuo_jax.hf.weight_files import open_tensor_source

    def peak_mb():
        status = pathlib.Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1000

    folder, copy = map(pathlib.Path, sys.argv[1:])
    before = peak_mb()
    source = open_tensor_source(folder)
    checksum = sum(float(source.read(name)[0, 0]) for name in source.names())
    assert checksum == sum(range(40)), checksum
    print(peak_mb() - before)
    tensors = [
        TensorToWrite(name, source.shape(name), source.dtype(name), lambda n=name: source.read(n))
        for name in source.names()
    ]
    write_safetensors(copy, tensors, max_shard_size=90_000_000)
    assert len(list(copy.iterdir())) == 4
    print(peak_mb() - before)
    assert "torch" not in sys.modules and "jax" not in sys.modules
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_memory_does_not_grow_with_the_tensors_that_are_read_and_written(tmp_path, kind):
    folder, copy = tmp_path / "source", tmp_path / "copy"
    folder.mkdir()
    copy.mkdir()
    arrays = {f"t{i}": np.full((1250, 1000), i, np.float32) for i in range(40)}
    if kind == "safetensors":
        safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    else:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        torch.save(tensors, folder / "pytorch_model.bin")

    command = [sys.executable, "-c", textwrap.dedent(MEASURE_GROWTH), str(folder), str(copy)]
    output = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)

    assert output.returncode == 0, output.stderr
    read_growth_mb, write_growth_mb = map(float, output.stdout.split())
    # 200 MB pass through; one tensor is 5 MB.
    assert read_growth_mb < 20
    assert write_growth_mb < 20
