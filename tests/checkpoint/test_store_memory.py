"""Restoring holds no second copy of the state, measured in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROWS, COLUMNS, ARRAYS = 4096, 3200, 8  # 8 arrays of 52 MB, 419 MB together

RUN = """
import json, sys, threading, time
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
jax.config.update("jax_num_cpu_devices", 8)
from huatuo_jax.checkpoint.store import CheckpointStore

what, directory, rows, columns, arrays = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])


def resident_mb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1e3


def watch():
    while not done.is_set():
        peak.append(max(peak.pop(), resident_mb()))
        time.sleep(0.002)


mesh = jax.make_mesh(
    (1, 8, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
)
spec = PartitionSpec(None, "fsdp") if what == "restore" else PartitionSpec("fsdp")
sharding = NamedSharding(mesh, spec)
with CheckpointStore(directory) as store:
    if what == "save":
        make = jax.jit(lambda key: jax.random.normal(key, (rows, columns)), out_shardings=sharding)
        store.save(1, {str(i): make(jax.random.key(i)) for i in range(arrays)}, config={})
    else:
        jax.block_until_ready(jax.device_put(np.zeros((8, 8), np.float32), sharding))
        leaf = jax.ShapeDtypeStruct((rows, columns), np.float32, sharding=sharding)
        before, done = resident_mb(), threading.Event()
        peak = [before]
        watcher = threading.Thread(target=watch)
        watcher.start()
        state = store.restore(abstract_state={str(i): leaf for i in range(arrays)}).state
        done.set()
        watcher.join()
        print(json.dumps({"peak": peak[0] - before, "after": resident_mb() - before}))
"""


@pytest.mark.slow
def test_restoring_on_another_mesh_holds_no_second_copy_on_the_host(tmp_path):
    def run(what):
        sizes = [str(number) for number in (ROWS, COLUMNS, ARRAYS)]
        environment = {
            **os.environ,
            "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
            # Freed buffers go back to the system at once, so that what is resident is held.
            "MALLOC_MMAP_THRESHOLD_": "1000000",
        }
        return subprocess.run(
            [sys.executable, "-c", RUN, what, tmp_path / "run", *sizes],
            stdout=subprocess.PIPE, text=True, check=True, env=environment,
        ).stdout  # fmt: skip

    run("save")
    measured = json.loads(run("restore"))
    state_mb = ROWS * COLUMNS * ARRAYS * 4 / 1e6
    assert measured["after"] > 0.9 * state_mb  # the arrays themselves are host memory here
    assert measured["peak"] < 1.5 * state_mb, measured
