"""A run that begins on eight devices resumes on four and on two, with the same results."""

import dataclasses
import itertools
import json

import jax
import pytest

from huatuo_jax.core import sharding
from huatuo_jax.data import SAMPLE_FOLDER
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.preferences.data import ComparisonsConfig, ComparisonSource
from huatuo_jax.reward.config import RewardConfig
from huatuo_jax.reward.stage import run_reward
from huatuo_jax.sft import SftConfig, run_sft
from huatuo_jax.training import loop
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig
from huatuo_jax.training.initial_model import ModelConfig
from huatuo_jax.training.loop import Interrupted, LoopConfig
from huatuo_jax.training.micro_batch import size_on_other_devices
from huatuo_jax.training.optimizer import OptimizerConfig
from huatuo_jax.training.stage import on_devices
from tests.multi_host import metrics
from tests.preferences.tiny import comparisons
from tests.tiny import TOKENIZER, backbone, write_rows

BACKBONE = backbone(max_positions=256)


def _sft(folder):
    return run_sft, SftConfig(
        model=ModelConfig(backbone=BACKBONE, tokenizer=TOKENIZER),
        data=DataConfig(
            sources=(
                SourceConfig(
                    name="said",
                    paths=(str(SAMPLE_FOLDER / "real_conversation.jsonl"),),
                    kind="real_conversation",
                ),
            ),
            row_length=128,
            held_out=HeldOutConfig(share=0.2),
            cache=str(folder / "cache"),
            num_processes=1,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        num_steps=6,
        batch_size=8,
        micro_batch_size=8,
        loop=LoopConfig(evaluate_every=3, checkpoint_every=100, tensorboard=False),
    )


def _reward(folder):
    return run_reward, RewardConfig(
        model=ModelConfig(backbone=BACKBONE, tokenizer=TOKENIZER),
        data=ComparisonsConfig(
            sources=(
                ComparisonSource(
                    paths=(write_rows(folder / "comparisons.jsonl", comparisons(40)),)
                ),
            ),
            max_length=64,
            row_length=128,
            held_out=HeldOutConfig(share=0.2),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.0),
        num_steps=6,
        batch_size=8,
        micro_batch_size=None,
        loop=LoopConfig(evaluate_every=3, checkpoint_every=100, tensorboard=False),
    )


@pytest.fixture
def devices(monkeypatch):
    """Sets how many of the virtual devices there are."""
    make_mesh = sharding.make_mesh

    def there_are(number):
        def make(*, devices=None, **sizes):
            return make_mesh(**sizes, devices=devices or jax.devices()[:number])

        monkeypatch.setattr(sharding, "make_mesh", make)

    return there_are


@pytest.fixture
def preempted_after(monkeypatch):
    """Sets the number of steps after which each start is stopped; None for no stop."""
    asked = iter(())

    def after(steps):
        nonlocal asked
        asked = itertools.count(1) if steps is None else iter(range(-steps + 1, 1))
        monkeypatch.setattr(loop.StopSignals, "requested", lambda _: next(asked) == 0)

    return after


def _decisive(workdir, name):
    return json.loads((workdir / "config.json").read_text())[name]["decisive"]


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        pytest.param("sft", _sft, marks=pytest.mark.slow),
        pytest.param("reward", _reward, marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_on_fewer_devices_with_the_same_losses(
    name, stage, devices, preempted_after, tmp_path, capsys
):
    run, config = stage(tmp_path)
    preempted_after(None)
    devices(8)
    run(config, tmp_path / "unbroken")
    assert "before on" not in capsys.readouterr().err
    for number, steps in ((8, 2), (4, 2), (2, None)):
        devices(number)
        preempted_after(steps)
        if steps is None:
            run(config, tmp_path / "moved")
        else:
            with pytest.raises(Interrupted):
                run(config, tmp_path / "moved")
        told = [line for line in capsys.readouterr().err.splitlines() if "before on" in line]
        assert told == (
            []
            if number == 8
            else [
                f"{name}: now on {number} devices (data 1 x fsdp {number} x tensor 1), before on "
                f"{2 * number} devices (data 1 x fsdp {2 * number} x tensor 1); an optimizer step "
                f"has 8 rows as before, {number} at once"
            ]
        )
    starts = json.loads((tmp_path / "moved" / "environment.json").read_text())["starts"]
    assert [start["mesh"]["fsdp"] for start in starts] == [8, 4, 2]
    assert _decisive(tmp_path / "moved", name) == _decisive(tmp_path / "unbroken", name)
    rows = [tmp_path / run / name / "metrics.jsonl" for run in ("moved", "unbroken")]
    found, expected = (metrics.numbers(path) for path in rows)
    assert found.keys() == expected.keys() and len(found) > 40
    apart = {
        key: (found[key], value)
        for key, value in expected.items()
        if found[key] != pytest.approx(value, rel=1e-5, abs=1e-6)
    }
    assert apart == {}


@pytest.mark.slow
def test_a_size_that_is_set_anew_is_taken_as_it_is(devices, preempted_after, tmp_path, capsys):
    run, config = _sft(tmp_path)
    for number, changed in ((8, config), (4, dataclasses.replace(config, micro_batch_size=4))):
        devices(number)
        preempted_after(1)
        with pytest.raises(Interrupted):
            run(changed, tmp_path / "run")
    assert "8 rows as before, 4 at once" in capsys.readouterr().err
    devices(2)
    mesh = changed.mesh.make()
    told = on_devices(changed, mesh, name="sft", workdir=tmp_path / "run")
    # Four rows on four devices were set last, not those of eight.
    assert told[0].micro_batch_size == 2 and "before on 4 devices" in told[1]
    set_now = dataclasses.replace(config, micro_batch_size=8)
    assert on_devices(set_now, mesh, name="sft", workdir=tmp_path / "run")[0] == set_now


@pytest.mark.parametrize(
    ("size", "rows", "before", "now", "expected"),
    [
        (8, 8, 8, 4, 4),
        (8, 8, 8, 1, 1),
        (16, 64, 8, 2, 4),
        (4, 64, 4, 8, 8),  # Four rows do not divide over eight devices.
        (4, 8, 2, 8, 8),
        (None, 64, 8, 4, 32),
        (None, 64, 4, 8, 64),
        ("auto", 64, 8, 4, "auto"),
        (8, 64, 8, 8, 8),
        (6, 6, 6, 4, 6),  # No size divides: left to the check of the rows.
    ],
)
def test_each_device_holds_no_more_rows_than_before(size, rows, before, now, expected):
    mesh = sharding.make_mesh(devices=jax.devices()[:now])
    assert size_on_other_devices(size, rows, mesh, shards_before=before) == expected
