"""Checked configurations: every field has its annotation's type, and every number lies in a range.

    @dataclasses.dataclass(frozen=True)
    class Rotation:
        theta: Positive = 10_000.0
        kind: Literal["default", "linear"] = "default"

        def __post_init__(self) -> None:
            check_fields(self)

`Rotation(theta=float("nan"))` is then a ValueError that says `Rotation.theta is nan: it must be a number above 0`. What
one field's value means for another is for the class itself to check, behind that line.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union

import numpy as np

T = TypeVar("T")

_INT32 = 2**31 - 1  # sizes, positions and ids are int32 on a device
_FLOAT32 = float(np.finfo(np.float32).max)
_SHOWN = 60  # characters of a value in a message
LATER = types.MappingProxyType({"later": True})  # of fields that came after descriptions were saved; see `described`


@dataclasses.dataclass(frozen=True)
class Interval:
    """The numbers from `low` to `high`, without `low` itself if `above`, and without `high` if `below`."""

    low: float
    high: float = _FLOAT32
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        low = self.low < value if self.above else self.low <= value
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low}" if self.above else f"of at least {self.low}"
        high = f"below {self.high}" if self.below else f"at most {self.high}"
        if self.high in (_INT32, _FLOAT32):
            return "" if self.low == -_FLOAT32 else low
        return f"{low} and {high}" if self.above or self.below else f"from {self.low} to {self.high}"


Size = Annotated[int, Interval(1, _INT32)]
Count = Annotated[int, Interval(0, _INT32)]
Seed = Annotated[int, Interval(-(2**63), 2**63 - 1)]
Finite = Annotated[float, Interval(-_FLOAT32, _FLOAT32)]
Positive = Annotated[float, Interval(0, _FLOAT32, above=True)]
NotNegative = Annotated[float, Interval(0, _FLOAT32)]
Fraction = Annotated[float, Interval(0, 1)]
BelowOne = Annotated[float, Interval(0, 1, below=True)]


def described(value: Any) -> str:
    """`repr`, without the fields of dataclasses that came later and have their default.

    So what was saved before there was such a field is described as it was then.
    """
    if isinstance(value, tuple):
        inside = ", ".join(map(described, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return repr(value)
    shown = [
        f"{field.name}={described(getattr(value, field.name))}"
        for field in dataclasses.fields(value)
        if field.repr and not (field.metadata.get("later") and getattr(value, field.name) == field.default)
    ]
    return f"{type(value).__qualname__}({', '.join(shown)})"


def check_fields(config: Any) -> None:
    """Raise a ValueError for the first field of a dataclass whose value is not as its annotation says.

    A bool is no number, a whole number is a float too, and NaN and infinity are no numbers. NumPy's scalars become
    Python's.
    """
    for name, hint in _field_hints(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, np.generic):
            value = value.item()
            object.__setattr__(config, name, value)
        if not fits(hint, value):
            raise ValueError(f"{type(config).__name__}.{name} is {_shown(value)}: it must be {describe(hint)}")


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], name: str) -> None:
    """The same for the keyword arguments of a function, which is called `name` in the message."""
    hints = _hints(function)
    for argument, value in arguments.items():
        if not fits(hints[argument], value):
            raise ValueError(f"{name}: {argument} is {_shown(value)}: it must be {describe(hints[argument])}")


def hashed_once(kind: type[T]) -> type[T]:
    """A frozen dataclass that computes its hash at the first call: every call of a jitted function asks for it."""
    compute = kind.__hash__

    def cached(self: T) -> int:
        kept = vars(self)
        if "_hash" not in kept:
            kept["_hash"] = compute(self)
        return int(kept["_hash"])

    kind.__hash__ = cached  # type: ignore[method-assign,assignment]
    return kind


def to_plain(value: Any) -> Any:
    """A tree of dataclasses as dictionaries of plain values; one with a `type_name` says it in the field "type"."""
    if isinstance(value, tuple):
        return tuple(map(to_plain, value))
    if not dataclasses.is_dataclass(value):
        return value
    plain = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    name = getattr(value, "type_name", None)
    return plain if name is None else {"type": name, **plain}


def from_plain(kind: type[T], values: Any) -> T:
    """A dataclass from what `to_plain` or `dataclasses.asdict` made of it, after a journey through JSON.

    Raises:
      ValueError: something else than fields and their values, an unknown field or one that is missing, or what the
        dataclass itself refuses.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{kind.__name__} is {_shown(values)}: it must be an object with its fields")
    if "type" in values and values["type"] == getattr(kind, "type_name", None):
        values = {name: value for name, value in values.items() if name != "type"}
    fields = dataclasses.fields(typing.cast(Any, kind))
    unknown = sorted(set(values) - {field.name for field in fields})
    if unknown:
        raise ValueError(f"unknown {kind.__name__} field {unknown[0]!r}: written by a newer streamjax?")
    needed = (f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING)
    missing = [name for name in needed if name not in values]
    if missing:
        raise ValueError(f"{kind.__name__}.{missing[0]} is missing")
    hints = _field_hints(kind)
    return kind(**{name: _from_plain(hints[name], value) for name, value in values.items()})


def fits(hint: Any, value: Any) -> bool:
    """Whether a value is of an annotation's type, and in its range."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(option, value) for option in arguments)
    if origin is Annotated:
        kind, *limits = arguments
        return fits(kind, value) and all(value in limit for limit in limits)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[-1:] == (...,):
            return all(fits(arguments[0], item) for item in value)
        return len(value) == len(arguments) and all(map(fits, arguments, value))
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and _finite(value)
    if hint is None:
        return value is None
    return isinstance(value, origin or hint)


def describe(hint: Any) -> str:
    """What fits, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        options = [describe(option) for option in arguments]
        return " or ".join(options) if len(options) < 5 else f"{', '.join(options[:-1])} or {options[-1]}"
    if origin is Annotated:
        return " ".join(filter(None, (describe(arguments[0]), *map(str, arguments[1:]))))
    if origin is Literal:
        return " or ".join(repr(option) for option in arguments)
    if origin is tuple:
        inside = arguments[:1] if arguments[-1:] == (...,) else arguments
        return f"a tuple of {', '.join(describe(option) for option in inside)}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "None"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _from_plain(hint: Any, value: Any) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    if isinstance(value, dict):
        groups = [option for option in options if dataclasses.is_dataclass(option)]
        named = [option for option in groups if getattr(option, "type_name", None) == value.get("type")]
        return from_plain(typing.cast(Any, (named or groups)[0]), value) if groups else value
    if isinstance(value, list | tuple):
        inside = next((typing.get_args(option)[0] for option in options if typing.get_origin(option) is tuple), Any)
        return tuple(_from_plain(inside, item) for item in value)
    return value


def _field_hints(kind: type) -> dict[str, Any]:
    hints = _hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


@functools.cache
def _hints(annotated: Any) -> dict[str, Any]:
    return typing.get_type_hints(annotated, include_extras=True)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
