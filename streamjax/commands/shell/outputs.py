"""Files that a command writes: looked at before the work, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

from streamjax.checkpoints import check_place, user_path, write_bytes
from streamjax.checkpoints.plain_json import to_json
from streamjax.evaluation.pictures import picture_format


def check_outputs(*, reads: str | None = None, **paths: str | None) -> None:
    """Make sure, before the work, that files can be written; nothing is left behind.

    Args:
      reads: what --input names, which no output may replace.
      **paths: by the name of the flag; a path that is None or empty is for nothing. "png" is for a picture, and
        "save_state" for the folder of a stream.

    Raises:
      ValueError: a path that is a folder, or one in which no file can be made, or that is taken already; a folder for a
        stream that holds something else; a picture of no format.
    """
    taken = {os.path.realpath(os.path.expanduser(reads)): "input"} if reads and os.path.exists(reads) else {}
    for flag, name in paths.items():
        if not name:
            continue
        path = Path(name)
        try:
            path = user_path(name)
            if flag == "png":
                picture_format(path)
            if flag == "save_state":
                check_place(_resolved(path))
                _probe(path.absolute().parent)
            else:
                _check_file(path)
        except OSError as error:
            raise ValueError(f"--{flag}={name} cannot be written: {_reason(error, path)}") from error
        except ValueError as error:
            raise ValueError(f"--{flag}={error}") from error
        if not (path.exists() and not path.is_file() and not path.is_dir()):  # devices take what several write
            other = taken.setdefault(os.path.realpath(path), flag)
            if other != flag:
                raise ValueError(f"--{flag}={name} would replace what --{other} names: give it another name")


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(13, os.strerror(13))
    if path.is_file():
        path.open("r+b").close()
    if path.is_file() or not path.exists():  # it is written beside, and then takes the name
        _probe(_resolved(path).parent)


def _resolved(path: Path) -> Path:
    """Where links lead."""
    with contextlib.suppress(FileNotFoundError):
        path.stat()  # a loop is an error of the system's here, and none of Python's
    return path.resolve()


def in_made_folder(name: str) -> Path:
    """The path of a file that will be written; its folder is made."""
    path = user_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_json(name: str, content: dict[str, Any]) -> None:
    """Write plain data; the folder is made, and a file that was there stays whole until the new one is.

    What is not finite is written as null.
    """
    write_bytes(user_path(name), (to_json(content, indent=1) + "\n").encode())


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
