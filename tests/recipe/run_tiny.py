"""Runs the tiny recipe in a process of its own, which a test may kill: `run_tiny.py DATA WORKDIR`.

With a third argument it is the parent of that process: it has imported all, and starts the run
anew, in another child, each time that the one before was killed.
"""

import os
import pathlib
import signal
import sys

from huatuo_jax.recipe.recipe import run_rlaif
from tests.bucket_server import repeat_at_once
from tests.recipe.tiny import tiny_recipe


def start_anew_until_it_ends(run):
    while True:
        child = os.fork()
        if child == 0:
            print(f"process {os.getpid()}", flush=True)
            return run()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != -signal.SIGKILL:
            sys.exit(status)


if __name__ == "__main__":
    data, workdir = map(pathlib.Path, sys.argv[1:3])

    def run():
        run_rlaif(tiny_recipe(data), workdir)

    if not sys.argv[3:]:
        run()
    else:
        repeat_at_once()
        start_anew_until_it_ends(run)
