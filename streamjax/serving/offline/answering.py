"""Answers to requests that are all known, by the endpoints of the API but without its sockets."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable, Sequence
from typing import Any

from streamjax.serving.http.chat import ChatCall, ChatWriter, prepare_chat
from streamjax.serving.http.completions import CompletionCall, CompletionWriter, prepare_completion
from streamjax.serving.http.errors import ApiError
from streamjax.serving.http.service import Service
from streamjax.serving.offline.batch_files import CHAT, Line

Prepared = ChatCall | CompletionCall | ApiError


def prepare(service: Service, line: Line) -> Prepared:
    """A request, ready for the engine, or what is wrong with it."""
    try:
        for name in ("stream", "conversation"):
            if line.body.get(name):
                raise ApiError(400, f"{name!r} is not for files of requests", name, "invalid_value")
        if line.url == CHAT:
            return prepare_chat(service, line.body, None)
        return prepare_completion(service, line.body)
    except ApiError as error:
        return error


async def answer_all(
    service: Service,
    calls: Sequence[tuple[str, Prepared]],
    at_once: int,
    done: Callable[[str, int, dict[str, Any]], None],
) -> None:
    """Answer requests, in this order, `at_once` of them at a time; `done` is given name, status and body of each."""
    waiting = collections.deque(calls)

    async def answer() -> None:
        while waiting:
            name, call = waiting.popleft()
            try:
                if isinstance(call, ApiError):
                    raise call
                generation = service.generations.submit(call.requests, None)
                if isinstance(call, ChatCall):
                    body = await ChatWriter(service, call, generation).whole()
                else:
                    body = await CompletionWriter(service, call, generation).whole()
            except ApiError as error:
                done(name, error.status, error.body())
            else:
                done(name, 200, body)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(at_once, len(calls))):
            group.create_task(answer())


def size_of(call: Prepared) -> tuple[tuple[int, ...], int]:
    """A request's prompt, and how many tokens it may draw."""
    if isinstance(call, ApiError):
        return (), 0
    return call.requests[0].prompt, sum(request.max_new_tokens for request in call.requests)
