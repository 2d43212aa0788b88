"""Rate limits, budget, prices, and the spending file of all calls to a judge's server.

A labels file holds judgements; a call that was cut off leaves none, but may have been paid for.
So each call has two lines in `LABELS.spending.jsonl`: one before it is sent, with the most it may
cost, and one when it ends, with its cost. A call of unknown cost (a timeout, a broken connection, a
killed run, a reply without usage) counts with the most it may cost. No call starts before the
server's rate limits allow it, and no run, nor all runs of a file together, exceed the budget.

Prices of tokens are a table in a JSON file that the user can replace. The shipped table is an
example: prices change, and nothing here can look them up. Every sum that uses it says so and names
it.
"""

import asyncio
import collections
import contextlib
import dataclasses
import decimal
import json
import math
import os
import pathlib
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from huatuo_jax.core.files import AppendedFile, Line, as_path
from huatuo_jax.judge.judgements import JudgeUnusable

# Calls do not arrive as evenly as they leave: one that leaves late may arrive in the next window.
_MARGIN_S = 1.0
_LOOK_AGAIN_S = 0.25


@dataclass(frozen=True, kw_only=True)
class RateLimits:
    """A server's rate limits.

    Attributes:
        requests: calls in a window; None for no limit.
        tokens: of prompts and replies in a window; None for no limit.
        window_s: length of the window in seconds.
    """

    requests: int | None = None
    tokens: int | None = None
    window_s: float = 60.0

    def __post_init__(self) -> None:
        """Validates that the limits let something through."""
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
        """Sets the start and the largest number of tokens."""
        self.started_s, self.tokens = started_s, tokens

    def took(self, tokens: int) -> None:
        """Replaces the reserved tokens by the server's own count."""
        self.tokens = tokens


class RateLimiter:
    """Lets calls through, first come first served, in a sliding window.

    In no window do more than `requests` calls start, nor calls of more than `tokens` tokens, where
    a call under way counts with its largest number. A single call above `tokens` goes alone.
    """

    def __init__(
        self,
        limits: RateLimits,
        past: Iterable[PastCall] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        """Starts with the calls of an earlier run, as a kill does not empty the server's window.

        Args:
            limits: the server's.
            past: calls of earlier runs.
            clock: returns the time in seconds.
            sleep: waits for some seconds.
        """
        self._limits, self._clock, self._wait = limits, clock, sleep
        self._window_s = limits.window_s + _MARGIN_S
        now_s = self._clock()
        oldest_first = sorted(past, reverse=True)
        self._passages = collections.deque(
            Passage(now_s - max(call.age_s, 0.0), call.tokens) for call in oldest_first
        )
        self._turn = asyncio.Lock()
        self._held_until_s = now_s
        self._given_up: Exception | None = None
        self._gave_up = asyncio.Event()

    def give_up(self, error: Exception) -> None:
        """Lets nothing through any more: every waiting or later call gets this error."""
        self._given_up = error
        self._gave_up.set()

    async def rest(self, seconds: float) -> None:
        """Waits for this long, or until the limiter gives up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._gave_up.wait()
        if self._given_up is not None:
            raise self._given_up

    def hold(self, seconds: float) -> None:
        """Lets no call through for this long, as the server has asked."""
        self._held_until_s = max(self._held_until_s, self._clock() + seconds)

    async def pass_through(self, tokens: int) -> Passage:
        """Waits until a call of at most this many tokens may start, and counts it as started."""
        async with self._turn:
            while (wait_s := self._wait_s(tokens)) > 0:
                await self._sleep(wait_s)
            if self._given_up is not None:
                raise self._given_up
            passage = Passage(self._clock(), tokens)
            if self._limits.requests is not None or self._limits.tokens is not None:
                self._passages.append(passage)
            return passage

    async def _sleep(self, wait_s: float) -> None:
        if self._given_up is not None:
            raise self._given_up
        await self._wait(min(wait_s, _LOOK_AGAIN_S))

    def _wait_s(self, tokens: int) -> float:
        now_s = self._clock()
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of a call as the server counted them; `cached_tokens` are part of `input_tokens`."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        """Adds the tokens of both."""
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Totals:
    """The sums over all calls of a spending file, of this run and earlier ones.

    Attributes:
        requests: calls sent.
        unknown_requests: calls of unknown cost among them.
        usage: tokens of the other calls, as the server counted them.
        cost: money of the other calls; 0 without prices.
        unknown_cost: the largest possible cost of the unknown ones; 0 without prices.
    """

    requests: int
    unknown_requests: int
    usage: Usage
    cost: float
    unknown_cost: float


@dataclasses.dataclass
class _Call:
    started_s: float
    max_tokens: int
    max_cost: float
    known: bool = False
    refused: bool = False
    usage: Usage | None = None


class SpendingFile:
    """Calls started and ended, kept in a file where there is one; `close` when done."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        """Opens the file, if it exists, and reads the spending of earlier runs.

        Args:
            path: the file, made with the first call; None to count without a file.

        Raises:
            ValueError: the file holds something else, or another process writes it.
            OSError: it cannot be read or written.
        """
        self._path = None if path is None else as_path(path)
        self._file: AppendedFile | None = None
        self._calls: list[_Call] = []
        # Sums are kept on the way, and exact: a budget asks for them before every call.
        self._num_known, self._usage = 0, Usage()
        self._cost = self._unknown_cost = decimal.Decimal(0)
        if self._path is not None and self._path.exists():
            self._open()

    def close(self) -> None:
        """Closes the file; removes it if it holds refused calls alone."""
        if self._file is not None:
            if all(call.refused for call in self._calls):
                self._file.remove()
            else:
                self._file.close()
            self._file = None

    def start(self, *, max_tokens: int, max_cost: float) -> int:
        """Records a call before it is sent, and returns its number."""
        if self._file is None and self._path is not None:
            self._open()
        number = len(self._calls)
        row = {
            "call": number,
            "time_s": time.time(),
            "max_tokens": max_tokens,
            "max_cost": max_cost,
        }
        self._append(row)
        self._start(row)
        return number

    def end(
        self, number: int, *, outcome: str, usage: Usage | None, cost: float | None, refused: bool
    ) -> None:
        """Records the end of a call.

        Args:
            number: as `start` gave it.
            outcome: in a word or two.
            usage: tokens, where the server counted them.
            cost: money; None where it cannot be known.
            refused: the server did not take the question at all.
        """
        row = {
            "call": number,
            "outcome": outcome,
            "usage": None if usage is None else dataclasses.asdict(usage),
            "cost": cost,
            "refused": refused,
        }
        self._append(row)
        self._end(row)

    def totals(self) -> Totals:
        """Returns the spending so far; a call under way counts as unknown."""
        return Totals(
            requests=len(self._calls),
            unknown_requests=len(self._calls) - self._num_known,
            usage=self._usage,
            cost=float(self._cost),
            unknown_cost=float(self._unknown_cost),
        )

    def recent(self, seconds: float) -> Sequence[PastCall]:
        """Returns the calls of the last `seconds`, for the rate limits."""
        now_s = time.time()
        return [
            PastCall(now_s - call.started_s, _tokens_of(call))
            for call in self._calls
            if now_s - call.started_s < seconds
        ]

    def _open(self) -> None:
        assert self._path is not None
        self._file = AppendedFile(self._path, locked=True)
        try:
            for line in self._file.lines():
                self._read_line(line)
            self._file.cut_unfinished()
        except BaseException:
            self._file.close()
            self._file = None
            raise

    def _read_line(self, line: Line) -> None:
        try:
            self._read(line.row)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            where = f"{self._path}:{line.number}"
            raise ValueError(f"{where}: no line of a spending file") from error

    def _read(self, row: Mapping[str, Any]) -> None:
        if "outcome" in row:
            self._end(row)
        elif row["call"] != len(self._calls):
            raise ValueError("calls are not in order")
        else:
            self._start(row)

    def _start(self, row: Mapping[str, Any]) -> None:
        self._calls.append(_Call(row["time_s"], row["max_tokens"], row["max_cost"]))
        self._unknown_cost += _exact(row["max_cost"])

    def _end(self, row: Mapping[str, Any]) -> None:
        call = self._calls[row["call"]]
        call.refused = row["refused"]
        call.usage = None if row["usage"] is None else Usage(**row["usage"])
        if call.usage is not None:
            self._usage += call.usage
        if row["cost"] is not None:
            call.known = True
            self._num_known += 1
            self._unknown_cost -= _exact(call.max_cost)
            self._cost += _exact(row["cost"])

    def _append(self, row: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.append([row])


def _exact(money: float) -> decimal.Decimal:
    return decimal.Decimal(repr(float(money)))


def _tokens_of(call: _Call) -> int:
    if call.usage is not None:
        return call.usage.input_tokens + call.usage.output_tokens
    return 0 if call.known else call.max_tokens


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """The budget of all calls of one labels file, over all its runs.

    Attributes:
        max_requests: calls, failed ones included; None for no limit.
        max_cost: money in the currency of the price table; None for no limit.
    """

    max_requests: int | None = None
    max_cost: float | None = None

    def __post_init__(self) -> None:
        """Validates that no limit is negative."""
        for name in ("max_requests", "max_cost"):
            value = getattr(self, name)
            if value is not None and (not math.isfinite(value) or value < 0):
                raise ValueError(f"{name}={value} must be a number from 0 on")


class Reservation:
    """Part of the budget, held for one call from before it is sent until it ends."""

    def __init__(self, budget: "Budget", *, max_tokens: int, max_cost: float) -> None:
        """Sets the amounts; `Budget.reserve` makes reservations."""
        self._budget, self._number = budget, -1
        self._passage = Passage(0.0, max_tokens)
        self.max_tokens, self.max_cost = max_tokens, max_cost

    def start(self, passage: Passage) -> None:
        """Records that the call is sent now; from here on it counts, however it ends.

        Args:
            passage: through the rate limits.
        """
        self._passage = passage
        self._number = self._budget.spending.start(
            max_tokens=self.max_tokens, max_cost=self.max_cost
        )
        self._budget.started(self)

    def end(
        self, *, outcome: str, usage: Usage | None, cost: float | None, refused: bool = False
    ) -> None:
        """Replaces the amount held for the call by its cost.

        Args:
            outcome: in a word or two.
            usage: tokens, where the server counted them.
            cost: money; None where it is unknown: the whole amount held then stays counted.
            refused: the server did not accept the question at all.
        """
        self._budget.spending.end(
            self._number, outcome=outcome, usage=usage, cost=cost, refused=refused
        )
        if usage is not None:
            self._passage.took(usage.input_tokens + usage.output_tokens)
        elif cost is not None:
            self._passage.took(0)
        self._budget.ended()

    def cancel(self) -> None:
        """Releases the amount held for a call that was never sent."""
        self._budget.cancelled(self)


class Budget:
    """Lets a call start only if the budget covers its largest cost."""

    def __init__(self, cfg: BudgetConfig, spending: SpendingFile) -> None:
        """Starts from the spending of earlier runs.

        Args:
            cfg: the budget.
            spending: the spending so far.
        """
        self._cfg, self.spending = cfg, spending
        self._held: set[Reservation] = set()  # Reserved, and not started.
        self._under_way = 0
        self._changed = asyncio.Event()

    async def reserve(self, *, max_tokens: int, max_cost: float) -> Reservation:
        """Reserves the largest cost of a call.

        Waits for calls under way where only they prevent it, as they mostly cost less than the
        amount held for them.

        Raises:
            JudgeUnusable: the budget does not cover it.
        """
        while lack := self._lack(max_cost):
            if not self._held and not self._under_way:
                raise JudgeUnusable(lack)
            self._changed.clear()
            await self._changed.wait()
        reservation = Reservation(self, max_tokens=max_tokens, max_cost=max_cost)
        self._held.add(reservation)
        return reservation

    def started(self, reservation: Reservation) -> None:
        """Records that a call was sent."""
        self._held.remove(reservation)
        self._under_way += 1

    def ended(self) -> None:
        """Records that a call under way has ended."""
        self._under_way -= 1
        self._changed.set()

    def cancelled(self, reservation: Reservation) -> None:
        """Records that a call will not be sent."""
        self._held.remove(reservation)
        self._changed.set()

    def _lack(self, max_cost: float) -> str | None:
        """Returns why the budget does not cover one more call, or None if it does."""
        totals = self.spending.totals()
        requests = totals.requests + len(self._held)
        limit = self._cfg.max_requests
        if limit is not None and requests + 1 > limit:
            return f"max_requests={limit} is spent: {totals.requests} requests were sent"
        if self._cfg.max_cost is None:
            return None
        held = math.fsum(reservation.max_cost for reservation in self._held)
        spent = totals.cost + totals.unknown_cost
        if spent + held + max_cost > self._cfg.max_cost:
            return (
                f"max_cost={self._cfg.max_cost:g} does not allow the next call: {spent:.6g} are "
                f"spent and it may cost {max_cost:.6g}"
            )
        return None


SHIPPED = pathlib.Path(__file__).with_name("prices.json")

_SHOWN_TOKENS = 1_000_000
_DIGITS = 12  # Of a cost: far below any currency, so that sums of costs are the sums of prices.


@dataclass(frozen=True, kw_only=True)
class Price:
    """The price of one token of each sort.

    Attributes:
        input: a token of the prompt.
        cached_input: a token of the prompt from the server's cache.
        output: a token of the reply.
        currency: as the table names it.
        table: the file it was read from.
        as_of: the table's date, in its own words; None for none.
    """

    input: float
    cached_input: float
    output: float
    currency: str
    table: str
    as_of: str | None = None

    @property
    def is_example(self) -> bool:
        """Returns True for the shipped table, which nobody has checked for this run."""
        return pathlib.Path(self.table) == SHIPPED

    def __str__(self) -> str:
        """Returns the prices and their source in one line, for the user to check."""
        prices = (
            f"{money * _SHOWN_TOKENS:.6g} {name}"
            for name, money in (
                ("in", self.input),
                ("in from its cache", self.cached_input),
                ("out", self.output),
            )
        )
        as_of = "no date" if self.as_of is None else f"as of {self.as_of}"
        text = f"prices in {self.currency} for a million tokens: {', '.join(prices)}"
        if self.is_example:
            return (
                f"{text}; from the example table that is shipped ({as_of}), NOT CHECKED: compare"
                f" them with your provider's, and give a copy of {self.table} by --prices"
            )
        return f"{text}; from your table {self.table} ({as_of})"

    def to_json(self) -> dict[str, Any]:
        """Returns the prices of one token and their source, for a report."""
        return {**dataclasses.asdict(self), "is_example": self.is_example}

    def cost(self, usage: Usage) -> float:
        """Returns the cost of a call with these tokens."""
        fresh_tokens = usage.input_tokens - usage.cached_tokens
        money = fresh_tokens * self.input + usage.cached_tokens * self.cached_input
        return round(money + usage.output_tokens * self.output, _DIGITS)


def read_price(model: str, path: str | os.PathLike[str] | None = None) -> Price | None:
    """Reads the price of a model by its exact name, or None where the table lacks it.

    Args:
        model: its name on the server.
        path: the user's table; None for the shipped one.

    Raises:
        ValueError: no such table, or an invalid one.
    """
    path = as_path(SHIPPED if path is None else path)
    if not path.is_file():
        raise ValueError(f"prices: there is no file {path}")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        currency, unit, models = table["currency"], table["per_tokens"], table["models"]
        as_of = str(table["as_of"]) if "as_of" in table else None
        row = models[model] if model in models else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"prices: {path} should be JSON with currency, per_tokens and models: {error}"
        ) from error
    if row is None:
        return None
    where = f"{path}: {model}"
    per_token = 1.0 / _number({"per_tokens": unit}, "per_tokens", where)
    fresh = _number(row, "input", where)
    cached = _number(row, "cached_input", where) if "cached_input" in row else fresh
    if cached > fresh:
        raise ValueError(f"prices: {where}: cached_input {cached} is above input {fresh}")
    return Price(
        input=fresh * per_token,
        cached_input=cached * per_token,
        output=_number(row, "output", where) * per_token,
        currency=str(currency),
        table=str(path),
        as_of=as_of,
    )


def _number(row: Mapping[str, Any], name: str, where: str) -> float:
    value: Any = row[name] if isinstance(row, Mapping) and name in row else None
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value < 0 or (name == "per_tokens" and value == 0):
        raise ValueError(f"prices: {where}: {name} is {value!r}; it should be a number from 0 on")
    return float(value)
