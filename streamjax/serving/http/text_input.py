"""`/v1/streamjax/input`: a user's words that come in pieces over a websocket; the model reads while they come.

A client sends JSON objects. The first of a turn is `{"begin": {...}}` with the fields of a chat request but for
`messages`; then `{"text": "..."}` as often as it likes, and `{"answer": true}` at the end. The server sends the chunks
of a streamed chat, then `{"done": true, "usage": {...}}`, and waits for the next turn. When a client goes in the middle
of a turn, the turn ends there, without an answer. With `wait` in `begin` the answer is written while the text comes
(`simultaneous_input.py`).
"""

from __future__ import annotations

import dataclasses
import secrets
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from streamjax.data.text.chat_turns import turn_around
from streamjax.data.text.stream_encoder import StreamEncoder
from streamjax.serving.http.chat import ChatCall, ChatWriter, prepare_pieces
from streamjax.serving.http.conversations import find, hold, read_conversation
from streamjax.serving.http.errors import ApiError
from streamjax.serving.http.reading.fields import Fields, parse_body
from streamjax.serving.http.reading.text_pieces import next_piece
from streamjax.serving.http.service import Service
from streamjax.serving.http.simultaneous_input import answer_while_reading
from streamjax.serving.requests import Request

_KEPT = 1000  # characters of what was said, that the next turn's template sees


async def serve_input(service: Service, socket: WebSocket) -> None:
    """Serve one client, turn by turn, until it goes."""
    await socket.accept()
    unnamed = f"input-{secrets.token_hex(16)}"  # of a connection that names no conversation; forgotten with it
    used = False
    try:
        while True:
            fields = Fields(parse_body((await socket.receive_text()).encode()))
            body = fields.required("begin", dict)
            fields.finish()
            if body.get("wait") is not None:
                await answer_while_reading(service, socket, body)
                continue
            name = read_conversation(Fields(body)) or unnamed
            used |= name == unnamed
            release = hold(service, name)
            try:
                await _Turn(service, socket, body, name, name != unnamed).run()
            finally:
                release()
    except ApiError as error:
        await socket.send_json(error.body())
        await socket.close(1008)
    except WebSocketDisconnect:
        pass
    finally:
        if used:
            await service.prepare(service.engine.delete_conversation, unnamed)


class _Turn:
    def __init__(self, service: Service, socket: WebSocket, body: dict[str, Any], name: str, named: bool):
        self._service, self._socket, self._body, self._name = service, socket, body, name
        self._named = named
        self._encoder = StreamEncoder(service.tokenizer, continues=True)
        self._waiting: list[int] = []  # ids that have come, and are not with the engine
        self._said = ""
        self._adapter: str | None = None

    async def run(self) -> None:
        service, kept = self._service, find(self._service, self._name)
        extra = {} if kept is None else dict(kept.extra)
        call, before, behind = await service.prepare(self._begin, extra, kept)
        self._adapter = call.requests[0].adapter
        self._waiting += before
        try:
            while await self._take():
                await self._read(extra)
        except (ApiError, WebSocketDisconnect):
            if self._said:  # the turn ends here, so that the next one finds the stream in order
                await self._read(self._after(extra), [*self._encoder.finish(), *behind])
            raise
        self._waiting += [*self._encoder.finish(), *behind]
        request = dataclasses.replace(
            call.requests[0], prompt=tuple(self._waiting), conversation=self._name, extra=self._after(extra)
        )
        call = dataclasses.replace(call, requests=(request,))
        with service.admission():
            generation = service.generations.submit(call.requests)
            writer = ChatWriter(service, call, generation)
            try:
                async for piece in writer.pieces():
                    await self._socket.send_json(piece)
            finally:
                generation.cancel()
                async for _ in generation.events():  # the conversation is held until its request has ended
                    pass
        await self._socket.send_json({"done": True, "usage": writer.usage()})

    def _begin(self, extra: dict[str, Any], kept: Any) -> tuple[ChatCall, list[int], list[int]]:
        """The request, and the ids before and behind the text."""
        service = self._service
        call = prepare_pieces(service, self._body)
        call = dataclasses.replace(call, conversation=self._name if self._named else None)
        begins = kept is None or kept.tokens_seen == 0
        with service.plain_errors():
            before, behind = turn_around(
                service.tokenizer,
                opening=extra.get("system", []),
                previous=extra.get("previous"),
                stopped_by=None if kept is None else kept.stopped_by,
                begins=begins,
                template_values=service.template_values,
            )
        return call, before, behind

    async def _take(self) -> bool:
        """Take a piece; whether there may be more."""
        text = await next_piece(self._socket)
        if text is None:
            return False
        self._said = (self._said + text)[:_KEPT]
        self._waiting += self._encoder.push(text.encode("utf-8", errors="replace"))
        return True

    async def _read(self, extra: dict[str, Any], more: list[int] | None = None) -> None:
        """Hand what has come to the engine, and wait until it is read: what comes meanwhile goes together."""
        self._waiting += more or []
        if not self._waiting:
            return
        request = Request(tuple(self._waiting), 0, conversation=self._name, adapter=self._adapter, extra=extra)
        self._waiting = []
        with self._service.admission():  # a client that is slow to write takes no room meanwhile
            async for _, event in self._service.generations.submit([request]).events():
                if event.finish_reason == "error":
                    raise ApiError(500, event.error or "the engine failed", code="engine_error")

    def _after(self, extra: dict[str, Any]) -> dict[str, Any]:
        return {"system": [], "tools": [], **extra, "previous": [{"role": "user", "content": self._said}]}
