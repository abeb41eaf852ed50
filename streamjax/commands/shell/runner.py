"""How a command runs: flags, start-up, and whatever goes wrong as one line on stderr."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging
from jax.experimental.compilation_cache import compilation_cache

from streamjax.checkpoints import user_path
from streamjax.commands.flags.meshes import meshes_of
from streamjax.commands.shell.launch import leave, redirect_to_nowhere
from streamjax.commands.shell.progress import end_progress_bars
from streamjax.commands.shell.signals import Terminated

_COMMON = ("help", "traceback", "compilation_cache")  # flags of every command
_LONGEST = 500  # characters of a message
_WHOLE = 2**63  # whole numbers lie below
Define = Callable[[flags.FlagValues], None]


class Stopped(Exception):
    """Ends a command with this exit status; a message that is not there has been given already."""

    def __init__(self, status: int, message: str = ""):
        super().__init__(message)
        self.status = status


def run_command(
    about: str | None,
    define: Sequence[Define],
    body: Callable[[flags.FlagValues], None],
    argv: Sequence[str] | None = None,
    extend_help: Callable[[flags.FlagValues], str] | None = None,
) -> int:
    """Parse flags, run a command and return its exit status; whatever goes wrong is one line on stderr.

    Args:
      about: the module's docstring, shown by --help.
      define: functions that define flags.
      body: the command; it runs under the mesh of --mesh where there is that flag.
      argv: the program's name and its arguments; the process's own by default.
      extend_help: what --help says behind the flags.

    Returns:
      0, or 1 where the command failed, 2 where its flags are wrong, 128 and a signal's number where that ended it.
    """
    values = _flags(define)
    try:
        with _plain_warnings():
            status = _run(about, values, body, list(sys.argv if argv is None else argv), extend_help)
    except flags.Error as error:
        status = fail(f"{error} (--help lists all options)", 2)
    except Stopped as stopped:
        status = stopped.status
        if message := str(stopped):
            _tell(message)
    except KeyboardInterrupt:
        status = fail("interrupted", 128 + signal.SIGINT)
    except Terminated as ended:
        status = fail(str(ended), 128 + ended.number)
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # whatever it is, a user gets one line; panics of Rust are no Exception
        if values.is_parsed() and values.traceback:
            end_progress_bars()
            raise
        complain(error)
        status = 1
    return _flush_output(status)


def _run(
    about: str | None,
    values: flags.FlagValues,
    body: Callable[[flags.FlagValues], None],
    argv: list[str],
    extend_help: Callable[[flags.FlagValues], str] | None,
) -> int:
    rest = values(argv)[1:]
    if rest:
        raise flags.Error(f"unexpected argument {rest[0]!r}: options are written --name=value")
    if values.help:
        print(help_text(about or "", values) + (extend_help(values) if extend_help else ""))
        return 0
    _check_numbers(values)
    _start_command(values)
    if "distributed" not in values:  # processes find each other before they look for devices
        require_device()
    with keep_compiled(values.compilation_cache), _mesh(values):
        body(values)
    return 0


def explain(error: BaseException) -> str:
    """What went wrong, and what to do about it, in words for users."""
    text = str(error)
    match error:
        case OSError() if error.strerror and error.filename is not None:
            return f"{os.fsdecode(error.filename)}: {error.strerror}"
        case OSError() if error.strerror:
            return error.strerror
        case MemoryError():
            return f"out of memory{': ' * bool(text)}{text}"
        case RecursionError():
            return "a file or an option is nested too deeply to be read"
        case OverflowError():
            return f"a number is too large: {text}"
        case RuntimeError() if "RESOURCE_EXHAUSTED" in text:
            needed = re.search(r"\d[\d.]* ?(?:bytes|[KMGT]i?B)", text)
            return (
                f"out of memory{f' (asked for {needed[0]})' if needed else ''}: a smaller cache, chunk or batch takes "
                "less, and a mesh splits the model over devices"
            )
        case ValueError() | OSError() | jax.errors.JaxRuntimeError():
            return text or type(error).__name__
    return f"internal error, {type(error).__name__}: {text} (please report it; --traceback shows where it came from)"


def complain(error: BaseException) -> None:
    """Say in one line on stderr what went wrong; a reader of the output that has gone needs no words."""
    if not _reader_has_gone(error):
        fail(explain(error), 1)


def attempt(work: Callable[[], None]) -> list[Exception]:
    """Do a part of what is to be done at the end; what went wrong, so that the other parts can be tried too."""
    try:
        work()
    except (ValueError, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        return [error]
    return []


def give(report: Callable[[], None], files: Sequence[tuple[str, str, Callable[[], None]]], stopped: int = 0) -> None:
    """Give what a command has found: files first, then words; each also where another one failed.

    Args:
      report: prints the result.
      files: what is in each, its path (nothing is written where that is empty) and what writes it.
      stopped: number of the signal that cut the work short, else 0.

    Raises:
      Stopped: after a signal, when all has been given.
    """
    wanted = [(name, path, write) for name, path, write in files if path]
    failures = {path: attempt(write) for _, path, write in wanted}
    written = [f"{name}: {path}" for name, path, _ in wanted if not failures[path]]
    failed = [error for errors in failures.values() for error in errors]

    def say() -> None:
        report()
        for line in written:
            print(line)

    failed += attempt(say)
    for error in failed[1:]:
        complain(error)
    if failed:
        raise failed[0]
    if stopped:
        raise Stopped(128 + stopped, "error: interrupted; what was measured until then is kept")


def fail(message: str, status: int) -> int:
    """Say in one line on stderr that a command failed, and return its exit status."""
    _tell(f"error: {message}")
    return status


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings for users in a line each, without the places in the program where Python would show them."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
            if issubclass(category, UserWarning):
                _tell(f"warning: {message}")
            else:
                others(message, category, *where, **options)

        warnings.showwarning = show
        yield


def _tell(message: str) -> None:
    end_progress_bars()
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(message.split()))
    if len(line) > _LONGEST:  # what is wrong stands at one of the ends
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    print(line, file=sys.stderr)


def _flush_output(status: int) -> int:
    """Write what is left, while an error can still be told; the exit status with that."""
    try:
        sys.stdout.flush()
    except OSError as error:
        redirect_to_nowhere(sys.stdout)
        if not status:
            complain(error)
            return 1
    return status


def _reader_has_gone(error: BaseException) -> bool:
    return isinstance(error, BrokenPipeError)


def _flags(define: Sequence[Define]) -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", flag_values=values)
    flags.DEFINE_bool("traceback", False, "Show where in the program an error came from.", flag_values=values)
    kept = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "streamjax" / "compiled"
    flags.DEFINE_string(
        "compilation_cache",
        os.environ.get("JAX_COMPILATION_CACHE_DIR", str(kept)),
        "Folder where compiled programs are kept for the next start; empty for none.",
        flag_values=values,
    )
    for function in define:
        function(values)
    return values


def _check_numbers(values: flags.FlagValues) -> None:
    for name in values:
        value: Any = values[name].value
        if isinstance(value, int) and not -_WHOLE <= value < _WHOLE:
            raise flags.Error(f"flag --{name}={value}: it must fit in 64 bits")
        if isinstance(value, float) and math.isnan(value):
            raise flags.Error(f"flag --{name}={value}: it must be a number")


def _start_command(values: flags.FlagValues) -> None:
    logging.set_verbosity(logging.ERROR)
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def keep_compiled(folder: str, seconds: float = 0.3) -> Iterator[None]:
    """Keep compiled programs in a folder for the next start, and take them from there; then all is as it was before.

    JAX opens its folder once, and goes on writing there whatever its configuration says later, until it is told to
    forget it: so without that, all that a process compiles after a command would be written too.

    Args:
      folder: "" for none, also where the environment names one.
      seconds: what compiles in less is not kept.
    """
    wanted = {
        "jax_compilation_cache_dir": str(user_path(folder)) if folder else None,
        "jax_persistent_cache_min_compile_time_secs": seconds,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    try:
        _configure(wanted)
        yield
    finally:
        _configure(before)


def _configure(values: dict[str, Any]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def require_device() -> None:
    """Make sure that JAX has something to run on.

    Raises:
      ValueError: JAX_PLATFORMS asks for what is not there.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts where a backend has no plugin
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise ValueError(
            f"JAX_PLATFORMS={asked}: JAX finds no such device here; leave it away, or set JAX_PLATFORMS=cpu"
            f"{f' ({error})' if str(error) else ''}"
        ) from error


def _mesh(values: flags.FlagValues) -> contextlib.AbstractContextManager:
    mesh = meshes_of(values).model
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


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
