"""The fields of a request's JSON, read one by one: each is of its type and in its range, and none is unknown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from streamjax.serving.http.errors import ApiError

_WORDS = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "an array", dict: "an object"}
_DEEPEST = 64  # levels of arrays and objects; whoever writes more has no message to send
_LARGEST = 2**31 - 1


def parse_body(data: bytes) -> dict[str, Any]:
    """The object that a request's body holds.

    Raises:
      ApiError: 400, no JSON, not UTF-8, nested too deeply, or no object.
    """
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
        too_deep = _deeper_than(value, _DEEPEST)
        if b"\\u" in data and not too_deep:  # half of a pair that stands for one character
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        too_deep = True
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    if too_deep:
        raise ApiError(400, f"the body is nested in more than {_DEEPEST} levels", code="invalid_json")
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, and is {_word(value)}", code="invalid_json")
    return value


class Fields:
    """An object of a request, whose fields are taken by name; a null stands for a field that is not there.

    Args:
      values: the object.
      where: what stands before its fields' names in errors, such as "messages[0]."; "" for the body itself.
    """

    def __init__(self, values: Any, where: str = ""):
        if not isinstance(values, dict):
            raise wrong_type(where.rstrip(".") or "body", "an object", values)
        self._values, self._where = values, where
        self._taken: set[str] = set()

    def take(self, name: str, *kinds: type, default: Any = None) -> Any:
        """The value of a field, of one of these JSON types (any, where none is given)."""
        self._taken.add(name)
        value = self._values.get(name)
        if value is None:
            return default
        is_kind = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            is_kind = True
        if kinds and not is_kind:
            raise wrong_type(self.path(name), " or ".join(_WORDS[kind] for kind in kinds), value)
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number in [low, high]."""
        try:
            value = float(self.take(name, float, default=default))
        except OverflowError:
            value = math.inf
        self._require_range(name, value, low, high)
        return value

    def whole(self, name: str, default: int | None, low: int, high: int = _LARGEST) -> int | None:
        """A whole number in [low, high], or the default."""
        value = self.take(name, int, default=default)
        if value is not None:
            self._require_range(name, value, low, high)
        return value

    def one_of(self, name: str, allowed: Iterable[str], default: str | None = None) -> str | None:
        """One of some words."""
        value, allowed = self.take(name, str, default=default), list(allowed)
        if value is not None and value not in allowed:
            raise wrong_value(self.path(name), f"must be one of {', '.join(allowed)}, and is {value!r}")
        return value

    def required(self, name: str, *kinds: type) -> Any:
        """A field that must be there."""
        value = self.take(name, *kinds)
        if value is None:
            path = self.path(name)
            raise ApiError(400, f"Missing required parameter: '{path}'.", path, "missing_required_parameter")
        return value

    def strings(self, name: str, most: int) -> tuple[str, ...]:
        """A string, or an array of at most so many; none of them empty."""
        value = self.take(name, str, list, default=[])
        words = [value] if isinstance(value, str) else value
        if len(words) > most:
            raise wrong_value(self.path(name), f"takes at most {most} strings, and has {len(words)}")
        for word in words:
            if not isinstance(word, str) or not word:
                raise wrong_value(self.path(name), "must be strings that are not empty")
        return tuple(words)

    def ignore(self, *names: str) -> None:
        """Fields that change nothing here."""
        self._taken.update(names)

    def refuse(self, name: str, why: str, *harmless: Any) -> None:
        """A field that would change what is answered, and is not there: refused but for these values."""
        value = self.take(name)
        if value is not None and value not in harmless:
            raise ApiError(
                400, f"'{self.path(name)}' is not supported: {why}", self.path(name), "unsupported_parameter"
            )

    def finish(self) -> None:
        """Refuse what has not been taken, as OpenAI does: a field that is misspelt would otherwise do nothing."""
        unknown = next((name for name in self._values if name not in self._taken), None)
        if unknown is not None:
            path = self.path(unknown[:64])
            raise ApiError(400, f"Unknown parameter: '{path}'.", path, "unknown_parameter")

    def path(self, name: str) -> str:
        """A field's name as a client finds it."""
        return self._where + name

    def _require_range(self, name: str, value: float, low: float, high: float) -> None:
        if not low <= value <= high:
            raise wrong_value(self.path(name), f"must lie between {low:g} and {high:g}, and is {value:g}")


def wrong_type(path: str, wanted: str, value: Any) -> ApiError:
    """400: a field of another type."""
    return ApiError(400, f"Invalid type for '{path}': expected {wanted}, but got {_word(value)}.", path, "invalid_type")


def wrong_value(path: str, why: str) -> ApiError:
    """400: a field of the right type that cannot be."""
    return ApiError(400, f"Invalid value for '{path}': it {why}.", path, "invalid_value")


def _word(value: Any) -> str:
    return "null" if value is None else _WORDS[type(value)]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _deeper_than(value: Any, levels: int) -> bool:
    row = [value]
    for _ in range(levels):
        row = [
            entry
            for parent in row
            if isinstance(parent, list | dict)
            for entry in (parent.values() if isinstance(parent, Mapping) else parent)
        ]
        if not row:
            return False
    return True
