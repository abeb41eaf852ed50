"""Texts that a command reads, and the lines of a conversation."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

from streamjax import data
from streamjax.checkpoints import require_file, user_path

BUILTIN = "builtin"
_READ = 1 << 16  # bytes
_LONGEST_TURN = 1 << 24  # characters


def open_input(name: str) -> tuple[Iterator[bytes], int | None]:
    """The text's bytes as they come, and how many there will be where that is known."""
    if name == BUILTIN:
        text = data.corpus_text("test").encode()
        return (text[start : start + _READ] for start in range(0, len(text), _READ)), len(text)
    if name == "-":
        if sys.stdin.isatty():
            print("reading from the keyboard; Ctrl-D ends the text", file=sys.stderr)
        return _read(sys.stdin.buffer), None  # type: ignore[arg-type]
    path = user_path(name)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: --input takes one text file, or - for standard input")
    if path.exists():
        require_file(path)  # a pipe or a device may never end; standard input may be one
    return _read(path.open("rb")), path.stat().st_size


def read_turn(prompt: str, person: bool) -> str:
    """The next line of standard input, at most 16 million characters.

    Args:
      prompt: shown to a person.
      person: whether somebody types.

    Raises:
      EOFError: there is none.
      ValueError: it is not UTF-8, or does not end.
    """
    try:
        if person:
            return input(prompt)
        line = sys.stdin.readline(_LONGEST_TURN + 1)
    except UnicodeDecodeError as error:
        raise ValueError("standard input is not UTF-8: convert it") from error
    if not line:
        raise EOFError
    if len(line) > _LONGEST_TURN:
        raise ValueError(f"standard input has a line of more than {_LONGEST_TURN:,} characters, and a line is a turn")
    return line.removesuffix("\n")


def _read(stream: io.BufferedIOBase) -> Iterator[bytes]:
    with stream:
        while data := stream.read1(_READ):
            yield data
