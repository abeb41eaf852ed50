"""Named caches: each published system is a function that returns its cascade, registered with its paper."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable
from typing import Any

from streamjax.kv.cascade import Cascade


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named cache: what it does in one line, the paper it is from, and the function that builds it."""

    name: str
    summary: str
    paper: str
    build: Callable[..., Cascade]

    @property
    def options(self) -> dict[str, Any]:
        """Option names and their defaults."""
        return {name: p.default for name, p in inspect.signature(self.build).parameters.items()}


_PRESETS: dict[str, Preset] = {}


def register(paper: str) -> Callable[[Callable[..., Cascade]], Callable[..., Cascade]]:
    """Decorator: register a builder under its own name; the first line of its docstring is the summary."""

    def add(build: Callable[..., Cascade]) -> Callable[..., Cascade]:
        summary = (inspect.getdoc(build) or "").partition("\n")[0]
        _PRESETS[build.__name__] = Preset(build.__name__, summary, paper, build)
        return build

    return add


def presets() -> dict[str, Preset]:
    """Every named cache, by name."""
    return dict(sorted(_PRESETS.items()))


def preset(name: str, **options: Any) -> Cascade:
    """The cascade of a published system.

    Args:
      name: one of `presets()`.
      **options: the system's own options, such as `sinks=4, window=1020`.

    Raises:
      ValueError: an unknown name or option; the message suggests the nearest.
    """
    if name not in _PRESETS:
        near = difflib.get_close_matches(name, _PRESETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(_PRESETS))}"
        raise ValueError(f"unknown cache preset {name!r}; {hint}")
    known = _PRESETS[name].options
    for option in options:
        if option not in known:
            raise ValueError(f"cache preset {name!r} has no option {option!r}; it takes {', '.join(known)}")
    return _PRESETS[name].build(**options)
