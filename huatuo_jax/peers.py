"""The processes of a run, seen by one of them: who is there, who is gone, where all stop.

What they tell each other goes through the key-value store of jax's coordination service, which
process 0 keeps, and through no device: it works while devices wait for a process that is gone.
"""

import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax

PEER_LOST_EXIT_CODE = 75
"""Exit code of a process that ends because another one did: the run can go on (EX_TEMPFAIL)."""


class Peers(threading.Thread):
    """This process's part in a run of several: it tells the others how it is, and watches them.

    Each process keeps one status in the store, under `status/INDEX`: its heartbeat; whether it was
    asked to stop; after how many questions about stopping it stands (told while they agree on
    where to stop); whether it has finished, why it failed, and whether it is gone for good.
    """

    def __init__(self, client: Any, *, index: int, count: int, timeout_s: float) -> None:
        """Watches nothing before `start`; `client` is that of jax's coordination service."""
        super().__init__(name="multi_host", daemon=True)
        self.index, self.count, self.timeout_s = index, count, timeout_s
        self.interval_s = min(2.0, timeout_s / 10)
        self.hosts = ["?"] * count
        self.asked = False
        self.has_failed = False
        self._client = client
        self._status: dict[str, Any] = {
            "beat": 0,
            "asked": False,
            "calls": None,
            "finished": False,
            "failed": None,
            "gone": False,
        }
        self._publishing = threading.Lock()
        self._beats: dict[int, int] = {}
        self._silent_s: dict[int, float] = {}
        self._over = threading.Event()
        self._ending = (
            threading.Lock()
        )  # Taken once, by who ends this process: itself, or the watch.
        self._uses = Counter[str]()
        # Held from the moment that any process was asked to stop until all know where.
        self._counting = threading.Lock()
        self._is_deciding = False
        self._calls = 0
        self._stop_at: int | None = None
        self.publish()

    def put(self, key: str, value: Any) -> None:
        """Stores a JSON value under a key."""
        self._client.key_value_set(f"huatuo/{key}", json.dumps(value), allow_overwrite=True)

    def read(self, folder: str) -> dict[int, Any]:
        """The values of a folder of keys, by the number that ends the key."""
        stored = self._client.key_value_dir_get(f"huatuo/{folder}/")
        return {int(key.rpartition("/")[2]): json.loads(value) for key, value in stored}

    def numbered(self, name: str) -> str:
        """A folder for this use of a name; all processes use it in the same order."""
        self._uses[name] += 1
        return f"{name}/{self._uses[name]}"

    def named(self, indices: Sequence[int]) -> str:
        """Processes for a message."""
        return " and ".join(f"process {index} (host {self.hosts[index]})" for index in indices)

    def publish(self, **changes: Any) -> None:
        """Changes this process's status."""
        with self._publishing:
            self._status |= changes
            self.put(f"status/{self.index}", self._status)

    def run(self) -> None:
        """Beats and watches until the run is over, or ends this process because another has."""
        pause_s = self.interval_s
        while not self._over.wait(pause_s):
            try:
                self.publish(beat=self._status["beat"] + 1, asked=self.asked)
                told = self.read("status")
            except jax.errors.JaxRuntimeError:
                continue  # Process 0 is gone with the store, and jax ends this process.
            if not self.has_failed:  # Else it ends by itself, with what it has to say.
                self._look(told, pause_s)
            self._decide(told)
            pause_s = 0.05 if self._is_deciding else self.interval_s

    def stop_now(self) -> bool:
        """Counts this question, and tells whether it is the one that all stop at."""
        with self._counting:
            self._calls += 1
            return self._stop_at is not None and self._calls >= self._stop_at

    def wait_for_the_lost(self) -> None:
        """Gives the watch the time it takes to find a process missing."""
        for _ in range(round(self.timeout_s / self.interval_s) + 2):
            time.sleep(self.interval_s)

    def wait_for_the_silent(self, indices: Sequence[int]) -> None:
        """Leaves it to the watch to end this process, where one of these is not heard of.

        The watch may come to its time-out a moment after those who waited for the same process.
        """
        while any(self._silent_s.get(index, 0.0) > 2 * self.interval_s for index in indices):
            time.sleep(self.interval_s)

    def fail(self, reason: str) -> None:
        """Tells the others that this process fails; `go` must follow.

        Does not return where the watch is ending this process, and has said why.
        """
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()
        self.has_failed = True
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.publish(failed=reason)

    def finish(self) -> None:
        """Waits until all have finished, and stops to watch."""
        self.publish(finished=True)
        while not all(status["finished"] for status in self.read("status").values()):
            time.sleep(0.05)
        self._over.set()
        self.join()

    def go(self, code: int) -> None:
        """Ends this process, with no regard for what Python and jax would wait for.

        Process 0 stays until the others are gone: with it goes the store, and jax ends those that
        are left without a word on why.
        """
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.publish(gone=True)
            if self.index == 0:
                self._outlast_the_others()
        os._exit(code)

    def _outlast_the_others(self) -> None:
        for _ in range(round(self.timeout_s / self.interval_s)):
            silent = {i for i, silent_s in self._silent_s.items() if silent_s >= self.timeout_s}
            told = self.read("status").items()
            if all(status["gone"] or index in silent for index, status in told):
                break
            time.sleep(self.interval_s)

    def _look(self, told: Mapping[int, Mapping[str, Any]], waited_s: float) -> None:
        """Ends this process if another one failed, or has been silent for too long.

        Silence is counted in this process's own pauses, so that a machine which sleeps misses none.
        """
        for index, status in told.items():
            if status["failed"] is not None:
                self._leave(f"{self.named([index])} has failed: {status['failed']}")
            if index == self.index or status["finished"] or status["gone"]:
                self._silent_s[index] = 0.0
                continue
            if status["beat"] == self._beats.get(index):
                self._silent_s[index] = self._silent_s.get(index, 0.0) + waited_s
            else:
                self._silent_s[index] = 0.0
            self._beats[index] = status["beat"]
        if silent := [i for i, silent_s in self._silent_s.items() if silent_s >= self.timeout_s]:
            self._leave(f"{self.named(silent)} not heard of for {self.timeout_s:g} s")

    def _leave(self, reason: str) -> None:
        if not self._ending.acquire(blocking=False):
            return
        line = f"error: {reason}; process {self.index} stops, run the same command again to go on\n"
        os.write(2, line.encode())  # The main thread may hold what `print` would wait for.
        self.go(PEER_LOST_EXIT_CODE)

    def _decide(self, told: Mapping[int, Mapping[str, Any]]) -> None:
        """Agrees on the question to stop at: the one after the farthest that any has asked.

        Until it is known to all, none asks another.
        """
        if self._stop_at is not None or not any(status["asked"] for status in told.values()):
            return
        if not self._is_deciding:
            self._counting.acquire()
            self._is_deciding = True
            self.publish(calls=self._calls)
            return
        calls = [status["calls"] for status in told.values() if not status["finished"]]
        if None not in calls:
            self._stop_at = max(calls, default=self._calls) + 1
            self._is_deciding = False
            self._counting.release()
