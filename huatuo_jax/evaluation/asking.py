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
import itertools
import math
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

from huatuo_jax.core.files import AppendedFile, as_path
from huatuo_jax.judge.chat import ChatMessages, ChatModel, ChatModelConfig, ChatReply
from huatuo_jax.judge.judgements import JudgeUnusable, for_each
from huatuo_jax.training.loop import Interrupted, StopSignals

SPENDING_SUFFIX = ".spending.jsonl"
"""Added to the name of a file of replies, that of the calls that were made for them."""

Progress = Callable[[int, int], None]


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
        self._path, self._cfg, self._model = path, cfg, ChatModel(cfg, key=key)
        beside = f"{os.fspath(path)}{SPENDING_SUFFIX}"
        self._spending = beside if spending is None else spending

    def estimate(self, requests: Mapping[str, ChatMessages]) -> Cost:
        """Returns what asking the requests without a reply may take."""
        standing = self.read(requests)
        left = [requests[name] for name in requests if _is_open(standing.get(name))]
        price = self._model.price
        estimates = [self._model.estimate(messages) for messages in left]
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
        hashes = {name: self._model.hash(messages) for name, messages in requests.items()}
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
        return asyncio.run(self._ask(requests, on_progress))

    async def _ask(
        self, requests: Mapping[str, ChatMessages], on_progress: Progress | None
    ) -> dict[str, ChatReply]:
        hashes = {name: self._model.hash(messages) for name, messages in requests.items()}
        with StopSignals() as stop, AppendedFile(self._path, locked=True) as file:
            found = kept(file, hashes)
            file.cut_unfinished()
            waiting = [name for name in requests if _is_open(found.get(name))]
            server = self._model.open_server(self._spending)

            async def work(name: str) -> None:
                reply, row = await self._model.complete(server, requests[name])
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
    if not as_path(path).exists():
        return {}
    with AppendedFile(path, locked=False) as file:
        return kept(file, hashes)
