"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(name: str | Path) -> Path:
    """The path, with ~ and ~user in the place of home folders.

    Raises:
      ValueError: there is no such user, or nothing says where the home folder is.

    Example:
      >>> user_path("/tmp/x").name
      'x'
    """
    expanded = os.path.expanduser(name)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise ValueError(f"{name}: no home folder is known for {user} (./{expanded} is the file of that name here)")
    return Path(expanded)
