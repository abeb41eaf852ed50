"""Paths as users write them."""

from __future__ import annotations

import os
import re
from pathlib import Path


def user_path(name: str | Path) -> Path:
    """The path, with ~ and ~user in the place of home folders.

    Raises:
      ValueError: there is no such user, or nothing says where the home folder is; an address such as gs://bucket.

    Example:
      >>> user_path("/tmp/x").name
      'x'
    """
    if scheme := re.match(r"[a-z][a-z0-9+.-]*://", os.fspath(name)):
        raise ValueError(
            f"{name} is an address, and a path on this machine is needed: mount what {scheme[0]} leads to as a folder "
            "(docs/pods.md) and give its path"
        )
    expanded = os.path.expanduser(name)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise ValueError(f"{name}: no home folder is known for {user} (./{expanded} is the file of that name here)")
    return Path(expanded)
