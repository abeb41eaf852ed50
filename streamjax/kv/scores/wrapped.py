"""`Wrapped`: a score that looks again at what another one says, as several published methods do."""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Float

from streamjax.kv.query import KVSpec, Query, State
from streamjax.kv.scores.score import Score


@dataclasses.dataclass(frozen=True)
class Wrapped(Score):
    """Asks for what `score` asks for. Subclasses rank by `self.score.rank(held)`.

    Raises:
      ValueError: a score that remembers what it said: it would remember what this one says.
    """

    score: Score

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score.remembers:
            raise ValueError(f"{type(self).__name__}.score is {self.score!r}: it cannot be one that remembers")

    @property
    def needs_attention(self) -> bool:  # type: ignore[override]
        return self.score.needs_attention

    @property
    def needs_queries(self) -> bool:  # type: ignore[override]
        return self.score.needs_queries

    @property
    def needs_outputs(self) -> bool:  # type: ignore[override]
        return self.score.needs_outputs

    @property
    def made_for(self) -> str | None:
        return self.score.made_for

    @property
    def counts_all_queries(self) -> bool:
        return self.score.counts_all_queries

    def check(self, every: int) -> None:
        self.score.check(every)

    def init(self, spec: KVSpec, slots: int) -> Float[Array, "B K S"]:
        return self.score.init(spec, slots)

    def fold(self, shares: Float[Array, "B K G C S"], query: Query) -> Float[Array, "B K S"]:
        return self.score.fold(shares, query)

    def kept(self, note: Float[Array, "B K S"], query: Query) -> Float[Array, "B K S"]:
        return self.score.kept(note, query)

    def joined(self, note: Float[Array, "B K S"], more: Float[Array, "B K S"]) -> Float[Array, "B K S"]:
        return self.score.joined(note, more)

    def memory(self, spec: KVSpec) -> State:
        return self.score.memory(spec)

    def watched(self, memory: State, query: Query) -> State:
        return self.score.watched(memory, query)
