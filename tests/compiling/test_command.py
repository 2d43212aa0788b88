"""What a user is told: of topologies, of what does not fit, and of settings that were tried."""

import dataclasses
import importlib.util
import types

import jax
import pytest

from huatuo_jax.compiling import hardware, report
from huatuo_jax.compiling import report as units
from huatuo_jax.compiling.command import REMAT, micro_batches, recommended, sweep, with_settings
from huatuo_jax.compiling.costs import Costs, Roofline
from huatuo_jax.compiling.programs import programs_of
from huatuo_jax.compiling.report import Analysis, Misfit, largest_arguments
from huatuo_jax.training.micro_batch import advice
from huatuo_jax.training.programs import Memory, bytes_on_device
from tests.compiling.small import small_sft

GIB = 1 << 30


def config(**changed):
    return small_sft(**changed)


def program(**changed):
    (found,) = programs_of(config(**changed), jax.devices())
    return found


def analysed(of, *, total=GIB, capacity=16 * GIB, step_s=1.0):
    return Analysis(
        program=of,
        seconds=1.0,
        memory=Memory(total, 0, 0, 0, 0, capacity),
        costs=Costs(1e12, 0.0, 1e9, 0),
        compiler_flops=1e11,
        collectives=[],
        roofline=Roofline(step_s, 0.0, 0.0, 0.5),
        splash=[],
        cudnn=[],
        stacked_gathers=[],
        arguments=[],
        values=[],
        advice=[],
    )


def refused(of):
    return Misfit(
        program=of,
        seconds=1.0,
        message="Ran out of memory on HBM",
        arguments=largest_arguments(of.arguments, 3),
        values=[],
        listed_on="",
        advice=["less of everything"],
    )


@pytest.mark.parametrize(
    ("name", "bounds"),
    [("v5e:1x1", (1, 1, 1)), ("v5e:2x1", (2, 1, 1)), ("v5p:1x1x1", (1, 1, 1)), ("v5e:2x4", None)],
)
def test_a_slice_of_less_than_a_host_is_asked_for_as_a_host_of_its_own(name, bounds, monkeypatch):
    asked = {}

    def describe(*, platform, topology_name, **options):
        asked[topology_name] = options
        return types.SimpleNamespace(devices=[])

    monkeypatch.setenv("TPU_LIBRARY_PATH", "libtpu.so")
    monkeypatch.setattr(hardware.topologies, "get_topology_desc", describe)
    hardware.open_slice(name)
    assert asked == {name: {} if bounds is None else {"chips_per_host_bounds": bounds}}


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:8", "tpu v5e:8x8", "v5e:2x2x2", "v4:8x8"])
def test_an_unknown_topology_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"v5e:8x8 \(2 axes\).*tpu7x:4x4x4 \(3 axes\)") as error:
        hardware.open_slice(name)
    assert name in str(error.value)


def test_without_libtpu_one_line_names_the_extra(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'huatuo_jax\[tpu\]'") as error:
        hardware.open_slice("v5e:2x2")
    assert "\n" not in str(error.value)


def test_bytes_are_those_of_a_devices_shards():
    place = jax.NamedSharding(program().mesh, jax.P(None, "fsdp"))
    leaf = jax.ShapeDtypeStruct((2, 64, 8), "float32", sharding=place)
    assert bytes_on_device({"kernel": leaf}) == 2 * 64 * 8 * 4 // 8
    (buffer,) = largest_arguments({"params": {"kernel": leaf}}, 3)
    assert buffer == ("params/kernel", "float32[2, 8, 8]", 2 * 64 * 8 * 4 // 8)


def test_advice_names_fields_that_would_help_and_only_those():
    wasteful = {
        "sft.compute.remat": "none",
        "sft.compute.compute_dtype": "float32",
        "sft.micro_batch_size": 16,
    }
    found = " ".join(_advice(wasteful, capacity=16 * GIB))
    for field in ("compute_dtype='bfloat16'", "remat='full'", "micro_batch_size=8", "mesh.tensor"):
        assert f"config.sft.{field}" in found or f"config.sft.compute.{field}" in found
    assert "lora" not in found
    lean = {"sft.compute.remat": "full", "sft.micro_batch_size": 8}
    found = " ".join(_advice(lean, capacity=16 * GIB))
    assert "remat" not in found and "micro_batch_size" not in found


def test_states_that_alone_are_too_large_need_fewer_moments_or_more_chips():
    found = " ".join(_advice({}, capacity=1 << 20))
    assert "config.sft.model.lora" in found and "larger slice" in found


def _advice(changed, *, capacity):
    changed_config = config(**changed)
    (found,) = programs_of(changed_config, jax.devices())
    return advice(found, changed_config.sft, capacity=capacity)


def test_what_does_not_fit_shows_its_largest_buffers_and_advice():
    lines = list(report.lines(refused(program())))
    assert any("does NOT fit: Ran out of memory" in line for line in lines)
    assert any("layers/mlp/gate_up/kernel" in line and "float32[" in line for line in lines)
    assert lines[-1] == "    - less of everything"
    assert report.fields(refused(program()))["fits"] is False


def test_what_the_stage_holds_beside_a_program_counts():
    found = analysed(program(), total=15 * GIB)
    assert found.fits
    memory = found.memory._replace(beside=2 * GIB)
    too_large = dataclasses.replace(found, memory=memory)
    assert not too_large.fits
    assert any(
        "17.00 of 16.00 GiB a device: does NOT fit" in line for line in report.lines(too_large)
    )


def test_attention_that_is_not_splash_is_said():
    found = analysed(program())
    assert found.attention_kernel == "xla"
    splash = dataclasses.replace(found, splash=["splash_mha_fwd.1"])
    assert splash.attention_kernel == "splash (1 kernels)"
    cudnn = dataclasses.replace(found, cudnn=["forward", "backward"])
    assert cudnn.attention_kernel == "cudnn (2 kernels)"


def test_a_compiler_that_counts_no_operations_is_not_cited():
    found = analysed(program())
    assert any("by cost_analysis" in line for line in report.lines(found))
    silent = dataclasses.replace(found, compiler_flops=None)
    assert not any("cost_analysis" in line for line in report.lines(silent))
    assert report.fields(silent)["flops"]["compiler_cost_analysis_per_device"] is None


def test_micro_batches_divide_a_step():
    assert list(micro_batches(24, 4)) == [4, 8]
    assert list(micro_batches(32, 4)) == [4, 8, 16, 32]
    assert list(micro_batches(8, 8)) == [8]


def test_a_sweep_recommends_the_fastest_that_fits_and_tries_nothing_larger_than_a_misfit():
    asked = []

    def programs(micro_batch, remat):
        asked.append(remat)
        changed = with_settings(config(), "sft", micro_batch, remat)
        return programs_of(changed, jax.devices())

    def compiled(of):
        """As if memory and time were as simple as this."""
        saved = REMAT[::-1].index(asked[-1])
        if of.rows_at_once * (1 + saved) > 32:
            return refused(of)
        return analysed(of, step_s=1.0 / of.rows_at_once - 0.001 * saved)

    found = sweep(programs, compiled, lambda line: None)
    assert [(one.micro_batch_size, one.remat, one.result.fits) for one in found] == [
        (8, "none", True),
        (16, "none", False),
        (8, "outputs", True),
        (16, "outputs", False),
        (8, "dots", True),
        (16, "dots", True),
        (32, "dots", False),
        (8, "full", True),
        (16, "full", True),
        (32, "full", True),
    ]
    best = recommended(found)
    assert (best.micro_batch_size, best.remat) == (32, "full")
    assert recommended([one for one in found if not one.result.fits]) is None
    assert "does NOT fit" in found[1].line()


def test_settings_of_a_sweep_leave_the_config_itself_alone():
    mine = config()
    changed = with_settings(mine, "sft", 8, "dots")
    assert (changed.sft.micro_batch_size, changed.sft.compute.remat) == (8, "dots")
    assert mine == config()


@pytest.mark.parametrize(
    ("say", "number", "said"),
    [
        (units.count, 1.25e15, "1.25 P"),
        (units.count, 3.4e9, "3.4 G"),
        (units.count, 12.0, "12"),
        (units.duration, 1.1, "1.1 s"),
        (units.duration, 0.00118, "1.18 ms"),
        (units.duration, 1.79e-7, "179 ns"),
        (units.duration, 2e-11, "2e-11 s"),
        (units.size, 104 * GIB, "104 GiB"),
        (units.size, 10 * 1024, "10 KiB"),
        (units.size, 3, "3 B"),
        (units.gib, 1.5 * GIB, "1.50"),
        (units.gib, 0.0008 * GIB, "0.0008"),
        (units.share, 0.456, "46%"),
        (units.share, 0.0012, "0.12%"),
        (units.rate, 12345.6, "12,346"),
        (units.rate, 0.25, "0.25"),
    ],
)
def test_a_number_is_told_in_units_of_its_size(say, number, said):
    assert say(number) == said
    assert float("".join(c for c in say(0) if c.isdigit() or c == ".")) == 0


def test_a_small_program_has_no_figure_that_looks_like_none():
    found = dataclasses.replace(
        analysed(program()),
        costs=Costs(3e6, 2e3, 1e3, 0),
        roofline=Roofline(2e-8, 1e-9, 0.0, 1e-4),
    )
    lines = list(report.lines(found))
    (flops,) = (line for line in lines if "FLOPs" in line)
    (bound,) = (line for line in lines if "roofline" in line)
    assert "3 M compiled" in flops and "2 k attention" in flops
    assert "compute 20 ns, memory 1 ns, interconnect 0 s" in bound and "at most 0.01%" in bound
