"""Processes that meet, or do not: `run_barrier.py WHAT SHARED_FOLDER`; process 2 is the odd one."""

import os
import pathlib
import signal
import time

from huatuo_jax import multi_host
from tests.multi_host.arguments import run


@multi_host.joined()
def main(arguments):
    what, folder = arguments
    index = multi_host.gather("index", None)  # Waits for all.
    is_odd = _process() == 2
    if what == "late":
        if is_odd:
            time.sleep(1000)
        multi_host.barrier("lunch")
    elif what == "lost":
        if is_odd:
            os.kill(os.getpid(), signal.SIGKILL)
        multi_host.barrier("lunch")
    elif what == "failing":
        if is_odd:
            raise ValueError("the disk of this host is full")
        time.sleep(1000)
    elif what == "broken":
        if is_odd:
            raise RuntimeError("a bug")
        time.sleep(1000)
    elif what == "differing":
        multi_host.check_same("the recipe", {"salt": 2 if is_odd else 1})
    elif what == "apart":
        multi_host.check_shared(pathlib.Path(folder, "odd" if is_odd else "same"))
    else:
        assert what == "together" and index == [None] * 3
        with multi_host.first_then_others("cooking"):
            print("first" if not pathlib.Path(folder, "meal").exists() else "found", flush=True)
            pathlib.Path(folder, "meal").touch()
        multi_host.check_same("the recipe", {"salt": 1})
        multi_host.check_shared(pathlib.Path(folder))
        assert multi_host.gather("index", _process()) == [0, 1, 2]


def _process():
    return int(os.environ["JAX_PROCESS_ID"])


if __name__ == "__main__":
    run(main)
