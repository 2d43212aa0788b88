"""Calls to an OpenAI-compatible server: within its limits and our budget, asked again on failure.

Every call is written to the spending file before it is sent. The openai client's own retries are
off, as they would be neither counted nor paced.
"""

import asyncio
import dataclasses
import math
import os
import random
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import openai

from huatuo_jax.feedback.budget import Budget, BudgetConfig, Reservation
from huatuo_jax.feedback.completions import Completion, read_completion
from huatuo_jax.feedback.judgements import printable
from huatuo_jax.feedback.judges import Estimate, JudgementFailed, JudgeUnusable
from huatuo_jax.feedback.prices import Price
from huatuo_jax.feedback.rate_limits import RateLimiter, RateLimits
from huatuo_jax.feedback.server_faults import Fault, fault_of
from huatuo_jax.feedback.spending import SpendingFile, Totals, Usage

OPENAI_URL = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where to ask, what it allows, and how hard to try.

    Attributes:
        base_url: of the server, with its `/v1`.
        budget: what all runs of one labels file may take.
        limits: what the server allows.
        timeout_s: of a call, from start to end.
        max_attempts: calls for one question, where the server or the way to it fails.
        first_delay_s: before the second attempt; it doubles from there, less a random part.
        max_delay_s: at most so long, unless the server asks for more.
        max_wait_s: a server that asks for more ends the run.
        max_failures: so many questions in a row that no attempt brought through end the run.
    """

    base_url: str = OPENAI_URL
    budget: BudgetConfig = BudgetConfig()
    limits: RateLimits = RateLimits()
    timeout_s: float = 120.0
    max_attempts: int = 6
    first_delay_s: float = 1.0
    max_delay_s: float = 60.0
    max_wait_s: float = 600.0
    max_failures: int = 20

    def __post_init__(self) -> None:
        """Raise ValueError for a field that cannot be."""
        address = urllib.parse.urlsplit(self.base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError("base_url should be like http://localhost:8000/v1")
        if address.username is not None or address.query:
            raise ValueError(f"base_url may hold no secret; the key belongs into {KEY_VARIABLE}")
        for name in ("max_attempts", "max_failures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("timeout_s", "first_delay_s", "max_delay_s", "max_wait_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")


@dataclass
class Taken:
    """What the calls of one question took together.

    Attributes:
        requests: calls sent.
        unknown_requests: of them those whose cost nobody told.
        usage: tokens of the others, as the server counted them.
        cost: money of the others; None without a price.
        latency_s: of the last call.
    """

    requests: int = 0
    unknown_requests: int = 0
    usage: Usage = dataclasses.field(default_factory=Usage)
    cost: float | None = None
    latency_s: float | None = None

    def fields(self) -> dict[str, Any]:
        """As a reply and a failed judgement hold it."""
        counts = {"requests": self.requests, "unknown_requests": self.unknown_requests}
        return {
            "usage": {**dataclasses.asdict(self.usage), **counts},
            "cost": self.cost,
            "latency_s": self.latency_s,
        }


def key_from_environment() -> str:
    """The key, which is never taken from anywhere else.

    Raises:
        JudgeUnusable: there is none, or it cannot be one.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        raise JudgeUnusable(
            f"{KEY_VARIABLE} is not set; the judge's key is taken from there (a server of your own"
            " that wants none takes any word)"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise JudgeUnusable(f"{KEY_VARIABLE} holds characters that no key has")
    return key


class Server:
    """A server, and what has been spent there."""

    def __init__(
        self,
        cfg: ServerConfig,
        *,
        key: str,
        price: Price | None,
        spending: str | os.PathLike[str] | None,
    ) -> None:
        """Read what earlier runs spent; nothing is sent.

        Args:
            cfg: where and how.
            key: for the server.
            price: of its model; None where it is not known.
            spending: the spending file; None to count this run alone.

        Raises:
            ValueError: the spending file holds something else, or another process writes it.
        """
        self._cfg, self._key, self._price = cfg, key, price
        self._where = f"the server at {cfg.base_url}"
        self._spending = SpendingFile(spending)
        self._budget = Budget(cfg.budget, self._spending)
        # A server's window knows of calls that a killed run made.
        recent = self._spending.recent(2 * cfg.limits.window_s + 60.0)
        self._limiter = RateLimiter(cfg.limits, recent)
        self._client = openai.AsyncOpenAI(
            api_key=key, base_url=cfg.base_url, max_retries=0, timeout=cfg.timeout_s
        )
        self._reached = self._answered = False
        self._failures_in_a_row = 0
        self._under_way = 0
        self._ended = asyncio.Event()
        self._most_output_tokens = 0  # Of a call, as the server counted them.

    @property
    def totals(self) -> Totals:
        """What all calls took, in this run and those before."""
        return self._spending.totals()

    async def close(self) -> None:
        """Close connections and the spending file."""
        await self._client.close()
        self._spending.close()

    async def complete(
        self, request: Mapping[str, Any], estimate: Estimate, taken: Taken
    ) -> Completion:
        """A chat completion, after as many attempts as it needs.

        Args:
            request: the body, with its model.
            estimate: the most that a call may take.
            taken: is added to, also where there is no completion.

        Raises:
            JudgementFailed: there is none to this request; with `ends_after` where no request has
                been answered yet, and the server's words do not say whether any will be.
            JudgeUnusable: there will be none to any.
        """
        if self._price is not None:
            taken.cost = 0.0
        told = ""
        for attempt in range(1, self._cfg.max_attempts + 1):
            outcome = await self._call(request, estimate, taken)
            if isinstance(outcome, Completion):
                self._reached = True
                self._failures_in_a_row = 0
                return outcome
            await self._react(outcome, taken)
            told = f"{attempt} attempts failed, the last one: {outcome.message}"
            if attempt < self._cfg.max_attempts:
                await self._limiter.rest(self._delay_s(attempt))
        self._failures_in_a_row += 1
        if not self._reached:
            raise self._unusable(told)
        if self._failures_in_a_row >= self._cfg.max_failures:
            raise self._unusable(f"{self._failures_in_a_row} questions in a row failed: {told}")
        raise JudgementFailed(told, failure="unanswered", **taken.fields())

    async def _call(
        self, request: Mapping[str, Any], estimate: Estimate, taken: Taken
    ) -> Completion | Fault:
        """One call, counted whatever becomes of it."""
        reservation = await self._let_through(estimate)
        taken.requests += 1
        started_s = time.monotonic()
        self._under_way += 1
        try:
            async with asyncio.timeout(self._cfg.timeout_s):
                send = self._client.chat.completions.with_raw_response.create
                response = await send(**request)
            completion = read_completion(response.content)
        except Exception as error:  # Whatever a server can cause is a fault of this call alone.
            fault = fault_of(
                error,
                key=self._key,
                model=request["model"],
                where=self._where,
                timeout_s=self._cfg.timeout_s,
            )
            self._reached |= fault.reached
            self._count(fault.usage, fault, reservation, taken)
            return fault
        finally:
            taken.latency_s = time.monotonic() - started_s
            self._under_way -= 1
            self._ended.set()
        self._answered |= completion.text is not None or completion.refusal is not None
        self._count(completion.usage, None, reservation, taken)
        return completion

    async def _let_through(self, estimate: Estimate) -> Reservation:
        # Thoughts may come on top of what a reply is allowed: the longest that came is expected.
        beyond = max(0, self._most_output_tokens - estimate.max_output_tokens)
        max_tokens = estimate.max_input_tokens + estimate.max_output_tokens + beyond
        max_cost = estimate.max_cost or 0.0
        if self._price is not None:
            max_cost += self._price.cost(Usage(output_tokens=beyond))
        try:
            reservation = await self._budget.reserve(max_tokens=max_tokens, max_cost=max_cost)
        except JudgeUnusable as error:
            self._limiter.give_up(error)
            raise
        try:
            passage = await self._limiter.pass_through(max_tokens)
        except BaseException:
            reservation.cancel()
            raise
        reservation.start(passage)
        return reservation

    def _count(
        self, usage: Usage | None, fault: Fault | None, reservation: Reservation, taken: Taken
    ) -> None:
        """Put a call's cost in place of what was held for it."""
        cost = None
        if usage is not None:
            cost = 0.0 if self._price is None else self._price.cost(usage)
            taken.usage += usage
            taken.cost = None if self._price is None else (taken.cost or 0.0) + cost
            self._most_output_tokens = max(self._most_output_tokens, usage.output_tokens)
        elif fault is not None and fault.unbilled:
            cost = 0.0
        else:
            taken.unknown_requests += 1
        reservation.end(
            outcome="answered" if fault is None else fault.outcome,
            usage=usage,
            cost=cost,
            refused=fault is not None and fault.refused,
        )

    async def _react(self, fault: Fault, taken: Taken) -> None:
        """Raise where asking again is no use; make everybody wait where the server asks for it."""
        if fault.consequence == "stop":
            raise self._unusable(fault.message)
        if fault.consequence == "stop unless answered" or fault.ends_after is not None:
            # What is under way may be answered, and would tell.
            while self._under_way and not self._answered:
                self._ended.clear()
                await self._ended.wait()
        if fault.consequence == "stop unless answered" and not self._answered:
            raise self._unusable(fault.message)
        if fault.consequence != "ask again":
            ends_after = None if self._answered else fault.ends_after
            raise JudgementFailed(
                fault.message, failure="refused", ends_after=ends_after, **taken.fields()
            )
        if fault.wait_s > self._cfg.max_wait_s:
            raise self._unusable(f"{fault.message}; it asks to wait {fault.wait_s:.0f} s")
        if fault.wait_s:
            self._limiter.hold(fault.wait_s)

    def _unusable(self, message: str) -> JudgeUnusable:
        """The error that ends the run, which everyone who waits gets too."""
        error = JudgeUnusable(printable(message))
        self._limiter.give_up(error)
        return error

    def _delay_s(self, attempt: int) -> float:
        # Half of it is random, so that calls that failed together do not come back together.
        delay_s = min(self._cfg.first_delay_s * 2.0 ** (attempt - 1), self._cfg.max_delay_s)
        return delay_s * random.uniform(0.5, 1.0)
