"""Several processes as one run: they join, send heartbeats, wait for each other and stop together.

A pod runs one process on each host. With one process every function here returns at once.

The processes communicate through the key-value store of jax's coordination service, which process 0
keeps, and not through devices: it works while devices wait for a lost process.
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

from huatuo_jax.core.files import make_folder, write_file

PEER_LOST_EXIT_CODE = 75
"""Exit code of a process that ends because another one did; the run can resume (EX_TEMPFAIL)."""

_MODE = "HUATUO_MULTI_HOST"
_TIMEOUT = "HUATUO_HOST_TIMEOUT_S"
_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_DEFAULT_TIMEOUT_S = 120.0
_JOIN_TIMEOUT_S = 600  # Hosts of a pod do not come up at the same moment.
# jax ends all processes, without our message, when it misses one for so long: the last resort.
_JAX_TIMEOUT_FACTOR = 5
T = TypeVar("T")


class Peers(threading.Thread):
    """Heartbeats between processes: detects lost ones and coordinates a common stop.

    Each process keeps one status in the store, under `status/INDEX`: its heartbeat; whether it was
    asked to stop; its number of calls of `stop_now` (published while they agree on where to stop);
    whether it has finished, why it failed, and whether it has ended.
    """

    def __init__(self, client: Any, *, index: int, count: int, timeout_s: float) -> None:
        """Publishes this process's status; `client` is that of jax's coordination service."""
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
        )  # Taken once, by whichever ends this process: itself or the watch.
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
        """Returns the values of a folder of keys, by the number that ends the key."""
        stored = self._client.key_value_dir_get(f"huatuo/{folder}/")
        return {int(key.rpartition("/")[2]): json.loads(value) for key, value in stored}

    def numbered(self, name: str) -> str:
        """Returns a folder for this use of a name; all processes use names in the same order."""
        self._uses[name] += 1
        return f"{name}/{self._uses[name]}"

    def named(self, indices: Sequence[int]) -> str:
        """Names processes for a message."""
        return " and ".join(f"process {index} (host {self.hosts[index]})" for index in indices)

    def publish(self, **changes: Any) -> None:
        """Changes this process's status."""
        with self._publishing:
            self._status |= changes
            self.put(f"status/{self.index}", self._status)

    def run(self) -> None:
        """Sends heartbeats until the run ends, or ends this process because another one did."""
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
        """Counts this call, and tells whether all processes stop at it."""
        with self._counting:
            self._calls += 1
            return self._stop_at is not None and self._calls >= self._stop_at

    def wait_for_the_lost(self) -> None:
        """Waits as long as the watch needs to find a lost process."""
        for _ in range(round(self.timeout_s / self.interval_s) + 2):
            time.sleep(self.interval_s)

    def wait_for_the_silent(self, indices: Sequence[int]) -> None:
        """Waits for the watch to end this process where one of these sends no heartbeat.

        The watch may come to its time-out a moment after those who waited for the same process.
        """
        while any(self._silent_s.get(index, 0.0) > 2 * self.interval_s for index in indices):
            time.sleep(self.interval_s)

    def fail(self, reason: str) -> None:
        """Publishes that this process fails; `go` must follow.

        Does not return where the watch is already ending this process with a message.
        """
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()
        self.has_failed = True
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.publish(failed=reason)

    def finish(self) -> None:
        """Waits until all have finished, and stops the watch."""
        self.publish(finished=True)
        while not all(status["finished"] for status in self.read("status").values()):
            time.sleep(0.05)
        self._over.set()
        self.join()

    def go(self, code: int) -> None:
        """Ends this process at once, without the waits of Python and jax.

        Process 0 ends last: without its store jax would end the others with no message.
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
        """Ends this process if another one failed, or sent no heartbeat for too long.

        Silence is counted in this process's own pauses, so that a suspended machine counts none.
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
        """Agrees on the call to stop at: the one after the last that any process has made.

        Until all know it, none makes another call.
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


_run: Peers | None = None


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that the environment names, and leaves them at the end.

    A process that fails makes the others stop as well; `leave` must follow. Where jax fails because
    another process is lost, this one ends within the time-out with a line that names it.
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
    """Joins the processes of a run if the environment asks for it; call it before jax is used.

    HUATUO_MULTI_HOST=auto lets jax find them: on TPU pods, Slurm, MPI and
    Kubernetes. JAX_COORDINATOR_ADDRESS=HOST:PORT (of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID name them. HUATUO_HOST_TIMEOUT_S is how long a process may be silent, or
    keep the others waiting, before the run ends; 120 by default.

    Raises:
        ValueError: an invalid variable.
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

    Python and jax would wait for the others at their end. Call it last, while the error is being
    raised.
    """
    if _run is None or not _run.has_failed:
        return
    if not isinstance(sys.exception(), SystemExit):
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _run.go(1)


def is_first() -> bool:
    """Tells whether this is the process that prints and writes the run's files."""
    return _run is None or _run.index == 0


def count() -> int:
    """Returns the number of processes of the run."""
    return 1 if _run is None else _run.count


def check_joined() -> None:
    """Raises ValueError where jax sees several processes that were never joined."""
    if _run is None and jax.process_count() > 1:
        raise ValueError(
            f"jax sees {jax.process_count()} processes that have not joined: set {_MODE}=auto"
        )


def gather(name: str, value: Any = None) -> list[Any]:
    """Waits until all processes call this, and returns the JSON value of each, in their order.

    Raises:
        TimeoutError: names those that did not call within the time-out while sending heartbeats;
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
    """Waits until all processes call this; raises as `gather`."""
    gather(name)


@contextlib.contextmanager
def first_then_others(name: str) -> Iterator[None]:
    """Lets the first process run the block alone; the others run it afterwards.

    They wait without a time-out: if the first process is lost, the watch ends them.
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
    """Calls a function in the first process and returns its result there; None in the others."""
    with first_then_others(name):
        return do() if is_first() else None


def told_by_first(name: str, do: Callable[[], T]) -> T:
    """Calls a function in the first process and returns its JSON value in all of them."""
    found: T = gather(name, by_first(name, do))[0]
    return found


def check_same(name: str, value: Any) -> None:
    """Raises ValueError in all processes unless all gave the same JSON value.

    Of dicts the message shows the fields that differ.
    """
    values = gather(name, value)
    for index, other in enumerate(values):
        if other != values[0]:
            assert _run is not None
            first, second = map(_shown, _unequal(values[0], other))
            raise ValueError(
                f"{name} differs between {_run.named([0])} and {_run.named([index])}: "
                f"{first} and {second}"
            )


def check_shared(folder: pathlib.Path) -> None:
    """Raises ValueError in all processes unless all see what the first one writes to a folder."""
    if _run is None:
        return
    probe = folder / f".shared-{gather('probe', secrets.token_hex(4))[0]}"
    if _run.index == 0:
        make_folder(folder)
        write_file(probe, "")
    barrier("probe written")
    seen = gather("probe seen", _is_seen(probe, timeout_s=_run.timeout_s / 4))
    if _run.index == 0:
        probe.unlink()
    if blind := [index for index, sees in enumerate(seen) if not sees]:
        raise ValueError(
            f"{folder} is not shared: {_run.named(blind)} does not see what {_run.named([0])} "
            "writes; choose a bucket, or a folder on a disk that all hosts mount"
        )


def stop_together(asked: bool) -> bool:
    """Tells whether all processes stop now, because any of them was asked to.

    All of them must call this equally often; they stop at the same call. No device is involved.

    Args:
        asked: True if this process was asked to stop, now or before.
    """
    assert _run is not None, "several processes need distributed.start()"
    _run.asked = _run.asked or asked
    return _run.stop_now()


def _finish(run: Peers) -> None:
    run.finish()
    jax.distributed.shutdown()


def _is_seen(path: pathlib.Path, *, timeout_s: float) -> bool:
    """Tells whether a file appears in time: network file systems are slow."""
    waited_s = 0.0
    while not path.exists():
        if waited_s >= timeout_s:
            return False
        time.sleep(0.2)
        waited_s += 0.2
    return True


def _unequal(one: Any, other: Any) -> tuple[Any, Any]:
    """Returns two JSON values without the fields of dicts that are equal in both."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one, other
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    pairs = {name: _unequal(one.get(name), other.get(name)) for name in names}
    first, second = ({name: pairs[name][index] for name in names} for index in (0, 1))
    return first, second


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _asked_for(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns the arguments for `jax.distributed.initialize`; None for a single process."""
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
