import json
import os
import pathlib
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from safetensors import safe_open

import huatuo_jax
from huatuo_jax.hf import safetensors_files
from huatuo_jax.hf.safetensors_files import (
    SUPPORTED_DTYPES,
    TensorToWrite,
    parse_size,
    plan_shards,
    read_safetensors_layout,
    write_safetensors,
)

REPOSITORY = pathlib.Path(huatuo_jax.__file__).resolve().parents[1]


def random_bits(shape: tuple[int, ...], dtype: np.dtype, seed: int = 0) -> np.ndarray:
    """Any bit pattern may turn up: not-a-numbers, infinities, negative zeros."""
    high = 2 if dtype == np.bool_ else 256
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    bits = np.random.default_rng(seed).integers(0, high, num_bytes, dtype=np.uint8)
    return bits.view(dtype).reshape(shape)


def one_of_each_dtype() -> dict[str, np.ndarray]:
    arrays = {}
    for seed, (name, dtype) in enumerate(SUPPORTED_DTYPES.items()):
        arrays[f"{name}.odd"] = random_bits((3, 5, 7), dtype, seed)
    arrays["scalar"] = np.array(2.5, np.float32)
    arrays["empty"] = np.zeros((0, 4), np.float16)
    arrays["gewicht.größe"] = random_bits((2,), np.dtype(ml_dtypes.bfloat16))
    return arrays


def announce(arrays: dict[str, np.ndarray]) -> list[TensorToWrite]:
    return [
        TensorToWrite(name, array.shape, array.dtype, lambda array=array: array)
        for name, array in arrays.items()
    ]


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def save_pretrained_in_shards(folder: pathlib.Path) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


def test_every_dtype_is_read_bit_for_bit_as_the_safetensors_library_wrote_it(tmp_path):
    path = tmp_path / "model.safetensors"
    arrays = one_of_each_dtype()
    safetensors.numpy.save_file(arrays, path)

    layout = read_safetensors_layout(path)

    assert set(layout) == set(arrays)
    read = {name: layout[name].read() for name in arrays}
    with path.open("r+b") as file:  # The arrays are no views of the file.
        file.write(bytes(path.stat().st_size))
    for name, expected in arrays.items():
        assert_same_bits(read[name], expected)
        assert read[name].flags.writeable and read[name].flags.c_contiguous


def test_a_bfloat16_tensor_of_torch_is_read_bit_for_bit(tmp_path):
    path = tmp_path / "model.safetensors"
    tensor = torch.randn(9, 4).to(torch.bfloat16)
    safetensors.torch.save_file({"weight": tensor}, path)

    actual = read_safetensors_layout(path)["weight"].read()

    assert actual.dtype == ml_dtypes.bfloat16
    assert actual.tobytes() == tensor.view(torch.uint8).numpy().tobytes()


def test_a_written_file_is_byte_for_byte_what_the_safetensors_library_writes(tmp_path):
    arrays = one_of_each_dtype()

    write_safetensors(tmp_path, announce(arrays), max_shard_size=10**9)

    expected = safetensors.numpy.save(arrays, metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_written_tensors_are_read_by_safetensors_in_torch(tmp_path):
    arrays = one_of_each_dtype()
    write_safetensors(tmp_path, announce(arrays), max_shard_size=10**9)

    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")

    assert tensors["bfloat16.odd"].dtype == torch.bfloat16
    for name, expected in arrays.items():
        bits = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert bits == expected.tobytes()


def test_shards_and_index_are_byte_for_byte_what_save_pretrained_writes(tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    ours.mkdir()
    model = save_pretrained_in_shards(theirs)
    arrays = {
        name: tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        for name, tensor in model.state_dict().items()
    }

    write_safetensors(ours, announce(arrays), max_shard_size=parse_size("20KB"))

    weight_files = sorted(path.name for path in theirs.glob("model*"))
    assert sorted(path.name for path in ours.iterdir()) == weight_files
    assert len(weight_files) > 3
    for name in weight_files:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_a_tensor_bigger_than_a_shard_gets_a_shard_of_its_own():
    sizes = {"a": 6, "b": 14, "c": 4, "d": 10, "e": 1}
    tensors = announce({name: np.zeros(size, np.int8) for name, size in sizes.items()})

    shards = plan_shards(tensors, max_shard_size=10)

    names = [[tensor.name for tensor in shard] for shard in shards]
    assert names == [["b"], ["a", "c"], ["d"], ["e"]]


def test_a_transposed_array_is_written_in_its_logical_order(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T

    write_safetensors(tmp_path, announce({"weight": array}), max_shard_size=10**9)

    with safe_open(tmp_path / "model.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_tensor("weight"), array)


def test_one_produced_tensor_is_dropped_before_the_next_is_asked_for(tmp_path):
    alive = []

    class Tracked(np.ndarray):
        def __del__(self):
            # A view may outlive the array that owns the data; owners are what we count.
            if self.base is None:
                alive.remove(1)

    def produce():
        assert not alive
        alive.append(1)
        return Tracked((50,), np.float32)

    tensors = [TensorToWrite(f"t{i}", (50,), np.dtype(np.float32), produce) for i in range(6)]
    write_safetensors(tmp_path, tensors, max_shard_size=400)

    assert not alive
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_any_cut_of_a_safetensors_file_is_noticed_at_open(tmp_path):
    path = tmp_path / "model.safetensors"
    whole = safetensors.numpy.save({"a": np.arange(20.0), "b": np.zeros(3, np.int8)})
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors: damaged or cut short"):
            read_safetensors_layout(path)


def test_left_over_bytes_in_a_safetensors_file_are_noticed_at_open(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.numpy.save({"a": np.arange(20.0)}) + b"\0")
    with pytest.raises(ValueError, match="damaged or cut short"):
        read_safetensors_layout(path)


def test_a_file_that_shrinks_after_it_was_opened_is_noticed_on_reading(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": np.arange(20.0)}, path)
    layout = read_safetensors_layout(path)
    os.truncate(path, path.stat().st_size - 5)
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged or cut short"):
        layout["a"].read()


def test_a_float8_tensor_is_refused_by_name(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"scaled": torch.zeros(4, dtype=torch.float8_e4m3fn)}, path)
    with pytest.raises(ValueError, match="tensor scaled has dtype F8_E4M3; supported"):
        read_safetensors_layout(path)


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [
        (5_000_000, 5_000_000),
        ("1234", 1234),
        ("17B", 17),
        ("20KB", 20_000),
        ("200MB", 200_000_000),
        ("5GB", 5_000_000_000),
        (" 1.5 gib ", 3 * 2**29),
        ("1TiB", 2**40),
        ("0.3GB", 300_000_000),
    ],
)
def test_sizes_are_read_as_huggingface_hub_reads_them(size, num_bytes):
    assert parse_size(size) == num_bytes


@pytest.mark.parametrize("size", ["", "GB", "5 apples", "-5GB", -1, 0, "0.1B", True, "1e9"])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(size)


def test_plans_that_cannot_be_written_are_refused_before_anything_is_produced(tmp_path):
    def never():
        raise AssertionError("produced too early")

    def tensor(name="w", dtype=np.float32):
        return TensorToWrite(name, (2,), np.dtype(dtype), never)

    with pytest.raises(ValueError, match="tensor w is to be written twice"):
        write_safetensors(tmp_path, [tensor(), tensor()], max_shard_size=10)
    with pytest.raises(ValueError, match="tensor z has dtype complex64"):
        write_safetensors(tmp_path, [tensor(), tensor("z", np.complex64)], max_shard_size=10)
    with pytest.raises(ValueError, match="tensor z has dtype >f4"):
        write_safetensors(tmp_path, [tensor(), tensor("z", ">f4")], max_shard_size=10)
    with pytest.raises(ValueError, match="max_shard_size is 0"):
        write_safetensors(tmp_path, [tensor()], max_shard_size=0)
    with pytest.raises(ValueError, match="no tensors"):
        write_safetensors(tmp_path, [], max_shard_size=10)
    assert not list(tmp_path.iterdir())
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(FileExistsError, match="00001-of-00002.safetensors: weights are here"):
        write_safetensors(tmp_path, [tensor()], max_shard_size=10)


@pytest.mark.parametrize("array", [np.zeros(3, np.float32), np.zeros(2, np.float16)])
def test_an_array_that_is_not_as_announced_is_refused(tmp_path, array):
    tensors = [TensorToWrite("w", (2,), np.dtype(np.float32), lambda: array)]
    with pytest.raises(ValueError, match=r"tensor w was announced as float32\[2\] but came as"):
        write_safetensors(tmp_path, tensors, max_shard_size=10)


def test_a_full_disk_is_one_line_with_the_path_and_the_missing_bytes(tmp_path):
    # A limit on the size of a file stops a write midway, as a full disk does.
    script = """
        import pathlib, resource, sys
        import numpy as np
        from huatuo_jax.hf.safetensors_files import TensorToWrite, write_safetensors

        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        tensors = [
            TensorToWrite(name, (500,), np.dtype("f4"), lambda: np.zeros(500, np.float32))
            for name in "abcd"
        ]
        try:
            write_safetensors(pathlib.Path(sys.argv[1]), tensors, max_shard_size=10**6)
        except OSError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    output = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    path = tmp_path / "model.safetensors"
    assert path.stat().st_size == 5000
    header_size = int.from_bytes(path.read_bytes()[:8], "little")
    total = 8 + header_size + 4 * 2000
    assert output.stdout.count("\n") == 1
    assert f"{total - 5000} of {total} bytes of the weights could not be written" in output.stdout
    assert str(path) in output.stdout


def test_a_disk_found_full_at_fsync_is_told_too(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device; 0 of .*safetensors") as caught:
        write_safetensors(tmp_path, announce({"w": np.zeros(2)}), max_shard_size=100)
    assert caught.value.errno == 28


def test_trouble_in_producing_a_tensor_is_not_blamed_on_the_written_file(tmp_path):
    def produce():
        raise FileNotFoundError(2, "No such file or directory", "source.bin")

    tensors = [TensorToWrite("w", (2,), np.dtype(np.float32), produce)]
    with pytest.raises(FileNotFoundError) as caught:
        write_safetensors(tmp_path, tensors, max_shard_size=100)
    assert str(caught.value) == "[Errno 2] No such file or directory: 'source.bin'"


def test_the_index_counts_parameters_and_bytes(tmp_path):
    arrays = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.float16)}
    write_safetensors(tmp_path, announce(arrays), max_shard_size=24)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_parameters": 11, "total_size": 34},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        },
    }
