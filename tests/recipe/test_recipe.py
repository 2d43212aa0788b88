"""The order of stages, what is run again after a stop or a kill, and what is refused."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from huatuo_jax.checkpoint.models import find_model, load_params
from huatuo_jax.core.config import load_card
from huatuo_jax.recipe import stages
from huatuo_jax.recipe.recipe import JOURNAL_FILE, Journal, run_stages, unfinished_stages
from huatuo_jax.recipe.stages import Stage, _save_base
from huatuo_jax.training.initial_model import open_model
from huatuo_jax.training.optimizer import make_optimizer
from tests.recipe.tiny import tiny_recipe


class Planted:
    """Three stages that write a file each, from the file before, and count their runs."""

    def __init__(self, folder, *, factor=2, following=()):
        self.folder, self.factor, self.following = folder, factor, following
        self.runs: list[str] = []
        self.during = {}

    def stages(self):
        names = ("one", "two", "three")
        places = [self.folder / name for name in names]
        return [
            Stage(
                name,
                {"factor": self.factor} if name == "two" else {},
                {"before": str(places[index - 1])} if index else {},
                (places[index],),
                lambda name=name, index=index: self._run(name, places, index),
                follows=name in self.following,
            )
            for index, name in enumerate(names)
        ]

    def _run(self, name, places, index):
        self.runs.append(name)
        if name in self.during:
            self.during[name]()
        value = int(places[index - 1].read_text()) * self.factor if index else 3
        places[index].write_text(str(value))
        return {"value": value}

    def run(self):
        stages, journal = self.stages(), Journal(self.folder)
        run_stages(stages, journal, unfinished_stages(stages, journal))
        return int((self.folder / "three").read_text())


def test_stages_run_in_order_once_and_tell_which_of_how_many(tmp_path, capsys):
    planted = Planted(tmp_path)
    assert planted.run() == 12 and planted.runs == ["one", "two", "three"]
    assert "stage 2 of 3: two\n" in capsys.readouterr().out
    assert planted.run() == 12 and planted.runs == ["one", "two", "three"]
    assert "stage 2 of 3: two, finished before" in capsys.readouterr().out


def test_a_stage_that_failed_is_run_again_and_those_before_it_are_not(tmp_path):
    planted = Planted(tmp_path)
    planted.during["two"] = lambda: (_ for _ in ()).throw(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        planted.run()
    planted.during.clear()
    assert planted.run() == 12 and planted.runs == ["one", "two", "two", "three"]
    entry = json.loads((tmp_path / JOURNAL_FILE).read_text())["two"]
    assert len(entry["starts"]) == 2 and entry["result"] == {"value": 6}


@pytest.mark.parametrize("killed", ["one", "two", "three"])
def test_a_run_killed_inside_a_stage_ends_as_an_unbroken_one(tmp_path, killed):
    unbroken = Planted(tmp_path / "unbroken")
    unbroken.folder.mkdir()
    planted = Planted(tmp_path / "killed")
    planted.folder.mkdir()
    planted.during[killed] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    child = os.fork()
    if not child:
        planted.run()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    planted.during.clear()
    assert planted.run() == unbroken.run()
    assert planted.runs == unbroken.runs[unbroken.runs.index(killed) :]


def test_a_finished_stage_with_other_settings_is_refused_by_name(tmp_path):
    Planted(tmp_path).run()
    with pytest.raises(ValueError, match="stage 'two' is finished .* factor: saved 2, now 5"):
        Planted(tmp_path, factor=5).run()


def test_a_finished_stage_whose_input_has_changed_is_refused_by_name(tmp_path):
    Planted(tmp_path).run()
    (tmp_path / "one").write_text("4")
    with pytest.raises(ValueError, match="stage 'two' is finished .* before: the stage was made"):
        Planted(tmp_path).run()


def test_a_stage_whose_output_was_removed_is_run_again(tmp_path):
    planted = Planted(tmp_path)
    planted.run()
    (tmp_path / "three").unlink()
    assert planted.run() == 12 and planted.runs[3:] == ["three"]


def test_a_stage_that_follows_is_made_anew_after_any_before_it_and_where_it_has_changed(tmp_path):
    planted = Planted(tmp_path, following=("two", "three"))
    assert planted.run() == 12
    (tmp_path / "two").unlink()
    assert planted.run() == 12 and planted.runs[3:] == ["two", "three"]
    (tmp_path / "one").write_text("4")
    assert planted.run() == 16 and planted.runs[5:] == ["two", "three"]
    assert planted.run() == 16 and len(planted.runs) == 7
    changed = Planted(tmp_path, factor=5, following=("two", "three"))
    assert changed.run() == 100 and changed.runs == ["two", "three"]


def test_the_base_model_is_what_fine_tuning_begins_with_whatever_its_warm_up(tmp_path):
    recipe = tiny_recipe(tmp_path / "mine.jsonl")
    optimizer = dataclasses.replace(recipe.sft.optimizer, warmup_steps=2)
    cfg = dataclasses.replace(recipe, sft=dataclasses.replace(recipe.sft, optimizer=optimizer))
    _save_base(cfg, tmp_path / "base")
    model = open_model(cfg.sft.model, cfg.sft.compute.compute_config())
    state = model.make_state(
        jax.random.key(cfg.sft.seed), make_optimizer(optimizer, num_steps=2), cfg.sft.mesh.make()
    )
    saved = load_params(find_model(tmp_path / "base"))
    jax.tree.map(np.testing.assert_array_equal, saved, dict(state.variables["params"]))


def test_a_report_of_an_unfinished_run_is_written_and_ends_nothing(tmp_path, monkeypatch, capsys):
    cfg = load_card("rlaif")
    write = stages._reports_so_far(cfg, tmp_path)
    journal = Journal(tmp_path)
    journal.start("sft", {}, {})
    write()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "not finished yet: sft" in page
    journal.finish("sft", {})
    journal.start("report", {}, {})  # The stage that writes the page.
    write()
    assert "not finished yet" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    (tmp_path / "recipe.json").write_text("{")
    write()
    assert "report: not written, " in capsys.readouterr().err
    without = dataclasses.replace(cfg, stages=("sft",))
    assert stages._reports_so_far(without, tmp_path) is None
