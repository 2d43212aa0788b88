"""Saves of a real process, killed at chosen moments, and what is left for the next run."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from huatuo_jax.checkpoint.store import CheckpointStore

# Saves steps 1 and 2, of which it keeps one. At the chosen moment it says so and stands still.
RUN = """
import os, sys, threading, time

moment, directory, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
import jax, numpy as np
from huatuo_jax.checkpoint.store import CheckpointStore


def say(now):
    if now == moment:
        print("ready", flush=True)
        time.sleep(60)


def watch(event, args):
    if event == "open" and moment == "as soon as save returns":
        if str(args[0]).startswith(os.path.join(directory, "2.")) and "extra.json" in str(args[0]):
            time.sleep(60)  # the save cannot end before the kill
    if event == "os.rename" and os.fspath(args[1]) == os.path.join(directory, "2"):
        say("before the rename")
    if event == "shutil.rmtree" and os.fspath(args[0]).endswith(".deleted"):
        sweeping.append(args[0])
    if event == "os.remove" and sweeping and os.path.exists(sweeping[-1]):
        removed.append(args[0])
        if len(removed) == 2:
            say("in the middle of deleting the step before")


sweeping = []
removed = []
sys.addaudithook(watch)
with CheckpointStore(directory, keep_newest=1) as store:
    for step in (1, 2):
        values = np.random.default_rng(step).normal(size=(rows, 1024)).astype(np.float32)
        store.save(step, {"kernel": jax.numpy.asarray(values)}, config={"rows": rows})
        if step == 1:
            store.wait()
            print("first", flush=True)
    say("as soon as save returns")
    leaf = jax.ShapeDtypeStruct((rows, 1024), np.float32)
    store.restore(abstract_state={"kernel": leaf}, config={"rows": rows})
    print("done", flush=True)
"""


def start(moment, directory, rows):
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", RUN, moment, directory, str(rows)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stderr.close()


def values_of(step, rows):
    return np.random.default_rng(step).normal(size=(rows, 1024)).astype(np.float32)


def assert_next_run_goes_on(directory, rows, *, newest):
    """Restores the newest whole step, saves step 2 (again) and finds a clean folder after it."""
    abstract = {"kernel": jax.ShapeDtypeStruct((rows, 1024), np.float32)}
    with CheckpointStore(directory, keep_newest=1) as store:
        assert store.all_steps() == [newest]
        restored = store.restore(abstract_state=abstract, config={"rows": rows})
        np.testing.assert_array_equal(restored.state["kernel"], values_of(newest, rows))
        if newest == 1:
            store.save(2, {"kernel": values_of(2, rows)}, config={"rows": rows})
        again = store.restore(2, abstract_state=abstract)
        np.testing.assert_array_equal(again.state["kernel"], values_of(2, rows))
    assert [path.name for path in directory.iterdir()] == ["2"]


MOMENTS = {
    "as soon as save returns": 1,
    "before the rename": 1,
    "in the middle of deleting the step before": 2,
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Starts all processes at once, because each takes seconds to start, and kills each."""
    folders = {moment: tmp_path_factory.mktemp("run") for moment in MOMENTS}
    processes = {moment: start(moment, folder, 2048) for moment, folder in folders.items()}
    for process in processes.values():
        said = [process.stdout.readline(), process.stdout.readline()]
        kill(process)
        assert said == ["first\n", "ready\n"]
    return folders


@pytest.mark.parametrize(("moment", "newest"), MOMENTS.items())
def test_a_killed_save_is_never_listed_and_the_next_run_goes_on(killed, moment, newest):
    folder = killed[moment]
    left = sorted(path.name for path in folder.iterdir())
    unfinished = "2.orbax-checkpoint-tmp" if newest == 1 else ".deleted"
    assert left == sorted([str(newest), unfinished])
    with CheckpointStore(folder, read_only=True) as reader:
        assert reader.all_steps() == [newest]
    assert sorted(path.name for path in folder.iterdir()) == left
    assert_next_run_goes_on(folder, 2048, newest=newest)


@pytest.mark.slow
def test_a_save_killed_at_random_moments_leaves_the_step_before_or_the_whole_new_one(tmp_path):
    cut = 0
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        process = start("never", folder, 16384)
        assert process.stdout.readline() == "first\n"
        unfinished, whole = folder / "2.orbax-checkpoint-tmp", folder / "2"
        # Counted from the save's beginning: how fast disks are is not to decide what is tested.
        while not (unfinished.exists() or whole.exists()):
            time.sleep(0.001)
        time.sleep(random.Random(attempt).uniform(0.0, 0.2))
        kill(process)
        cut += unfinished.exists()
        assert_next_run_goes_on(folder, 16384, newest=2 if (folder / "2").exists() else 1)
    assert cut >= 2, "the kills came too late to hit a save"


def test_an_ordinary_run_prints_nothing(tmp_path):
    process = start("never", tmp_path / "run", 8)
    output, errors = process.communicate(timeout=60)
    assert (output, errors, process.returncode) == ("first\ndone\n", "", 0)
