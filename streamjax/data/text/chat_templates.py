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
from typing import Any

from streamjax.data.text.control_characters import escape_controls
from streamjax.data.text.template_process import render_apart
from streamjax.data.text.template_sandbox import render
from streamjax.data.text.tokenizers import Tokenizer

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


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **values: Any
) -> list[int]:
    """The ids of a conversation, by the tokenizer's own template; see `render_chat`.

    A model's template writes its BOS itself; with the default template BOS is added where the model expects one.
    """
    text = render_chat(
        tokenizer.chat_template,
        messages,
        add_generation_prompt,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        **values,
    )
    return tokenizer.encode(text, add_bos=tokenizer.chat_template is None and tokenizer.adds_bos)
