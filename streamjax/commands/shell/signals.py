"""Signals that ask a command to end: it keeps what it has, then it ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Terminated(BaseException):
    """SIGTERM, or SIGHUP where the terminal was closed: the command is to end, and to keep what it has.

    No `Exception`, and no `KeyboardInterrupt`, which ends an answer and not a conversation.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def ending_signals(*others: signal.Signals) -> Iterator[None]:
    """The first SIGTERM or SIGHUP raises `Terminated`; after it none disturbs what the block does to keep its work.

    Args:
      *others: SIGINT, where Ctrl-C is to act once too; it raises KeyboardInterrupt.
    """
    numbers = (signal.SIGTERM, signal.SIGHUP, *others)
    before = {number: signal.getsignal(number) for number in numbers}
    # What is ignored stays so: SIGHUP under nohup, SIGINT in a shell's background.
    taken = [number for number in numbers if before[number] not in (signal.SIG_IGN, None)]
    if threading.current_thread() is not threading.main_thread():
        taken = []

    def first(number: int, frame: FrameType | None) -> None:
        for each in {*taken, signal.SIGINT}:
            signal.signal(each, lambda number, frame: None)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Terminated(number)

    interrupt = signal.getsignal(signal.SIGINT)
    for number in taken:
        signal.signal(number, first)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])
        if taken:
            signal.signal(signal.SIGINT, interrupt)
