"""`metrics.jsonl`: what is written, and what a restart cuts off."""

import json

import pytest
from tensorboardX.proto.event_pb2 import Event

from huatuo_jax.core.files import as_path
from huatuo_jax.training.metrics import MetricsLog, cut_rows, is_time_field, read_rows
from huatuo_jax.training.trackers import TensorBoard
from tests.bucket_server import repeat_at_once


def _write(path, **kwargs):
    settings = {"after_step": None, "evaluated": False, "tensorboard": None, "stage": "sft"}
    with MetricsLog(path, **(settings | kwargs)) as log:
        for step in (1, 2, 3):
            log.write(step, {"train/loss": 1.0 / step})
            if step == 2:
                log.write(step, {"eval/loss": 5.0})


def _kept(path):
    return [(row["step"], "eval/loss" in row) for row in read_rows(path)]


def test_a_row_has_step_time_stage_and_its_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _write(path)
    first = json.loads(path.read_text().splitlines()[0])
    assert list(first) == ["step", "time_s", "stage", "train/loss"]
    assert first["step"] == 1 and first["stage"] == "sft" and first["train/loss"] == 1.0


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, stage="sft", after_step=None, evaluated=False, tensorboard=None) as log:
        log.write(1, {"train/loss": float("nan"), "train/grad_norm": float("inf"), "a": 1.0})
    (row,) = read_rows(path)
    assert set(row) == {"step", "time_s", "stage", "a"}


def _events(content):
    """Step and numbers of each event with any, in a file of TensorBoard."""
    found = []
    while content:  # TFRecord: the length and its checksum, the event and its checksum.
        size = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + size])
        found.append((event.step, {each.tag: each.simple_value for each in event.summary.value}))
        content = content[16 + size :]
    return [(step, numbers) for step, numbers in found if numbers]


def test_tensorboard_gets_all_numbers_of_a_row_in_one_event(tmp_path):
    _write(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "events")
    (path,) = (tmp_path / "events").iterdir()
    rows = _events(path.read_bytes())
    expected = [(1, {"train/loss": 1.0}), (2, {"train/loss": 0.5}), (2, {"eval/loss": 5.0})]
    assert rows[:3] == expected and len(rows) == 4


def test_tensorboard_in_a_bucket_holds_all_events_where_answers_are_lost(bucket, monkeypatch):
    repeat_at_once(monkeypatch.setattr)
    bucket.failing = 0.4
    events = TensorBoard(as_path("gs://bucket/events"), after_step=None)
    for step in range(10):
        events.write(step, {"train/loss": 0.5}, time_s=1.0)
        events.flush()
    events.close()
    (content,) = bucket.files("bucket").values()
    assert _events(content) == [(step, {"train/loss": 0.5}) for step in range(10)]
    assert bucket.failures > 3


@pytest.mark.parametrize(
    ("after_step", "evaluated", "kept"),
    [
        (None, False, []),
        (1, True, [(1, False)]),
        (2, True, [(1, False), (2, False), (2, True)]),
        (2, False, [(1, False), (2, False)]),
        (3, False, [(1, False), (2, False), (2, True), (3, False)]),
    ],
)
def test_rows_past_the_restored_step_are_cut(tmp_path, after_step, evaluated, kept):
    path = tmp_path / "metrics.jsonl"
    _write(path)
    cut_rows(path, after_step=after_step, evaluated=evaluated)
    assert _kept(path) == kept


def test_a_last_row_that_a_kill_cut_short_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _write(path)
    with path.open("a") as file:
        file.write('{"step": 3, "trai')
    assert len(read_rows(path)) == 4
    cut_rows(path, after_step=3, evaluated=False)
    assert path.read_text().endswith("}\n") and len(read_rows(path)) == 4


def test_time_fields_are_told_by_their_names():
    assert is_time_field("time_s") and is_time_field("throughput/tokens_per_s")
    assert not is_time_field("train/loss") and not is_time_field("step")
