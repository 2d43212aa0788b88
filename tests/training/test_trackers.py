"""Metrics in Weights & Biases and MLflow: off by default, by keys of the environment."""

import importlib.util
import json
import sys

import pytest

from huatuo_jax.training import trackers
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.metrics import MetricsLog, read_rows

SETTINGS = {"seed": 3, "optimizer": {"learning_rate": 0.1}}


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    yield
    if "wandb" in sys.modules:  # It reads the environment once.
        sys.modules["wandb"].teardown()


def write(folder, names, steps, *, resumed):
    """A start of a stage that writes rows of these steps."""
    folder.mkdir(parents=True, exist_ok=True)
    opened = trackers.open_trackers(names, folder, settings=SETTINGS, resumed=resumed)
    with MetricsLog(
        folder / "metrics.jsonl",
        stage="sft",
        after_step=steps[0] - 1 if resumed else None,
        evaluated=False,
        tensorboard=None,
        trackers=opened,
    ) as log:
        for step in steps:
            log.write(step, {"train/loss": 1.0 / step})
    return json.loads((folder / trackers.IDS_FILE).read_text())


def test_nothing_is_sent_unless_it_is_asked_for(tmp_path):
    assert LoopConfig().trackers == ()
    assert trackers.open_trackers((), tmp_path, settings=SETTINGS, resumed=False) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(name, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda one: None if one == name else find(one))
    with pytest.raises(ValueError, match=rf"loop.trackers='{name}' .* 'huatuo_jax\[{name}\]'"):
        trackers.check_trackers((name,))


def test_without_a_key_or_a_server_a_run_does_not_begin():
    pytest.importorskip("mlflow", reason="pip install mlflow-skinny")
    with pytest.raises(ValueError, match="'mlflow' needs MLFLOW_TRACKING_URI"):
        trackers.check_trackers(("mlflow",))
    pytest.importorskip("wandb", reason="pip install wandb")
    with pytest.raises(ValueError, match="'wandb' needs WANDB_API_KEY"):
        trackers.check_trackers(("wandb",))


def test_a_server_that_is_not_there_is_one_line(monkeypatch, tmp_path):
    pytest.importorskip("mlflow", reason="pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ValueError, match=r"loop.trackers: MLflow: .*127\.0\.0\.1"):
        trackers.open_trackers(("mlflow",), tmp_path, settings=SETTINGS, resumed=False)


def test_mlflow_has_the_rows_and_a_resumed_stage_continues_its_run(monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/server")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    trackers.check_trackers(("mlflow",))
    first = write(tmp_path / "run" / "sft", ("mlflow",), (1, 2), resumed=False)
    assert write(tmp_path / "run" / "sft", ("mlflow",), (3, 4), resumed=True) == first
    assert write(tmp_path / "run" / "sft", ("mlflow",), (1,), resumed=False) != first
    client = mlflow.MlflowClient()
    found = client.get_run(first["mlflow"])
    assert found.info.run_name == "run/sft" and found.info.status == "FINISHED"
    assert found.data.params == {"seed": "3", "optimizer.learning_rate": "0.1"}
    history = client.get_metric_history(first["mlflow"], "train/loss")
    assert [(one.step, one.value) for one in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]


def test_wandb_has_the_rows_and_keeps_no_key_in_the_run(monkeypatch, tmp_path):
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    trackers.check_trackers(("wandb",))
    folder = tmp_path / "run" / "sft"
    first = write(folder, ("wandb",), (1, 2), resumed=False)
    assert write(folder, ("wandb",), (3, 4), resumed=True) == first
    assert len(read_rows(folder / "metrics.jsonl")) == 4
    kept = sorted(path.name for path in (folder / "wandb").glob("offline-run-*"))
    assert len(kept) == 2 and all(name.endswith(first["wandb"]) for name in kept)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert all(b"k" * 40 not in path.read_bytes() for path in files)
