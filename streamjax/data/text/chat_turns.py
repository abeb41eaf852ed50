"""What a turn of a conversation adds to its stream: ids behind the answer before it, and nothing again.

A chat template renders whole conversations. What a turn adds is what the rendering of the turn before and this one has
behind the assistant's answer: one exchange is rendered, however long the conversation is. The answer itself is in the
stream already, as the model wrote it; its place is held by a mark.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from streamjax.data.text.chat_templates import ChatText, encode_chat, encode_typed, render_typed
from streamjax.data.text.tokenizers import Tokenizer

Message = Mapping[str, Any]  # of a chat: "role" and "content" at least
_NEAR = 4  # tokens at the start of a turn among which the end of the answer before is looked for


def turn_ids(
    tokenizer: Tokenizer,
    turn: Sequence[Message],
    *,
    opening: Sequence[Message] = (),
    previous: Sequence[Message] | None = None,
    stopped_by: str | int | None = None,
    begins: bool = False,
    parse_special: bool = False,
    template_values: Mapping[str, Any] | None = None,
) -> list[int]:
    """The ids that a turn adds to a stream, up to where the answer begins.

    Args:
      tokenizer: whose template and ids.
      turn: the new messages.
      opening: messages that come before all others, such as the system's.
      previous: the turn that was answered last; None where there is none.
      stopped_by: the stop string, or the id, that ended that answer; None where it was cut short.
      begins: whether the stream has read nothing yet.
      parse_special, template_values: as in `encode_chat`.

    Raises:
      ValueError: the template refuses the messages, or does not write the assistant's.
    """
    values = dict(template_values or {})
    if previous is None:
        messages = [*opening, *turn]
        if begins:
            return encode_chat(tokenizer, messages, parse_special=parse_special, **values)
        return encode_typed(
            tokenizer, render_typed(tokenizer, messages, parse_special=parse_special, **values), continues=True
        )
    said = json.dumps([*opening, *previous, *turn], ensure_ascii=False)
    mark = "[answer]"
    while mark in said:
        mark = f"[{mark}]"
    messages = [*opening, *previous, {"role": "assistant", "content": mark}, *turn]
    rendered, typed = render_typed(tokenizer, messages, parse_special=parse_special, **values)
    if mark not in rendered:
        raise ValueError("the chat template does not write the assistant's messages: it cannot go on with one")
    added = rendered.rpartition(mark)[2]
    if isinstance(stopped_by, str):
        return encode_typed(tokenizer, ChatText(added.removeprefix(stopped_by), typed), continues=True)
    ids = encode_typed(tokenizer, ChatText(added, typed), continues=True)
    if stopped_by in ids[:_NEAR]:  # the stream has read the token that ended the answer
        return ids[ids.index(stopped_by) + 1 :]
    return ids
