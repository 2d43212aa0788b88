"""An OpenAI-compatible server on loopback that streams what a test writes, and serves the page."""

import json
import pathlib
import select
import socket
import threading

from huatuo_jax import serving
from tests.local_server import Handler, LocalServer

PAGE = pathlib.Path(serving.__file__).parent / "page" / "index.html"
HOLD = object()
"""A piece of an answer: nothing more comes until the test sets `released`, or the client leaves."""
CUT = object()
"""A piece of an answer: the connection ends here."""


class Refuse(Exception):
    """Raised by a script: the HTTP status, the words of the error, and other headers."""

    def __init__(self, status, words, **headers):
        super().__init__(words)
        self.status, self.headers = status, headers


class Fail(Exception):
    """A piece of an answer: an error inside the stream."""


class ScriptedChat(LocalServer):
    """Serves while the context lasts.

    Attributes:
        asked: bodies of the requests for answers.
        classified: bodies of the requests for scores.
        keys: the keys of all requests, None for none.
        released: lets held answers continue.
        left: set when a client has left in the middle of an answer.
    """

    def __init__(self, answer, *, models=("sft",), reward=None, score=len, key=None):
        """Takes the script.

        Args:
            answer: `answer(body, index)` gives the pieces of a choice, or raises `Refuse`.
            models: names of the policies.
            reward: name of the reward model.
            score: of an answer's text.
            key: the key that every request needs.
        """
        self.answer, self.models, self.reward, self.score = answer, models, reward, score
        self.key = key
        self.asked, self.classified, self.keys = [], [], []
        self.released, self.left = threading.Event(), threading.Event()
        outer = self

        class Replies(Handler):
            def do_GET(self):
                if self.path == "/":
                    return self.send(200, PAGE.read_bytes(), "text/html; charset=utf-8")
                if self.path == "/v1/models" and self.may():
                    self.send(200, {"object": "list", "data": outer.entries()})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not self.may():
                    return
                try:
                    if self.path == "/v1/classify":
                        outer.classified.append(body)
                        return self.send(200, outer.scores(body))
                    outer.asked.append(body)
                    texts = [outer.answer(body, index) for index in range(body.get("n", 1))]
                except Refuse as refused:
                    return self.refuse(refused)
                if body.get("stream"):
                    self.stream(body, texts)
                else:
                    message = {"role": "assistant", "content": "".join(texts[0])}
                    choice = {"index": 0, "message": message, "finish_reason": "stop"}
                    self.send(200, {**outer.head(body), "choices": [choice]})

            def may(self):
                found = self.headers["Authorization"]
                outer.keys.append(found and found.removeprefix("Bearer "))
                if outer.key is None or outer.keys[-1] == outer.key:
                    return True
                self.refuse(Refuse(401, "the key is missing or wrong"))
                return False

            def refuse(self, refused):
                error = {"message": str(refused), "type": "scripted", "param": None, "code": None}
                self.send(refused.status, {"error": error}, **refused.headers)

            def send(self, status, content, kind="application/json", **headers):
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                named = {"Content-Type": kind, "Content-Length": str(len(data)), **headers}
                for name, value in named.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(data)

            def stream(self, body, texts):
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                self.close_connection = True
                try:
                    for index, pieces in enumerate(texts):
                        self.chunk(body, index, {"role": "assistant", "content": ""})
                        for piece in pieces:
                            if piece is CUT or (piece is HOLD and not self.hold()):
                                return
                            if isinstance(piece, Fail):
                                error = {"message": str(piece), "type": "server_error"}
                                return self.event(json.dumps({"error": error}))
                            if isinstance(piece, str):
                                self.chunk(body, index, {"content": piece})
                        self.chunk(body, index, {}, "stop")
                    usage = {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}
                    if body.get("stream_options", {}).get("include_usage"):
                        self.event(json.dumps({**outer.head(body), "choices": [], "usage": usage}))
                    self.event("[DONE]")
                except (BrokenPipeError, ConnectionResetError):
                    outer.left.set()

            def hold(self):
                while not outer.released.wait(0.02):
                    readable = select.select([self.connection], [], [], 0)[0]
                    if readable and not self.connection.recv(1, socket.MSG_PEEK):
                        outer.left.set()
                        return False
                return True

            def chunk(self, body, index, delta, reason=None):
                choice = {"index": index, "delta": delta, "finish_reason": reason}
                self.event(json.dumps({**outer.head(body), "choices": [choice]}))

            def event(self, data):
                self.wfile.write(f"data: {data}\n\n".encode())
                self.wfile.flush()

        super().__init__(Replies)

    def entries(self):
        kinds = {name: "policy" for name in self.models}
        if self.reward:
            kinds[self.reward] = "reward"
        return [
            {
                "id": name,
                "object": "model",
                "created": 1,
                "owned_by": "test",
                "huatuo": {"kind": kind},
            }
            for name, kind in kinds.items()
        ]

    def scores(self, body):
        data = [
            {"index": index, "score": float(self.score(text))}
            for index, text in enumerate(body["responses"])
        ]
        return {"object": "list", "model": body["model"], "data": data, "usage": {}}

    def head(self, body):
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk" if body.get("stream") else "chat.completion",
            "created": 1,
            "model": body["model"],
        }

    def __exit__(self, *exception):
        self.released.set()
        super().__exit__(*exception)
