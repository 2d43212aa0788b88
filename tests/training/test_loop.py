"""The loop in one process: bad batches, evaluation, what is on disk at the end."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from huatuo_jax.checkpoint.store import CheckpointStore
from huatuo_jax.core import sharding
from huatuo_jax.training.loop import Diverged, LoopConfig, train
from huatuo_jax.training.metrics import is_time_field, read_rows
from huatuo_jax.training.wall_time import WallTime
from tests.training.tiny import random_batch, run_tiny, tiny_job

LOOP = LoopConfig(
    evaluate_every=4,
    checkpoint_every=3,
    keep_checkpoints=2,
    log_every=2,
    max_not_finite_in_a_row=3,
    tensorboard=True,
)


def _mesh():
    return sharding.make_mesh(fsdp=1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    job = tiny_job(workdir, mesh=_mesh(), num_steps=10, spoilt=(2,))
    state, evaluation = train(job, LOOP)
    return job, state, evaluation, read_rows(job.directory.metrics)


def test_every_step_has_a_row_and_every_evaluation_one(finished):
    _, _, _, rows = finished
    assert [row["step"] for row in rows if "train/updates" in row] == list(range(1, 11))
    assert [row["step"] for row in rows if "eval/loss" in row] == [4, 8, 10]
    assert all(row["stage"] == "sft" for row in rows)


def test_a_step_with_a_loss_that_is_not_finite_is_skipped_and_named(finished, capfd):
    job, state, _, rows = finished
    bad = next(row for row in rows if row["step"] == 3 and "train/updates" in row)
    assert "train/loss" not in bad and bad["train/steps_not_finite"] == 1
    assert bad["train/updates"] == 2
    assert int(state.num_updates) == 9 and int(state.step) == 10


def test_the_loss_falls_and_the_row_says_what_the_batch_held(finished):
    _, _, evaluation, rows = finished
    steps = [row for row in rows if "train/updates" in row]
    batch = random_batch(0)
    assert steps[0]["train/tokens"] == (batch["segment_ids"] > 0).sum()
    assert steps[0]["train/trained_tokens"] == batch["trained_mask"].sum()
    evaluations = [row["eval/loss"] for row in rows if "eval/loss" in row]
    assert evaluations[-1] < evaluations[0]
    assert evaluation["eval/loss"] == evaluations[-1]
    assert evaluation["eval/perplexity"] == pytest.approx(np.exp(evaluations[-1]))


def test_the_loss_of_an_evaluation_is_the_mean_over_its_kinds(finished):
    _, _, evaluation, _ = finished
    kinds = [name for name in evaluation if name.startswith("eval/loss/")]
    assert len(kinds) == 3  # Rows have two or three dialogues, of the first three kinds.
    assert min(evaluation[k] for k in kinds) < evaluation["eval/loss"]
    assert max(evaluation[k] for k in kinds) > evaluation["eval/loss"]


def test_the_time_of_a_step_is_split(finished):
    _, _, _, rows = finished
    for row in (row for row in rows if "train/updates" in row):
        split = row["throughput/data_wait_s"] + row["throughput/compute_s"]
        assert split == pytest.approx(row["throughput/step_s"])
        assert row["throughput/tokens_per_s"] * row["throughput/step_s"] == pytest.approx(
            row["train/tokens"]
        )
        assert "throughput/model_flops_utilisation" not in row  # No peak is known of a CPU.


def test_all_time_is_told_as_trained_or_lost_to_something(finished):
    job, _, _, rows = finished
    found = WallTime(job.directory.began_s(), rows)
    lost = found.lost_s()
    assert all(lost[one] > 0 for one in ("compiling", "waiting for data", "evaluating", "saving"))
    assert found.trained_s + sum(lost.values()) == pytest.approx(found.seconds)
    assert all(0 <= row["throughput/goodput"] <= 1 for row in rows)
    assert rows[-1]["throughput/goodput"] == found.goodput > 0
    evaluations = [row for row in rows if "eval/loss" in row]
    assert all(row["throughput/evaluation_s"] > 0 for row in evaluations)


def test_what_follows_an_evaluation_finds_its_row_on_disk(tmp_path):
    job = tiny_job(tmp_path, mesh=_mesh(), num_steps=10)
    found = []
    followed = dataclasses.replace(
        job, after_evaluation=lambda: found.append(read_rows(job.directory.metrics)[-1])
    )
    train(followed, LOOP)
    assert [row["step"] for row in found if "eval/loss" in row] == [4, 8, 10]
    times = [row for row in read_rows(job.directory.metrics) if "throughput/reporting_s" in row]
    assert [row["step"] for row in times] == [5, 9]


def test_the_newest_checkpoints_and_the_best_one_are_kept(finished):
    job, _, _, rows = finished
    with CheckpointStore(
        job.directory.checkpoints, read_only=True, best_metric="eval/loss"
    ) as store:
        assert set(store.all_steps()) >= {9, 10}
        assert len(store.all_steps()) <= 3
        restored = store.restore(abstract_state=job.abstract_state, config=job.decisive)
    assert restored.extra == {"data": {"next": 10}, "evaluated": True}


def test_tensorboard_has_events(finished):
    job, _, _, _ = finished
    assert list(job.directory.tensorboard.glob("events.out.tfevents.*"))


def test_lines_say_step_loss_speed_and_time_left(tmp_path, capsys):
    run_tiny(tmp_path, num_steps=4, spoilt=(1,), loop=LOOP)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("sft: step 4/4: loss ") and "tokens/s" in line for line in lines)
    skipped = [line for line in lines if "not finite" in line]
    assert len(skipped) == 1 and not any("nan" in line for line in lines)
    assert "step 2:" in skipped[0] and "dialogue-1-0, dialogue-1-1" in skipped[0]


def test_too_many_bad_steps_in_a_row_stop_the_run_and_name_the_batch(tmp_path):
    job = tiny_job(tmp_path, mesh=_mesh(), num_steps=10, spoilt=(4, 5, 6))
    with pytest.raises(Diverged, match="step 7: .*dialogue-6-0, .*3 steps in a row"):
        train(job, LOOP)
    # The state of step 6 is that of step 4: going on from there stops at once, at the same place.
    with pytest.raises(Diverged, match="step 7: .*dialogue-6-0, .*3 steps in a row"):
        train(tiny_job(tmp_path, mesh=_mesh(), num_steps=10, spoilt=(4, 5, 6)), LOOP)


@pytest.mark.slow
def test_two_runs_in_one_process_are_the_same_but_for_time(tmp_path):
    runs = []
    for name in ("first", "second"):
        arrays = run_tiny(tmp_path / name, num_steps=5, loop=LOOP)
        text = (tmp_path / name / "sft" / "metrics.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        runs.append((arrays, [{k: v for k, v in r.items() if not is_time_field(k)} for r in rows]))
    assert runs[0][1] == runs[1][1]
    for path, array in runs[0][0].items():
        assert array.tobytes() == runs[1][0][path].tobytes(), path


def test_a_number_of_steps_below_one_is_refused():
    with pytest.raises(ValueError, match="LoopConfig.checkpoint_every=0 must be at least 1"):
        LoopConfig(checkpoint_every=0)
