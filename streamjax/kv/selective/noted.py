"""`Noted`: every token, and beside it what a score wants to know for a choice that comes later.

A prompt that is to be compacted by the attention of all its queries (H2O), or by what these are like (Expected
Attention), is read under this tier: nothing is chosen while it is read, so chunks stay whole, where a `Scored` tier
reads them in pieces that end where it chooses.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
from jaxtyping import Array, Float

from pallas_kernels.partial import Partial
from streamjax.attention.rotary import Rotary
from streamjax.field_checks import Size, check_fields
from streamjax.kv.noting import Noting
from streamjax.kv.query import KVSpec, KVTokens, Query, State, Stored
from streamjax.kv.scores.score import Score
from streamjax.kv.slots.ring_buffer import write_linear
from streamjax.kv.tier import Tier
from streamjax.kv.tiers.full import Full, LinearState, append


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NotedState:
    """note: of the attention that each slot's token got, where the score asks for it. memory: the score's."""

    slots: LinearState
    note: Float[Array, "B N S"] | None
    memory: State


@dataclasses.dataclass(frozen=True)
class Noted(Tier):
    """Keeps every token up to `capacity`, as `Full`, with what `score` wants to know of all queries so far.

    `compact` into a `Scored` tier with that score needs no query then. The last tier of its cascade.

    Raises:
      ValueError: a score that wants to know nothing of queries, or only of the last ones before a choice.
    """

    shares_values: ClassVar[bool] = True
    keeps_all: ClassVar[bool] = True
    last_because: ClassVar[str] = "nothing falls out of it"
    alters_every: ClassVar[int | None] = None  # type: ignore[misc]
    keeps_notes: ClassVar[bool] = True  # type: ignore[misc]
    watches: ClassVar[bool] = True  # type: ignore[misc]

    capacity: Size
    score: Score

    def __post_init__(self) -> None:
        check_fields(self)
        if not can_note(self.score):
            raise ValueError(f"Noted.score is {self.score!r}, which asks nothing of all queries: read into Full")

    @property
    def slots(self) -> int:
        return self.capacity

    @property
    def wants_noted(self) -> Noting | None:
        return self.score if self.score.needs_attention else None

    @property
    def made_for(self) -> str | None:
        return self.score.made_for

    @property
    def _full(self) -> Full:
        return Full(self.capacity)

    def init(self, spec: KVSpec) -> NotedState:
        note = self.score.init(spec, self.capacity) if self.score.needs_attention else None
        return NotedState(self._full.init(spec), note, self.score.memory(spec))

    def stored(self, state: NotedState, rotary: Rotary | None) -> Stored:
        return self._full.stored(state.slots, rotary)._replace(note=state.note)

    def attend(self, state: NotedState, query: Query, reach: int | None) -> Partial:
        return self._full.attend(state.slots, query, reach)

    def observe(self, state: NotedState, query: Query, lse: Float[Array, "B C H"], reach: int | None) -> NotedState:
        note, held = state.note, state.slots
        if note is not None:
            note = self.score.noted(note, query, held.k, held.position, held.valid, lse, filled=held.filled)
        return self.watched(dataclasses.replace(state, note=note), query)

    def watched(self, state: NotedState, query: Query) -> NotedState:
        """The state after a chunk's queries, whose attention is noted already."""
        return dataclasses.replace(state, memory=jax.lax.stop_gradient(self.score.watched(state.memory, query)))

    def insert(self, state: NotedState, tokens: KVTokens) -> tuple[NotedState, KVTokens]:
        note, (start, count) = state.note, tokens.run()
        if note is not None and tokens.score is not None:
            taken = count.clip(max=self.capacity - state.slots.filled)
            note = write_linear(note, tokens.score, state.slots.filled, start, taken, axis=2)
        slots, left = append(state.slots, tokens)
        return dataclasses.replace(state, slots=slots, note=note), left


def can_note(score: Score) -> bool:
    """Whether all that a score wants to know can be noted as queries come, wherever a choice will be."""
    if score.remembers or score.of_tokens or not (score.needs_attention or score.needs_queries):
        return False
    return not score.needs_attention or score.counts_all_queries
