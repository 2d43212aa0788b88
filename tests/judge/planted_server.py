"""An OpenAI-compatible server on loopback that answers from known utilities, and fails as told.

It writes down every request that reaches it: when, how it ended, and what it counted. Its verdict
on a question depends on the texts alone, so that whoever asks twice is told the same.
"""

import dataclasses
import json
import math
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping

from tests.local_server import Handler, LocalServer

CRITERIA = ("informative", "coherent", "preferred", "accurate", "overall")
KEY = "sk-planted-0123456789abcdef"
MODEL = "planted-judge"

# What a call can become. Of these the server works, and counts tokens, for all but 429 and 500.
FAULTS = ("429", "500", "time-out", "cut", "truncated", "scale", "prose", "empty")
UNBILLED = frozenset({"429", "500", "401", "404", "400"})
UNDELIVERED = frozenset({"time-out", "cut"})
NO_VERDICT = frozenset({"truncated", "scale", "prose", "empty"})

TEXTS = re.compile(r"<(回答[一二]?) (\w+)>\n(.*?)\n</\1 \2>", re.DOTALL)


@dataclasses.dataclass
class Call:
    """A request as the server saw it."""

    arrived_s: float
    outcome: str
    texts: tuple[str, ...]
    input_tokens: int = 0
    output_tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planted:
    """What the server is.

    Attributes:
        utilities: of each answer's text.
        position_bias: added to the log-odds of the answer that is shown first.
        noise: whether a verdict is drawn with its probability (Bradley-Terry) or is the likelier.
        logit_noise: standard deviation of what is added to the log-odds, anew for each two texts in
            each order.
        fault: of the n-th request from 0 on; None for none.
        retry_after: the header of a 429.
        time_out_s: how long a "time-out" says nothing.
        delay_s: of every reply.
        needs_schema: refuse requests without a JSON schema.
        models: those it knows.
        prefix: put before every text of a reply.
    """

    utilities: Mapping[str, float]
    position_bias: float = 0.0
    noise: bool = True
    logit_noise: float = 0.0
    fault: Callable[[int], str | None] = lambda n: None
    retry_after: str = "1"
    time_out_s: float = 3.0
    delay_s: float = 0.0
    needs_schema: bool = True
    models: tuple[str, ...] = (MODEL,)
    prefix: str = ""


def sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x))


def p_first(planted, first, second):
    """The probability that the server prefers the answer shown first."""
    return sigmoid(log_odds_first(planted, first, second))


def log_odds_first(planted, first, second):
    gap = planted.utilities[first] - planted.utilities[second]
    noise = random.Random(f"noise {first}\0{second}").gauss(0.0, planted.logit_noise)
    return gap + planted.position_bias + noise


def verdict(planted, first, second):
    """1 or 2; always the same for the same two texts in the same order."""
    p = p_first(planted, first, second)
    lot = random.Random(f"{first}\0{second}").random() if planted.noise else 0.5
    return 1 if lot < p else 2


def scores(planted, text):
    """Whole numbers from 1 to 5 that rise with the utility."""
    whole = min(max(round(3 + planted.utilities[text]), 1), 5)
    return {name: min(whole + (name == "coherent"), 5) for name in CRITERIA}


def some_fault(share, seed=0):
    """Faults of every kind, in all this share of the calls; a function of the call's number."""

    def fault(n):
        lot = random.Random(f"{seed} {n}")
        return lot.choice(FAULTS) if lot.random() < share else None

    return fault


class PlantedServer(LocalServer):
    """The server, running in threads while the context lasts."""

    def __init__(self, planted):
        self.planted = planted
        self.calls: list[Call] = []
        self.lock = threading.Lock()
        self.requests = []
        outer = self

        class Replies(Handler):
            def do_POST(self):
                arrived_s = time.monotonic()
                length = int(self.headers["Content-Length"])
                body = json.loads(self.rfile.read(length))
                outer.answer(self, arrived_s, body)

        super().__init__(Replies)

    def answer(self, handler, arrived_s, body):
        user = body["messages"][-1]["content"]
        texts = tuple(found[2] for found in TEXTS.findall(user))
        call = Call(arrived_s, "", texts)
        with self.lock:
            number = len(self.calls)
            self.calls.append(call)
            self.requests.append(body)
        call.outcome = outcome = self.refusal(handler, body) or self.planted.fault(number) or "ok"
        if outcome in UNBILLED:
            return self.refuse(handler, outcome, body)
        text = self.planted.prefix + self.reply_text(texts, outcome)
        call.input_tokens = sum(len(message["content"]) for message in body["messages"])
        call.output_tokens = len(text)
        time.sleep(self.planted.time_out_s if outcome == "time-out" else self.planted.delay_s)
        data = json.dumps(self.completion(body, texts, text, call, outcome)).encode()
        if outcome == "time-out":
            return self.hang_up(handler)
        if outcome == "cut":
            self.send(handler, 200, data, cut=len(data) // 2)
            return self.hang_up(handler)
        self.send(handler, 200, data)

    def refusal(self, handler, body):
        if handler.headers["Authorization"] != f"Bearer {KEY}":
            return "401"
        if body["model"] not in self.planted.models or handler.path != "/v1/chat/completions":
            return "404"
        if self.planted.needs_schema and body.get("response_format", {}).get("type") != (
            "json_schema"
        ):
            return "400"
        return None

    def refuse(self, handler, outcome, body):
        given = handler.headers["Authorization"].removeprefix("Bearer ")
        message = {
            "400": "response_format is needed",
            "401": f"Incorrect API key provided: {given[:6]}****{given[-4:]}, in full {given}",
            "404": f"The model `{body['model']}` does not exist",
            "429": f"Rate limit reached for {given}",
            "500": f"The server had an error with {given}",
        }[outcome]
        headers = {"Retry-After": self.planted.retry_after} if outcome == "429" else {}
        data = json.dumps({"error": {"message": message, "type": "", "code": None}}).encode()
        self.send(handler, int(outcome), data, headers=headers)

    def reply_text(self, texts, outcome):
        if outcome == "prose":
            return "第一条回答更好一些，但是两条都还可以。"
        if outcome == "empty":
            return ""
        if len(texts) == 1:
            found = scores(self.planted, texts[0])
            if outcome == "scale":
                found["accurate"] = 10
            parts = {name: {"reason": "说明", "score": score} for name, score in found.items()}
            text = json.dumps(parts, ensure_ascii=False)
        else:
            better = 10 if outcome == "scale" else verdict(self.planted, *texts)
            text = json.dumps({"reason": "说明", "better": better}, ensure_ascii=False)
        return text[: len(text) // 2] if outcome == "truncated" else text

    def completion(self, body, texts, text, call, outcome):
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "stop",
        }
        if body.get("logprobs") and len(texts) == 2 and outcome == "ok":
            choice["logprobs"] = {"content": self.log_probs(texts, text)}
        return {
            "id": "planted",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice],
            "usage": {
                "prompt_tokens": call.input_tokens,
                "completion_tokens": call.output_tokens,
                "total_tokens": call.input_tokens + call.output_tokens,
            },
        }

    def log_probs(self, texts, text):
        """Tokens of a few characters, split so that some hold half of a Chinese character."""
        data, p = text.encode(), p_first(self.planted, *texts)
        ends = [*range(4, len(data) - 3, 4), len(data) - 3, len(data)]
        pieces = [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        tokens = [token(piece, 0.0) for piece in pieces]
        assert pieces[-1][-2:-1] in (b"1", b"2")  # ` 1}`: the verdict inside a token
        tokens[-1]["top_logprobs"] = [token(b" 1}", math.log(p)), token(b" 2}", math.log1p(-p))]
        return tokens

    def send(self, handler, status, data, *, headers=None, cut=None):
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data[:cut])

    def hang_up(self, handler):
        handler.wfile.flush()
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)


def token(data, log_prob):
    return {
        "token": data.decode("utf-8", "replace"),
        "bytes": list(data),
        "logprob": log_prob,
        "top_logprobs": [],
    }


def billed(calls):
    return [call for call in calls if call.outcome not in UNBILLED]


def delivered(calls):
    return [call for call in billed(calls) if call.outcome not in UNDELIVERED]


def most_in_a_window(calls, window_s):
    """The most calls that arrived within any window."""
    times = sorted(call.arrived_s for call in calls)
    return max(sum(1 for b in times if 0 <= b - a < window_s) for a in times)
