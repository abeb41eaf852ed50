"""Text that a client sends over a websocket while it comes."""

from __future__ import annotations

from starlette.websockets import WebSocket

from streamjax.serving.http.reading.fields import Fields, parse_body, wrong_value

_LONGEST = 1 << 20  # characters of a piece


async def next_piece(socket: WebSocket) -> str | None:
    """The next piece of a text; None where the client has said that it ends.

    Raises:
      ApiError: another message, or a piece that is too long.
      WebSocketDisconnect: the client has gone.
    """
    fields = Fields(parse_body((await socket.receive_text()).encode()))
    if fields.take("answer", bool, default=False):
        fields.finish()
        return None
    text = fields.required("text", str)
    fields.finish()
    if len(text) > _LONGEST:
        raise wrong_value("text", f"must not be longer than {_LONGEST:,} characters")
    return text
