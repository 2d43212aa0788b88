"""A chat server on loopback whose replies a test writes; it keeps every request that it saw."""

import json
import threading

from tests.local_server import Handler, LocalServer

KEY = "sk-scripted-0123456789abcdef"


class Refuse(Exception):
    """Raised by a script: the HTTP status and the words of the error."""

    def __init__(self, status, words):
        super().__init__(words)
        self.status = status


class ScriptedServer(LocalServer):
    """Serves while the context lasts.

    Attributes:
        requests: bodies in the order of arrival, refused ones too.
        paid: how many were answered.
        under_way: how many are being answered.
    """

    def __init__(self, reply):
        """`reply(body, number)` gives the text of the reply to the n-th request."""
        self.reply, self.requests, self.paid, self.under_way = reply, [], 0, 0
        self.lock = threading.Lock()
        outer = self

        class Replies(Handler):
            def do_POST(self):
                with outer.lock:
                    outer.under_way += 1
                try:
                    self.answer()
                except ConnectionError:  # Of a client that a test has killed.
                    self.close_connection = True
                finally:
                    with outer.lock:
                        outer.under_way -= 1

            def answer(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = len(outer.requests)
                    outer.requests.append(body)
                try:
                    text = outer.reply(body, number)
                except Refuse as refused:
                    return self.send(refused.status, {"error": {"message": str(refused)}})
                with outer.lock:
                    outer.paid += 1
                message = {"role": "assistant", "content": text}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
                self.send(200, {"choices": [choice], "usage": usage, "model": body["model"]})

            def send(self, status, content):
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        super().__init__(Replies)
