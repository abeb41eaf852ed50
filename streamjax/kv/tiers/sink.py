"""`Sink`: the first tokens of a stream, kept for ever (StreamingLLM, 2309.17453).

Trained models park attention on the first tokens of a sequence; a stream that loses them collapses. Their distance is
clamped: a query deep in the stream sees them as if it stood right behind a full cache, so that distances never exceed
what the model was trained on. Keys stay as they were written; the query is rotated once more for them.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, UInt32

from pallas_kernels.partial import Partial
from streamjax.attention.rotary import Rotary
from streamjax.field_checks import Size, check_fields
from streamjax.kv.query import KVSpec, KVTokens, Query, Stored
from streamjax.kv.tier import Tier
from streamjax.kv.tiers.full import LinearState, append

TRUE_DISTANCE = 2**30  # a reach behind which nothing is clamped: sinks stand where they are


def clamped(query: Query, state_position: UInt32[Array, "B N S"], reach: int) -> UInt32[Array, "B C"]:
    """Where each query stands for the sinks: at most `reach` positions behind the first one."""
    first = state_position[:, 0, :1]
    return first + jnp.minimum(query.index, reach).astype(jnp.uint32)


def placed(query: Query, state_position: UInt32[Array, "B N S"], reach: int) -> Query:
    """The queries where they stand for the sinks: see `clamped`.

    At their true distance they are rotated already. Their place is clamped all the same, so that differences of places
    never wrap and sinks stay visible for ever.
    """
    place = clamped(query, state_position, reach)
    return dataclasses.replace(query, position=place) if reach == TRUE_DISTANCE else query.at_position(place)


@dataclasses.dataclass(frozen=True)
class Sink(Tier):
    """Keeps the first `size` tokens. `reach` is where a distant query stands, in positions behind the first token.

    A cascade fills `reach` in: the number of slots of all its tiers, which is the query's place in the cache.
    """

    shares_values: ClassVar[bool] = True
    alters_every: ClassVar[int | None] = None

    size: Size
    reach: Size | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def slots(self) -> int:
        return self.size

    @property
    def reach_back(self) -> int | None:
        return 0

    def init(self, spec: KVSpec) -> LinearState:
        return LinearState.empty(spec, self.size)

    def absorb(self, state: LinearState, query: Query, tokens: KVTokens) -> tuple[LinearState, KVTokens]:
        return append(state, tokens)

    def stored(self, state: LinearState, rotary: Rotary | None) -> Stored:
        return Stored(state.k, state.v, state.position, state.valid)

    def attend(self, state: LinearState, query: Query, reach: int | None) -> Partial:
        if self.reach is not None:
            query = placed(query, state.position, self.reach)
        return query.attend(state.k, state.v, state.position, state.valid)
