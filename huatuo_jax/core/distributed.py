"""Several processes as one run: joining them, waiting for each other, stopping together.

A pod runs one process on each host. With one process every function here answers at once.

The processes of a run, seen by one of them: who is there, who is gone, where all stop.

What they tell each other goes through the key-value store of jax's coordination service, which
process 0 keeps, and through no device: it works while devices wait for a process that is gone.
"""

import contextlib
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax._src import distributed  # The only way to the key-value store.

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


_MODE = "HUATUO_MULTI_HOST"
_TIMEOUT = "HUATUO_HOST_TIMEOUT_S"
_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_DEFAULT_TIMEOUT_S = 120.0
_JOIN_TIMEOUT_S = 600  # Hosts of a pod do not come up at the same moment.
# jax ends all processes, without a word of ours, when it misses one for so long: the last resort.
_JAX_TIMEOUT_FACTOR = 5

T = TypeVar("T")

_run: Peers | None = None


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that the environment speaks of, and parts from them at the end.

    A process that fails tells the others, which stop as well; `leave` must follow. Where jax fails
    because another process is gone, this one ends within the time-out with a line that names it.
    """
    start()
    if _run is None:
        yield
        return
    try:
        yield
    except SystemExit:
        _finish(_run)
        raise
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            _run.wait_for_the_lost()
        _run.fail(" ".join(str(error).split())[:500] or type(error).__name__)
        raise
    _finish(_run)


def start() -> None:
    """Joins the processes of a run, where the environment asks for it; before jax is used.

    HUATUO_MULTI_HOST=auto joins them as jax finds out by itself: on TPU pods, Slurm, MPI and
    Kubernetes. JAX_COORDINATOR_ADDRESS=HOST:PORT (of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID say it outright. HUATUO_HOST_TIMEOUT_S is how long a process may be silent, or
    keep the others waiting, before the run ends; 120 by default.

    Raises:
        ValueError: a variable that cannot be.
        OSError: the processes did not find each other.
    """
    global _run
    asked = _asked_for(os.environ)
    if asked is None or _run is not None:
        return
    timeout_s = _timeout(os.environ)
    # It would take SIGTERM away from `StopSignals`, which agree through `stop_together`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **asked,
            initialization_timeout=_JOIN_TIMEOUT_S,
            heartbeat_timeout_seconds=round(_JAX_TIMEOUT_FACTOR * timeout_s),
            shutdown_timeout_seconds=round(timeout_s),
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"the processes of the run did not find each other: {reason}") from error
    state = distributed.global_state
    if state.num_processes > 1:
        _run = Peers(
            state.client,
            index=state.process_id,
            count=state.num_processes,
            timeout_s=timeout_s,
        )
        _run.start()
        _run.hosts = gather("host", socket.gethostname())


def leave() -> None:
    """Ends this process at once if it failed while others run; otherwise does nothing.

    What Python and jax do at their end would wait for the others. Call it last, with the error
    still on its way.
    """
    if _run is None or not _run.has_failed:
        return
    if not isinstance(sys.exception(), SystemExit):
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _run.go(1)


def is_first() -> bool:
    """Whether this is the process that prints, and writes what is written once."""
    return _run is None or _run.index == 0


def count() -> int:
    """How many processes the run has."""
    return 1 if _run is None else _run.count


def check_joined() -> None:
    """Raises ValueError where jax sees several processes that were never joined."""
    if _run is None and jax.process_count() > 1:
        raise ValueError(
            f"jax sees {jax.process_count()} processes that have not joined: set {_MODE}=auto"
        )


def gather(name: str, value: Any = None) -> list[Any]:
    """Waits until all processes are here, and gives each one's JSON value, in their order.

    Raises:
        TimeoutError: names those that did not come within the time-out, though they are heard of:
            where one is lost, the watch ends this process.
    """
    if _run is None:
        return [value]
    folder, waited_s, pause_s = _run.numbered(name), 0.0, 0.01
    _run.put(f"{folder}/{_run.index}", value)
    while True:
        there = _run.read(folder)
        if len(there) == _run.count:
            return [there[index] for index in range(_run.count)]
        if waited_s >= _run.timeout_s:
            missing = [index for index in range(_run.count) if index not in there]
            _run.wait_for_the_silent(missing)
            raise TimeoutError(
                f"{_run.named(missing)} did not come to {name!r} within {_run.timeout_s:g} s"
            )
        time.sleep(pause_s)
        waited_s += pause_s  # Not by a clock: a machine may sleep.
        pause_s = min(0.5, 1.5 * pause_s)


def barrier(name: str) -> None:
    """Waits until all processes are here; `gather` says what is raised."""
    gather(name)


@contextlib.contextmanager
def first_then_others(name: str) -> Iterator[None]:
    """Lets the first process do a thing alone; the others then find it done.

    They wait as long as it takes: should the first process be lost, the watch ends them.
    """
    if _run is None:
        yield
        return
    folder = _run.numbered(name)
    if _run.index != 0:
        while not _run.read(folder):
            time.sleep(0.2)
    yield
    if _run.index == 0:
        _run.put(f"{folder}/0", "done")


def by_first(name: str, do: Callable[[], T]) -> T | None:
    """Lets the first process do a thing for all, and gives what came of it; None in others."""
    with first_then_others(name):
        return do() if is_first() else None


def told_by_first(name: str, do: Callable[[], T]) -> T:
    """Lets the first process do a thing, and gives all of them what came of it, a JSON value."""
    found: T = gather(name, by_first(name, do))[0]
    return found


def check_same(name: str, value: Any) -> None:
    """Raises ValueError in all processes unless they came with the same JSON value."""
    values = gather(name, value)
    for index, other in enumerate(values):
        if other != values[0]:
            assert _run is not None
            raise ValueError(
                f"{name} differs between {_run.named([0])} and {_run.named([index])}: "
                f"{_shown(values[0])} and {_shown(other)}"
            )


def check_shared(folder: pathlib.Path) -> None:
    """Raises ValueError in all processes unless all see what the first one writes to a folder."""
    if _run is None:
        return
    probe = folder / f".shared-{gather('probe', secrets.token_hex(4))[0]}"
    if _run.index == 0:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    barrier("probe written")
    seen = gather("probe seen", _is_seen(probe, timeout_s=_run.timeout_s / 4))
    if _run.index == 0:
        probe.unlink()
    if blind := [index for index, sees in enumerate(seen) if not sees]:
        raise ValueError(
            f"{folder} is not shared: {_run.named(blind)} does not see what {_run.named([0])} "
            "writes; choose a folder on a disk that all hosts mount"
        )


def stop_together(asked: bool) -> bool:
    """Whether all processes stop now, because any of them was asked to.

    All of them must call this equally often; they stop at the same call. It waits for no device.

    Args:
        asked: whether this one was asked, now or before.
    """
    assert _run is not None, "several processes need multi_host.start()"
    _run.asked = _run.asked or asked
    return _run.stop_now()


def _finish(run: Peers) -> None:
    run.finish()
    jax.distributed.shutdown()


def _is_seen(path: pathlib.Path, *, timeout_s: float) -> bool:
    """Whether a file is there, or comes: network file systems take a while."""
    waited_s = 0.0
    while not path.exists():
        if waited_s >= timeout_s:
            return False
        time.sleep(0.2)
        waited_s += 0.2
    return True


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _asked_for(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments that jax is to join with; None for a run of one process."""
    given = [name for name in _EXPLICIT if name in environment]
    mode = environment.get(_MODE, "")
    if mode == "auto":
        return {}
    if mode:
        raise ValueError(f"{_MODE}={mode!r} must be auto, or not set")
    if not given:
        return None
    if len(given) < len(_EXPLICIT):
        missing = [name for name in _EXPLICIT if name not in given]
        raise ValueError(f"{' and '.join(given)} is set without {' and '.join(missing)}")
    address, count, index = (environment[name] for name in _EXPLICIT)
    if not count.isdecimal() or int(count) < 1:
        raise ValueError(f"JAX_NUM_PROCESSES={count!r} must be a whole number from 1")
    if not index.isdecimal() or int(index) >= int(count):
        raise ValueError(f"JAX_PROCESS_ID={index!r} must be a whole number from 0 to {count} - 1")
    if not address.rpartition(":")[2].isdecimal():
        raise ValueError(f"JAX_COORDINATOR_ADDRESS={address!r} must be HOST:PORT")
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
        "cluster_detection_method": "deactivate",
    }


def _timeout(environment: Mapping[str, str]) -> float:
    text = environment.get(_TIMEOUT, str(_DEFAULT_TIMEOUT_S))
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = 0.0
    if not 1 <= timeout_s < float("inf"):
        raise ValueError(f"{_TIMEOUT}={text!r} must be a number of seconds from 1")
    return timeout_s
