"""A turn of `/v1/streamjax/input` with `wait`: the answer is written while the text comes, by wait-k.

The server sends chunks of the answer as soon as so much of the text is there, and goes on when `{"answer": true}` has
said that nothing more comes. Source and answer have positions of their own (`serving/simultaneous`).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
from typing import Any

from starlette.websockets import WebSocket

from streamjax.data.text.chat_turns import turn_around
from streamjax.serving.http.chat import ChatCall, ChatWriter, prepare_pieces
from streamjax.serving.http.errors import ApiError, overloaded
from streamjax.serving.http.generations import Generation
from streamjax.serving.http.reading.fields import Fields, wrong_value
from streamjax.serving.http.reading.text_pieces import next_piece
from streamjax.serving.http.service import Service
from streamjax.serving.requests import Event, Overloaded, Request
from streamjax.serving.simultaneous.streams import SimultaneousStream, SimultaneousStreams

_AHEAD = 1 << 16  # tokens that a client may be ahead of what is due


async def answer_while_reading(service: Service, socket: WebSocket, body: dict[str, Any]) -> None:
    """Serve one turn, whose `begin` has these fields.

    Raises:
      ApiError: what is wrong with it.
      WebSocketDisconnect: the client has gone.
    """
    streams = service.simultaneous
    if streams is None:
        raise wrong_value("wait", "is for servers that were started with --simultaneous")
    for name in ("conversation", "response_format"):
        if body.get(name) is not None:
            raise wrong_value(name, "must not be given beside wait")
    with service.admission():
        stream, call = await service.prepare(_open, service, streams, body)
        try:
            await _Turn(service, socket, streams, stream, call).run()
        finally:
            with contextlib.suppress(RuntimeError):  # of a server that has ended
                streams.submit(stream.close)  # behind its step, if one is under way


def _open(service: Service, streams: SimultaneousStreams, body: dict[str, Any]) -> tuple[SimultaneousStream, ChatCall]:
    """A stream for a turn, and its request."""
    fields = Fields(body)
    wait, between = fields.whole("wait", 0, 0), fields.whole("between", 1, 0)
    template = fields.take("template", bool, default=True)
    assert wait is not None
    assert between is not None
    own = ("wait", "between", "template")
    call = prepare_pieces(service, {name: value for name, value in body.items() if name not in own})
    tokenizer = service.tokenizer
    if template:
        with service.plain_errors():
            before, begin = turn_around(tokenizer, begins=True, template_values=service.template_values)
    elif tokenizer.bos_id is None:
        raise wrong_value("template", "must be true for a model without BOS: nothing else begins an answer")
    else:
        before, begin = [tokenizer.bos_id] if tokenizer.adds_bos else [], [tokenizer.bos_id]
    request: Request = dataclasses.replace(call.requests[0], prompt=tuple(begin))
    try:
        with service.plain_errors():
            return streams.open(request, before, wait, between), call
    except Overloaded as error:
        raise overloaded(error) from error


class _Turn:
    def __init__(
        self, service: Service, socket: WebSocket, streams: SimultaneousStreams, stream: SimultaneousStream,
        call: ChatCall,
    ):  # fmt: skip
        self._service, self._socket = service, socket
        self._streams, self._stream, self._call = streams, stream, call
        self._generation = Generation(1, None, None)
        self._pieces: collections.deque[list[int]] = collections.deque()
        self._news = asyncio.Event()  # a piece has come, or one has been taken

    async def run(self) -> None:
        reading = asyncio.create_task(self._receive())
        reading.add_done_callback(lambda task: self._news.set())
        writing = asyncio.create_task(self._write(reading))
        writer = ChatWriter(self._service, self._call, self._generation)
        try:
            async for piece in writer.pieces():
                if not _failed(writing):
                    await self._socket.send_json(piece)
            await writing
            await self._socket.send_json({"done": True, "usage": writer.usage()})
            await reading  # what still comes of the text is dropped
        finally:
            reading.cancel()
            writing.cancel()
            await asyncio.gather(reading, writing, return_exceptions=True)

    async def _receive(self) -> None:
        """Take pieces until the text has ended."""
        while (text := await next_piece(self._socket)) is not None:
            self._pieces.append(self._service.tokenizer.encode(text, add_bos=False, continues=True))
            self._news.set()
            while sum(map(len, self._pieces)) > _AHEAD and not self._stream.ended:
                self._news.clear()
                await self._news.wait()
            if self._stream.ended:
                self._pieces.clear()

    async def _write(self, reading: asyncio.Task[None]) -> None:
        """Write the answer, a token whenever one is due."""
        try:
            while not self._stream.ended:
                await self._feed(reading)
                step = asyncio.wrap_future(self._streams.submit(self._stream.step))
                for event in await step:
                    self._generation.push(0, event)
        except ApiError:
            raise
        except ValueError as error:
            raise ApiError(400, str(error), code="invalid_value") from error
        finally:
            if not self._stream.ended:
                self._generation.push(0, Event("", finish_reason="cancelled"))
            self._news.set()

    async def _feed(self, reading: asyncio.Task[None]) -> None:
        """Wait until the next token is due."""
        while True:
            while self._pieces and not self._stream.due(False):
                self._stream.feed(self._pieces.popleft())
            if reading.done():
                reading.result()  # whatever is wrong with the text
            if self._stream.due(reading.done() and not self._pieces):
                return
            self._news.clear()
            await self._news.wait()


def _failed(task: asyncio.Task[None]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
