"""Memory, measured: what the process holds, and what of a cache is in use at a place in the stream."""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
from pathlib import Path

from streamjax.streaming.state import StreamState


def resident_bytes() -> int:
    """Memory of this process that is in RAM now; its peak on systems without /proc."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most memory that this process has had in RAM."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(peak if sys.platform == "darwin" else peak * 1024, resident_bytes())  # the kernel notes its peak late


@dataclasses.dataclass(frozen=True)
class SlotMemory:
    """What the caches of one stream's layers cost: `slots` tokens and `slot_bytes` a token.

    One pair a layer; where heads of a layer cache by different rules, one a group of heads.
    """

    slots: tuple[int, ...]
    slot_bytes: tuple[float, ...]

    @classmethod
    def from_state(cls, state: StreamState) -> SlotMemory:
        """Measured on a state; counters count as parts of the slots."""
        layers = zip(state.caches, state.layers, strict=True)
        parts = [part for cache, layer in layers for part in cache.sizes(layer)]
        return cls(tuple(n for n, _ in parts), tuple(size / n / state.batch_size for n, size in parts))

    def in_use(self, tokens: int) -> int:
        """Bytes of the slots that hold something after so many tokens: what a cache that grows would take."""
        return round(sum(min(tokens, n) * size for n, size in zip(self.slots, self.slot_bytes, strict=True)))

    @property
    def allocated(self) -> int:
        """Bytes of all slots."""
        return self.in_use(max(self.slots))
