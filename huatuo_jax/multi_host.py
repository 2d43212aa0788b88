"""Several processes as one run: joining them, waiting for each other, stopping together.

A pod runs one process on each host. With one process every function here answers at once.
"""

import contextlib
import json
import os
import pathlib
import secrets
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from jax._src import distributed  # The only way to the key-value store.

from huatuo_jax.peers import Peers

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
