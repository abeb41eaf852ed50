"""Ctrl-C between two steps of a stream, never inside one.

A step donates the state it is given: an interrupt after that, and before the new state is assigned, would leave a
stream with no state at all.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Hold SIGINT back until the block has ended; then it acts as it would have."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if received and callable(before):
            before(*received[0])
        elif received:
            signal.raise_signal(signal.SIGINT)
