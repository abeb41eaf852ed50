"""Packages whose names load on first use: importing one takes no time, and what is not used is never imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, Iterable[str]], modules: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
      package: its `__name__`.
      homes: which module has which names.
      modules: modules of the package that are names of it too.

    >>> __getattr__, __dir__ = lazy_names(__name__, {"streamjax.models": ("Decoder", "forward")})
    """
    home = {name: module for module, names in homes.items() for name in names}
    home |= {name: "" for name in modules}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = importlib.import_module(home[name] or f"{package}.{name}")
        return getattr(found, name) if home[name] else found

    return get, lambda: sorted({*vars(sys.modules[package]), *home})
