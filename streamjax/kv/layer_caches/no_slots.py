"""`NoSlots`: what caches have in common that hold no token of their own."""

from __future__ import annotations

from typing import ClassVar

from streamjax.kv.cache import Cache


class NoSlots(Cache):
    """A layer that keeps keys and values of no token: a stream never fills it, and it bounds nothing."""

    alters_every: ClassVar[int | None] = None

    @property
    def slots(self) -> int:
        return 0

    @property
    def span(self) -> int:
        return 1

    @property
    def capacity(self) -> None:
        return None

    @property
    def reach(self) -> None:
        return None
