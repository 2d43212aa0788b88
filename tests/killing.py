"""Runs in processes of their own that are killed or stopped, started again, and compared."""

import dataclasses
import os
import pathlib
import random
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from huatuo_jax.checkpoint.store import saved_steps
from huatuo_jax.training.loop import INTERRUPTED_EXIT_CODE
from huatuo_jax.training.metrics import is_time_field, read_rows

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of a module that is run as `python -m MODULE WORKDIR SECONDS_EACH`.

    Attributes:
        module: runs it to its end, or ends with the code of an interrupted run.
        name: of its folder.
        num_steps: in all; there is a checkpoint of the last one.
        texts: files in the stage's folder that have to be equal too.
    """

    module: str
    name: str
    num_steps: int
    texts: tuple[str, ...] = ()

    def start(self, workdir, *, seconds_each):
        return subprocess.Popen(
            [sys.executable, "-m", self.module, str(workdir), str(seconds_each)],
            cwd=ROOT,
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, workdir):
        """Runs it to its end; what it printed."""
        process = self.start(workdir, seconds_each=0.0)
        output, _ = process.communicate(timeout=1800)
        assert process.returncode == 0, output
        return output

    def checkpoints(self, workdir):
        return workdir / self.name / "checkpoints"

    def newest(self, workdir):
        """The step of the newest checkpoint that is whole; 0 without one."""
        return max(saved_steps(self.checkpoints(workdir)), default=0)

    def result(self, workdir):
        """All that must be equal: the last checkpoint's arrays, metrics but for time, texts."""
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            place = self.checkpoints(workdir) / str(self.num_steps) / "state"
            tree = checkpointer.restore(os.fspath(place))
        arrays = {
            jax.tree_util.keystr(path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        rows = [
            {name: value for name, value in row.items() if not is_time_field(name)}
            for row in read_rows(workdir / self.name / "metrics.jsonl")
        ]
        texts = {
            name: (workdir / self.name / name).read_text(encoding="utf-8") for name in self.texts
        }
        return arrays, rows, texts

    def kill_at_random_moments(self, workdir, moments, *, seed, seconds_each, within, spare):
        """Kills the run so often, each time a while after it made a new checkpoint.

        Args:
            workdir: of the run.
            moments: how often.
            seed: of the moments.
            seconds_each: that a step takes longer, so that there is time to come.
            within: seconds after the checkpoint.
            spare: steps that have to be left at each start.
        """
        draw = random.Random(seed)
        for _ in range(moments):
            before = self.newest(workdir)
            assert before <= self.num_steps - spare, "the run is nearly over: give it more time"
            process = self.start(workdir, seconds_each=seconds_each)
            wait_for(lambda before=before: self.newest(workdir) > before, process)
            time.sleep(draw.uniform(0.0, within))
            kill(process)

    def stop(self, workdir, number, *, seconds_each, when):
        """Sends a signal once a condition holds; the step at which it saved and stopped."""
        process = self.start(workdir, seconds_each=seconds_each)
        wait_for(when, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=1800)
        assert process.returncode == INTERRUPTED_EXIT_CODE, output
        assert "run the same command again to resume" in output
        return self.newest(workdir)


def wait_for(condition, process, *, seconds=1800):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until, "the run did not come to that point"
        time.sleep(0.002)


def kill(process):
    process.kill()
    process.wait()
    process.stdout.close()


def assert_identical(found, expected):
    """That two results of a stage are the same, arrays bit for bit."""
    arrays, rows, texts = found
    expected_arrays, expected_rows, expected_texts = expected
    assert rows == expected_rows
    assert texts == expected_texts
    assert arrays.keys() == expected_arrays.keys()
    for path, array in expected_arrays.items():
        assert array.tobytes() == arrays[path].tobytes(), path
