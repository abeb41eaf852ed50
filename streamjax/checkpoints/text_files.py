"""Small files that are replaced whole."""

from __future__ import annotations

import os
from pathlib import Path


def replace_text(file: Path, text: str) -> None:
    """Write a text, in UTF-8, to a file, as `replace_bytes` does."""
    replace_bytes(file, text.encode("utf-8"))


def replace_bytes(file: Path, data: bytes) -> None:
    """Write a file; what stands there stays whole until the new one does.

    It is written beside the file, under a hidden name that another process could take too: one process writes a file
    at a time. Where a file is a link, its name becomes a file of its own.

    Raises:
      OSError: there is no such folder, the disk is full, or it does not let itself be written to; the file is as it
        was, and nothing is left beside it.
    """
    partial = file.with_name(f".{file.name}.new")
    try:
        partial.write_bytes(data)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write what a user wants in a file: its folder is made, a link leads to the file, a device or a pipe takes it all.

    Raises:
      OSError: as in `replace_bytes`; it names the path.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        file = path.resolve()
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(file, data)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
