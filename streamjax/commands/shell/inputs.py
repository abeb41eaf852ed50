"""Texts that a command reads."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

from streamjax import data
from streamjax.checkpoints import require_file

BUILTIN = "builtin"
_READ = 1 << 16  # bytes


def open_input(name: str) -> tuple[Iterator[bytes], int | None]:
    """The text's bytes as they come, and how many there will be where that is known."""
    if name == BUILTIN:
        text = data.corpus_text("test").encode()
        return (text[start : start + _READ] for start in range(0, len(text), _READ)), len(text)
    if name == "-":
        if sys.stdin.isatty():
            print("reading from the keyboard; Ctrl-D ends the text", file=sys.stderr)
        return _read(sys.stdin.buffer), None  # type: ignore[arg-type]
    path = Path(name).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a folder: --input takes one text file, or - for standard input")
    if path.exists():
        require_file(path)  # a pipe or a device may never end; standard input may be one
    return _read(path.open("rb")), path.stat().st_size


def _read(stream: io.BufferedIOBase) -> Iterator[bytes]:
    with stream:
        while data := stream.read1(_READ):
            yield data
