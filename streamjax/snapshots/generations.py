"""One snapshot as the keeper of one machine holds it: the machine's own data, and codes of others' pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from streamjax.snapshots.stripes import Layout, piece_bounds

Name = tuple[str, int]  # which start of the run made it, and after which step


class Generation:
    """What is held of a snapshot by machine number `host` of those of `layout`."""

    def __init__(self, layout: Layout, host: int):
        self.layout, self.host = layout, host
        self.group, self.stripes = layout.group_of(host), layout.stripes(host)
        self.machine = host - self.group.start  # in its group
        self.parts: dict[int, bytearray] = {}  # by training process
        self.whole = False  # all of this machine's processes have given theirs
        self.heads: dict[int, dict[str, Any]] = {}  # what is known of machines' data: size, and where processes lie
        self.codes: dict[tuple[int, int], bytes] = {}
        self.complete: set[int] = set()  # machines that hold all they are to hold
        self._waiting: dict[tuple[int, int], dict[int, bytes | memoryview]] = {}

    @property
    def is_everywhere(self) -> bool:
        """Whether every machine holds all it is to hold."""
        return len(self.complete) == self.layout.hosts

    def put(self, process: int, data: bytearray, local: list[int]) -> bool:
        """Take what a training process gives; whether it was the last of this machine's, which are `local`."""
        self.parts[process] = data
        if self.whole or set(local) - set(self.parts):
            return False
        places, start = [], 0
        for number in sorted(self.parts):
            places.append([number, start, len(self.parts[number])])
            start += len(self.parts[number])
        self.heads[self.machine] = {"size": start, "parts": places}
        self.whole = True
        return True

    def data(self, start: int, end: int) -> Iterator[memoryview]:
        """A stretch of this machine's data, in parts that are not copied."""
        for number in sorted(self.parts):
            part = memoryview(self.parts[number])
            if start < len(part) and end > 0:
                yield part[max(start, 0) : end]
            start, end = start - len(part), end - len(part)

    def pieces(self) -> Iterator[tuple[int, int, int, int, list[memoryview]]]:
        """(stripe, block of the code, machine that makes it, piece, its bytes) of all that is to be sent."""
        for piece, bounds in enumerate(piece_bounds(self.heads[self.machine]["size"], self.stripes.pieces)):
            stripe = self.stripes.stripe_of(self.machine, piece)
            for block, machine in self.stripes.coders(stripe):
                yield stripe, block, machine, piece, list(self.data(*bounds))

    def add_piece(self, stripe: int, block: int, piece: int, head: dict[str, Any], data: bytes | memoryview) -> None:
        """Take a piece from another machine, and code the stripe when all of its pieces are there."""
        self.heads[self.stripes.machine(stripe, piece)] = head
        waiting = self._waiting.setdefault((stripe, block), {})
        waiting[piece] = data
        if len(waiting) == self.stripes.pieces:
            self.codes[stripe, block] = self.stripes.encode([waiting[i] for i in sorted(waiting)], block)
            del self._waiting[stripe, block]

    @property
    def is_complete_here(self) -> bool:
        """Whether this machine holds all it is to hold."""
        return self.whole and set(self.codes) == set(self.stripes.coded_by(self.machine))

    def describe(self) -> dict[str, Any]:
        """What JSON can hold of it."""
        return {
            "layout": dataclasses.astuple(self.layout),
            "host": self.host,
            "whole": self.whole,
            "codes": [list(name) for name in self.codes],
            "heads": [[machine, head] for machine, head in self.heads.items()],
            "complete": self.is_everywhere,
        }
