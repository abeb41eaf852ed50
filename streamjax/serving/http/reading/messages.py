"""Messages of a chat: from OpenAI's form to what chat templates read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from streamjax.serving.http.errors import ApiError
from streamjax.serving.http.reading.fields import Fields, parse_body, wrong_type, wrong_value

_ROLES = ("system", "developer", "user", "assistant", "tool")
_MOST = 10_000
Messages = list[dict[str, Any]]


def read_messages(fields: Fields) -> Messages:
    """Take `messages`: a role and a content each, tool calls as templates read them.

    Parts of a content are joined; `developer` is another name of `system`. Only text is read.

    Raises:
      ApiError: 400, names the message and its field.
    """
    given = fields.required("messages", list)
    if not 0 < len(given) <= _MOST:
        raise wrong_value("messages", f"must have 1 to {_MOST:,} messages, and has {len(given):,}")
    return [_message(Fields(value, f"messages[{i}].")) for i, value in enumerate(given)]


def _message(fields: Fields) -> dict[str, Any]:
    fields.required("role", str)
    role = fields.one_of("role", _ROLES)
    message: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": _content(fields)}
    calls = fields.take("tool_calls", list) if role == "assistant" else None
    if calls:
        message["tool_calls"] = [_tool_call(call, fields.path(f"tool_calls[{i}].")) for i, call in enumerate(calls)]
    elif fields.take("content") is None:
        fields.required("content")
    if role == "tool":
        message["tool_call_id"] = fields.required("tool_call_id", str)
    if (name := fields.take("name", str)) is not None:
        message["name"] = name
    if role == "assistant":  # what a server has sent comes back
        fields.ignore("refusal", "audio", "annotations", "function_call", "reasoning_content")
    fields.finish()
    return message


def _content(fields: Fields) -> str:
    content = fields.take("content", str, list, default="")
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        part = Fields(part, f"{fields.path('content')}[{i}].")
        kind = part.required("type", str)
        if kind not in ("text", "input_text", "refusal"):
            raise wrong_value(part.path("type"), f"must be 'text', and is {kind[:32]!r}: the model reads nothing else")
        texts.append(part.required("refusal" if kind == "refusal" else "text", str))
        part.finish()
    return "".join(texts)


def _tool_call(value: Any, where: str) -> dict[str, Any]:
    call = Fields(value, where)
    call.one_of("type", ("function",))
    call.ignore("index")
    function = Fields(call.required("function", dict), f"{where}function.")
    name, text = function.required("name", str), function.required("arguments", str)
    try:
        arguments = parse_body(text.encode())
    except (ApiError, UnicodeEncodeError) as error:
        raise wrong_type(function.path("arguments"), "a JSON object written as a string", text) from error
    function.finish()
    found = {"id": call.take("id", str), "type": "function", "function": {"name": name, "arguments": arguments}}
    call.finish()
    return found


def split_opening(messages: Messages) -> tuple[Messages, Messages]:
    """The messages of the system that come first, and all others."""
    count = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    return messages[:count], messages[count:]


def last_exchange(messages: Messages, previous: Sequence[dict[str, Any]] | None) -> Messages:
    """What a conversation keeps of its newest turn, for a template to render the next one behind it.

    It is the user's last message and what followed; where a turn has none, as with results of tools, the last one of
    the turn before stands before it. So it does not grow with the conversation.
    """
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if users:
        return messages[users[-1] :]
    before = [message for message in previous or () if message["role"] == "user"][-1:]
    return [*before, *([{"role": "assistant", "content": ""}] if before else []), *messages]


def as_text(messages: Messages) -> Messages:
    """Messages for a template that knows no tools: calls as the model wrote them, results as the user's words."""
    plain = []
    for message in messages:
        content = message["content"]
        if message["role"] == "tool":
            plain.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
            continue
        for call in message.get("tool_calls", ()):
            content += f"\n<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        plain.append({"role": message["role"], "content": content.lstrip("\n")})
    return plain
