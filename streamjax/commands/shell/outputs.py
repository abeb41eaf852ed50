"""Files that a command writes: looked at before the work, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from streamjax.checkpoints import check_place, replace_text
from streamjax.checkpoints.plain_json import to_json


def check_outputs(**paths: str | None) -> None:
    """Make sure, before the work, that files can be written; nothing is left behind.

    Args:
      **paths: by the name of the flag; a path that is None or empty is for nothing.

    Raises:
      ValueError: a path that is a folder, or one in which no file can be made.
    """
    for flag, name in paths.items():
        if not name:
            continue
        path = Path(name).expanduser()
        try:
            if path.is_dir():
                raise ValueError(f"--{flag}={name} is a folder: name a file")
            if not path.exists():
                _probe(path.parent)
            elif not os.access(path, os.W_OK):
                raise PermissionError(13, os.strerror(13))
            elif path.is_file():
                path.open("r+b").close()
        except OSError as error:
            raise ValueError(f"--{flag}={name} cannot be written: {_reason(error, path)}") from error


def check_saved_stream(flag: str, name: str | None) -> None:
    """Make sure, before the work, that a stream can be saved in a folder; nothing is left behind.

    Raises:
      ValueError: the folder holds something else, or cannot be made.
    """
    if not name:
        return
    path = Path(name).expanduser()
    try:
        check_place(path)
        _probe(path.absolute().parent)
    except ValueError as error:
        raise ValueError(f"--{flag}: {error}") from error
    except OSError as error:
        raise ValueError(f"--{flag}={name} cannot be written: {_reason(error, path)}") from error


def write_json(name: str, content: dict[str, Any]) -> None:
    """Write plain data; the folder is made, and a file that was there stays whole until the new one is.

    What is not finite is written as null.
    """
    file = Path(name).expanduser()
    text = to_json(content, indent=1) + "\n"
    if file.exists() and not file.is_file():  # a device or a pipe
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            error.filename = name
            raise
        return
    file = file.resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, text)


def _probe(folder: Path) -> None:
    """Make a file in a folder, and the folder if need be; all is taken away again."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    made: list[Path] = []
    try:
        for each in reversed(missing):
            each.mkdir()
            made.append(each)
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        for each in reversed(made):
            each.rmdir()


def _reason(error: OSError, path: Path) -> str:
    """The system's words, and which part of the path they are about where it is not the whole."""
    about = error.filename
    where = f" ({about})" if isinstance(about, str) and Path(about) in path.parents else ""
    return f"{error.strerror or error}{where}"
