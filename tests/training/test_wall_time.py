"""Goodput: what the seconds of a stage were spent on, over restarts."""

import json
import time

import jax
import jax.monitoring
import pytest

from huatuo_jax.training import wall_time
from huatuo_jax.training.metrics import MetricsLog, read_rows
from huatuo_jax.training.wall_time import STARTS, TimeSpent, WallTime

COMPILED = "/jax/core/compile/backend_compile_duration"


def row(time_s, **seconds):
    return {"time_s": time_s} | {f"throughput/{name}_s": value for name, value in seconds.items()}


def test_time_is_split_into_what_trained_and_what_it_was_lost_to():
    found = WallTime(
        1000.0,
        [
            row(1030.0, trained=10.0, compile=5.0, data_wait=1.0),
            row(1040.0, evaluation=4.0, compile=2.0),
            # Killed here; the rows past the checkpoint were cut, and it was started again later.
            row(1100.0, trained=20.0, saving=3.0, reporting=1.0),
        ],
    )
    assert found.seconds == 100.0 and found.goodput == 0.3
    assert found.lost_s() == {
        "compiling": 7.0,
        "waiting for data": 1.0,
        "evaluating": 4.0,
        "judging": 0.0,
        "saving": 3.0,
        "writing the report": 1.0,
        STARTS: 54.0,
    }


def test_a_stage_that_has_just_begun_has_a_share():
    assert WallTime(1000.0, []).goodput == 0.0
    # Clocks are read to a second, and may be set back.
    assert WallTime(1000.5, [row(1000.0, trained=1.0)]).goodput == 0.0
    assert WallTime(1000.0, [row(1001.0, trained=1.5)]).goodput == 1.0


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""

    class Clock:
        now = 50.0

        def moves(self, seconds, *, compiling=0.0):
            self.now += seconds
            if compiling:
                jax.monitoring.record_event_duration_secs(COMPILED, compiling)

    made = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: made.now)
    return made


def test_compiling_counts_once_wherever_it_happens(clock):
    with TimeSpent() as spent:
        clock.moves(7.0, compiling=5.0)
        assert spent.of_step(7.0, waited_s=1.0) == {
            "throughput/compile_s": 5.0,
            "throughput/trained_s": 1.0,
        }
        with spent.on("evaluation"):
            clock.moves(4.0, compiling=3.0)
        assert spent.take() == {"throughput/compile_s": 3.0, "throughput/evaluation_s": 1.0}
        with spent.on("saving"):
            clock.moves(2.0)
        clock.moves(3.0)
        assert spent.of_step(3.0) == {"throughput/saving_s": 2.0, "throughput/trained_s": 3.0}


def test_events_inside_of_an_event_are_not_counted_again(clock):
    with TimeSpent() as spent:
        clock.moves(2.0, compiling=2.0)
        clock.moves(1.0)
        clock.moves(1.0, compiling=1.0)
        jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_trace_duration", 4.0)
        jax.monitoring.record_event_duration_secs("/jax/checkpoint/write", 9.0)
        assert spent.of_step(4.0)["throughput/compile_s"] == 4.0
    clock.moves(1.0, compiling=1.0)
    assert spent.of_step(1.0) == {"throughput/trained_s": 1.0}


def test_what_jax_compiles_is_heard():
    with TimeSpent() as spent:
        jax.jit(lambda x: x * 3 + time.perf_counter())(1.0)
        assert spent.of_step(100.0)["throughput/compile_s"] > 0


def test_the_share_stands_in_each_row_and_goes_on_after_a_restart(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    settings = {"stage": "sft", "evaluated": False, "tensorboard": None, "began_s": 1000.0}
    now = iter((1010.0, 1020.0, 1100.0))
    monkeypatch.setattr(time, "time", lambda: next(now))
    with MetricsLog(path, after_step=None, **settings) as log:
        log.write(1, {"train/loss": 1.0, "throughput/trained_s": 5.0})
        log.write(2, {"train/loss": 1.0, "throughput/trained_s": 10.0})
    with MetricsLog(path, after_step=1, **settings) as log:
        log.write(2, {"train/loss": 1.0, "throughput/trained_s": 15.0})
    assert [one[wall_time.GOODPUT] for one in read_rows(path)] == [0.5, 0.2]
    assert json.loads(path.read_text().splitlines()[1])["throughput/trained_s"] == 15.0
