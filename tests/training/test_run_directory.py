"""A run's folder: what may change between restarts, and what may not."""

import dataclasses
import json
import subprocess

import pytest

from huatuo_jax.core.config import all_fields, identity, operational
from huatuo_jax.training import run_directory
from huatuo_jax.training.run_directory import begin_stage


@dataclasses.dataclass(frozen=True)
class _Inner:
    rate: float = 0.1
    path: str = operational("here")


@dataclasses.dataclass(frozen=True)
class _Config:
    seed: int = 0
    inner: _Inner = _Inner()
    parts: tuple[_Inner, ...] = (_Inner(),)
    mesh: _Inner = operational(_Inner())


def _begin(folder, config):
    return begin_stage(folder, "sft", settings=all_fields(config), decisive=identity(config))


def test_operational_fields_are_no_part_of_the_identity():
    assert identity(_Config()) == {
        "seed": 0,
        "inner": {"rate": 0.1},
        "parts": [{"rate": 0.1}],
    }
    assert all_fields(_Config())["inner"] == {"rate": 0.1, "path": "here"}


def test_a_decisive_field_may_not_change_once_there_is_a_checkpoint(tmp_path):
    stage = _begin(tmp_path, _Config())
    (stage.checkpoints / "3").mkdir(parents=True)
    changed = _Config(seed=1, inner=_Inner(rate=0.2))
    with pytest.raises(ValueError) as error:
        _begin(tmp_path, changed)
    message = str(error.value)
    assert "stage 'sft'" in message
    assert "inner.rate: saved 0.1, now 0.2" in message and "seed: saved 0, now 1" in message


def test_a_finished_stage_holds_its_settings_too(tmp_path):
    stage = _begin(tmp_path, _Config())
    stage.finish({"step": 3})
    with pytest.raises(ValueError, match="seed: saved 0, now 1"):
        _begin(tmp_path, _Config(seed=1))
    assert _begin(tmp_path, _Config()).result() == {"step": 3}


def test_operational_fields_may_change_and_are_written_down(tmp_path):
    stage = _begin(tmp_path, _Config())
    (stage.checkpoints / "3").mkdir(parents=True)
    _begin(tmp_path, _Config(inner=_Inner(path="there"), mesh=_Inner(rate=5.0)))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["sft"]["settings"]["inner"]["path"] == "there"


def test_before_the_first_checkpoint_everything_may_change(tmp_path):
    stage = _begin(tmp_path, _Config())
    (stage.checkpoints / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    _begin(tmp_path, _Config(seed=1))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["sft"]["decisive"]["seed"] == 1


def test_the_environment_of_every_start_is_written_down(tmp_path):
    _begin(tmp_path, _Config())
    _begin(tmp_path, _Config())
    starts = json.loads((tmp_path / "environment.json").read_text())["starts"]
    assert len(starts) == 2
    assert starts[0]["packages"]["jax"] and starts[0]["devices"]["number"] >= 1
    assert starts[0]["stage"] == "sft" and "git_commit" in starts[0]


def test_a_commit_is_written_down_only_of_a_repository_that_holds_the_code(tmp_path, monkeypatch):
    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        done = subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    code = tmp_path / "installed.py"
    code.write_text("")
    monkeypatch.setattr(run_directory, "__file__", str(code))
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message=somebody else's")
    assert run_directory.environment()["git_commit"] is None
    git("add", "installed.py")
    git("commit", "--quiet", "--message=ours")
    assert run_directory.environment()["git_commit"] == git("rev-parse", "HEAD")
    code.write_text("changed = True\n")
    assert run_directory.environment()["git_commit"] == f"{git('rev-parse', 'HEAD')}+changes"


def test_the_version_of_a_package_that_is_not_installed_is_none(monkeypatch):
    monkeypatch.setattr(run_directory, "_PACKAGES", ("numpy", "not-installed-anywhere"))
    packages = run_directory.environment()["packages"]
    assert packages["numpy"] and packages["not-installed-anywhere"] is None
