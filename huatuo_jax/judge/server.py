"""Calls to an OpenAI-compatible server within its rate limits and our budget, with retries.

Every call is written to the spending file before it is sent. The openai client's own retries are
off, as they would be neither counted nor paced.

A failed call leads to a retry, to giving up one question, or to the end of the run. Servers have
few statuses and many wordings, so the words decide first: those about money, a key or a model
concern every question; those about filters and lengths concern this question. Where the words say
neither, only the answer to another question can decide: such a fault counts as this question's,
and ends the run once enough questions have met it and none was answered.

A server that answers with an error has done no work, so the call costs nothing; but where a reply
was cut off or never came it may have, and the cost is unknown.
"""

import asyncio
import dataclasses
import datetime
import email.utils
import math
import os
import random
import re
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import openai

from huatuo_jax.core.config import Text
from huatuo_jax.judge.completions import (
    Completion,
    Meaning,
    NoCompletion,
    meanings_of,
    read_completion,
    read_json,
    status_within,
    words_of,
)
from huatuo_jax.judge.judgements import Estimate, JudgementFailed, JudgeUnusable, printable
from huatuo_jax.judge.spending import (
    Budget,
    BudgetConfig,
    Price,
    RateLimiter,
    RateLimits,
    Reservation,
    SpendingFile,
    Totals,
    Usage,
)

# "give up": this question. "stop": the run, as every question meets it; "stop unless answered":
# unless another question was answered before.
Consequence = Literal["ask again", "give up", "stop unless answered", "stop"]

_MOST_OF_A_MESSAGE = 300
# A filter may refuse any question, the first ones too; refusals cost nothing.
_UNCLEAR_ENDS_AFTER = 20
_FORBIDDEN_ENDS_AFTER = 3  # Mostly a key without permission.
_LONGEST_WAIT_S = 366 * 24 * 3600.0  # A larger number is not in seconds.
_SHORTEST_KEY = 8  # A local server takes any word as a key; "none" is not a secret.
# ASCII alone: Chinese text has no blank before a key, and its characters are letters too.
_KEY_LIKE = re.compile(r"(?<![A-Za-z0-9])sk-[A-Za-z0-9_*.-]{4,}")
# Errors before anything was sent. By class name, as the library below the openai client has
# changed between its versions.
_NOT_SENT = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout"})
OPENAI_URL = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A failed call.

    Attributes:
        outcome: in a word or two, for the spending file.
        message: for the user, without secrets, with the server's own words.
        consequence: what to do.
        ends_after: number of questions with this fault, and none answered, that end the run; None
            where `consequence` alone decides.
        unbilled: certain to cost nothing.
        refused: the server did not accept the question at all.
        reached: a server answered, if only with an error.
        wait_s: seconds that the server asked to wait, or 0.
        usage: tokens that the server counted all the same.
    """

    outcome: str
    message: str
    consequence: Consequence
    ends_after: int | None = None
    unbilled: bool
    refused: bool = False
    reached: bool = True
    wait_s: float = 0.0
    usage: Usage | None = None


def scrubbed(text: str, key: str) -> str:
    """Returns the text without the key, and without anything that looks like part of one."""
    if len(key) >= _SHORTEST_KEY:
        text = text.replace(key, "[key]")
    return _KEY_LIKE.sub("[key]", text)


def fault_of(error: Exception, *, key: str, model: str, where: str, timeout_s: float) -> Fault:
    """Classifies a failed call.

    Args:
        error: any exception of the client or of the reader of the body.
        key: kept out of every text.
        model: the model asked.
        where: the server, as the user knows it.
        timeout_s: how long a call may take.
    """

    def cleaned(words: str) -> str:
        return printable(scrubbed(words, key))[:_MOST_OF_A_MESSAGE]

    if isinstance(error, openai.APIStatusError):
        body = _body_of(error)
        message = cleaned(words_of(body) or str(error.message))
        wait_s = _wait_s(error.response.headers)
        return _error_fault(error.status_code, body, message, model, where, wait_s)
    if isinstance(error, NoCompletion) and error.body is not None:
        message = cleaned(words_of(error.body) or str(error.body))
        return _error_fault(None, error.body, message, model, where, 0.0, error.usage)
    cause = type(error.__cause__).__name__
    not_sent = cause in _NOT_SENT
    if isinstance(error, TimeoutError | openai.APITimeoutError) and not not_sent:
        outcome, message = "time-out", f"no reply from {where} within {timeout_s:g} s"
    elif not_sent:
        outcome, message = "no connection", f"no server answers at {where}"
    elif isinstance(error, openai.APIConnectionError):
        outcome, message = "broken connection", f"the connection to {where} broke ({cause})"
    else:
        said = str(error) if isinstance(error, NoCompletion) else type(error).__name__
        outcome, message = "broken reply", f"the reply of {where} is unreadable: {cleaned(said)}"
    return Fault(
        outcome=outcome,
        message=message,
        consequence="ask again",
        unbilled=not_sent,
        refused=not_sent,
        reached=not (not_sent or outcome == "time-out"),
    )


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """A server's address and limits, and the retries.

    Attributes:
        base_url: the server's address, with its `/v1`.
        budget: what all runs of one labels file may spend.
        limits: the server's rate limits.
        timeout_s: seconds of a call, from start to end.
        max_attempts: calls for one question, where the server or the connection fails.
        first_delay_s: delay before the second attempt; it doubles each time, less a random part.
        max_delay_s: longest delay, unless the server asks for more.
        max_wait_s: a server that asks for a longer wait ends the run.
        max_failures: number of questions in a row without a successful attempt that ends the run.
    """

    base_url: Text = OPENAI_URL
    budget: BudgetConfig = BudgetConfig()
    limits: RateLimits = RateLimits()
    timeout_s: float = 120.0
    max_attempts: int = 6
    first_delay_s: float = 1.0
    max_delay_s: float = 60.0
    max_wait_s: float = 600.0
    max_failures: int = 20

    def __post_init__(self) -> None:
        """Validates the fields."""
        address = urllib.parse.urlsplit(self.base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError("base_url should be like http://localhost:8000/v1")
        if address.username is not None or address.query:
            raise ValueError(f"base_url must not hold a secret; put the key into {KEY_VARIABLE}")
        for name in ("max_attempts", "max_failures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("timeout_s", "first_delay_s", "max_delay_s", "max_wait_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")


@dataclass
class Taken:
    """The cost of all calls of one question.

    Attributes:
        requests: calls sent.
        unknown_requests: calls of unknown cost among them.
        usage: tokens of the others, as the server counted them.
        cost: money of the others; None without a price.
        latency_s: seconds of the last call.
    """

    requests: int = 0
    unknown_requests: int = 0
    usage: Usage = dataclasses.field(default_factory=Usage)
    cost: float | None = None
    latency_s: float | None = None

    def fields(self) -> dict[str, Any]:
        """Returns the fields of a reply or a failed judgement."""
        counts = {"requests": self.requests, "unknown_requests": self.unknown_requests}
        return {
            "usage": {**dataclasses.asdict(self.usage), **counts},
            "cost": self.cost,
            "latency_s": self.latency_s,
        }


def key_from_environment() -> str:
    """Returns the key, which is read from the environment and nowhere else.

    Raises:
        JudgeUnusable: there is none, or it is not a valid key.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        raise JudgeUnusable(
            f"{KEY_VARIABLE} is not set; the judge's key is read from there (any word does for a"
            " server of your own without keys)"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise JudgeUnusable(f"{KEY_VARIABLE} holds characters that no key has")
    return key


class Server:
    """A server, and the spending there."""

    def __init__(
        self,
        cfg: ServerConfig,
        *,
        key: str,
        price: Price | None,
        spending: str | os.PathLike[str] | None,
    ) -> None:
        """Reads the spending of earlier runs; sends nothing.

        Args:
            cfg: address, limits and retries.
            key: for the server.
            price: of its model; None where it is unknown.
            spending: the spending file; None to count this run alone.

        Raises:
            ValueError: the file is not a spending file, or another process writes it.
        """
        self._cfg, self._key, self._price = cfg, key, price
        self._where = f"the server at {cfg.base_url}"
        self._spending = SpendingFile(spending)
        self._budget = Budget(cfg.budget, self._spending)
        # The server's window includes calls of a killed run.
        recent = self._spending.recent(2 * cfg.limits.window_s + 60.0)
        self._limiter = RateLimiter(cfg.limits, recent)
        self._client = openai.AsyncOpenAI(
            api_key=key, base_url=cfg.base_url, max_retries=0, timeout=cfg.timeout_s
        )
        self._reached = self._answered = False
        self._failures_in_a_row = 0
        self._under_way = 0
        self._ended = asyncio.Event()
        self._most_output_tokens = 0  # Largest count of a call by the server.

    @property
    def totals(self) -> Totals:
        """Returns the sums over all calls, of this run and earlier ones."""
        return self._spending.totals()

    async def close(self) -> None:
        """Closes connections and the spending file."""
        await self._client.close()
        self._spending.close()

    async def complete(
        self, request: Mapping[str, Any], estimate: Estimate, taken: Taken
    ) -> Completion:
        """Gets a chat completion, with as many attempts as needed.

        Args:
            request: the body, with its model.
            estimate: the largest cost of a call.
            taken: added to, also where there is no completion.

        Raises:
            JudgementFailed: this request got none; with `ends_after` where no request has been
                answered yet, and the server's words do not show whether any will be.
            JudgeUnusable: no request can get one.
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
        """Makes one call, and counts it however it ends."""
        reservation = await self._let_through(estimate)
        taken.requests += 1
        started_s = time.monotonic()
        self._under_way += 1
        try:
            async with asyncio.timeout(self._cfg.timeout_s):
                send = self._client.chat.completions.with_raw_response.create
                response = await send(**request)
            completion = read_completion(response.content)
        except Exception as error:  # Anything that a server causes is a fault of this call alone.
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
        # Reasoning may exceed a reply's token limit: the longest so far is expected.
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
        """Replaces the amount held for a call by its cost."""
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
        """Raises if a retry is useless; makes all calls wait if the server asks for it."""
        if fault.consequence == "stop":
            raise self._unusable(fault.message)
        if fault.consequence == "stop unless answered" or fault.ends_after is not None:
            # An answer to a call under way would decide.
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
        """Returns the error that ends the run, and raises it in every waiting call."""
        error = JudgeUnusable(printable(message))
        self._limiter.give_up(error)
        return error

    def _delay_s(self, attempt: int) -> float:
        # Half of it is random, so that calls that failed together are not repeated together.
        delay_s = min(self._cfg.first_delay_s * 2.0 ** (attempt - 1), self._cfg.max_delay_s)
        return delay_s * random.uniform(0.5, 1.0)


def _body_of(error: openai.APIStatusError) -> object:
    """Returns the body of an error; the client itself reads none after a byte order mark."""
    try:
        return read_json(error.response.content)
    except NoCompletion:
        return error.body


def _error_fault(
    status: int | None,
    body: object,
    message: str,
    model: str,
    where: str,
    wait_s: float,
    usage: Usage | None = None,
) -> Fault:
    """Classifies an error that a server reports.

    Args:
        status: None where the error came with status 200, so that the server may have done work.
        body: of the error.
        message: of the error, for the user.
        model: the model asked.
        where: the server.
        wait_s: seconds that its headers ask to wait.
        usage: the server's count.
    """
    http = "an error with HTTP 200" if status is None else f"HTTP {status}"
    meant = status_within(body) if status is None else status
    consequence, reason, ends_after = _consequence(meant, meanings_of(body), model)
    text = f" {reason} ({http}: {message})" if reason else f": {http}: {message}"
    stops = consequence in ("stop", "stop unless answered")
    return Fault(
        outcome=http,
        message=f"{where}{text}",
        consequence=consequence,
        # A gateway that timed out does not know whether there was an answer.
        unbilled=status not in (None, 408, 502, 504),
        ends_after=ends_after,
        refused=status is not None and (stops or ends_after is not None),
        wait_s=wait_s if consequence == "ask again" else 0.0,
        usage=usage,
    )


def _consequence(
    status: int | None, meanings: frozenset[Meaning], model: str
) -> tuple[Consequence, str, int | None]:
    """Returns what to do about an error, its description where it is known, and `ends_after`."""
    failing = status is None or status >= 500
    busy = status in (408, 409, 425, 429) or (
        (failing or status == 403) and Meaning.BUSY in meanings
    )
    if status == 402 or Meaning.NO_MONEY in meanings:
        return "stop", "has nothing left for this key to spend", None
    if status == 401 or (not busy and Meaning.NO_KEY in meanings):
        return "stop", "refuses the key in OPENAI_API_KEY", None
    no_model = f"does not know the model {model!r}, or is no such server"
    if not busy and Meaning.NO_MODEL in meanings:
        return "stop", no_model, None
    if status in (404, 405):
        return "stop unless answered", no_model, None
    if busy:
        return "ask again", "", None
    if status in (413, 451) or meanings & {Meaning.FILTERED, Meaning.TOO_LONG}:
        return "give up", "will not judge this question", None
    if failing:
        return "ask again", "", None
    if status == 403:
        reason = "refuses the key in OPENAI_API_KEY, or this question"
        return "give up", reason, _FORBIDDEN_ENDS_AFTER
    if Meaning.PARAMETER in meanings:
        return "stop unless answered", "does not take the request as it is", None
    return "give up", "refuses this question", _UNCLEAR_ENDS_AFTER


def _wait_s(headers: Mapping[str, str]) -> float:
    """Returns the seconds that Retry-After asks for, given as a number or as a date."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers[name] if name in headers else None
        if value is None:
            continue
        try:
            seconds = float(value) * unit_s
        except ValueError:
            seconds = _until_s(value)
        if math.isfinite(seconds) and 0 < seconds <= _LONGEST_WAIT_S:
            return seconds
    return 0.0


def _until_s(date: str) -> float:
    try:
        then = email.utils.parsedate_to_datetime(date)
    except (ValueError, OverflowError, TypeError, IndexError):
        return 0.0  # Numbers of any size that are not a date.
    if then.tzinfo is None:
        then = then.replace(tzinfo=datetime.UTC)
    return (then - datetime.datetime.now(datetime.UTC)).total_seconds()
