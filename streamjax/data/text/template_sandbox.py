"""What runs a chat template: jinja's sandbox; and, as a program, a process whose time, memory and output are bounded.

As a program it reads requests from its standard input and answers on its standard output, each a length of 8 bytes and
JSON. It imports nothing but jinja2 and Python's own library, so that it is there at once; `template_process.py` talks
to it.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import math
import resource
import signal
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO, NoReturn

if __name__ == "__main__":
    sys.path += sys.argv[1:]  # where jinja2 lies: an isolated Python does not look there

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

READY = b"\0"
CPU_SECONDS = 2
_MEMORY = 512 << 20  # bytes beyond what the process starts with
_OUTPUT = 1 << 20  # characters


def render(template: str, names: Mapping[str, Any], limit: float = math.inf) -> str:
    """The text that a template writes.

    Args:
      template: jinja.
      names: plain data that the template sees.
      limit: characters of text.

    Raises:
      ValueError: the template is broken, refuses its names, reaches for what it may not, or writes too much.
    """
    pieces, size = [], 0
    try:
        for piece in _compile(template).generate(**names):
            size += len(piece)
            if size > limit:
                raise jinja2.sandbox.SecurityError(f"it writes more than {limit:,} characters")
            pieces.append(piece)
        return "".join(pieces)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"chat template, line {error.lineno}: {_one_line(error.message)}") from error
    except jinja2.sandbox.SecurityError as error:
        raise ValueError(f"chat template refused: {_one_line(error)}") from error
    except MemoryError as error:
        raise ValueError(f"chat template refused: it takes more than {_MEMORY >> 20:,} MB of memory") from error
    except Exception as error:  # a template is a program: it can fail in any way
        raise ValueError(f"chat template failed: {_one_line(error) or type(error).__name__}") from error


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
    """{% generation %} ... {% endgeneration %} marks what the assistant says.

    The content stands between the values `generation_start_mark` and `generation_end_mark`, where there are such.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        first, last = (
            jinja2.nodes.Output([jinja2.nodes.Name(f"generation_{end}_mark", "load")], lineno=line)
            for end in ("start", "end")
        )
        return jinja2.nodes.Scope([first, *body, last], lineno=line)


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


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asks
    start = _address_space()
    answers.write(READY)
    answers.flush()
    while len(head := requests.read(8)) == 8:
        length = int.from_bytes(head)
        _set_soft(resource.RLIMIT_AS, start + _MEMORY + 64 * length)
        used = resource.getrusage(resource.RUSAGE_SELF)
        _set_soft(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + CPU_SECONDS + length // 20_000_000)
        try:
            asked = json.loads(requests.read(length))
            text = render(asked["template"], asked["names"], _OUTPUT + 8 * length)
            answer = json.dumps({"text": text}).encode()
        except ValueError as error:
            answer = json.dumps({"error": str(error)}).encode()
        answers.write(len(answer).to_bytes(8) + answer)
        answers.flush()


def _address_space() -> int:
    """Bytes of it that the process has."""
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
    return 1 << 30


def _set_soft(kind: int, limit: int) -> None:
    hard = resource.getrlimit(kind)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    with contextlib.suppress(OSError, ValueError):  # some systems do not bound the address space
        resource.setrlimit(kind, (limit, hard))


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
