"""Conversations without end: the server keeps the stream, and a request sends what is new alone."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from streamjax.data.text.chat_turns import turn_ids
from streamjax.serving.http.errors import ApiError
from streamjax.serving.http.reading.fields import Fields, parse_body
from streamjax.serving.http.reading.messages import Messages, last_exchange, split_opening
from streamjax.serving.http.reading.tools import Tools
from streamjax.serving.http.sending import read_body
from streamjax.serving.http.service import Service
from streamjax.serving.requests import KeptConversation

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")
_MOST_EMPTY = 10_000  # the oldest are forgotten
_LARGEST_BODY = 1 << 16


def read_conversation(fields: Fields) -> str | None:
    """Take `conversation`: a name, or an object with an `id`.

    Raises:
      ApiError: 400, no name.
    """
    given = fields.take("conversation", str, dict)
    if isinstance(given, dict):
        about = Fields(given, "conversation.")
        given = about.required("id", str)
        about.finish()
    return None if given is None else _require_name(given, "conversation")


def _require_name(name: str, param: str) -> str:
    if not _NAME.fullmatch(name):
        raise ApiError(
            400,
            f"'{param}' must be 1 to 64 letters, digits, _, - and ., and not begin with a dot",
            param,
            "invalid_value",
        )
    return name


def hold(service: Service, name: str) -> Callable[[], None]:
    """Keep a conversation for one request; call what is returned when that has ended.

    Raises:
      ApiError: 409, another request is under way on it.
    """
    kept = find(service, name)
    if name in service.held or (kept is not None and kept.busy):
        raise ApiError(
            409,
            f"conversation {name!r} is busy: wait for its answer, or cancel it",
            "conversation",
            "conversation_busy",
        )
    service.held.add(name)
    return lambda: service.held.discard(name)


def find(service: Service, name: str) -> KeptConversation | None:
    """The conversation of a name, if something has been said in it."""
    return next((kept for kept in service.engine.conversations() if kept.name == name), None)


def next_turn(service: Service, name: str, messages: Messages, tools: Tools) -> tuple[list[int], dict[str, Any]]:
    """The ids that messages add to a conversation, and what is to be kept of them.

    The system's messages and the tools stand at the beginning. A later turn may repeat them; it cannot change them.

    Raises:
      ApiError: 400, they are others, or there is nothing new.
      ValueError: the template refuses the messages.
    """
    kept = find(service, name)
    extra = {} if kept is None else kept.extra
    begins = kept is None or kept.tokens_seen == 0
    offered = list(tools.offered)
    opening, turn = split_opening(messages)
    if not begins:
        if opening and opening != extra.get("system", []):
            message = "the system's messages stand at the beginning of a conversation and cannot be changed"
            raise ApiError(400, message, "messages", "conversation_has_begun")
        if offered and offered != extra.get("tools", []):
            message = "the tools stand at the beginning of a conversation and cannot be changed"
            raise ApiError(400, message, "tools", "conversation_has_begun")
        opening, offered = list(extra.get("system", [])), list(extra.get("tools", []))
    if not turn:
        raise ApiError(400, "'messages' has nothing new for the conversation", "messages", "invalid_value")
    told, values = Tools(tuple(offered)).told([*opening, *turn], service.tokenizer.chat_template)
    told_opening, told_turn = split_opening(told)
    previous = extra.get("previous") if not begins else None
    ids = turn_ids(
        service.tokenizer,
        told_turn,
        opening=told_opening,
        previous=previous,
        stopped_by=None if kept is None else kept.stopped_by,
        begins=begins,
        template_values=service.template_values | values,
    )
    return ids, {"system": opening, "tools": offered, "previous": last_exchange(told_turn, previous)}


def _public(name: str, kept: KeptConversation | None) -> dict[str, Any]:
    seen, busy = (0, False) if kept is None else (kept.tokens_seen, kept.busy)
    return {"id": name, "object": "conversation", "tokens_seen": seen, "busy": busy}


class ConversationRoutes:
    """`/v1/conversations`.

    Args:
      service: whose engine keeps them.
    """

    def __init__(self, service: Service):
        self._service = service

    async def list(self, request: Request) -> JSONResponse:
        """All of them, the newest last."""
        service = self._service
        kept = service.engine.conversations()
        names = {each.name for each in kept}
        found = [_public(each.name, each) for each in kept]
        found += [_public(name, None) for name in service.empty_conversations if name not in names]
        return JSONResponse({"object": "list", "data": found})

    async def create(self, request: Request) -> JSONResponse:
        """A name for a new one: the caller's `id`, or one that nobody guesses. Kept from its first request on."""
        service = self._service
        data = await read_body(request, _LARGEST_BODY)
        fields = Fields(parse_body(data) if data.strip() else {})
        name = _require_name(fields.take("id", str, default=f"conv_{secrets.token_hex(16)}"), "id")
        fields.ignore("metadata")
        fields.refuse("items", "send them with the first request", [])
        fields.finish()
        if find(service, name) is not None or name in service.empty_conversations:
            raise ApiError(409, f"there is a conversation {name!r} already", "id", "conversation_exists")
        service.empty_conversations[name] = None
        while len(service.empty_conversations) > _MOST_EMPTY:
            del service.empty_conversations[next(iter(service.empty_conversations))]
        return JSONResponse({**_public(name, None), "created_at": int(time.time())})

    async def get(self, request: Request) -> JSONResponse:
        """One of them."""
        name = request.path_params["name"]
        kept = find(self._service, name)
        if kept is None and name not in self._service.empty_conversations:
            raise _none(name)
        return JSONResponse(_public(name, kept))

    async def delete(self, request: Request) -> JSONResponse:
        """Forget one, here and on disk."""
        service, name = self._service, request.path_params["name"]
        was_empty = name in service.empty_conversations
        service.empty_conversations.pop(name, None)
        deleted = await service.prepare(service.engine.delete_conversation, name)
        if not deleted and not was_empty:
            raise _none(name)
        return JSONResponse({"id": name, "object": "conversation.deleted", "deleted": True})


def _none(name: str) -> ApiError:
    return ApiError(404, f"there is no conversation {name[:64]!r}", "conversation", "conversation_not_found")
