"""Reading small files that others may have written: JSON that is checked before anybody uses it."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

_LARGEST = 1 << 28  # bytes; the largest files of JSON that models come with, vocabularies, have a tenth of it
_DIGITS = 40
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def require_file(file: Path) -> None:
    """Raise ValueError unless there is a plain file, or a link to one: opening a pipe or a device may never end."""
    try:
        mode = file.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{file}: this file is missing") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # a name with a null character
        raise ValueError(f"{str(file)!r}: not the name of a file ({error})") from error
    if not stat.S_ISREG(mode):
        kinds = {"a folder": stat.S_ISDIR, "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
        kind = next((kind for kind, is_kind in kinds.items() if is_kind(mode)), "a device")
        raise ValueError(f"{file} is {kind}: a file is needed")


def read_json(file: Path, *, finite: bool = True) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
      file: the file.
      finite: whether NaN and Infinity, which JSON does not have, are refused.

    Raises:
      ValueError: one line that names the file: it is missing, is no plain file, or is no JSON object; it nests too
        deeply, or has numbers or strings that nothing can be done with.
    """
    require_file(file)
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"it has {file.stat().st_size:,} bytes")
        text = file.read_text(encoding="utf-8")
        values = parse_json(text, finite=finite)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not readable as JSON ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(values).__name__}")
    return values


def one_line(text: object) -> str:
    """What a file says, fit for a message of one line."""
    return " ".join(str(text).split())


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """What a text of JSON says; a ValueError, whatever is wrong with it."""
    text = text if isinstance(text, str) else text.decode("utf-8")
    constant: Callable[[str], Any] = _refuse_constant if finite else float
    number: Callable[[str], Any] = _finite_float if finite else float
    try:
        values = json.loads(text, parse_int=_bounded_int, parse_constant=constant, parse_float=number)
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    if _SURROGATE.search(text):
        try:
            json.dumps(values, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("it has strings that are no text: half of a surrogate pair") from None
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it has {name}, which is no JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:_DIGITS]} is too large")
    return value


def _bounded_int(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)
