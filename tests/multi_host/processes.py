"""The processes of a run on this machine, each with a log of its own."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]


class Processes:
    """`count` processes of a script that join; a context manager that leaves none behind."""

    def __init__(
        self, folder, script, arguments, *, count, devices=1, timeout_s=120, environment=()
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        shared = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "HUATUO_HOST_TIMEOUT_S": str(timeout_s),
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
            "JAX_NUM_PROCESSES": str(count),
            **dict(environment),
        }
        self._running = [
            subprocess.Popen(
                [sys.executable, HERE / script, *map(str, arguments)],
                env=shared | {"JAX_PROCESS_ID": str(index)},
                cwd=ROOT,
                stdout=self._path(index).open("w"),
                stderr=subprocess.STDOUT,
            )
            for index in range(count)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for one in self._running:
            if one.poll() is None:
                one.kill()
                one.wait()

    def _path(self, index):
        return self.folder / f"{index}.log"

    def log(self, index):
        return self._path(index).read_text()

    def send(self, index, number):
        self._running[index].send_signal(number)

    def kill(self, index):
        self.send(index, signal.SIGKILL)

    def wait(self):
        """All exit codes, in order."""
        return [one.wait() for one in self._running]

    def wait_until(self, condition):
        """Waits for something that the processes do; fails if they end before."""
        while not condition():
            ended = [one.poll() for one in self._running]
            assert None in ended, f"ended with {ended}: {self.log(0)}"
            time.sleep(0.1)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
