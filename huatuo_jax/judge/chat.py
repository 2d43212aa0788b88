"""One request to a chat model behind an OpenAI-compatible server, and what becomes of its reply."""

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from huatuo_jax.judge.judgements import Estimate, JudgementFailed, printable, sha256
from huatuo_jax.judge.openai import request_estimate
from huatuo_jax.judge.server import Server, ServerConfig, Taken, scrubbed
from huatuo_jax.judge.spending import SHIPPED, Price, read_price

ChatMessages = tuple[Mapping[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class ChatModelConfig:
    """A chat model behind a server.

    Attributes:
        model: its name there.
        server: address, limits and budget; the budget holds for all runs of one output folder.
        max_tokens: of a reply.
        temperature: None leaves it to the server.
        json_object: demand a reply that is one JSON object, of a server that can.
        prices: file of the price table; None for the one that is shipped.
        concurrency: requests under way at once.
    """

    model: str
    server: ServerConfig = field(default_factory=ServerConfig)
    max_tokens: int = 1024
    temperature: float | None = 0.0
    json_object: bool = False
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


class ChatModel:
    """Makes requests of messages, and asks each once."""

    def __init__(self, cfg: ChatModelConfig, *, key: str | None = None) -> None:
        """Remembers whom to ask; nothing is read or sent.

        Args:
            cfg: the model that is asked.
            key: for the server; None where nothing is to be sent.
        """
        self.cfg, self._key = cfg, key

    @functools.cached_property
    def price(self) -> Price | None:
        """The model's price, read once; None where the table does not have it."""
        return read_price(self.cfg.model, self.cfg.prices)

    def body(self, messages: ChatMessages) -> dict[str, Any]:
        """Returns the body of a request."""
        body: dict[str, Any] = {
            "model": self.cfg.model,
            "messages": [dict(message) for message in messages],
            "max_tokens": self.cfg.max_tokens,
        }
        if self.cfg.temperature is not None:
            body["temperature"] = self.cfg.temperature
        if self.cfg.json_object:
            body["response_format"] = {"type": "json_object"}
        return body

    def hash(self, messages: ChatMessages) -> str:
        """Returns a hash of a request's body."""
        return sha256(json.dumps(self.body(messages), ensure_ascii=False, sort_keys=True))

    def estimate(self, messages: ChatMessages) -> Estimate:
        """Returns what a request may take."""
        return request_estimate(
            self.body(messages), max_tokens=self.cfg.max_tokens, price=self.price
        )

    def open_server(self, spending: str | os.PathLike[str] | None) -> Server:
        """Opens the server and its spending file; sends nothing.

        Raises:
            ValueError: a budget of money for a model without a price, or an invalid spending file.
        """
        cfg = self.cfg
        max_cost = cfg.server.budget.max_cost
        if self.price is None and max_cost is not None:
            raise ValueError(
                f"max_cost={max_cost:g} needs a price, and {cfg.prices or SHIPPED} has none for "
                f"{cfg.model!r}"
            )
        assert self._key is not None
        return Server(cfg.server, key=self._key, price=self.price, spending=spending)

    async def complete(
        self, server: Server, messages: ChatMessages
    ) -> tuple[ChatReply, dict[str, Any]]:
        """Asks once, as often as the server needs; a failure is a reply without a text.

        Returns:
            The reply, and its fields in a file beside what it took.

        Raises:
            JudgeUnusable: no request can be answered any more.
        """
        assert self._key is not None
        taken = Taken()
        try:
            completion = await server.complete(self.body(messages), self.estimate(messages), taken)
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
