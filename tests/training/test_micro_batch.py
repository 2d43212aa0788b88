"""The largest micro-batch that fits: found in few tries, the same for all, or one clear error."""

import math
import types

import pytest

from huatuo_jax.core import distributed, sharding
from huatuo_jax.training import micro_batch, programs
from huatuo_jax.training.micro_batch import (
    check_micro_batch_size,
    largest_that_fits,
    micro_batch_sizes,
    settle,
)
from huatuo_jax.training.programs import GIB, MEMORY_VARIABLE, StageProgram, TooLarge, device_memory
from tests.compiling.small import small_sft
from tests.tiny import one_device


def tried(sizes, limit, *, also=()):
    """What is found and what was tried, where sizes up to a limit fit."""
    tries = []

    def fits(size):
        tries.append(size)
        return size <= limit or size in also

    return largest_that_fits(sizes, fits), tries


@pytest.mark.parametrize("rows", [1, 2, 6, 7, 64, 96, 120])
def test_the_largest_that_fits_is_found_in_few_tries(rows):
    sizes = micro_batch_sizes(rows, one_device())
    assert sizes[0] == rows and sizes[-1] == 1
    for limit in range(rows + 2):
        found, tries = tried(sizes, limit)
        assert found == max((size for size in sizes if size <= limit), default=None)
        assert len(tries) <= 2 + math.log2(len(sizes))
        assert found is None or [size for size in tries if size <= limit][-1] == found


def test_the_whole_batch_is_tried_first_and_may_fit_where_smaller_ones_do_not():
    assert tried([8, 4, 2, 1], 0, also=(8,)) == (8, [8])


def test_a_mesh_divides_what_goes_through_the_model_at_once():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    assert micro_batch_sizes(24, mesh) == [24, 12, 8, 4]


@pytest.fixture
def settled(monkeypatch):
    """Settles a config of 32 rows, of which each takes 1 GiB; gives what was compiled too."""

    def run(*, refuses_from=None, mesh=None, micro_batch_size="auto", **changed):
        cfg = small_sft(**{"sft.micro_batch_size": micro_batch_size}, **changed).sft
        mesh, compiled = mesh or one_device(), []

        def compile_it(program):
            compiled.append(program.rows_at_once)
            if refuses_from is not None and program.rows_at_once >= refuses_from:
                raise TooLarge("Ran out of memory in memory space hbm.")
            return program.rows_at_once

        def count(rows, **_):
            return types.SimpleNamespace(total=rows * GIB)

        def program(size):
            return StageProgram(
                name="sft/update",
                function=sharding.OnMesh(None, mesh),
                arguments=(),
                mesh=mesh,
                rows=32,
                rows_at_once=size,
                in_micro_batches=True,
            )

        monkeypatch.setattr(StageProgram, "compile", compile_it)
        monkeypatch.setattr(micro_batch, "memory_of", count)
        found, made = settle(
            cfg,
            stage="sft",
            rows=32,
            mesh=mesh,
            make=lambda cfg: cfg.rows_at_once,
            programs=lambda size: [program(size)],
        )
        assert made == found.rows_at_once
        return found.micro_batch_size, compiled

    return run


def test_one_line_tells_the_choice_what_it_takes_and_what_there_is(settled, monkeypatch, capsys):
    monkeypatch.setenv(MEMORY_VARIABLE, "20")
    assert settled() == (16, [32, 4, 8, 16])
    assert capsys.readouterr().err == (
        "sft: micro_batch_size=auto: 16 of 32 rows at once; sft/update takes 16 GiB of 19 GiB "
        "(a device's 20 less 5%)\n"
    )


def test_part_of_the_memory_is_left_free(settled, monkeypatch):
    monkeypatch.setenv(MEMORY_VARIABLE, "16.5")
    assert settled()[0] == 8


@pytest.mark.parametrize("given", [4, None])
def test_what_is_said_outright_is_taken_and_nothing_compiled(settled, monkeypatch, given, capsys):
    monkeypatch.setenv(MEMORY_VARIABLE, "1")
    assert settled(micro_batch_size=given) == (given, [])
    assert capsys.readouterr().err == ""


def test_on_cpu_it_is_all_rows_and_nothing_compiled(settled, monkeypatch, capsys):
    monkeypatch.delenv(MEMORY_VARIABLE, raising=False)
    assert settled() == (32, [])
    assert capsys.readouterr().err == ""


def test_what_the_compiler_refuses_does_not_fit(settled, monkeypatch):
    monkeypatch.setenv(MEMORY_VARIABLE, "100")
    assert settled(refuses_from=16)[0] == 8


def test_where_nothing_fits_one_line_names_the_fields_that_would_help(settled, monkeypatch):
    monkeypatch.setenv(MEMORY_VARIABLE, "0.5")
    with pytest.raises(ValueError) as error:
        settled(**{"sft.compute.remat": "none", "sft.compute.compute_dtype": "float32"})
    message = str(error.value)
    assert message.startswith(
        "config.sft.micro_batch_size='auto': not even one row at a time on each device fits: "
        "sft/update takes 1 GiB of 0.475 GiB (a device's 0.5 less 5%); what would help: "
    )
    for field in ("compute.remat='full'", "compute.compute_dtype='bfloat16'", "mesh.tensor=2"):
        assert f"config.sft.{field}" in message
    assert "\n" not in message and "micro_batch_size=" not in message.partition("help: ")[2]
    with pytest.raises(ValueError, match="fits: the compiler says: Ran out of memory in"):
        settled(refuses_from=1)


def test_all_processes_take_what_fits_the_one_with_the_least_memory(settled, monkeypatch):
    """The other process has other devices, and its compiler counts more."""
    monkeypatch.setenv(MEMORY_VARIABLE, "40")
    others = {"device memory": lambda own: 20 * GIB, "memory of a program": lambda own: own + GIB}
    monkeypatch.setattr(distributed, "gather", lambda name, own: [own, others[name](own)])
    assert device_memory(one_device()) == 20 * GIB
    assert settled()[0] == 16
    others["memory of a program"] = lambda own: 2 * own
    assert settled()[0] == 8
    others["memory of a program"] = lambda own: "Ran out of memory" if own > 3 * GIB else own
    assert settled()[0] == 2


class Accelerator:
    """A mesh of devices that tell so much of their memory."""

    def __init__(self, *statistics):
        self.local_devices = [
            types.SimpleNamespace(platform="gpu", memory_stats=lambda one=one: one)
            for one in statistics
        ]


def test_the_least_memory_of_any_device_counts(monkeypatch):
    monkeypatch.delenv(MEMORY_VARIABLE, raising=False)
    told = [{"bytes_limit": number * GIB, "bytes_in_use": GIB} for number in (24, 16)]
    assert device_memory(Accelerator(*told)) == 16 * GIB
    assert device_memory(Accelerator(*told, None)) is None
    assert device_memory(one_device()) is None


def test_devices_that_do_not_tell_their_memory_are_told_of(settled, monkeypatch, capsys):
    monkeypatch.delenv(MEMORY_VARIABLE, raising=False)
    monkeypatch.setattr(micro_batch, "_is_host", lambda mesh: False)
    assert settled() == (32, [])
    assert f"all 32 rows at once, as the devices do not tell their memory; {MEMORY_VARIABLE}" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("text", ["much", "0", "-1", "inf", "nan", ""])
def test_a_memory_that_cannot_be_is_named(monkeypatch, text):
    monkeypatch.setenv(MEMORY_VARIABLE, text)
    with pytest.raises(ValueError, match=f"{MEMORY_VARIABLE}='{text}' must be a number of GiB"):
        programs.device_memory(one_device())


def test_sizes_that_cannot_be_are_named():
    for size in (None, "auto", 4):
        check_micro_batch_size(size, 8, name="batch_size=8")
    for size, message in (
        (0, "micro_batch_size=0 must be at least 1"),
        (3, "micro_batch_size=3 must divide batch_size=8"),
        ("most", "micro_batch_size='most' must be a whole number, 'auto' or None"),
    ):
        with pytest.raises(ValueError, match=message):
            check_micro_batch_size(size, 8, name="batch_size=8")
