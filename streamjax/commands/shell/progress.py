"""Progress bars on stderr."""

from __future__ import annotations

import sys
from typing import Any

import tqdm


def progress_bar(**options: Any) -> tqdm.tqdm:
    """A bar of `tqdm` that is quick on a terminal, and writes a line every 15 seconds into a file."""
    return tqdm.tqdm(dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 15, **options)


def end_progress_bars() -> None:
    """End the line of every bar that is there, so that what follows begins on one of its own."""
    for bar in list(getattr(tqdm.tqdm, "_instances", ())):
        bar.close()
