"""How far a bulk run is, and how long it still takes."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator

from huatuo_jax.generation.requests import Answer

_PROGRESS_EVERY_S = 10.0


@dataclasses.dataclass(frozen=True)
class BulkProgress:
    """How far a run is: prompts of the file, and tokens of this run."""

    prompts_done: int
    num_prompts: int
    tokens: int
    seconds: float
    seconds_left: float

    def __str__(self) -> str:
        """One line."""
        left = "" if math.isinf(self.seconds_left) else f", {self.seconds_left:.0f} s left"
        speed = self.tokens / self.seconds if self.seconds else 0.0
        return f"{self.prompts_done} of {self.num_prompts} prompts, {speed:.1f} tokens/s{left}"


class Clock:
    """Says tokens, speed and time left, now and then."""

    def __init__(
        self, start: int, num_prompts: int, on_progress: Callable[[BulkProgress], None] | None
    ) -> None:
        """Start the clock.

        Args:
            start: prompts that were done before.
            num_prompts: prompts in all.
            on_progress: told every ten seconds or so, and after each chunk.
        """
        self._start, self._num_prompts, self._say = start, num_prompts, on_progress
        self._done, self._tokens = start, 0
        self._started_s = self._said_s = time.monotonic()

    def watch(self, answers: Iterator[Answer]) -> Iterator[Answer]:
        """The answers, counted on their way."""
        for answer in answers:
            self._tokens += answer.usage.completion_tokens
            if time.monotonic() - self._said_s >= _PROGRESS_EVERY_S:
                self._tell()
            yield answer

    def chunk_done(self, num_records: int) -> None:
        """A chunk is on the disk."""
        self._done = num_records
        self._tell()

    def _tell(self) -> None:
        self._said_s = time.monotonic()
        seconds, done = self._said_s - self._started_s, self._done - self._start
        left = seconds / done * (self._num_prompts - self._done) if done else math.inf
        if self._say is not None:
            self._say(BulkProgress(self._done, self._num_prompts, self._tokens, seconds, left))
