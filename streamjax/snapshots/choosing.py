"""Which snapshot the machines that are there can give back, and where each process's part of it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from streamjax.snapshots.generations import Name
from streamjax.snapshots.messages import Address, connect, request
from streamjax.snapshots.stripes import Layout, piece_bounds


@dataclasses.dataclass
class Held:
    """A snapshot as several keepers hold it.

    data: keepers that have a machine's data, by its number. codes: those that have a code, by group, stripe and block.
    heads: sizes of machines' data, and where in them processes lie.
    """

    layout: Layout
    data: dict[int, Address] = dataclasses.field(default_factory=dict)
    codes: dict[tuple[int, int, int], Address] = dataclasses.field(default_factory=dict)
    heads: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether all machines' data can be had."""
        for group in self.layout.groups:
            there = {number: host in self.data for number, host in enumerate(group)}
            codes = {(stripe, block): True for start, stripe, block in self.codes if start == group.start}
            if not self.layout.stripes(group.start).can_give(there, codes):
                return False
        return all(host in self.heads for host in range(self.layout.hosts))

    @property
    def lost(self) -> list[int]:
        """Machines whose data is there no more."""
        return [host for host in range(self.layout.hosts) if host not in self.data]

    def place_of(self, process: int) -> tuple[int, int, int] | None:
        """(machine, start, end) of what a process gave."""
        for host, head in self.heads.items():
            for number, start, size in head["parts"]:
                if number == process:
                    return host, start, start + size
        return None


def held_by(statuses: Sequence[tuple[Address, Sequence[Any]]]) -> dict[Name, Held]:
    """All snapshots of which keepers hold anything, from the addresses of keepers and what `status` says of each."""
    found: dict[Name, Held] = {}
    for address, generations in statuses:
        for start_id, step, about in generations:
            held = found.setdefault((start_id, step), Held(Layout(*about["layout"])))
            group = held.layout.group_of(about["host"])
            if about["whole"]:
                held.data[about["host"]] = address
            held.codes |= {(group.start, stripe, block): address for stripe, block in about["codes"]}
            held.heads |= {group[machine]: head for machine, head in about["heads"]}
    return found


def newest(found: dict[Name, Held]) -> Name | None:
    """The snapshot after the latest step that can be given back whole."""
    return max((name for name, held in found.items() if held.is_whole), key=lambda name: name[1], default=None)


class Reader:
    """Reads a snapshot from keepers, and computes what a lost machine held."""

    def __init__(self, name: Name, held: Held, key: bytes):
        self._held, self._key = held, key
        self._about = {"start_id": name[0], "step": name[1]}
        self._connections: dict[Any, Connection] = {}

    def read(self, process: int) -> bytearray:
        """What a process gave.

        Raises:
          OSError: a keeper has gone. LookupError: there is no such process.
        """
        place = self._held.place_of(process)
        if place is None:
            raise LookupError(f"no process {process} gave anything")
        host, start, end = place
        if host in self._held.data:
            return self._data(host, start, end)
        found = bytearray()
        group, stripes = self._held.layout.group_of(host), self._held.layout.stripes(host)
        for piece, (low, high) in enumerate(piece_bounds(self._held.heads[host]["size"], stripes.pieces)):
            first, last = max(low, start), min(high, end)
            if first < last:
                stripe = stripes.stripe_of(host - group.start, piece)
                whole = stripes.decode(stripe, piece, lambda *block, s=stripe: self._block(group, s, *block))
                if whole is None:
                    raise LookupError(f"too few machines hold what machine {host} held")
                found += memoryview(whole)[first - low : last - low]
        return found

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()

    def _block(self, group: range, stripe: int, block: int, machine: int) -> bytes | None:
        host = group[machine]
        stripes = self._held.layout.stripes(host)
        if block < stripes.pieces:
            if host not in self._held.data:
                return None
            return bytes(self._data(host, *piece_bounds(self._held.heads[host]["size"], stripes.pieces)[block]))
        address = self._held.codes.get((group.start, stripe, block))
        if address is None:
            return None
        return bytes(self._ask(address, {"op": "code", "stripe": stripe, "block": block}))

    def _data(self, host: int, start: int, end: int) -> bytearray:
        return self._ask(self._held.data[host], {"op": "data", "start": start, "end": end})

    def _ask(self, address: Address, head: dict[str, Any]) -> bytearray:
        place = str(address)
        if place not in self._connections:
            self._connections[place] = connect(address, self._key)
        return request(self._connections[place], {**head, **self._about})[1]
