"""Which keys a query may see in one sequence: causal patterns, as data that kernels and references share.

Positions are indices in the sequence. A pattern answers two questions: is key j visible to query i, and, for kernels
that work in blocks, which range of keys can a block of queries see at all.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@dataclasses.dataclass(frozen=True)
class Full:
    """Causal attention: query i sees keys j <= i."""

    def mask(self, query: Int[Array, "..."], key: Int[Array, "..."]) -> Bool[Array, "..."]:
        return key <= query

    def key_range(self, first: Array | int, last: Array | int) -> tuple[Array | int, Array | int]:
        """Half-open range of keys that queries first..last (inclusive) can see, leading sinks left out."""
        return 0 * first, last + 1

    @property
    def sinks(self) -> int:
        return 0

    @property
    def window(self) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class SlidingWindow:
    """Query i sees the `window` newest keys, itself included: i - window < j <= i (Hugging Face's sliding_window)."""

    window: int

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"SlidingWindow.window must be at least 1, got {self.window}")

    def mask(self, query: Int[Array, "..."], key: Int[Array, "..."]) -> Bool[Array, "..."]:
        return (key <= query) & (key > query - self.window)

    def key_range(self, first: Array | int, last: Array | int) -> tuple[Array | int, Array | int]:
        return jnp.maximum(first - self.window + 1, 0), last + 1

    @property
    def sinks(self) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class SinkWindow:
    """`SlidingWindow(window)` plus the first `sinks` keys of the sequence, at their true distance."""

    sinks: int
    window: int

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 1:
            raise ValueError(f"SinkWindow needs sinks >= 0 and window >= 1, got {self.sinks} and {self.window}")

    def mask(self, query: Int[Array, "..."], key: Int[Array, "..."]) -> Bool[Array, "..."]:
        return (key <= query) & ((key > query - self.window) | (key < self.sinks))

    def key_range(self, first: Array | int, last: Array | int) -> tuple[Array | int, Array | int]:
        return jnp.maximum(first - self.window + 1, 0), last + 1


@dataclasses.dataclass(frozen=True)
class Chunked:
    """Query i sees the keys j <= i of its own chunk of `size` keys, j // size == i // size (Llama 4).

    Over a whole sequence that is `Full` in each chunk by itself: `streamjax.attention.dispatch` folds chunks into rows.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"Chunked.size must be at least 1, got {self.size}")

    def mask(self, query: Int[Array, "..."], key: Int[Array, "..."]) -> Bool[Array, "..."]:
        return (key <= query) & (key >= query - query % self.size)

    def key_range(self, first: Array | int, last: Array | int) -> tuple[Array | int, Array | int]:
        return first - first % self.size, last + 1

    @property
    def sinks(self) -> int:
        return 0


Pattern = Full | SlidingWindow | SinkWindow | Chunked
