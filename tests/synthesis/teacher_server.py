"""A teacher behind an OpenAI-compatible server on loopback, whose texts and faults a test writes.

A reply depends on the request alone, so that a repeated request has the same reply. Faults of the
server depend on the number of the call: of these it works, and counts tokens, for all but 429, 451
and 500.
"""

import dataclasses
import hashlib
import json
import random
import socket
import threading
import time

from tests.local_server import Handler, LocalServer

KEY = "sk-teacher-0123456789abcdef"
MODEL = "scripted-teacher"
FAULTS = ("429", "500", "cut", "garbled")
UNBILLED = frozenset({"429", "451", "500"})
PRICE = {"input": 2.0, "output": 8.0}  # Money for a million tokens.


@dataclasses.dataclass
class Call:
    """A request as the server saw it."""

    body: str
    outcome: str
    input_tokens: int = 0
    output_tokens: int = 0


def some_fault(share, seed=0):
    """Faults of all kinds, in all this share of the calls."""

    def fault(number):
        lot = random.Random(f"{seed} {number}")
        return lot.choice(FAULTS) if lot.random() < share else None

    return fault


def draw_for(*parts):
    """A random generator that depends on texts alone."""
    return random.Random(hashlib.sha256("\0".join(map(str, parts)).encode()).digest())


def price_table(path):
    """Writes the price table of the model; its path."""
    table = {"currency": "EUR", "per_tokens": 1_000_000, "as_of": "today", "models": {MODEL: PRICE}}
    path.write_text(json.dumps(table))
    return str(path)


class TeacherServer(LocalServer):
    """Serves while the context lasts."""

    def __init__(self, reply, *, fault=lambda number: None, delay_s=0.0):
        """`reply(messages)` gives the text to a request's messages, or a text and its ending."""
        self.reply, self.fault, self.delay_s = reply, fault, delay_s
        self.calls, self.lock = [], threading.Lock()
        outer = self

        class Replies(Handler):
            def do_POST(self):
                length = int(self.headers["Content-Length"])
                raw = self.rfile.read(length)
                if len(raw) == length:  # A client that was killed may have sent its headers alone.
                    outer.answer(self, raw.decode())

        super().__init__(Replies)

    def answer(self, handler, raw):
        call = Call(raw, "")
        with self.lock:
            number = len(self.calls)
            self.calls.append(call)
        call.outcome = self.fault(number) or "ok"
        body = json.loads(raw)
        if call.outcome in UNBILLED:
            error = json.dumps({"error": {"message": f"fault {call.outcome}", "code": None}})
            headers = {"Retry-After": "0"} if call.outcome == "429" else {}
            return self.send(handler, int(call.outcome), error.encode(), headers)
        text = self.reply(body["messages"])
        text, ending = text if isinstance(text, tuple) else (text, "stop")
        call.input_tokens = sum(len(one["content"]) for one in body["messages"])
        call.output_tokens = len(text)
        usage = {
            "prompt_tokens": call.input_tokens,
            "completion_tokens": call.output_tokens,
            "total_tokens": call.input_tokens + call.output_tokens,
        }
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": ending}
        data = json.dumps({"choices": [choice], "usage": usage, "model": body["model"]}).encode()
        time.sleep(self.delay_s)
        if call.outcome == "garbled":
            return self.send(handler, 200, b"<html>bad gateway</html>", {})
        if call.outcome == "cut":
            self.send(handler, 200, data, {}, cut=len(data) // 2)
            handler.wfile.flush()
            handler.close_connection = True
            return handler.connection.shutdown(socket.SHUT_RDWR)
        self.send(handler, 200, data, {})

    def send(self, handler, status, data, headers, *, cut=None):
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data[:cut])

    def delivered(self):
        """The calls whose reply went out whole."""
        return [call for call in self.calls if call.outcome == "ok"]

    def money(self, calls):
        """What the server asks for these calls."""
        tokens = sum(
            PRICE["input"] * c.input_tokens + PRICE["output"] * c.output_tokens for c in calls
        )
        return tokens / 1_000_000
