"""The whole recipe at its smallest: what it leaves, and that kills leave no trace."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.parse

import numpy as np
import pytest

from huatuo_jax.checkpoint.models import find_model, load_params
from huatuo_jax.checkpoint.orbax_files import COMMITTED
from huatuo_jax.core.files import as_path
from huatuo_jax.core.sharding import path_name
from huatuo_jax.recipe.recipe import Journal, run_rlaif
from tests.recipe.tiny import RUN_STAGES, tiny_recipe, write_dialogues

ROOT = pathlib.Path(__file__).parents[2]
MARKER = ".unfinished"
WITH_CHECKPOINTS = ("sft", "reward", "ppo")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "mine.jsonl"
    write_dialogues(path)
    return path


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, data):
    """A run's folder, and what the run printed."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    return folder, run(data, folder).stdout


def start(data, folder, *more, stderr=subprocess.PIPE):
    script = ROOT / "tests" / "recipe" / "run_tiny.py"
    return subprocess.Popen(
        [sys.executable, *map(str, (script, data, folder, *more))],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def run(data, folder):
    process = start(data, folder)
    stdout, stderr = process.communicate(timeout=900)
    assert process.returncode == 0, stderr
    return subprocess.CompletedProcess(process.args, 0, stdout, stderr)


def leaves(folder):
    import jax

    params = load_params(find_model(folder))
    found = jax.tree_util.tree_flatten_with_path(params)[0]
    return {path_name(path): np.asarray(leaf) for path, leaf in found}


def what_stands(folder):
    """All that a run is for, without its times."""
    lines = {
        name: (folder / name).read_text(encoding="utf-8")
        for name in (
            "prompts.jsonl",
            "answers.jsonl",
            "comparisons.jsonl",
            "evaluation.json",
            "evaluation/scored_best_of_n.jsonl",
            "export/release.json",
        )
    }
    lines["ppo result"] = (folder / "ppo" / "finished.json").read_text(encoding="utf-8")
    names = ("base/model", "sft/model", "reward/model", "ppo/model", "export/policy")
    return lines, {name: leaves(folder / name) for name in names}


def test_every_stage_runs_in_order_and_leaves_what_the_design_says(unbroken):
    folder, told = unbroken
    assert re.findall(r"^stage (\d) of 8: (\w+)$", told, re.MULTILINE) == [
        (str(number), name) for number, name in enumerate(RUN_STAGES, start=1)
    ]
    assert all(Journal(folder).is_finished(name) for name in RUN_STAGES)
    for name in ("config.json", "labels.jsonl", "evaluation.json", "report.html"):
        assert (folder / name).is_file(), name


def test_the_evaluation_finds_the_held_out_loss_that_fine_tuning_reported(unbroken):
    folder, _ = unbroken
    reported = json.loads((folder / "sft" / "finished.json").read_text())["eval/loss"]
    found = json.loads((folder / "evaluation.json").read_text())["held_out_loss"]
    assert found["sft"]["eval/loss"] == pytest.approx(reported, rel=1e-6)
    assert found["base"]["eval/loss"] > found["sft"]["eval/loss"]


def test_the_report_holds_the_evaluations_numbers(unbroken):
    folder, _ = unbroken
    page = (folder / "report.html").read_text(encoding="utf-8")
    named = dict(re.findall(r'<data value="([^"]+)" data-name="([^"]+)">', page))
    numbers = {name: float(value) for value, name in named.items()}
    found = json.loads((folder / "evaluation.json").read_text())
    assert numbers["reward_gain"] == found["differences"]["ppo_over_sft"]["reward"]["value"]
    assert numbers["kl_per_sequence"] == found["kl"]["per_sequence"]["value"]


def test_the_exports_load_in_transformers_and_say_the_same(unbroken):
    result = Journal(unbroken[0]).stages["export"]["result"]
    for name in ("policy", "reward"):
        found = result[name]["transformers"]
        assert found["max_difference"] <= 1e-4 * found["output_range"]


def test_what_the_evaluation_decided_is_exported_bit_for_bit(unbroken):
    """Three held-out prompts, beside one for the judgings, tell nothing: it is SFT in any case."""
    folder, _ = unbroken
    decided = json.loads((folder / "evaluation.json").read_text())["release"]
    assert decided["pick"] == "sft" and decided["num_prompts"] == 3
    assert "only 3 prompts were judged" in decided["reason"]
    exported, sft = leaves(folder / "export" / "policy"), leaves(folder / "sft" / "model")
    for path, leaf in sft.items():
        np.testing.assert_array_equal(exported[path], leaf, err_msg=path)
    assert any(
        not np.array_equal(exported[path], leaf)
        for path, leaf in leaves(folder / "ppo" / "model").items()
    )
    told = json.loads((folder / "export" / "release.json").read_text())
    assert (told["policy"], told["sentence"]) == ("sft", decided["reason"])
    assert decided["reason"] in (folder / "report.html").read_text(encoding="utf-8")


def test_best_of_n_is_chosen_among_answers_that_do_not_stand_for_sft(unbroken):
    folder = unbroken[0] / "evaluation"
    sft, best = (
        [json.loads(line) for line in (folder / f"scored_{name}.jsonl").read_text().splitlines()]
        for name in ("sft", "best_of_n")
    )
    for drawn, chosen in zip(sft, best, strict=True):
        assert len(drawn["answers"]) == 2 + 2
        assert chosen["rewards"] == [max(drawn["rewards"][2:])]
        place = 2 + drawn["rewards"][2:].index(chosen["rewards"][0])
        assert chosen["answers"] == [drawn["answers"][place]]
    found = json.loads((unbroken[0] / "evaluation.json").read_text())["models"]
    mean = np.mean([np.mean(one["rewards"][:2]) for one in sft])
    assert found["sft"]["reward"]["value"] == pytest.approx(mean)
    mean = np.mean([one["rewards"][0] for one in best])
    assert found["best_of_n"]["reward"]["value"] == pytest.approx(mean)


def test_the_last_lines_say_what_is_released_and_where_the_report_is(unbroken, data, tmp_path):
    folder, _ = unbroken
    config = tmp_path / "config.py"
    config.write_text(
        "import pathlib\n"
        "from tests.recipe.tiny import tiny_recipe\n"
        f"def get_config():\n    return tiny_recipe(pathlib.Path({str(data)!r}))\n"
    )
    command = [ROOT / "launch" / "train.py", f"--config={config}", f"--workdir={folder}"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reason = json.loads((folder / "evaluation.json").read_text())["release"]["reason"]
    last = [f"released: {reason}", f"report: {folder / 'report.html'}"]
    assert done.stdout.splitlines()[-2:] == last


def test_run_again_nothing_but_the_report_is_made_anew(unbroken, data):
    folder, _ = unbroken
    before = what_stands(folder)
    told = run(data, folder).stdout
    assert told.count(", finished before") == 7
    compare(what_stands(folder), before)


def compare(found, expected):
    assert found[0] == expected[0]
    for name, tree in expected[1].items():
        for path, leaf in tree.items():
            np.testing.assert_array_equal(found[1][name][path], leaf, err_msg=f"{name} {path}")


def test_a_run_killed_in_every_stage_ends_bit_for_bit_as_an_unbroken_one(unbroken, data, tmp_path):
    folder = tmp_path / "run"
    kills = 0
    draw = np.random.default_rng(0)
    for stage in RUN_STAGES:
        process = start(data, folder)
        assert process.stdout is not None
        for line in process.stdout:
            if re.match(rf"stage \d of 8: {stage}$", line):
                time.sleep(float(draw.uniform(0.0, 4.0)))
                break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    run(data, folder)
    assert kills >= len(RUN_STAGES) - 2  # The last ones may be done before they are killed.
    compare(what_stands(folder), what_stands(unbroken[0]))


class Killer:
    """Kills a run at requests to its bucket, before or after they are carried out.

    It remembers the objects that a killed process left in unfinished folders and checkpoints: a
    process that reads the content of one has taken a torn write for whole.
    """

    def __init__(self, bucket, *, kills, most_requests):
        self.kills, self.num_torn, self.torn_reads = 0, 0, []
        self._bucket, self._torn = bucket, set()
        # As many in each stage but the report; some at its first requests, some at late ones.
        requests = np.exp(np.random.default_rng(0).uniform(0, np.log(most_requests), size=kills))
        stages = [1 + number * (len(RUN_STAGES) - 1) // kills for number in range(kills)]
        self._moments = list(zip(stages, map(int, requests), strict=True))
        self._process, self._left, self._waits_for = None, None, None
        bucket.refuses = self

    def begins(self, process):
        """A new process is there, after the one before has been killed."""
        with self._bucket.lock:
            self._process = process
            objects = self._bucket.objects["bucket"]
            unfinished = [name.removesuffix(MARKER) for name in objects if name.endswith(MARKER)]
            unfinished += {
                found[0]
                for name in objects
                if (found := re.match(r".*/checkpoints/\d+/", name))
                and f"{found[0]}{COMMITTED}" not in objects
            }
            torn = {
                stored.generation
                for name, stored in objects.items()
                if name.startswith(tuple(unfinished)) and not name.endswith(MARKER)
            }
            self.num_torn += len(torn - self._torn)
            self._torn |= torn

    def reaches(self, number):
        """The process begins a stage."""
        if self._left is None and self._moments and number >= self._moments[0][0]:
            stage, self._left = self._moments.pop(0)
            name, is_last = RUN_STAGES[stage - 1], stage not in dict(self._moments)
            if is_last and name in WITH_CHECKPOINTS:  # Counted from its first checkpoint on.
                self._left = min(self._left, 40)
                self._waits_for = rf"run/{name}/checkpoints/\d+/{COMMITTED}"
            elif is_last and name == "export":  # In the middle of what it writes.
                self._left = min(self._left, 3)
                self._waits_for = r"run/export/policy/.+\.json"

    def __call__(self, method, path):
        """Nothing is refused but a request that is lost with its process."""
        _, _, query = self._bucket.requests[-1]
        match = re.fullmatch(r".*/b/bucket/o/(.+)", path)
        if method == "GET" and match and (query.get("alt") == "media" or "/download/" in path):
            found = self._bucket.objects["bucket"].get(urllib.parse.unquote(match[1]))
            if found is not None and found.generation in self._torn:
                self.torn_reads.append(path)
        if self._left is None:
            return None
        if self._waits_for is not None:
            objects = self._bucket.objects["bucket"]
            if not any(re.fullmatch(self._waits_for, name) for name in objects):
                return None
            self._waits_for = None
        self._left -= 1
        if self._left:
            return None
        self._left = None
        self.kills += 1
        os.kill(self._process, signal.SIGKILL)
        return 503 if self.kills % 2 else None


def test_a_run_in_a_bucket_killed_twenty_times_ends_bit_for_bit_as_on_a_disk(
    unbroken, data, bucket
):
    """The server answers 503 to one request in five, of half of them after it did what was asked.

    Each moment is some requests after a stage has begun. All of the run's processes are children
    of one that has imported what they need.
    """
    folder = as_path("gs://bucket/run")
    bucket.failing = 0.2
    killer = Killer(bucket, kills=20, most_requests=300)
    process = start(data, folder, "anew", stderr=subprocess.STDOUT)
    assert process.stdout is not None
    told = []
    for line in process.stdout:
        told.append(line)
        if found := re.match(r"process (\d+)$", line):
            killer.begins(int(found[1]))
        elif found := re.match(r"stage (\d) of 8: \w+$", line):
            killer.reaches(int(found[1]))
    assert process.wait() == 0, "".join(told)
    assert killer.kills == 20 and killer.num_torn and bucket.failures > 100, "".join(told)
    resumed = {line.partition(":")[0] for line in told if "resumes from the checkpoint" in line}
    assert resumed == set(WITH_CHECKPOINTS), "".join(told)
    assert killer.torn_reads == []
    bucket.failing = 0.0
    compare(what_stands(folder), what_stands(unbroken[0]))


def test_another_setting_on_a_finished_run_is_refused_and_names_the_stage(unbroken, data):
    import dataclasses

    cfg = tiny_recipe(data)
    answers = dataclasses.replace(cfg.answers, num_samples=5)
    with pytest.raises(ValueError, match="stage 'answers' is finished .*num_samples: saved 3"):
        run_rlaif(dataclasses.replace(cfg, answers=answers), unbroken[0])


def test_other_data_on_a_finished_run_is_refused_and_names_the_file(unbroken, tmp_path):
    write_dialogues(tmp_path / "mine.jsonl", count=30)
    with pytest.raises(ValueError, match="stage 'sft' is finished .*mine.jsonl: the stage was"):
        run_rlaif(tiny_recipe(tmp_path / "mine.jsonl"), unbroken[0])
