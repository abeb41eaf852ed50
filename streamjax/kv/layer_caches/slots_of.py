"""What a layer caches that reads another layer's keys and values: nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxtyping import Array, Float

from streamjax.field_checks import Count, check_fields
from streamjax.kv.cache import Cache
from streamjax.kv.layer_caches.no_slots import NoSlots
from streamjax.kv.query import KVSpec, KVTokens, Query, State


@dataclasses.dataclass(frozen=True)
class SlotsOf(NoSlots):
    """The slots of layer `layer`, which this layer reads with queries of its own and never writes.

    The upper layers of Gemma 4 E2B and E4B have such caches, whatever preset a stream is given. What the other layer
    keeps is shown to all its readers as it was in front of a chunk, with the chunk's own keys, before it takes the
    chunk in (`Decoder.stream`).
    """

    layer: Count

    def __post_init__(self) -> None:
        check_fields(self)

    def init(self, spec: KVSpec) -> State:
        return ()

    def update(self, state: State, query: Query, tokens: KVTokens) -> tuple[Float[Array, "B C H D"], State]:
        raise ValueError(f"the slots that this layer reads are those of layer {self.layer}: ask its cache")

    def deferred(self, one_by_one: bool = False) -> Cache:
        return self

    def sizes(self, state: State) -> Sequence[tuple[int, int]]:
        return []
