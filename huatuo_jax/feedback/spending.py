"""The spending file: every call to a judge's server, written down before it is sent.

A labels file holds judgements; a call that was cut off leaves none, but may have been paid for.
So each call has two lines in `LABELS.spending.jsonl`: one when it starts, with the most it may
cost, and one when it ends, with what it did cost. A call whose cost nobody told us (a time-out, a
connection that broke, a killed run, a reply without usage) counts with the most it may cost.
"""

import dataclasses
import decimal
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from huatuo_jax.feedback.rate_limits import PastCall
from huatuo_jax.json_lines import AppendedFile, Line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of a call as the server counted them; `cached_tokens` are part of `input_tokens`."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        """Both calls' tokens."""
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Totals:
    """What all calls of a spending file took, in this run and those before.

    Attributes:
        requests: calls sent.
        unknown_requests: of them those whose cost nobody told.
        usage: tokens of the other calls, as the server counted them.
        cost: money of the other calls; 0 without prices.
        unknown_cost: the most that the unknown ones can have cost; 0 without prices.
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
        """Open the file, if there is one yet, and read what earlier runs spent.

        Args:
            path: the file, made with the first call; None to count without a file.

        Raises:
            ValueError: the file holds something else, or another process writes it.
            OSError: it cannot be read or written.
        """
        self._path = None if path is None else pathlib.Path(path)
        self._file: AppendedFile | None = None
        self._calls: list[_Call] = []
        # Sums are kept on the way, and exact: a budget asks for them before every call.
        self._num_known, self._usage = 0, Usage()
        self._cost = self._unknown_cost = decimal.Decimal(0)
        if self._path is not None and self._path.exists():
            self._open()

    def close(self) -> None:
        """Close the file; remove it where it says only that the server refused to do anything."""
        if self._file is not None:
            if self._path is not None and all(call.refused for call in self._calls):
                self._path.unlink()
            self._file.close()
            self._file = None

    def start(self, *, max_tokens: int, max_cost: float) -> int:
        """Write down a call that is about to be sent; returns its number."""
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
        """Write down how a call ended.

        Args:
            number: as `start` gave it.
            outcome: in a word or two.
            usage: tokens, where the server told.
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
        """What has been spent by now; a call under way is among the unknown."""
        return Totals(
            requests=len(self._calls),
            unknown_requests=len(self._calls) - self._num_known,
            usage=self._usage,
            cost=float(self._cost),
            unknown_cost=float(self._unknown_cost),
        )

    def recent(self, seconds: float) -> Sequence[PastCall]:
        """The calls that started in the last so many seconds, for the rate limits."""
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
