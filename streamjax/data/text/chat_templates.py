"""Chat templates: messages to the text a model was tuned on, by the model's own jinja template in a sandbox.

A template comes with a checkpoint and is a stranger's program: it runs in jinja's immutable sandbox, sees plain data
only (what JSON can hold), and an attempt to get at Python's internals is an error. The names that templates may use are
those of Hugging Face's `apply_chat_template`: messages, add_generation_prompt, bos_token, eos_token, tools, documents,
raise_exception, strftime_now, the filter tojson, loop controls and {% generation %} blocks.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

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
      ValueError: the template is broken, refuses the messages, or reaches for what it may not; or values that are not
        plain data.
    """
    names = {"tools": None, "documents": None, **values, "messages": list(messages)}
    try:
        names = json.loads(json.dumps(names))
    except (TypeError, ValueError) as error:
        raise ValueError(f"chat messages and template values must be plain data: {error}") from error
    try:
        return _compile(DEFAULT_TEMPLATE if template is None else template).render(
            **names, add_generation_prompt=add_generation_prompt, bos_token=bos_token, eos_token=eos_token
        )
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"chat template, line {error.lineno}: {_one_line(error.message)}") from error
    except jinja2.sandbox.SecurityError as error:
        raise ValueError(f"chat template refused: {_one_line(error)}") from error
    except Exception as error:  # a template is a program: it can fail in any way
        raise ValueError(f"chat template failed: {_one_line(error) or type(error).__name__}") from error


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


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox; an unsafe attribute is an error at once, not a value that prints as nothing."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise jinja2.sandbox.SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}")


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without underscored names: jinja itself would call some of them, such as __html__."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no name for self: a template may say namespace(self=...)
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks what the assistant says; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals = {
        "range": environment.globals["range"],
        "dict": _make_dict,
        "namespace": _Namespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as a model reads it: jinja's own filter would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.sandbox.SecurityError(f"it stores the name {name!r} in a namespace")


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())[:300]
