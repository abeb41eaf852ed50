"""How a command runs: flags, start-up, and errors of one line."""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import flags, logging

from streamjax.commands.flags.model import parse_mesh

_COMMON = ("help", "traceback", "compilation_cache")  # flags of every command
Define = Callable[[flags.FlagValues], None]


class Stopped(Exception):
    """Ends a command with this exit status, its message already given."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


def run_command(
    about: str | None, define: Sequence[Define], body: Callable[[flags.FlagValues], None], argv: list[str]
) -> int:
    """Parse flags, run a command and return its exit status; whatever a user can cause is one line on stderr.

    Args:
      about: the module's docstring, shown by --help.
      define: functions that define flags; `define_model` among them, or called by them.
      body: the command; it runs under the mesh of --mesh.
      argv: the program's name and its arguments.
    """
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", flag_values=values)
    flags.DEFINE_bool("traceback", False, "Show where in the program an error came from.", flag_values=values)
    flags.DEFINE_string(
        "compilation_cache",
        str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "streamjax" / "compiled"),
        "Folder where compiled programs are kept for the next start; empty for none.",
        flag_values=values,
    )
    for function in define:
        function(values)
    logging.set_verbosity(logging.ERROR)
    try:
        rest = values(argv)[1:]
        if rest:
            raise flags.Error(f"unexpected argument {rest[0]!r}: options are written --name=value")
    except flags.Error as error:
        return _fail(f"{error} (--help lists all options)", 2)
    if values.help:
        print(help_text(about or "", values))
        return 0
    try:
        if values.compilation_cache:
            jax.config.update("jax_compilation_cache_dir", str(Path(values.compilation_cache).expanduser()))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        mesh = parse_mesh(values.mesh)
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            body(values)
    except Stopped as stopped:
        return stopped.status
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read the output has gone
        return 1
    except (ValueError, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        if values.traceback:
            raise
        complain(error)
        return 1
    return 0


def complain(error: Exception) -> None:
    """Say in one line on stderr what went wrong."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        _fail(f"{error.filename}: {error.strerror}", 1)
    else:
        _fail(str(error) or type(error).__name__, 1)


def _fail(message: str, status: int) -> int:
    print(f"error: {' '.join(message.split())[:500]}", file=sys.stderr)
    return status


def help_text(about: str, values: flags.FlagValues) -> str:
    """The text of --help: what the command is, then its flags in the order in which they were defined."""
    names = [name for name in values if name not in (*_COMMON, "h")]
    lines = [about.strip(), "", "Options:"]
    for name in [*names, *_COMMON]:
        flag = values[name]
        default = " ".join(map(str, flag.default)) if isinstance(flag.default, list) else flag.default
        about_default = "" if default is None or default is False or default == "" else f"  [{default}]"
        lines.append(f"  --{name}{about_default}")
        about_flag = flag.help.partition(";\n")[0]  # absl adds to the text of flags that may be repeated
        lines += textwrap.wrap(about_flag, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
