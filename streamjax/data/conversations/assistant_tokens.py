"""Which tokens of a conversation the assistant wrote, by the model's own chat template.

A template with `{% generation %}` blocks says so itself. For any other one, what the assistant writes in a turn begins
where the rendering of the messages before it ends with the generation prompt, and ends where the rendering with its
message does. Some templates write earlier messages differently once there are later ones (Qwen3 drops thoughts of
earlier turns), or end the generation prompt with more than what a stored answer begins with (an open "<think>"). There
the turn is found by marks around the message's content, and it ends with the token that ends a turn.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from streamjax.data.text.chat_templates import render_typed
from streamjax.data.text.hugging_face import HFTokenizer, Span, well_formed
from streamjax.data.text.tokenizers import Tokenizer

Message = Mapping[str, Any]
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
_MARKS = tuple(map(chr, range(0xFDE0, 0xFDF0)))  # characters that no text has


class LearntTokens(NamedTuple):
    """Ids of a text, and which of them a model is to learn to write."""

    ids: list[int]
    learnt: list[bool]


def encode_conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    first: int = 0,
    everything: bool = False,
    parse_special: bool = False,
    **values: Any,
) -> LearntTokens:
    """The ids of a conversation, those of `encode_chat`, and which of them the assistant wrote.

    A turn ends with the token that ends it, which a model must learn too; white space that a template writes behind
    that token is not the assistant's.

    Args:
      tokenizer: whose template and ids.
      messages: each with "role", and "content" or "tool_calls".
      first: the assistant's messages from this one on are to be learnt; those before it are context.
      everything: whether all tokens are to be learnt, whoever wrote them.
      parse_special: as in `encode_chat`.
      values: more names for the template, such as tools.

    Raises:
      ValueError: what `render_chat` refuses, or a template by which the assistant's turns cannot be told.

    Example:
      >>> talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
      >>> encode_conversation(sj.load_tokenizer(), talk).learnt.count(True)  # "hello" and the line's end, in bytes
      7
    """
    rendered = _Renderings(tokenizer, messages, parse_special, values)
    text, typed, blocks = rendered.marked
    ids, places = _ids_and_places(tokenizer, text, typed)
    if everything:
        spans = [(0, len(text))]
    elif _GENERATION.search(tokenizer.chat_template or ""):
        context = _shared(text, rendered.prefix(first, False) or "") if first else 0
        spans = [span for span in blocks if span[0] >= context]
    else:
        ends = [place for token, place in zip(ids, places, strict=True) if token in _turn_end_ids(tokenizer)]
        turns = (i for i in range(first, len(messages)) if messages[i].get("role") == "assistant")
        spans = [_turn(rendered, text, ends, i) for i in turns]
    learnt = [stop > start and any(start < end and begin < stop for begin, end in spans) for start, stop in places]
    if tokenizer.chat_template is None and tokenizer.adds_bos and tokenizer.bos_id is not None:
        return LearntTokens([tokenizer.bos_id, *ids], [everything, *learnt])
    return LearntTokens(ids, learnt)


class _Renderings:
    """A conversation and its beginnings as the template writes them, each rendered once."""

    def __init__(self, tokenizer: Tokenizer, messages: Sequence[Message], parse_special: bool, values: dict[str, Any]):
        self._tokenizer, self.messages, self._parse_special, self._values = tokenizer, messages, parse_special, values
        self._prefixes: dict[tuple[int, bool], str | None] = {}

    @functools.cached_property
    def marked(self) -> tuple[str, list[Span], list[Span]]:
        """The text, where special tokens were typed in it, and what its generation blocks wrote."""
        open_mark, close_mark = _MARKS[:2]
        marks = {"generation_start_mark": open_mark, "generation_end_mark": close_mark}
        chat = self._render(self.messages, False, **marks)
        pieces: list[str] = []
        length, typed, blocks, opened = 0, [], [], 0
        for piece in re.split(f"([{re.escape(chat.mark)}{open_mark}{close_mark}])", chat.text):
            if piece == chat.mark:
                typed.append((length, length + 1))
            elif piece == open_mark:
                opened = length
            elif piece == close_mark:
                blocks.append((opened, length))
            else:
                pieces.append(piece)
                length += len(piece)
        return well_formed("".join(pieces)), typed, blocks

    def prefix(self, count: int, prompted: bool) -> str | None:
        """The text of the first messages, with the generation prompt if asked; None where the template refuses them."""
        if (count, prompted) not in self._prefixes:
            try:
                chat = self._render(self.messages[:count], prompted)
                self._prefixes[count, prompted] = chat.text.replace(chat.mark, "")
            except ValueError:
                self._prefixes[count, prompted] = None
        return self._prefixes[count, prompted]

    def content(self, index: int) -> Span | None:
        """Where the content of a message stands in the text, found by marks around it; None where it is not."""
        content = self.messages[index].get("content")
        if not isinstance(content, str) or not content.strip():
            return None
        inner = len(content) - len(content.lstrip()), len(content.rstrip())
        for start, stop in dict.fromkeys(((0, len(content)), inner)):  # a template may strip white space
            found = self._marked_content(index, content, start, stop)
            if found is not None:
                return found
        return None

    def _marked_content(self, index: int, content: str, start: int, stop: int) -> Span | None:
        left, right = _MARKS[2:4]
        inside = content[:start] + left + content[start:stop] + right + content[stop:]
        messages = [*self.messages[:index], {**self.messages[index], "content": inside}, *self.messages[index + 1 :]]
        try:
            chat = self._render(messages, False)
        except ValueError:
            return None
        text = chat.text.replace(chat.mark, "")
        if text.count(left) != 1 or text.count(right) != 1 or text.replace(left, "").replace(right, "") != self.text:
            return None
        return text.index(left), text.index(right) - 1

    @property
    def text(self) -> str:
        return self.marked[0]

    def _render(self, messages: Sequence[Message], prompted: bool, **marks: str) -> Any:
        values = {**self._values, **marks}
        return render_typed(self._tokenizer, messages, prompted, parse_special=self._parse_special, **values)


def _turn(rendered: _Renderings, text: str, ends: Sequence[Span], index: int) -> Span:
    """What the assistant wrote in one turn, characters [start, stop) of the text.

    ends: where tokens that end a turn stand.
    """
    prompted, before = rendered.prefix(index, True), rendered.prefix(index, False)
    content = None
    if prompted is not None and text.startswith(prompted):
        start = len(prompted)
    else:
        content = rendered.content(index)
        start = -1 if content is None else content[0]
        if before is not None and prompted is not None and text.startswith(before) and prompted.startswith(before):
            begin = _shared(prompted, text)
            start = begin if start < 0 else min(begin, start)
    after = rendered.prefix(index + 1, False)
    stop = len(text) if index + 1 == len(rendered.messages) else -1
    if stop < 0 and after is not None and text.startswith(after):
        stop = len(after)
    if stop >= 0 and start >= 0:
        last = max((end for begin, end in ends if start <= begin and end <= stop), default=stop)
        return start, stop if text[last:stop].strip() else last
    content = content or rendered.content(index)
    behind = start if content is None else content[1]
    last = min((end for begin, end in ends if begin >= behind), default=-1)
    if start < 0 or last < 0:
        raise ValueError(
            f"by this chat template message {index}, the assistant's, cannot be told from the others: put its text "
            "between {% generation %} and {% endgeneration %} in the template"
        )
    return start, last


def _shared(one: str, other: str) -> int:
    """Characters with which both begin."""
    most = min(len(one), len(other))
    return next((i for i in range(most) if one[i] != other[i]), most)


def _turn_end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that may end a turn."""
    return tokenizer.special_ids | frozenset(tokenizer.eos_ids)


def _ids_and_places(tokenizer: Tokenizer, text: str, typed: Sequence[Span]) -> tuple[list[int], list[Span]]:
    """The ids of a text, and the characters of each; special tokens that were typed are text."""
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.tokens(text, text_spans=typed)
    ids = tokenizer.encode(text, text_spans=typed)
    sizes = [len(character.encode("utf-8")) for character in text]
    places = [(i, i + 1) for i, size in enumerate(sizes) for _ in range(size)]
    if len(places) != len(ids):
        raise ValueError(f"tokenizer {tokenizer.name!r} does not say which characters its tokens stand for")
    return ids, places
