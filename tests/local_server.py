"""An HTTP server on loopback, whose handler a test writes."""

import http.server
import sys
import threading


class Handler(http.server.BaseHTTPRequestHandler):
    """Keeps connections open, and logs nothing."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # Else a body waits 40 ms for the receipt of its headers.

    def log_message(self, *args):
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # Of a client that a test has killed.
            super().handle_error(request, client_address)


class LocalServer:
    """Serves while the context lasts."""

    def __init__(self, handler):
        """`handler` is a class of `Handler`."""
        self.http = _Server(("127.0.0.1", 0), handler)

    @property
    def address(self):
        return f"http://127.0.0.1:{self.http.server_port}/"

    @property
    def url(self):
        """The base URL of OpenAI's interface."""
        return f"{self.address}v1"

    def __enter__(self):
        self._thread = threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
        self._thread.join()
