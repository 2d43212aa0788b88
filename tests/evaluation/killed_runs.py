"""Runs that pay a scripted server, killed and started again; and what is left of their calls."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections import Counter

ROOT = pathlib.Path(__file__).resolve().parents[2]

# The modules are read once; each run is a process of its own.
STARTER = """
import os, sys
for line in sys.stdin:
    child = os.fork()
    if not child:
        run()
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runs:
    """The same run, started again as often as it is killed.

    Attributes:
        child: the process id of the newest.
    """

    def __init__(self, code, arguments):
        """`code` defines `run()`, which takes the arguments from `sys.argv`."""
        self.child = None
        self.dead, self.ended = threading.Event(), threading.Event()
        self.process = subprocess.Popen(
            [sys.executable, "-c", code + STARTER, *arguments],
            cwd=ROOT,
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def kill_at(self, now):
        """Called by the server with each request: kills the run, and answers no dead one."""
        if now:
            self.dead.set()
            os.kill(self.child, signal.SIGKILL)
            self.ended.wait()
            raise ConnectionAbortedError
        if self.dead.is_set():
            raise ConnectionAbortedError

    def run_while_killed(self, after_each):
        """The exit codes of all runs, up to the first that was not killed."""
        codes = []
        while not codes or codes[-1] == -signal.SIGKILL:
            self.dead.clear()
            self.ended.clear()
            self.process.stdin.write("again\n")
            self.process.stdin.flush()
            self.child = int(self._line())
            codes.append(int(self._line()))
            after_each()
            self.ended.set()
        return codes

    def _line(self):
        """The next line that is a number; others are the run's own."""
        told = self.process.stdout.readline()
        while told and not told.lstrip("-").strip().isdigit():
            told = self.process.stdout.readline()
        return told

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def start():
    """To be made a fixture: starts runs, which are closed with the test."""
    running = []

    def begin(code, arguments):
        running.append(Runs(code, arguments))
        return running[-1]

    yield begin
    for one in running:
        one.close()


def kept_replies(folder):
    """The number of replies that the files of a run hold, by request."""
    rows = []
    for path in [*(folder / "responses").glob("*.jsonl"), folder / "judge.jsonl"]:
        if path.exists() and ".spending" not in path.suffixes:
            whole = path.read_bytes().rpartition(b"\n")[0].decode("utf-8")
            rows += [json.loads(line) for line in whole.splitlines()]
    return Counter(row["request"] for row in rows if row["text"] is not None)


def calls_without_an_end(folder):
    """The calls of a run's spending files that were sent and never ended."""
    found = 0
    for path in folder.rglob("*.spending.jsonl"):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        ended = sum("outcome" in row for row in rows)
        found += len(rows) - 2 * ended
    return found
