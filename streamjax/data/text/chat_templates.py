"""Chat templates: messages to the text a model was tuned on, by the model's own jinja template in a sandbox.

A template comes with a checkpoint and is a stranger's program: it runs in jinja's immutable sandbox
(`template_sandbox.py`), sees plain data only (what JSON can hold), and an attempt to get at Python's internals is an
error. It runs in a process of its own, whose time, memory and output are bounded (`template_process.py`). The names
that templates may use are those of Hugging Face's `apply_chat_template`: messages, add_generation_prompt, bos_token,
eos_token, tools, documents, raise_exception, strftime_now, the filter tojson, loop controls and {% generation %}
blocks.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from streamjax.data.text.control_characters import escape_controls
from streamjax.data.text.hugging_face import HFTokenizer, well_formed
from streamjax.data.text.template_process import render_apart
from streamjax.data.text.template_sandbox import render
from streamjax.data.text.tokenizers import Tokenizer

_MARKS = (*range(0xFDD0, 0xFDF0), *range(0xF0000, 0xF1000))  # characters that no text has
DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def render_chat(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    **values: Any,
) -> str:
    """The text of a conversation.

    Args:
      template: the model's jinja template; None for `DEFAULT_TEMPLATE`, plain "User: ..." lines.
      messages: each with "role" and "content" at least.
      add_generation_prompt: whether to end where the assistant's answer begins.
      bos_token, eos_token: as text; a template writes them where the model expects them.
      values: more names for the template, such as tools, documents or enable_thinking.

    Raises:
      ValueError: the template is broken, refuses the messages, reaches for what it may not, or takes too much time,
        memory or room; or values that are not plain data.
    """
    names = {"tools": None, "documents": None, **values, "messages": list(messages)}
    try:
        names = json.loads(json.dumps(names))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"chat messages and template values must be plain data: {error}") from error
    names |= {"add_generation_prompt": add_generation_prompt, "bos_token": bos_token, "eos_token": eos_token}
    try:
        if template is None or template == DEFAULT_TEMPLATE:
            return render(DEFAULT_TEMPLATE, names)
        return render_apart(template, names)
    except ValueError as error:
        raise ValueError(escape_controls(str(error))) from error


class ChatText(NamedTuple):
    """A rendered conversation. `mark` stands before the last character of each special token that was typed in it."""

    text: str
    mark: str


def render_typed(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    *,
    parse_special: bool = False,
    **values: Any,
) -> ChatText:
    """A conversation by the tokenizer's own template, in which what was typed is told from what the template writes.

    Arguments as in `encode_chat`. The text without marks is that of `render_chat`. A template sees a marked token as
    text: it does not find there what it might look for.
    """
    try:
        said = json.dumps([tokenizer.chat_template, *messages, *values.values()], ensure_ascii=False)
        mark = next((character for character in map(chr, _MARKS) if character not in said), chr(_MARKS[0]))
        if not parse_special and isinstance(tokenizer, HFTokenizer):
            messages = _marked(list(messages), tokenizer, mark)
            values = _marked(values, tokenizer, mark)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"chat messages and template values must be plain data: {error}") from error
    text = render_chat(
        tokenizer.chat_template,
        messages,
        add_generation_prompt,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        **values,
    )
    return ChatText(text, mark)


def encode_typed(tokenizer: Tokenizer, chat: ChatText, *, add_bos: bool = False, continues: bool = False) -> list[int]:
    """The ids of what `render_typed` returned, or of a part of it.

    Special tokens of the template are parsed, those that were typed are text.

    Args:
      tokenizer: the one that it was rendered for.
      chat: the text with its marks.
      add_bos, continues: as in `Tokenizer.encode`.
    """
    first, *others = chat.text.split(chat.mark)
    spans, length = [], len(first)
    for part in others:
        spans.append((length, length + 1))
        length += len(part)
    return tokenizer.encode(first + "".join(others), add_bos=add_bos, continues=continues, text_spans=spans)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    *,
    parse_special: bool = False,
    **values: Any,
) -> list[int]:
    """The ids of a conversation, by the tokenizer's own template; see `render_chat`.

    A model's template writes its BOS itself; with the default template BOS is added where the model expects one.

    Args:
      tokenizer: whose template and ids.
      messages: each with "role" and "content" at least.
      add_generation_prompt: whether to end where the assistant's answer begins.
      parse_special: whether special tokens that are written out in messages, such as "<|im_end|>", are those tokens.
        They are text by default: what a user types ends no turn. Those of the template are always tokens.
      values: more names for the template.
    """
    chat = render_typed(tokenizer, messages, add_generation_prompt, parse_special=parse_special, **values)
    return encode_typed(tokenizer, chat, add_bos=tokenizer.chat_template is None and tokenizer.adds_bos)


def _marked(value: Any, tokenizer: HFTokenizer, mark: str) -> Any:
    """Plain data with a mark in every special token that is written out in its strings."""
    if isinstance(value, str):
        value = well_formed(value)
        for _, stop in reversed(tokenizer.special_spans(value)):
            value = value[: stop - 1] + mark + value[stop - 1 :]
        return value
    if isinstance(value, Mapping):
        return {key: _marked(entry, tokenizer, mark) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(entry, tokenizer, mark) for entry in value]
    return value
