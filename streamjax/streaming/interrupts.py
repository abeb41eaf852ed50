"""Signals between two steps of a stream, never inside one.

A step donates the state it is given: an interrupt after that, and before the new state is assigned, would leave a
stream with no state at all.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Hold Ctrl-C back until the block has ended, and SIGTERM and SIGHUP where they have a handler; then they act."""
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    held = [number for number, handler in handlers.items() if callable(handler)]
    if threading.current_thread() is not threading.main_thread() or not held:
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    for number in held:
        signal.signal(number, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        for number in held:
            signal.signal(number, handlers[number])
        if received:
            handlers[signal.Signals(received[0][0])](*received[0])  # type: ignore[operator, misc]  # it is callable
