"""Patterns for names of modules, as PEFT's `rank_pattern` has them, matched in bounded time.

PEFT runs them as regular expressions, which can take time exponential in their length. Here a pattern leads from the
positions that can be reached in a name to those behind them, so that no way through it is tried twice. It has
what names of modules need: characters, classes, groups, alternatives, repetitions (none within another), `^` and `$`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any, NoReturn, TypeVar

Value = TypeVar("Value")
Positions = frozenset[int]  # in a name
# A pattern: ("one", what tells characters), ("any", patterns), ("all", patterns), ("repeat", pattern, least, most),
# ("begin",) or ("end",).
Node = tuple[Any, ...]
_LONGEST, _DEEPEST, _MOST = 500, 20, 1000  # characters of a pattern, groups in groups, repetitions
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:|\{\d+(?:,\d*)?\}|.", re.DOTALL)
_CLASSES = "dDwWsS"


def matching_key(patterns: Mapping[str, Value], name: str) -> str | None:
    """The first pattern that a name matches, whole or behind a dot, by PEFT's rule; None if there is none.

    Raises:
      ValueError: a pattern that is none, or has what is not supported.
    """
    return next((key for key in patterns if matches(key, name)), None)


def names_module(names: Collection[str], name: str) -> bool:
    """Whether a module is meant by one of the names, each whole or the end of the module's name behind a dot."""
    return any(name == key or name.endswith(f".{key}") for key in names)


def matches(pattern: str, name: str) -> bool:
    """Whether a name, or what stands behind one of its dots, is what a pattern says.

    Raises:
      ValueError: the pattern is none, or has what is not supported.
    """
    starts = (0, *(index + 1 for index, letter in enumerate(name) if letter == "."))
    return len(name) in _advance(_parse(pattern), name, frozenset(starts))


def _advance(node: Node, name: str, positions: Positions) -> Positions:
    """The positions behind what a node matches, from any of the positions before it."""
    if not positions:
        return positions
    match node:
        case ("one", test):
            return frozenset(place + 1 for place in positions if place < len(name) and test(name[place]))
        case ("any", nodes):
            return frozenset[int]().union(*(_advance(inner, name, positions) for inner in nodes))
        case ("all", nodes):
            for inner in nodes:
                positions = _advance(inner, name, positions)
            return positions
        case ("begin",):
            return positions & {0}
        case ("end",):
            return positions & {len(name)}
        case ("repeat", inner, least, most):
            reached = positions if least == 0 else frozenset[int]()
            for count in range(1, most + 1):
                positions = _advance(inner, name, positions)
                if count >= least:
                    positions -= reached  # from the others everything has been tried
                    reached |= positions
                if not positions:
                    break
            return reached
    raise AssertionError(node)


@lru_cache(maxsize=256)
def _parse(text: str) -> Node:
    parser = _Parser(text)
    node = parser.alternatives(0)
    if parser.tokens:
        parser.refuse("a bracket is closed that was not opened")
    return node


def _repeats(node: Node) -> bool:
    """Whether there is a repetition in a pattern."""
    return node[0] == "repeat" or (node[0] in ("any", "all") and any(map(_repeats, node[1])))


class _Parser:
    """A pattern, read from left to right."""

    def __init__(self, text: str):
        self.text, self.tokens = text, _TOKEN.findall(text)[::-1]
        if len(text) > _LONGEST:
            self.refuse(f"it has {len(text)} characters")

    def refuse(self, reason: str) -> NoReturn:
        raise ValueError(f"the pattern {self.text[:100]!r} cannot be used: {reason}")

    def alternatives(self, depth: int) -> Node:
        if depth > _DEEPEST:
            self.refuse("too many groups in groups")
        found = [self._sequence(depth)]
        while self._peek() == "|":
            self.tokens.pop()
            found.append(self._sequence(depth))
        return found[0] if len(found) == 1 else ("any", found)

    def _peek(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def _sequence(self, depth: int) -> Node:
        nodes = []
        while self._peek() not in ("", "|", ")"):
            nodes.append(self._repeated(self._atom(depth)))
        return "all", nodes

    def _atom(self, depth: int) -> Node:
        token = self.tokens.pop()
        if token in ("(", "(?:"):
            if self._peek() == "?":
                self.refuse("groups with (? are not supported")
            inner = self.alternatives(depth + 1)
            if self._peek() != ")":
                self.refuse("a bracket is not closed")
            self.tokens.pop()
            return inner
        if token in ("^", "$"):
            return ("begin",) if token == "^" else ("end",)
        if token in ("*", "+", "?", "[") or token[0] == "{":
            self.refuse(f"{token!r} stands where a character is needed")
        if token[0] == "[" or token == "." or (token[0] == "\\" and token[1:] in tuple(_CLASSES)):
            try:
                return "one", re.compile(token).fullmatch
            except re.error as error:
                self.refuse(str(error))
        if token[0] == "\\" and (len(token) < 2 or token[1].isalnum()):
            self.refuse(f"{token!r} is not supported")
        return "one", token[-1].__eq__

    def _repeated(self, node: Node) -> Node:
        token = self._peek()
        bounds = re.fullmatch(r"\{(\d+)(,?)(\d*)\}", token)
        if token not in ("*", "+", "?") and bounds is None:
            return node
        self.tokens.pop()
        least, most = {"*": (0, _MOST), "+": (1, _MOST), "?": (0, 1)}.get(token, (0, 0))
        if bounds is not None:
            least = int(bounds[1])
            most = int(bounds[3]) if bounds[3] else _MOST if bounds[2] else least
        if most > _MOST or least > most:
            self.refuse(f"the repetition {token!r}")
        if most > 1 and _repeats(node):
            self.refuse("a repetition within a repetition")
        if self._peek() == "?":
            self.tokens.pop()  # as few as possible: the same names match
        if self._peek() in ("*", "+", "?"):
            self.refuse("a repetition of a repetition")
        return "repeat", node, least, most
