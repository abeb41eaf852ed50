"""Small text files that are replaced whole."""

from __future__ import annotations

import os
from pathlib import Path


def replace_text(file: Path, text: str) -> None:
    """Write a text, in UTF-8, to a file; what stands there stays whole until the new one does.

    It is written beside the file, under a hidden name that another process could take too: one process writes a file
    at a time. Where a file is a link, its name becomes a file of its own.

    Raises:
      OSError: there is no such folder, the disk is full, or it does not let itself be written to; the file is as it
        was, and nothing is left beside it.
    """
    partial = file.with_name(f".{file.name}.new")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
