"""Requests and tokens a minute: no call starts before the server's limits allow it."""

import asyncio
import collections
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

# Calls do not arrive as evenly as they leave: what left a window late may arrive in the next one.
_MARGIN_S = 1.0
_LOOK_AGAIN_S = 0.25


@dataclass(frozen=True, kw_only=True)
class RateLimits:
    """What a server allows.

    Attributes:
        requests: in a window; None for no limit.
        tokens: of prompts and replies in a window; None for no limit.
        window_s: length of the window.
    """

    requests: int | None = None
    tokens: int | None = None
    window_s: float = 60.0

    def __post_init__(self) -> None:
        """Raise ValueError for limits that let nothing through."""
        for name in ("requests", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} in a window must be at least 1")
        if not self.window_s > 0:
            raise ValueError(f"window_s={self.window_s} must be above 0")


class PastCall(NamedTuple):
    """A call of an earlier run: how long ago it started, and its tokens at most."""

    age_s: float
    tokens: int


class Passage:
    """One call that was let through."""

    def __init__(self, started_s: float, tokens: int) -> None:
        """Remember when and with how many tokens at most."""
        self.started_s, self.tokens = started_s, tokens

    def took(self, tokens: int) -> None:
        """Put the server's own count in place of the reserved tokens."""
        self.tokens = tokens


class RateLimiter:
    """Lets calls through, first come first served, in a sliding window.

    In no window do more calls start than `requests`, nor calls of more than `tokens`, where a call
    under way counts with the most tokens it may take. A single call above `tokens` goes alone.
    """

    def __init__(self, limits: RateLimits, past: Iterable[PastCall] = ()) -> None:
        """Start with the calls of an earlier run, as a kill does not empty the server's window."""
        self._limits = limits
        self._window_s = limits.window_s + _MARGIN_S
        now_s = time.monotonic()
        oldest_first = sorted(past, reverse=True)
        self._passages = collections.deque(
            Passage(now_s - max(call.age_s, 0.0), call.tokens) for call in oldest_first
        )
        self._turn = asyncio.Lock()
        self._held_until_s = now_s
        self._given_up: Exception | None = None

    def give_up(self, error: Exception) -> None:
        """Let nothing through any more: who waits, or comes later, gets this error."""
        self._given_up = error

    async def rest(self, seconds: float) -> None:
        """Wait so long, or until there is nothing left to wait for."""
        until_s = time.monotonic() + seconds
        while (wait_s := until_s - time.monotonic()) > 0:
            await self._sleep(wait_s)

    def hold(self, seconds: float) -> None:
        """Let no call through for so long: the server has asked for it."""
        self._held_until_s = max(self._held_until_s, time.monotonic() + seconds)

    async def pass_through(self, tokens: int) -> Passage:
        """Wait until a call of so many tokens at most may start; it counts as started then."""
        async with self._turn:
            while (wait_s := self._wait_s(tokens)) > 0:
                await self._sleep(wait_s)
            if self._given_up is not None:
                raise self._given_up
            passage = Passage(time.monotonic(), tokens)
            if self._limits.requests is not None or self._limits.tokens is not None:
                self._passages.append(passage)
            return passage

    async def _sleep(self, wait_s: float) -> None:
        if self._given_up is not None:
            raise self._given_up
        await asyncio.sleep(min(wait_s, _LOOK_AGAIN_S))

    def _wait_s(self, tokens: int) -> float:
        now_s = time.monotonic()
        while self._passages and self._passages[0].started_s + self._window_s <= now_s:
            self._passages.popleft()
        wait_s = self._held_until_s - now_s
        limits, passages = self._limits, self._passages
        if limits.requests is not None and len(passages) >= limits.requests:
            wait_s = max(wait_s, passages[-limits.requests].started_s + self._window_s - now_s)
        if limits.tokens is not None:
            excess = sum(passage.tokens for passage in passages) + tokens - limits.tokens
            for passage in passages:
                if excess <= 0:
                    break
                wait_s = max(wait_s, passage.started_s + self._window_s - now_s)
                excess -= passage.tokens
        return wait_s
