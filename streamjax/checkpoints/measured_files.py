"""What was measured of a model, in a safetensors file of one kind: numbers, and in its metadata whose they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from streamjax.checkpoints.json_files import require_file
from streamjax.checkpoints.user_paths import user_path


@contextmanager
def measured_file(path: str | Path, kind: str, what: str, otherwise: str) -> Iterator[tuple[Any, Mapping[str, str]]]:
    """The opened file and its metadata, whose `kind` says what it is.

    Args:
      path: of the file.
      kind: what its metadata must say.
      what: such as "filters of queries", for the error.
      otherwise: what is wrong with a file of another kind.

    Raises:
      ValueError: no such file, one of another kind, or whatever goes wrong while it is read; one line that names it.
    """
    path = user_path(path)
    try:
        require_file(path)
        with safe_open(path, "numpy") as file:
            about = file.metadata() or {}
            if about.get("kind") != kind:
                raise ValueError(otherwise)
            yield file, about
    except (OSError, KeyError, IndexError, TypeError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: no {what} could be read: {reason}") from None
