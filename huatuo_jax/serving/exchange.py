"""An HTTP exchange: reads bodies, notices clients that leave, writes event streams."""

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import pydantic
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from huatuo_jax.generation.streaming import TextChangedError
from huatuo_jax.serving.calls import Call
from huatuo_jax.serving.errors import ApiError, of_validation
from huatuo_jax.serving.metrics import Metrics
from huatuo_jax.serving.runner import log_error

Body = TypeVar("Body", bound=pydantic.BaseModel)

MAX_BODY_BYTES = 16 * 2**20
_BODY_S = 60.0
_OPEN = ("/", "/health")  # Paths that need no key.
_HEADERS = (
    (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


async def body_of(request: Request, model: type[Body]) -> Body:
    """Reads the body of a request.

    Raises:
        ApiError: it is no JSON, too large, too slow, or has not the fields of the model.
        ClientDisconnect: the client left.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type is {kind[:80]!r}; it should be application/json")
    data = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for part in request.stream():
                data += part
                if len(data) > MAX_BODY_BYTES:
                    raise ApiError(413, f"the body has more than {MAX_BODY_BYTES} bytes")
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {_BODY_S:.0f} s") from None
    try:
        return model.model_validate_json(bytes(data))
    except pydantic.ValidationError as error:
        raise of_validation(error) from None


@contextlib.asynccontextmanager
async def attended(request: Request, call: Call) -> AsyncIterator[None]:
    """Fails a call when its client leaves."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        call.fail(ClientDisconnect())

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


def json_response(found: pydantic.BaseModel) -> Response:
    """Returns the response of an object of OpenAI's, with the fields that were set."""
    return Response(
        found.model_dump_json(exclude_unset=True, warnings=False), media_type="application/json"
    )


def error_response(error: ApiError) -> Response:
    """Returns the response of an error."""
    return JSONResponse(error.to_json(), status_code=error.status, headers=error.headers)


class EventStream(StreamingResponse):
    """A stream of events; an error of theirs is the last of them."""

    def __init__(
        self, events: AsyncGenerator[pydantic.BaseModel | None, None], finish: Callable[[], object]
    ) -> None:
        """Sends nothing yet.

        Args:
            events: each is sent as it comes; a comment for None keeps the connection open.
            finish: called at the end, also where the client left before the first event.
        """
        super().__init__(_lines(events), media_type="text/event-stream")
        self._events, self._finish = events, finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            self._finish()


async def _lines(events: AsyncGenerator[pydantic.BaseModel | None, None]) -> AsyncIterator[str]:
    """Yields the events as lines, and a comment for None."""
    try:
        async for event in events:
            if event is None:
                yield ": waiting\n\n"
            else:
                yield f"data: {event.model_dump_json(exclude_unset=True, warnings=False)}\n\n"
        yield "data: [DONE]\n\n"
    except ClientDisconnect:
        return
    except ApiError as error:
        yield f"data: {json.dumps(error.to_json())}\n\n"
    except TextChangedError as error:
        yield f"data: {json.dumps(ApiError(500, str(error)).to_json())}\n\n"
    except Exception as error:
        log_error(error, doing="streaming an answer")
        yield f"data: {json.dumps(unexpected().to_json())}\n\n"


def unexpected() -> ApiError:
    """Returns the error of a fault of this server's."""
    return ApiError(500, "the server failed on this request; its log says where")


class Guard:
    """Checks the key, sets headers, counts responses, and turns faults into errors."""

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, api_keys: Sequence[str], paths: Sequence[str]
    ) -> None:
        """Wraps an application.

        Args:
            app: the application.
            metrics: counts there.
            api_keys: one of them is needed; none where all are served.
            paths: that are counted by name.
        """
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s, status, is_whole = time.perf_counter(), 0, False

        async def send_with_headers(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)
            is_whole = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await self._serve(scope, receive, send_with_headers)
        except ClientDisconnect:
            status = 499  # As others count it; nobody is there to read a response.
        except Exception as error:
            log_error(error, doing="answering a request")
            if not status:
                await error_response(unexpected())(scope, receive, send_with_headers)
            elif not is_whole:  # So that the connection is closed, and not taken as ended.
                raise SystemError("the response was cut off") from None
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.responses.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - started_s)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._keys and scope["path"] not in _OPEN and not self._has_key(scope):
            error = ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
            )
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        matches = [hmac.compare_digest(key.strip(), one) for one in self._keys]
        return kind.lower() == b"bearer" and any(matches)


def api_error(_: Request, error: Any) -> Response:
    """Handles errors of the server's own, and its faults, which are raised further."""
    return error_response(error if isinstance(error, ApiError) else unexpected())


def http_error(request: Request, error: Any) -> Response:
    """Handles errors of routing, in the shape of the others."""
    method, path = request.method, request.url.path[:200]
    words = {404: f"there is no {path}", 405: f"{path} does not take {method}"}
    message = words.get(error.status_code, str(error.detail))
    response = error_response(ApiError(error.status_code, message))
    response.headers.update(error.headers or {})
    return response


def query_error(_: Request, error: Any) -> Response:
    """Handles errors of the part of an address behind its question mark."""
    problem = error.errors()[0]
    name = str(problem["loc"][-1])
    return error_response(ApiError(400, f"{name}: {problem['msg']}", param=name))
