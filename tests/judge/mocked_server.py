"""The judge's client with all of its stack but the network and the clock.

Requests go through the openai client to a function of the test, and time passes only where
everybody waits for it, so that a thousand retries take no time.
"""

import asyncio
import dataclasses
import inspect
import json
import pathlib
import selectors

import httpx2
import openai

from huatuo_jax.judge import judgements, spending
from huatuo_jax.judge import server as server_calls
from huatuo_jax.judge import spending as rate_limits
from huatuo_jax.judge.judgements import read_judgements
from huatuo_jax.judge.labelling import LabelConfig
from huatuo_jax.judge.openai import OpenAIJudgeConfig
from huatuo_jax.judge.server import ServerConfig
from huatuo_jax.judge.spending import BudgetConfig
from huatuo_jax.preferences.label import LabelRun, report_path, run_labels, spending_path
from tests.judge.planted_server import CRITERIA, KEY, MODEL, TEXTS

URL = "http://mocked/v1"


class Clock:
    """Stands still until somebody waits."""

    def __init__(self):
        self.now_s = 1e6

    def monotonic(self):
        return self.now_s

    time = monotonic


class _Selector(selectors.SelectSelector):
    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def select(self, timeout=None):
        found = super().select(0)
        assert found or timeout is not None, "everybody waits, and nothing will ever happen"
        if not found:
            self.clock.now_s += max(timeout, 0.0)
        return found


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, clock):
        super().__init__(_Selector(clock))
        self.clock = clock

    def time(self):
        return self.clock.now_s


class MockedServer:
    """A function of (number of the request, texts asked about, body) in place of a server.

    It returns a response, raises what a transport raises, or is a coroutine that does. `requests`
    are the bodies as they came.
    """

    def __init__(self, monkeypatch, reply):
        self.clock, self.reply, self.requests = Clock(), reply, []
        client = httpx2.AsyncClient
        real = openai.AsyncOpenAI

        def make(**keywords):
            transport = httpx2.MockTransport(self._handle)
            http_client = client(transport=transport, follow_redirects=True)
            made = real(**keywords, http_client=http_client)
            made._platform = "Unknown"  # The client would ask a thread, for which no time passes.
            return made

        monkeypatch.setattr(server_calls.openai, "AsyncOpenAI", make)
        monkeypatch.setattr(asyncio.events, "new_event_loop", lambda: _Loop(self.clock))
        for module in (judgements, rate_limits, server_calls, spending):
            monkeypatch.setattr(module, "time", self.clock)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)

    async def _handle(self, request):
        body = json.loads(request.content)
        texts = tuple(found[2] for found in TEXTS.findall(body["messages"][-1]["content"]))
        self.requests.append(body)
        response = self.reply(len(self.requests) - 1, texts, body)
        return await response if inspect.isawaitable(response) else response


@dataclasses.dataclass
class Ran:
    """What a run of the command did: labels or an error, what it said, the lines of its files."""

    labels: object
    error: Exception | None
    told: str
    lines: list
    spending: list


def label(answers, output, *, protocol="score", concurrency=8, comparisons=None, **fields):
    """Runs the whole command; what it raises for the user is its error."""
    budget = {name: fields.pop(name) for name in ("max_requests", "max_cost") if name in fields}
    server = {
        name: fields.pop(name)
        for name in [field.name for field in dataclasses.fields(ServerConfig)]
        if name in fields
    }
    cfg = LabelRun(
        answers=str(answers),
        output=str(output),
        comparisons=None if comparisons is None else str(comparisons),
        label=LabelConfig(protocol=protocol, concurrency=concurrency),
        openai=OpenAIJudgeConfig(
            **{"model": MODEL} | fields,
            server=ServerConfig(base_url=URL, budget=BudgetConfig(**budget), **server),
        ),
    )
    told, labels, error = [], None, None
    try:
        labels = run_labels(cfg, told.append)
    except (ValueError, OSError) as raised:
        error = raised
    lines = list(read_judgements(output)) if pathlib.Path(output).exists() else []
    calls = pathlib.Path(spending_path(output))
    rows = calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []
    assert labels is None or pathlib.Path(report_path(output)).exists()
    return Ran(labels, error, "\n".join(map(str, told)), lines, list(map(json.loads, rows)))


def verdict(texts, *, better=1, score=4, reason="说明"):
    """The text of a good reply."""
    if len(texts) == 2:
        return json.dumps({"reason": reason, "better": better}, ensure_ascii=False)
    parts = {name: {"reason": reason, "score": score} for name in CRITERIA}
    return json.dumps(parts, ensure_ascii=False)


def completion(text, *, prompt=10, output=5, finish_reason="stop", **choice):
    """The body of a good reply with this text."""
    message = {"role": "assistant", "content": text}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason} | choice],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
        },
    }


def respond(body, status=200, headers=None):
    """A response of a JSON body, or of bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx2.Response(
        status, headers={"content-type": "application/json"} | (headers or {}), content=content
    )
