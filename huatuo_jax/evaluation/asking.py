"""Asks an OpenAI-compatible server for chat completions and keeps every reply in a file.

Each request is answered once: a reply in the file is read and not paid for again, however often a
run is killed and started. A request that no attempt brought through is kept as failed, counted, and
asked again by the next run, except where the server refused it.

SIGTERM and Ctrl-C send nothing more and wait for the replies under way, so that none is lost. A
process that is killed at once (SIGKILL, no power) loses what it had sent and not yet got a reply
to, at most `concurrency` requests: no protocol brings such a reply back. They stand in the spending
file as calls without an end, count against the budget at their highest cost, and are sent again.
"""

import asyncio
import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from huatuo_jax.core.files import AppendedFile
from huatuo_jax.judge.judgements import JudgementFailed, JudgeUnusable, for_each, printable, sha256
from huatuo_jax.judge.openai import request_estimate
from huatuo_jax.judge.server import Server, ServerConfig, Taken, scrubbed
from huatuo_jax.judge.spending import SHIPPED, Price, read_price
from huatuo_jax.training.loop import Interrupted, StopSignals

SPENDING_SUFFIX = ".spending.jsonl"
"""Added to the name of a file of replies, that of the calls that were made for them."""

ChatMessages = tuple[Mapping[str, str], ...]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class ChatModelConfig:
    """A chat model behind a server.

    Attributes:
        model: its name there.
        server: address, limits and budget; the budget holds for all runs of one output folder.
        max_tokens: of a reply.
        temperature: None leaves it to the server.
        prices: file of the price table; None for the one that is shipped.
        concurrency: requests under way at once.
    """

    model: str
    server: ServerConfig = field(default_factory=ServerConfig)
    max_tokens: int = 1024
    temperature: float | None = 0.0
    prices: str | None = None
    concurrency: int = 8

    def __post_init__(self) -> None:
        """Validates the fields."""
        if not self.model:
            raise ValueError("model is empty: name a model of the server")
        for name in ("max_tokens", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


class ChatReply(NamedTuple):
    """The outcome of one request.

    Attributes:
        text: of the reply; None where there is none.
        finish_reason: in the server's words.
        failure: why there is no text; None where there is one.
        error: the failure's message.
    """

    text: str | None
    finish_reason: str | None = None
    failure: str | None = None
    error: str | None = None


class Cost(NamedTuple):
    """The cost of requests, estimated before they are sent.

    Attributes:
        requests: not answered yet.
        input_tokens: expected.
        max_output_tokens: all replies at their longest.
        cost: expected, with replies at their longest; None without a price.
        currency: of the cost.
    """

    requests: int
    input_tokens: int
    max_output_tokens: int
    cost: float | None
    currency: str | None

    def __str__(self) -> str:
        """Says it in a line."""
        told = (
            f"{self.requests} requests, about {self.input_tokens} tokens in, "
            f"at most {self.max_output_tokens} out"
        )
        if self.cost is None:
            return f"{told}; no price is known"
        return f"{told}, at most about {self.cost:.4g} {self.currency}"


class ReplyFile:
    """The replies to requests by name, of one chat model."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        cfg: ChatModelConfig,
        *,
        key: str | None = None,
        spending: str | os.PathLike[str] | None = None,
    ) -> None:
        """Remembers where and whom; nothing is read or sent.

        Args:
            path: JSON Lines file; made with its first reply.
            cfg: the model that is asked.
            key: for the server; None where nothing is to be sent.
            spending: the spending file, which several reply files may share; None for one beside
                the replies.
        """
        self._path, self._cfg, self._key = path, cfg, key
        beside = f"{os.fspath(path)}{SPENDING_SUFFIX}"
        self._spending = beside if spending is None else spending

    def estimate(self, requests: Mapping[str, ChatMessages]) -> Cost:
        """Returns what asking the requests without a reply may take."""
        standing = self.read(requests)
        left = [self._body(requests[name]) for name in requests if _is_open(standing.get(name))]
        price = self._price
        estimates = [
            request_estimate(body, max_tokens=self._cfg.max_tokens, price=price) for body in left
        ]
        cost = None if price is None else math.fsum(one.cost or 0.0 for one in estimates)
        return Cost(
            requests=len(left),
            input_tokens=sum(one.input_tokens for one in estimates),
            max_output_tokens=self._cfg.max_tokens * len(left),
            cost=cost,
            currency=None if price is None else price.currency,
        )

    def read(self, requests: Mapping[str, ChatMessages]) -> dict[str, ChatReply]:
        """Returns the replies that the file holds to these very requests.

        Raises:
            ValueError: a line is no reply.
        """
        hashes = {name: self._hash(messages) for name, messages in requests.items()}
        return read_kept(self._path, hashes)

    def ask(
        self, requests: Mapping[str, ChatMessages], on_progress: Progress | None = None
    ) -> dict[str, ChatReply]:
        """Returns a reply for each request, asking for those that the file lacks.

        Args:
            requests: messages by name; the name is what a reply is found by.
            on_progress: is called with the replies there are and the number of requests.

        Raises:
            ValueError: no request can be answered any more (no money, key, model or server); all
                replies that came before are in the file, and the message says how many are missing.
            Interrupted: SIGTERM or Ctrl-C came; replies under way were waited for and are kept.
        """
        assert self._key is not None
        return asyncio.run(self._ask(requests, on_progress))

    async def _ask(
        self, requests: Mapping[str, ChatMessages], on_progress: Progress | None
    ) -> dict[str, ChatReply]:
        hashes = {name: self._hash(messages) for name, messages in requests.items()}
        with StopSignals() as stop, AppendedFile(self._path, locked=True) as file:
            found = kept(file, hashes)
            file.cut_unfinished()
            waiting = [name for name in requests if _is_open(found.get(name))]
            server = self._open_server()

            async def work(name: str) -> None:
                reply, row = await self._complete(server, requests[name])
                file.append([{"name": name, "request": hashes[name], **row}])
                found[name] = reply
                if on_progress is not None:
                    on_progress(len(found), len(requests))

            try:
                until_stop = itertools.takewhile(lambda _: not stop.requested(), waiting)
                error = await for_each(until_stop, work, concurrency=self._cfg.concurrency)
            finally:
                await server.close()
            stopped = stop.requested()
        if error is not None and not isinstance(error, JudgeUnusable):
            raise error
        missing = sum(_is_open(found.get(name)) for name in requests)
        left = (
            f"{missing} of {len(requests)} requests to {self._cfg.model!r} have no reply yet, the "
            f"others are in {self._path}: run the same command again to resume"
        )
        if error is not None:
            raise ValueError(f"{error}; {left}")
        if stopped:
            raise Interrupted(f"stopped; {left}")
        return found

    async def _complete(
        self, server: Server, messages: ChatMessages
    ) -> tuple[ChatReply, dict[str, Any]]:
        """Asks once, as often as the server needs; a failure is a reply without a text."""
        assert self._key is not None
        body, taken = self._body(messages), Taken()
        estimate = request_estimate(body, max_tokens=self._cfg.max_tokens, price=self._price)
        try:
            completion = await server.complete(body, estimate, taken)
        except JudgementFailed as failed:
            reply = ChatReply(None, failure=failed.failure, error=printable(str(failed)))
        else:
            text = completion.text
            if text is not None:
                reply = ChatReply(scrubbed(text, self._key), completion.finish_reason)
            else:
                told = completion.refusal or "the reply has no text in it"
                reply = ChatReply(
                    None, completion.finish_reason, "refused", scrubbed(told, self._key)
                )
        return reply, reply._asdict() | taken.fields()

    @functools.cached_property
    def _price(self) -> Price | None:
        """The model's price, read once; None where the table does not have it."""
        return read_price(self._cfg.model, self._cfg.prices)

    def _open_server(self) -> Server:
        cfg, price = self._cfg, self._price
        max_cost = cfg.server.budget.max_cost
        if price is None and max_cost is not None:
            raise ValueError(
                f"max_cost={max_cost:g} needs a price, and {cfg.prices or SHIPPED} has none for "
                f"{cfg.model!r}"
            )
        assert self._key is not None
        return Server(cfg.server, key=self._key, price=price, spending=self._spending)

    def _body(self, messages: ChatMessages) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._cfg.model,
            "messages": [dict(message) for message in messages],
            "max_tokens": self._cfg.max_tokens,
        }
        if self._cfg.temperature is not None:
            body["temperature"] = self._cfg.temperature
        return body

    def _hash(self, messages: ChatMessages) -> str:
        return sha256(json.dumps(self._body(messages), ensure_ascii=False, sort_keys=True))


def _is_open(reply: ChatReply | None) -> bool:
    """Tells whether a request is to be sent: it has no reply, or none came through."""
    return reply is None or (reply.text is None and reply.failure != "refused")


def kept(file: AppendedFile, hashes: Mapping[str, str]) -> dict[str, ChatReply]:
    """Returns the replies that a file holds to requests of these names and hashes.

    Raises:
        ValueError: a line is no reply.
    """
    found: dict[str, ChatReply] = {}
    for line in file.lines():
        name, asked = line.row.get("name"), line.row.get("request")
        if not isinstance(name, str) or not isinstance(asked, str):
            raise ValueError(
                f"{file.path}, line {line.number}: this is no reply to a request (name and request "
                "are missing)"
            )
        if hashes.get(name) == asked:
            found[name] = ChatReply(**{each: line.row.get(each) for each in ChatReply._fields})
    return found


def read_kept(path: str | os.PathLike[str], hashes: Mapping[str, str]) -> dict[str, ChatReply]:
    """Returns `kept` of a file that may not be there yet."""
    if not os.path.exists(path):
        return {}
    with AppendedFile(path, locked=False) as file:
        return kept(file, hashes)
