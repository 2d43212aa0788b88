"""The engine's answers to one HTTP request, as they come, on the side of the event loop."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from huatuo_jax.generation.requests import Answer, Request, Running

_EVERY_S = 0.05
_QUIET_S = 15.0


class Growing(NamedTuple):
    """An unfinished answer, whose lists grow in the engine's thread.

    Attributes:
        running: the answer; only its first tokens may be read.
        num_tokens: number of them.
    """

    running: Running
    num_tokens: int


class Update(NamedTuple):
    """The newest state of an answer.

    Attributes:
        prompt: number of its prompt in the call.
        answer: number of the answer among those of the prompt.
        state: the answer so far, or when it is complete.
    """

    prompt: int
    answer: int
    state: Growing | Answer


class Call:
    """The requests of one HTTP request, and what their answers are by now.

    A reader that is slow gets the newest state of each answer: nothing piles up.

    Attributes:
        requests: one a prompt.
        remaining: answers that are not complete.
        started_s: time of its start, by `time.perf_counter`.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        """Is made in the event loop that reads it.

        Args:
            requests: one a prompt.
        """
        self.requests = tuple(requests)
        self.remaining = sum(one.num_answers for one in self.requests)
        self.started_s = time.perf_counter()
        self._error: BaseException | None = None
        self._complete: set[tuple[int, int]] = set()
        self._updates: dict[tuple[int, int], Update] = {}
        self._changed, self._end = asyncio.Event(), asyncio.Event()
        # By the loop's clock: the next update is due, and the reader is going to be woken.
        self._due_s = self._waking_s = 0.0

    def put(self, update: Update) -> bool:
        """Records an update, unless the answer is complete; returns True if it is new."""
        key = (update.prompt, update.answer)
        if key in self._complete or self._error is not None:
            return False
        if isinstance(update.state, Answer):
            self._complete.add(key)
            self.remaining -= 1
            if not self.remaining:
                self._end.set()
        self._updates[key] = update
        self._wake()
        return True

    def fail(self, error: BaseException) -> None:
        """Ends the call with an error, unless it has ended."""
        if self.remaining and self._error is None:
            self._error = error
            self._changed.set()
            self._end.set()

    @property
    def ended(self) -> bool:
        """True once all answers are complete, or the call has failed."""
        return not self.remaining or self._error is not None

    async def updates(self) -> AsyncIterator[list[Update]]:
        """Yields what is new of the answers, at most one update of each at a time.

        The first update comes at once, and so does the end; between them 50 ms pass at least, as
        each event costs the processors that decode. Where nothing comes for a while, an empty list
        is yielded.

        Raises:
            BaseException: the error that ended the call.
        """
        loop = asyncio.get_running_loop()
        while True:
            if not self.ended:
                reminder = loop.call_later(_QUIET_S, self._changed.set)
                try:
                    await self._changed.wait()
                finally:
                    reminder.cancel()
                self._changed.clear()
            if not self._updates and self._error is not None:
                raise self._error
            if not self._updates and self.ended:
                return
            found = list(self._updates.values())
            self._updates.clear()
            self._due_s = loop.time() + _EVERY_S
            yield found

    def _wake(self) -> None:
        """Wakes the reader of `updates`, once its next update is due or the call has ended."""
        loop = asyncio.get_running_loop()
        if self.ended or loop.time() >= self._due_s:
            self._changed.set()
        elif self._waking_s < self._due_s:
            self._waking_s = self._due_s
            loop.call_at(self._due_s, self._changed.set)

    async def answers(self) -> list[list[Answer]]:
        """Waits for all answers; returns them in the order of prompts and answers.

        Raises:
            BaseException: the error that ended the call.
        """
        if not self.ended:
            await self._end.wait()  # Answers that grow wake only a reader of `updates`.
        if self._error is not None:
            raise self._error
        found: list[dict[int, Answer]] = [{} for _ in self.requests]
        for prompt, answer, state in self._updates.values():
            if isinstance(state, Answer):
                found[prompt][answer] = state
        return [[group[index] for index in sorted(group)] for group in found]
