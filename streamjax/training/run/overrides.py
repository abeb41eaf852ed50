"""Changing fields of a frozen configuration from the command line: `optimizer.learning_rate=3e-4`.

A configuration is a tree of frozen dataclasses, so its annotations say what a text must be parsed as, and a misspelt
field can be told at once. All changes to one dataclass are made together: its checks see the final values.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, TypeVar, Union, cast

T = TypeVar("T")

_NONE = ("none", "null")


def apply_overrides(config: T, overrides: Iterable[tuple[str, str]]) -> T:
    """A copy of a dataclass tree with fields replaced.

    Args:
      config: a frozen dataclass whose fields are plain values, tuples of them, and dataclasses.
      overrides: (dotted field name, text) pairs; of two for one field the later counts. "none" is None where that is
        allowed, tuples are written as in Python.

    Raises:
      ValueError: one line: an unknown field (with the nearest one there is), a text that is not of the field's type, or
        what the dataclass itself objects to.
    """
    changes: dict[str, Any] = {}
    for name, text in overrides:
        _place(changes, config, name.split("."), name, text)
    return _replace(config, changes)


def describe(config: Any, prefix: str = "config") -> list[str]:
    """One line a field: `config.optimizer.learning_rate = 0.001  (float)`."""
    lines = []
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(value):
            lines += describe(value, name)
        else:
            lines.append(f"{name} = {value!r}  ({_type_name(hints[field.name])})")
    return lines


def field_names(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of all fields that hold values."""
    names = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inner = field_names(value, f"{prefix}{field.name}.") if dataclasses.is_dataclass(value) else []
        names += inner or [prefix + field.name]
    return names


def _place(changes: dict[str, Any], root: Any, parts: list[str], name: str, text: str) -> None:
    """Parse one override into the nested dictionary of changes."""
    config = root
    for depth, part in enumerate(parts):
        hints = typing.get_type_hints(type(config))
        if part not in hints:
            raise ValueError(_unknown(root, name, config, parts[:depth], part))
        value = getattr(config, part)
        if depth == len(parts) - 1:
            changes[part] = _parse(hints[part], text, name, value)
            return
        if not dataclasses.is_dataclass(value):
            held = "none" if value is None else repr(value)
            raise ValueError(f"config.{name}: config.{'.'.join(parts[: depth + 1])} is {held} here, without fields")
        if not isinstance(changes.get(part), dict):
            changes[part] = {}
        changes, config = changes[part], value


def _replace(config: Any, changes: dict[str, Any]) -> Any:
    values = {
        name: _replace(getattr(config, name), change) if isinstance(change, dict) else change
        for name, change in changes.items()
    }
    return dataclasses.replace(config, **values) if values else config


def _unknown(root: Any, name: str, config: Any, parents: list[str], part: str) -> str:
    """The nearest field: of this name anywhere; spelt alike here; else of those initials ("lr"), or spelt alike."""
    siblings = [field.name for field in dataclasses.fields(config)]
    last = name.split(".")[-1]
    by_last = {field.split(".")[-1]: field for field in reversed(field_names(root))}  # the first of a name
    own = {name: ".".join([*parents, name]) for name in siblings}
    near = [by_last[part]] if part in by_last else []
    near += [own[match] for match in difflib.get_close_matches(part, siblings, n=1)]
    near += [fields[last] for fields in (_by_initials(own), by_last, _by_initials(by_last)) if last in fields]
    near += [by_last[match] for match in difflib.get_close_matches(last, by_last, n=1)]
    hint = f"did you mean config.{near[0]}?" if near else f"there is {', '.join(siblings)}"
    return f"unknown field config.{name}; {hint}"


def _by_initials(fields: dict[str, str]) -> dict[str, str]:
    """Fields by the initials of their words; the first of those that share some."""
    return {"".join(word[0] for word in name.split("_")): field for name, field in reversed(fields.items())}


def _parse(hint: Any, text: str, name: str, current: Any) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in options and text.lower() in _NONE:
        return None
    for option in options:
        if option is not type(None) and not dataclasses.is_dataclass(option):
            found, value = _parse_as(option, text)
            if found and isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ValueError(f"config.{name} is {text}: it must fit in 64 bits")
            if found:
                return value
    groups = [option for option in options if dataclasses.is_dataclass(option)]
    if groups:
        inner = dataclasses.fields(cast(Any, groups[0]))[0].name
        raise ValueError(f"config.{name} is a group of fields: set one of them, as in --config.{name}.{inner}=...")
    raise ValueError(f"config.{name} is {text!r}: it must be {_type_name(hint)}, for instance {current!r}")


def _parse_as(kind: Any, text: str) -> tuple[bool, Any]:
    """Whether `text` is a value of `kind`, and the value."""
    if typing.get_origin(kind) is Literal:
        return text in typing.get_args(kind), text
    if kind is str:
        return True, text
    if kind is bool:
        return text.lower() in ("true", "false"), text.lower() == "true"
    try:
        if kind is int:
            return True, int(text)
        if kind is float:
            return True, float(text)
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return False, None
    if typing.get_origin(kind) is not tuple:
        return False, None
    element = typing.get_args(kind)[0]
    allowed = typing.get_args(element) or (element,)
    value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    numbers = tuple(float(item) if float in allowed and type(item) is int else item for item in value)
    return all(type(item) in allowed for item in numbers), numbers


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(repr(argument) for argument in arguments)
    if origin is tuple:
        return f"a tuple of {_type_name(arguments[0])}"
    if hint is type(None):
        return "none"
    return {int: "an integer", float: "a number", str: "text", bool: "true or false"}.get(hint, hint.__name__)
