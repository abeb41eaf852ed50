"""The first thing that a command runs, before the imports, which take seconds.

Nothing here may import JAX: Ctrl-C in the middle of an import would end in a traceback, or in half a module.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from types import FrameType
from typing import Any


def launch(command: str) -> int:
    """Run a command of `streamjax.commands` with the process's arguments, and return its exit status."""
    _open_standard_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's warnings: a command says what a user needs
    try:
        status = importlib.import_module(f"streamjax.commands.{command}").main()
    except ImportError as error:
        name = "'streamjax[serve]'" if command in ("batch", "serve") else "streamjax"
        print(f"error: this installation is incomplete: {error} (pip install {name})", file=sys.stderr)
        status = 1
    if signal.getsignal(signal.SIGINT) in (leave, signal.default_int_handler):
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(status))  # the work is done
    return status


def leave(number: int, frame: FrameType | None) -> None:
    """Handler of a signal that comes when there is nothing to lose yet: one line, and the end of the process."""
    print("error: interrupted", file=sys.stderr, flush=True)
    os._exit(128 + number)


def _open_standard_streams() -> None:
    """Make standard input, output and errors usable, whatever the shell did with them.

    A stream that was closed becomes /dev/null: else the next file that is opened takes its number, and what is printed
    goes into that file. What an encoding lacks is written as an escape.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdin = sys.stdin or open(0, encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8")  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.stdout = Output(sys.stdout)  # type: ignore[assignment]
    sys.stderr = Messages(sys.stderr)  # type: ignore[assignment]


class Output:
    """Standard output whose errors say that they are its own.

    Args:
      stream: what is written to.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            return self._failed(error, text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error, "")

    def _failed(self, error: OSError, text: str) -> int:
        error.filename = "standard output"
        raise error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Messages(Output):
    """Standard error, whose reader may go or whose disk may fill up: no reason to end the work."""

    def _failed(self, error: OSError, text: str) -> int:
        redirect_to_nowhere(self._stream)
        return len(text)


def redirect_to_nowhere(stream: Any) -> None:
    """Send all that a standard stream holds and will hold to /dev/null, so that its last flush cannot fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def batch() -> int:
    """`streamjax-batch`."""
    return launch("batch")


def chat() -> int:
    """`streamjax-chat`."""
    return launch("chat")


def convolutions() -> int:
    """`streamjax-convolutions`."""
    return launch("cache_training.convolutions")


def demo() -> int:
    """`streamjax-demo`."""
    return launch("demo")


def find_heads() -> int:
    """`streamjax-find-heads`."""
    return launch("find_heads")


def leaderboard() -> int:
    """`streamjax-leaderboard`."""
    return launch("leaderboard")


def measure_budget() -> int:
    """`streamjax-measure-budget`."""
    return launch("measure_budget")


def perplexity() -> int:
    """`streamjax-perplexity`."""
    return launch("perplexity")


def projections() -> int:
    """`streamjax-projections`."""
    return launch("cache_training.projections")


def recall() -> int:
    """`streamjax-recall`."""
    return launch("recall")


def draft_heads() -> int:
    """`streamjax-draft-heads`."""
    return launch("trained_parts.draft_heads")


def retaining_heads() -> int:
    """`streamjax-retaining-heads`."""
    return launch("cache_training.retaining_heads")


def serve() -> int:
    """`streamjax-serve`."""
    return launch("serve")


def side_network() -> int:
    """`streamjax-side-network`."""
    return launch("trained_parts.side_network")


def stream() -> int:
    """`streamjax-stream`."""
    return launch("stream")


def train() -> int:
    """`streamjax-train`."""
    return launch("train")
