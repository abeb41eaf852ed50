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
    if previous is None and begins:
        return encode_chat(tokenizer, [*opening, *turn], parse_special=parse_special, **values)
    added = _added(tokenizer, turn, opening, previous, parse_special, values)
    return _ids_behind_answer(tokenizer, added, None if previous is None else stopped_by)


def turn_around(
    tokenizer: Tokenizer,
    *,
    opening: Sequence[Message] = (),
    previous: Sequence[Message] | None = None,
    stopped_by: str | int | None = None,
    begins: bool = False,
    template_values: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[int]]:
    """The ids that stand before and behind what a user says, where that comes in pieces; arguments as in `turn_ids`.

    The pieces' own ids are those of a `StreamEncoder` that continues. A template that changes what it is given, such as
    one that strips white space, does not see them.

    Raises:
      ValueError: as in `turn_ids`, or the template does not write the user's messages.
    """
    place = _absent("[text]", [*opening, *(previous or ())])
    turn = [{"role": "user", "content": place}]
    added = _added(tokenizer, turn, opening, None if begins else previous, False, dict(template_values or {}))
    before, found, behind = added.text.rpartition(place)
    if not found:
        raise ValueError("the chat template does not write the user's messages")
    if begins:
        bos = tokenizer.chat_template is None and tokenizer.adds_bos
        first = encode_typed(tokenizer, ChatText(before, added.mark), add_bos=bos)
    else:
        first = _ids_behind_answer(tokenizer, ChatText(before, added.mark), None if previous is None else stopped_by)
    return first, encode_typed(tokenizer, ChatText(behind, added.mark), continues=True)


def _absent(mark: str, messages: Sequence[Message]) -> str:
    """A mark that no message has."""
    said = json.dumps(list(messages), ensure_ascii=False)
    while mark in said:
        mark = f"[{mark}]"
    return mark


def _added(
    tokenizer: Tokenizer,
    turn: Sequence[Message],
    opening: Sequence[Message],
    previous: Sequence[Message] | None,
    parse_special: bool,
    values: dict[str, Any],
) -> ChatText:
    """What a turn adds behind the answer before it."""
    if previous is None:
        return render_typed(tokenizer, [*opening, *turn], parse_special=parse_special, **values)
    mark = _absent("[answer]", [*opening, *previous, *turn])
    messages = [*opening, *previous, {"role": "assistant", "content": mark}, *turn]
    rendered, typed = render_typed(tokenizer, messages, parse_special=parse_special, **values)
    if mark not in rendered:
        raise ValueError("the chat template does not write the assistant's messages: it cannot go on with one")
    return ChatText(rendered.rpartition(mark)[2], typed)


def _ids_behind_answer(tokenizer: Tokenizer, added: ChatText, stopped_by: str | int | None) -> list[int]:
    """Ids of what is added, without the end of the answer before it that the stream has read."""
    if isinstance(stopped_by, str):
        return encode_typed(tokenizer, ChatText(added.text.removeprefix(stopped_by), added.mark), continues=True)
    ids = encode_typed(tokenizer, added, continues=True)
    if stopped_by in ids[:_NEAR]:
        return ids[ids.index(stopped_by) + 1 :]
    return ids
