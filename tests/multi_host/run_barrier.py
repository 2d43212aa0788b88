"""Processes that meet, or do not: `run_barrier.py WHAT SHARED_FOLDER`; process 2 is the odd one."""

import os
import pathlib
import signal
import time

from huatuo_jax.core import distributed
from tests.multi_host.arguments import run


@distributed.joined()
def main(arguments):
    what, folder = arguments
    index = distributed.gather("index", None)  # Waits for all.
    is_odd = _process() == 2
    if what == "late":
        if is_odd:
            time.sleep(1000)
        distributed.barrier("lunch")
    elif what == "lost":
        if is_odd:
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.barrier("lunch")
    elif what == "failing":
        if is_odd:
            raise ValueError("the disk of this host is full")
        time.sleep(1000)
    elif what == "broken":
        if is_odd:
            raise RuntimeError("a bug")
        time.sleep(1000)
    elif what == "differing":
        distributed.check_same("the recipe", {"salt": 2 if is_odd else 1})
    elif what == "apart":
        distributed.check_shared(pathlib.Path(folder, "odd" if is_odd else "same"))
    else:
        assert what == "together" and index == [None] * 3
        with distributed.first_then_others("cooking"):
            print("first" if not pathlib.Path(folder, "meal").exists() else "found", flush=True)
            pathlib.Path(folder, "meal").touch()
        distributed.check_same("the recipe", {"salt": 1})
        distributed.check_shared(pathlib.Path(folder))
        assert distributed.gather("index", _process()) == [0, 1, 2]


def _process():
    return int(os.environ["JAX_PROCESS_ID"])


if __name__ == "__main__":
    run(main)
