"""Request bodies in, answers out: whole or as server-sent events, and nothing for clients that have gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from streamjax.serving.http.errors import ApiError
from streamjax.serving.http.generations import Generation

_BODY_SECONDS = 30.0  # between two pieces of a body
_DISCARD_SECONDS = 2.0  # that a client has to stop sending what is too large


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request.

    Raises:
      ApiError: 413, more than `most` bytes; 408, nothing has come for half a minute.
    """
    parts: list[bytes] = []
    size = 0
    stream = request.stream()
    try:
        if int(request.headers.get("content-length", "0") or 0) > most:
            size = most + 1
        while size <= most:
            part = await asyncio.wait_for(anext(stream, None), _BODY_SECONDS)
            if part is None:
                return b"".join(parts)
            parts.append(part)
            size += len(part)
    except TimeoutError:
        raise ApiError(408, "the body did not come", code="timeout", headers={"Connection": "close"}) from None
    with contextlib.suppress(TimeoutError, ClientDisconnect):  # a client that still sends would not read the answer
        async with asyncio.timeout(_DISCARD_SECONDS):
            async for _ in stream:
                pass
    message = f"the body is too large: {most:,} bytes are the most"
    raise ApiError(413, message, code="request_too_large", headers={"Connection": "close"})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Answer(Response):
    """The answer of a generation, which ends when its client goes.

    Args:
      generation: what is answered with.
      whole: makes the body of an answer that is sent at once.
      pieces: the events of one that is streamed; one of the two is given.
    """

    def __init__(
        self,
        generation: Generation,
        whole: Coroutine[Any, Any, dict[str, Any]] | None = None,
        pieces: AsyncIterator[dict[str, Any]] | None = None,
    ):
        self._generation, self._whole, self._pieces = generation, whole, pieces
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._send(scope, receive, send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._generation.cancel()  # no effect on what has ended
            for task in (work, gone):
                if not task.done():
                    task.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            with contextlib.suppress(asyncio.CancelledError):
                await work

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._whole is not None:
            try:
                response: Response = JSONResponse(await self._whole)
            except ApiError as error:
                response = error.response()
            await response(scope, receive, send)
            return
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        assert self._pieces is not None
        async for piece in self._pieces:
            await send({"type": "http.response.body", "body": event_data(piece), "more_body": True})
        if self._generation.overrun:
            raise ConnectionError("the client does not read")  # the server closes the connection
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def event_data(value: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n\n"
