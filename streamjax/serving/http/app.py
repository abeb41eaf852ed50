"""The application: routes, who may use them, and every error in OpenAI's form."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streamjax.serving.http.chat import answer_chat
from streamjax.serving.http.completions import answer_completion
from streamjax.serving.http.conversations import ConversationRoutes
from streamjax.serving.http.errors import ApiError
from streamjax.serving.http.reading.fields import parse_body
from streamjax.serving.http.sending import read_body
from streamjax.serving.http.service import Service
from streamjax.serving.http.text_input import serve_input

PAGE = Path(__file__).parent / "page"
_OPEN = ("/", "/health", "/page/")  # without a key
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# The page runs its own script and nothing else, whatever a model writes.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
_log = logging.getLogger(__name__)


def make_app(
    service: Service, *, keys: Sequence[str] = (), largest_body: int = 16 << 20, any_host: bool = False
) -> Starlette:
    """The server's application. It starts the engine when it starts, and closes it when it ends.

    Args:
      service: the model.
      keys: one of which a request must bring; none: everybody may come.
      largest_body: bytes of a request.
      any_host: whether requests may name another host than this machine's loopback, as they do where the server
        listens on other addresses.
    """
    conversations = ConversationRoutes(service)
    endpoints = _Endpoints(service, largest_body)
    routes: list[Any] = [
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/v1/completions", endpoints.completion, methods=["POST"]),
        Route("/v1/models", endpoints.models),
        Route("/v1/models/{name:path}", endpoints.model),
        Route("/v1/conversations", conversations.list),
        Route("/v1/conversations", conversations.create, methods=["POST"]),
        Route("/v1/conversations/{name}", conversations.get),
        Route("/v1/conversations/{name}", conversations.delete, methods=["DELETE"]),
        Route("/v1/streamjax", endpoints.about),
        WebSocketRoute("/v1/streamjax/input", lambda socket: serve_input(service, socket)),
        Route("/metrics", endpoints.metrics),
        Route("/health", endpoints.health),
        Route("/", endpoints.page),
        Route("/favicon.ico", lambda request: RedirectResponse("/page/icon.svg")),
        Mount("/page", _PageFiles(directory=PAGE)),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await asyncio.to_thread(service.close)

    handlers: dict[Any, Any] = {
        ApiError: lambda request, error: error.response(),
        HTTPException: _http_error,
        Exception: _internal_error,
    }
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.add_middleware(_Door, service=service, keys=tuple(keys), any_host=any_host)
    return app


class _PageFiles(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(_PAGE_HEADERS)
        return response


class _Endpoints:
    def __init__(self, service: Service, largest_body: int):
        self._service, self._largest_body = service, largest_body

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, answer_chat)

    async def completion(self, request: Request) -> Response:
        return await self._generate(request, answer_completion)

    async def _generate(self, request: Request, answer: Callable[..., Awaitable[Response]]) -> Response:
        with contextlib.ExitStack() as room:
            room.enter_context(self._service.admission())
            body = parse_body(await read_body(request, self._largest_body))
            ended = contextlib.ExitStack()
            ended.push(room.pop_all())
            try:
                return await answer(self._service, body, ended.close)
            except BaseException:
                ended.close()
                raise
        raise AssertionError  # the block above returns

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._service.models]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._service.adapter_of(name)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        """A model's entry; an adapter's names what it is for."""
        service = self._service
        parent = {} if name == service.name else {"parent": service.name}
        return {"id": name, "object": "model", "created": service.created, "owned_by": "streamjax", **parent}

    async def about(self, request: Request) -> Response:
        """What the page shows: the model, what a stream's tiers hold and how many bytes, what the engine does."""
        service = self._service
        sizes = service.cache_sizes
        parts = [] if sizes is None else [{**dataclasses.asdict(part), "bytes": part.bytes} for part in sizes.parts]
        stats = dataclasses.asdict(service.engine.stats())
        return JSONResponse({
            "model": service.name,
            "trained_length": service.trained_length,
            "cache": {"name": service.cache_words, "bytes": 0 if sizes is None else sizes.total, "parts": parts},
            "engine": stats,
        })  # fmt: skip

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self._service.name})

    async def page(self, request: Request) -> Response:
        return FileResponse(PAGE / "index.html", headers=_PAGE_HEADERS)


class _Door:
    """Lets in who has a key; keeps out the pages of other sites, which a browser on this machine may have open."""

    def __init__(self, app: ASGIApp, service: Service, keys: tuple[str, ...], any_host: bool):
        self._app, self._service, self._keys, self._any_host = app, service, keys, any_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        path = scope["path"]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                name = getattr(route, "path", "other")  # not what a client makes up
                self._service.metrics.responses.labels(name, message["status"]).inc()
            await send(message)

        error = self._refusal(Headers(scope=scope), path)
        try:
            if error is None:
                await self._app(scope, receive, counted)
            elif scope["type"] == "http":
                await error.response()(scope, receive, counted)
            else:
                await send({"type": "websocket.close", "code": 1008, "reason": str(error)[:100]})
        except ClientDisconnect:  # nobody is there to be told
            pass

    def _refusal(self, headers: Headers, path: str) -> ApiError | None:
        host = headers.get("host", "")
        if not self._any_host and urlsplit(f"//{host}").hostname not in _LOOPBACK:
            return ApiError(403, f"this server is {' or '.join(_LOOPBACK)}, not {host[:64]!r}", code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return ApiError(403, f"pages of {origin[:64]!r} may not use this server", code="wrong_origin")
        if not self._keys or path in _OPEN or path.startswith("/page/"):
            return None
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode() if kind.lower() == "bearer" else b""
        if any([hmac.compare_digest(given, known.encode()) for known in self._keys]):  # all, so that time tells nothing
            return None
        message = (
            "Incorrect API key provided." if given else "You didn't provide an API key: send Authorization: Bearer KEY."
        )
        return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    words = {404: f"Unknown request URL: {request.method} {path[:128]}.", 405: f"{request.method} is not allowed here."}
    found = ApiError(error.status_code, words.get(error.status_code, str(error.detail)), code="unknown_url")
    found.headers = dict(error.headers or {})
    return found.response()


async def _internal_error(request: Request, error: Exception) -> Response:
    _log.error("%s %s: %s", request.method, request.url.path, type(error).__name__, exc_info=error)
    return ApiError(500, "the server has made a mistake", code="internal_error").response()
