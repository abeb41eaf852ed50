"""Which machine codes what of which others, and what was lost computed again.

A group of n machines may lose m at once. Each machine cuts what it holds into k = n - m pieces. A stripe is a piece of
each of k machines, and m codes of them on the other m (Reed-Solomon codes by `zfec`; with m = 1 as RAID 5 does it).
There are n stripes, and each machine codes m of them: it holds m / k of its own size for others, and sends m times
its own size. Any k blocks of a stripe give all others.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def require_zfec() -> Any:
    """The library of the codes.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import zfec
    except ImportError as error:
        raise ValueError("snapshots over several machines need zfec: pip install 'streamjax[snapshots]'") from error
    return zfec


@dataclasses.dataclass(frozen=True)
class Stripes:
    """A group of `size` machines that may lose `lost`; machines are numbered within the group.

    A block is a piece of a machine's data (numbers 0 to k - 1) or a code (from k on).
    """

    size: int
    lost: int

    @property
    def pieces(self) -> int:
        """Of a machine's data."""
        return self.size - self.lost

    def machine(self, stripe: int, block: int) -> int:
        """The machine that holds a block."""
        back = block + self.lost if block < self.pieces else block - self.pieces
        return (stripe + back) % self.size

    def stripe_of(self, machine: int, piece: int) -> int:
        """The stripe of a machine's piece, whose number is that of the block, too."""
        return (machine - self.lost - piece) % self.size

    def coders(self, stripe: int) -> list[tuple[int, int]]:
        """(block, machine) of a stripe's codes."""
        return [(block, self.machine(stripe, block)) for block in range(self.pieces, self.size)]

    def coded_by(self, machine: int) -> list[tuple[int, int]]:
        """(stripe, block) of the codes that a machine holds."""
        return [((machine - number) % self.size, self.pieces + number) for number in range(self.lost)]

    def encode(self, blocks: Sequence[bytes | memoryview], block: int) -> bytes:
        """One code of the pieces of a stripe, in their order; shorter ones count as filled up with zeros."""
        length = max(map(len, blocks))
        return require_zfec().Encoder(self.pieces, self.size).encode(_filled(blocks, length), [block])[0]

    def decode(self, stripe: int, piece: int, fetch: Callable[[int, int], bytes | None]) -> bytes | None:
        """A piece from other blocks of its stripe, filled up with zeros; None if there are too few.

        fetch: (block, machine) to what that machine has of it, None where it is not to be had.
        """
        found: dict[int, bytes] = {}
        for block in range(self.size):
            if block != piece and len(found) < self.pieces:
                data = fetch(block, self.machine(stripe, block))
                if data is not None:
                    found[block] = data
        if len(found) < self.pieces:
            return None
        length = max(map(len, found.values()))
        numbers = sorted(found)
        decoder = require_zfec().Decoder(self.pieces, self.size)
        return decoder.decode(_filled([found[number] for number in numbers], length), numbers)[piece]

    def can_give(self, data: Mapping[int, bool], codes: Mapping[tuple[int, int], bool]) -> bool:
        """Whether all machines' data can be had.

        data: the machines whose data is there. codes: the (stripe, block) of codes that are there.
        """
        for stripe in range(self.size):
            there = sum(data.get(self.machine(stripe, block), False) for block in range(self.pieces))
            there += sum(codes.get((stripe, block), False) for block, _ in self.coders(stripe))
            if there < self.pieces:
                return False
        return True


@dataclasses.dataclass(frozen=True)
class Layout:
    """So many machines, in groups of equal size, or nearly so, with at most `most` each, which may lose `lost`.

    Raises:
      ValueError: a group that is too small to lose so many.
    """

    hosts: int
    most: int
    lost: int

    def __post_init__(self) -> None:
        smallest = min(len(group) for group in self.groups)
        if self.hosts > 1 and smallest <= self.lost:
            raise ValueError(
                f"snapshots.lost is {self.lost}, and the smallest group has {smallest} machines: set it below that"
            )

    @property
    def groups(self) -> list[range]:
        """Numbers of machines."""
        count = -(-self.hosts // self.most)
        ends = [self.hosts * number // count for number in range(count + 1)]
        return [range(*pair) for pair in itertools.pairwise(ends)]

    def group_of(self, host: int) -> range:
        return next(group for group in self.groups if host in group)

    def stripes(self, host: int) -> Stripes:
        """Of the group of a machine; a machine alone has nobody to code its data."""
        return Stripes(len(self.group_of(host)), self.lost if self.hosts > 1 else 0)


def piece_bounds(size: int, pieces: int) -> list[tuple[int, int]]:
    """Where a machine's data of `size` bytes is cut; the last pieces may be short or empty."""
    length = -(-size // pieces)
    return [(min(number * length, size), min((number + 1) * length, size)) for number in range(pieces)]


def _filled(blocks: Sequence[bytes | memoryview], length: int) -> list[bytes | memoryview]:
    return [block if len(block) == length else bytes(block) + bytes(length - len(block)) for block in blocks]
