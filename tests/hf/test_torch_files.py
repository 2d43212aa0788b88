import collections
import io
import os
import pickle
import random
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from huatuo_jax.hf.safetensors_files import SUPPORTED_DTYPES
from huatuo_jax.hf.weight_files import read_torch_layout

BOTH_LAYOUTS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])


def save(state, path, is_zip):
    torch.save(state, path, _use_new_zipfile_serialization=is_zip)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Any bit pattern may turn up: not-a-numbers, infinities, negative zeros."""
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    bits = torch.randint(0, high, (num_bytes,), dtype=torch.uint8)
    return bits.view(dtype).reshape(shape)


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_reads_as_torch_does(path):
    assert_holds(path, torch.load(path, weights_only=True))


def assert_holds(path, expected):
    layout = read_torch_layout(path)
    assert list(layout) == list(expected)
    for name, tensor in expected.items():
        array = layout[name].read()
        assert array.shape == tuple(tensor.shape)
        assert array.dtype == SUPPORTED_DTYPES[str(tensor.dtype).removeprefix("torch.")]
        assert array.tobytes() == bits_of(tensor), name
        assert array.flags.writeable and array.flags.c_contiguous


@BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES)
def test_every_dtype_is_read_bit_for_bit_as_torch_held_it(tmp_path, dtype, is_zip):
    path = tmp_path / "pytorch_model.bin"
    state = {
        "block": random_tensor((3, 5, 7), getattr(torch, dtype)),
        "scalar": random_tensor((), getattr(torch, dtype)),
        "empty": random_tensor((0, 4), getattr(torch, dtype)),
    }
    save(state, path, is_zip)
    # Not torch.load: it cannot read back its own legacy files of unsigned integers.
    assert_holds(path, state)


@BOTH_LAYOUTS
def test_views_and_shared_storages_are_read_as_torch_reads_them(tmp_path, is_zip):
    path = tmp_path / "pytorch_model.bin"
    base = torch.randn(6, 8)
    state = collections.OrderedDict(
        embedding=base,
        tied_head=base,
        offset=base[2:],
        column=base[:, 3],
        columns=base[:, 2:5],
        every_second_row=base[1::2],
        transposed=base.t(),
        permuted=base.reshape(2, 3, 8).permute(2, 0, 1),
        expanded=base[:1].expand(4, 8),
        one_wide=torch.randn(5, 9)[:, 4:5],
        last_element=base[5, 7],
        parameter=torch.nn.Parameter(torch.randn(3, 2).to(torch.bfloat16).t()),
    )
    save(state, path, is_zip)
    assert_reads_as_torch_does(path)


@BOTH_LAYOUTS
def test_tied_tensors_are_read_into_separate_arrays(tmp_path, is_zip):
    path = tmp_path / "pytorch_model.bin"
    weight = torch.ones(3)
    save({"embedding": weight, "head": weight}, path, is_zip)
    layout = read_torch_layout(path)
    embedding, head = layout["embedding"].read(), layout["head"].read()
    embedding[:] = 7
    np.testing.assert_array_equal(head, [1, 1, 1])


@BOTH_LAYOUTS
def test_a_state_dict_of_a_module_with_its_metadata_is_read(tmp_path, is_zip):
    path = tmp_path / "pytorch_model.bin"
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).half()
    save(module.state_dict(), path, is_zip)
    assert_reads_as_torch_does(path)
    assert read_torch_layout(path)["1.num_batches_tracked"].dtype == np.int64


def test_many_storages_of_a_zip_keep_apart(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({f"t{i}": torch.full((i % 7, 3), i) for i in range(120)}, path)
    assert_reads_as_torch_does(path)


@BOTH_LAYOUTS
def test_any_cut_of_a_torch_file_is_noticed_at_open(tmp_path, is_zip):
    path = tmp_path / "pytorch_model.bin"
    save({"a": torch.arange(20.0), "b": torch.zeros(3, dtype=torch.int8)}, path, is_zip)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: .*cut short"):
            read_torch_layout(path)


@BOTH_LAYOUTS
def test_a_damaged_file_gives_a_value_error_or_the_right_shapes(tmp_path, is_zip):
    path = tmp_path / "pytorch_model.bin"
    save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(3).half()}, path, is_zip)
    whole = path.read_bytes()
    chooser = random.Random(0)
    num_refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[chooser.randrange(len(whole))] ^= 1 << chooser.randrange(8)
        path.write_bytes(damaged)
        try:
            for tensor in read_torch_layout(path).values():
                tensor.read()
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            num_refused += 1
    assert num_refused > 50


class Attack:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@BOTH_LAYOUTS
def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(tmp_path, is_zip):
    path, marker = tmp_path / "pytorch_model.bin", tmp_path / "marker"
    save({"w": torch.ones(2), "x": Attack(os.system, f"touch {marker}")}, path, is_zip)
    with pytest.raises(ValueError, match=r"asks for 'posix\.system', which was refused"):
        read_torch_layout(path)
    assert not marker.exists()


@BOTH_LAYOUTS
@pytest.mark.parametrize(
    ("payload", "named"),
    [
        (Attack(eval, "1 + 1"), "__builtin__.eval"),
        (Attack(getattr, "text", "upper"), "__builtin__.getattr"),
        (Attack(torch.load, "other.bin"), "torch.serialization.load"),
        (np.ones(2), "numpy"),
        (torch.zeros(2, dtype=torch.complex64), "torch.ComplexFloatStorage"),
        (torch.zeros(2, dtype=torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (torch.zeros(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (torch.device("cpu"), "torch.device"),
    ],
)
def test_whatever_is_no_plain_tensor_is_refused_by_name(tmp_path, payload, named, is_zip):
    path = tmp_path / "pytorch_model.bin"
    save({"w": payload}, path, is_zip)
    with pytest.raises(ValueError, match=f"asks for '{named}.*refused and not run"):
        read_torch_layout(path)


def rewrite_zip(path, **changes):
    """Save the archive again with some of its entries' contents replaced."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, changes.get(name.rpartition("/")[2].partition(".")[0], content))


@pytest.mark.parametrize(
    "target", ["torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict"]
)
@pytest.mark.parametrize("through", ["__dict__", "setattr"])
def test_a_pickle_cannot_alter_what_it_is_given(tmp_path, target, through):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(2)}, path)
    # The opcode BUILD sets attributes: {"name": 1} in __dict__, (None, {"name": 1}) by setattr.
    state = b"}X\x04\x00\x00\x00nameK\x01s"
    if through == "setattr":
        state = b"N" + state + b"\x86"
    rewrite_zip(
        path, data=b"\x80\x02c" + target.replace(" ", "\n").encode() + b"\n" + state + b"b."
    )
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: damaged"):
        read_torch_layout(path)
    torch.save({"w": torch.ones(2)}, path)
    assert_reads_as_torch_does(path)


class StorageId(tuple):
    """Saved the way torch saves a storage: as a reference to bytes kept elsewhere."""


class TensorPickler(pickle.Pickler):
    def persistent_id(self, value):
        return tuple(value) if isinstance(value, StorageId) else None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("offset", 0),
        ("offset", 1),
        ("offset", -1),
        ("shape", (3, 2)),
        ("shape", (2,)),
        ("shape", (2.0, 2)),
        ("strides", (3, 1)),
        ("strides", (-1, 1)),
        ("num_elements", 5),
        ("num_elements", "4"),
        ("key", "1"),
        ("key", "../data/0"),
    ],
)
def test_a_description_that_does_not_fit_its_storage_is_refused(tmp_path, field, value):
    path = tmp_path / "pytorch_model.bin"
    weight = torch.arange(4.0).reshape(2, 2)
    torch.save({"w": weight}, path)
    fields = {"offset": 0, "shape": (2, 2), "strides": (2, 1), "num_elements": 4, "key": "0"}
    fields[field] = value
    storage = StorageId(
        ("storage", torch.FloatStorage, fields["key"], "cpu", fields["num_elements"])
    )
    tensor = Attack(
        torch._utils._rebuild_tensor_v2,
        *(storage, fields["offset"], fields["shape"], fields["strides"], False, {}),
    )
    description = io.BytesIO()
    TensorPickler(description, protocol=2).dump({"w": tensor})
    rewrite_zip(path, data=description.getvalue())
    if (field, value) == ("offset", 0):
        assert_holds(path, {"w": weight})
    else:
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: "):
            read_torch_layout(path)


def test_a_big_endian_file_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(2)}, path)
    rewrite_zip(path, byteorder=b"little")
    assert_reads_as_torch_does(path)
    rewrite_zip(path, byteorder=b"big")
    with pytest.raises(ValueError, match="written on a big-endian machine"):
        read_torch_layout(path)


@BOTH_LAYOUTS
@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([torch.ones(2)], "holds a list; it must be a dict of tensors"),
        ({"model": {"w": torch.ones(2)}}, "'model' is a dict; each entry must be"),
        ({"step": 3}, "'step' is a int; each entry must be"),
        ({0: torch.ones(2)}, "0 is a Tensor; each entry must be a name and a tensor"),
        ({"s": torch.ones(2).untyped_storage()}, "'s' is a Storage; each entry must be"),
    ],
)
def test_what_is_no_flat_dict_of_tensors_is_refused(tmp_path, state, message, is_zip):
    path = tmp_path / "pytorch_model.bin"
    save(state, path, is_zip)
    with pytest.raises(ValueError, match=message):
        read_torch_layout(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps({"w": [1.0, 2.0]}))
    with pytest.raises(ValueError, match="not a file of torch.save in either of its layouts"):
        read_torch_layout(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match="a zip archive, but not one of torch.save"):
        read_torch_layout(path)


def test_a_bfloat16_weight_has_the_dtype_of_ml_dtypes(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}, path)
    array = read_torch_layout(path)["w"].read()
    assert array.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(array.astype(np.float32), [1.5, -2.0])
