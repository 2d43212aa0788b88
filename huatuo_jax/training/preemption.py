"""Stopping a run from outside: SIGTERM and Ctrl-C ask it to finish its step and save."""

import signal
import threading
import types
from typing import Self

import jax

from huatuo_jax import multi_host

INTERRUPTED_EXIT_CODE = 75
"""Exit code of a run that was asked to stop and can go on (EX_TEMPFAIL of sysexits.h)."""


class Interrupted(Exception):
    """A run was asked to stop and has saved; running the same command goes on."""


class StopSignals:
    """Notes SIGTERM and Ctrl-C while it is entered; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        """Notes nothing yet."""
        self._requested = False
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def requested(self) -> bool:
        """Whether to stop, since any process of the run was asked to.

        All of them must call this together, and have the same answer.
        """
        if jax.process_count() == 1:
            return self._requested
        return multi_host.stop_together(self._requested)

    def __enter__(self) -> Self:
        """Takes the signals over; only a process's main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, _: types.FrameType | None) -> None:
        if number == signal.SIGINT and self._requested:
            raise KeyboardInterrupt
        self._requested = True
