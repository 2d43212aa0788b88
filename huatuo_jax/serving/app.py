"""The application: its paths, and what surrounds them."""

import contextlib
import functools
import pathlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pydantic
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from openai.types import Model as ListedModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import ASGIApp

from huatuo_jax.serving import chat_completions, classify, completions, tokenizing
from huatuo_jax.serving.answering import Answering
from huatuo_jax.serving.bodies import (
    ChatBody,
    ClassifyBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from huatuo_jax.serving.errors import ApiError
from huatuo_jax.serving.exchange import Guard, api_error, http_error, query_error
from huatuo_jax.serving.metrics import CONTENT_TYPE
from huatuo_jax.serving.models import Policy, Served, ServedModel

PAGE = pathlib.Path(__file__).resolve().parent / "page" / "index.html"
"""The web page."""

Respond = Callable[[Request, Answering], Awaitable[Response]]

_POSTED: dict[str, tuple[Respond, type[pydantic.BaseModel]]] = {
    "/v1/chat/completions": (chat_completions.respond, ChatBody),
    "/v1/completions": (completions.respond, CompletionBody),
    "/v1/classify": (classify.respond, ClassifyBody),
    "/tokenize": (tokenizing.tokenize, TokenizeBody),
    "/detokenize": (tokenizing.detokenize, DetokenizeBody),
}
_GOT = ("/", "/health", "/metrics", "/tokenizer_info", "/v1/models")


def make_app(
    served: Served,
    *,
    max_waiting: int,
    api_keys: Sequence[str] = (),
    cors: Sequence[str] = (),
) -> ASGIApp:
    """Makes the application, whose engines run while its lifespan lasts.

    Args:
        served: the models.
        max_waiting: answers that wait for a slot of a model before more are refused.
        api_keys: one of them is needed; none where all are served.
        cors: origins whose pages may ask; `*` for all.
    """
    answering = Answering(served, max_waiting=max_waiting)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        answering.runner.start()
        try:
            yield
        finally:
            answering.runner.stop()

    # Without FastAPI's own pages, which load scripts from other addresses.
    app = FastAPI(title="huatuo_jax", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(Exception, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, query_error)
    _add_pages(app, answering)
    for path, (respond, body) in _POSTED.items():
        _add_post(app, path, respond, body, answering)
    app.openapi = functools.partial(_schema, app)  # type: ignore[method-assign]
    guarded: ASGIApp = Guard(
        app, metrics=answering.metrics, api_keys=api_keys, paths=[*_POSTED, *_GOT]
    )
    if not cors:
        return guarded
    # Outside, as a browser asks for leave without the key.
    return CORSMiddleware(
        guarded,
        allow_origins=list(cors),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["Retry-After"],
    )


def _add_pages(app: FastAPI, answering: Answering) -> None:
    """Adds the paths that are got."""
    served = answering.served

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """Returns the web page."""
        return FileResponse(PAGE, media_type="text/html; charset=utf-8")

    @app.get("/health", response_class=JSONResponse)
    async def health() -> Response:
        """Says whether the engines answer."""
        if answering.runner.is_dead:
            raise ApiError(503, "the engine has failed, and the server has to be started anew")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Returns counts and times in Prometheus's text."""
        return Response(answering.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    @app.get("/v1/models", response_class=JSONResponse)
    async def models() -> Response:
        """Lists the models."""
        every: list[ServedModel] = [*served.policies.values(), *served.rewards.values()]
        return JSONResponse({"object": "list", "data": [_listed(one) for one in every]})

    @app.get("/tokenizer_info", response_class=JSONResponse)
    async def tokenizer_info(model: str | None = None) -> Response:
        """Describes the tokenizer of a model, the first unless it is named."""
        return JSONResponse(tokenizing.information(served.any(model).saved))

    @app.get("/v1/models/{model:path}", response_class=JSONResponse)
    async def model(model: str) -> Response:
        """Describes a model."""
        return JSONResponse(_listed(served.any(model)))


def _listed(model: ServedModel) -> dict[str, Any]:
    listed = ListedModel(
        id=model.name, object="model", created=model.created, owned_by="huatuo_jax"
    )
    kind = "policy" if isinstance(model, Policy) else "reward"
    more = {"max_model_len": model.max_length, "huatuo": {"kind": kind}}
    return listed.model_dump(exclude_unset=True) | more


def _add_post(
    app: FastAPI,
    path: str,
    respond: Respond,
    body: type[pydantic.BaseModel],
    answering: Answering,
) -> None:
    """Adds a path that takes a body, which is read by `exchange.body_of`."""

    async def endpoint(request: Request) -> Response:
        return await respond(request, answering)

    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    content = {"required": True, "content": {"application/json": {"schema": schema}}}
    app.post(
        path,
        name=path,
        description=(respond.__doc__ or "").partition("\n")[0],
        response_class=Response,
        openapi_extra={"requestBody": content},
    )(endpoint)


def _schema(app: FastAPI) -> dict[str, Any]:
    """Returns the OpenAPI schema, with the bodies."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, bodies = pydantic.json_schema.models_json_schema(
            [(body, "validation") for _, body in _POSTED.values()],
            ref_template="#/components/schemas/{model}",
        )
        found.setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
        app.openapi_schema = found
    return app.openapi_schema
