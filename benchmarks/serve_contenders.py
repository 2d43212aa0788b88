"""The servers that benchmarks ask, each in a process of its own: ours and the peers."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from typing import IO

from absl import flags

SLOTS = flags.DEFINE_integer("slots", 32, "Slots of our engine.", lower_bound=1)
VLLM = flags.DEFINE_string("vllm_python", None, "Interpreter that has vLLM.")

MAX_LENGTH = 512
ROOT = pathlib.Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    """That of all processes."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def our_server(folder: pathlib.Path) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Serves by this project while the context lasts."""
    command = [sys.executable, str(ROOT / "launch" / "serve.py"), "--port=0"]
    command += [f"--model=ours={folder / 'model'}", f"--slots={SLOTS.value}"]
    command += ["--max_waiting=100000"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r":(\d+)/", line)
        assert found, f"the server did not start: {line}"
        yield int(found[1]), process
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def transformers_server(folder: pathlib.Path, *more: str) -> Iterator[int]:
    """`transformers serve`, with more flags, while the context lasts."""
    start = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    port = _free_port()
    command = [sys.executable, "-c", start, "serve", str(folder / "model"), "--device", "cpu"]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port), *more]
    with _peer(command, port) as ready:
        yield ready


@contextlib.contextmanager
def vllm_server(folder: pathlib.Path) -> Iterator[int]:
    """Serves by vLLM while the context lasts."""
    port = _free_port()
    command = [str(VLLM.value), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder / "model"), "--served-model-name", "vllm"]
    command += ["--dtype", "float32", "--max-model-len", str(MAX_LENGTH), "--port", str(port)]
    # Of the host's memory, on this build; by default it wants nearly all of it.
    command += ["--gpu-memory-utilization", "0.2"]
    with _peer(command, port) as ready:
        yield ready


def vllm_version(port: int) -> str:
    """The version of a vLLM server, which is of another environment."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/version") as response:
        return str(json.loads(response.read())["version"])


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def _peer(command: Sequence[str], port: int) -> Iterator[int]:
    log = tempfile.TemporaryFile()
    process = subprocess.Popen(
        command,
        env=environment(),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # With all the processes that it starts.
    )
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"it has ended: {' '.join(command)}: {_end_of(log)}")
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1.0).close()
                break
            time.sleep(0.5)
        yield port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def _end_of(log: IO[bytes]) -> str:
    """The last lines that a process has written."""
    log.seek(0)
    return log.read().decode(errors="replace")[-500:]


PEERS = {
    "transformers": transformers_server,
    "transformers_batching": lambda folder: transformers_server(folder, "--continuous-batching"),
    "vllm": vllm_server,
}
