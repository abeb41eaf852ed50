"""`Score`: the rule by which a `Scored` tier ranks its tokens. A new rule is a file of some forty lines.

    @dataclasses.dataclass(frozen=True)
    class KNorm(Score):
        def rank(self, held: Held) -> Float[Array, "B K S"]:
            return -jnp.linalg.norm(held.k, axis=-1)

`rank` is called when a tier has to make room, and sees all that the tier holds. A score that wants to know how much
attention tokens got says `needs_attention`, and may say how it is noted (`fold`, `kept`, see `Noting`). One that wants
to know the queries of the stream keeps what it needs of them in a `memory`; their mean and covariance are there for a
score that derives from `QueryMoments`. Fields are checked. One that is `LayerTables` has numbers of the layer, which
states hold, so that layers share their programs: `memory` gives them with `in_state`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from streamjax.attention.rotary import Rotary
from streamjax.field_checks import check_fields
from streamjax.kv.layer_tables import LayerTables
from streamjax.kv.noting import Noting
from streamjax.kv.query import KVSpec, KVTokens, Query, State


class Held(NamedTuple):
    """What a score sees of the tokens that compete, in no order; `valid` says which slots hold any.

    k, v: as they are stored, keys rotated. position: of each token in its stream. note: of its attention, or what the
    score itself said last time (`remembers`). memory: the score's. now: the position of the stream's next token.
    rotary: what rotated the keys. distance: how far behind every query they stand, where that is one number. size: how
    many stay. outputs: what takes values to the layer's output, where the score asks (`needs_outputs`).
    """

    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S V"]
    position: UInt32[Array, "B #K S"]
    valid: Bool[Array, "B #K S"]
    note: Float[Array, "B N S"] | None
    memory: State
    now: UInt32[Array, " B"]
    rotary: Rotary | None = None
    distance: int | None = None
    size: int = 1
    outputs: Float[Array, "K G V E"] | None = None

    @property
    def values(self) -> Float[Array, "B K S V"]:
        """Values; keys where they are one and the same."""
        return self.v if self.v.shape[-1] else self.k

    @property
    def noted(self) -> Float[Array, "B N S"]:
        """The notes, for a score that asks for them."""
        assert self.note is not None, "there are notes where a score `needs_attention`, or `remembers`"
        return self.note

    @property
    def there(self) -> Bool[Array, "B K S"]:
        """`valid`, for each key head."""
        return jnp.broadcast_to(self.valid, self.k.shape[:3])

    @property
    def fresh(self) -> Bool[Array, "B K S"]:
        """The tokens of which nothing has been said so far, where the score `remembers`."""
        return self.there & (self.noted == 0)

    @property
    def raw_k(self) -> Float[Array, "B K S D"]:
        """Keys before rotation."""
        position = self.position if self.distance is None else jnp.zeros_like(self.position)
        return self.k if self.rotary is None else self.rotary.back(self.k, position)


@dataclasses.dataclass(frozen=True)
class Score(Noting):
    """How tokens are ranked. Subclasses are frozen dataclasses."""

    needs_attention: ClassVar[bool] = False  # whether `held.note` has the attention that tokens got
    needs_queries: ClassVar[bool] = False  # whether `held.memory` has what the score keeps of queries
    remembers: ClassVar[bool] = False  # whether `held.note` has what `rank` said last, 0 for a new token
    needs_outputs: ClassVar[bool] = False  # whether `held.outputs` has what takes values to the layer's output

    at_true_distance: ClassVar[bool] = False  # whether keys mean nothing to it that all stand at one distance

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def _tables(self) -> dict[str, LayerTables]:
        """The fields that have numbers of the layer."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, LayerTables)}

    @property
    def made_for(self) -> str | None:
        """A fingerprint of the model that it was measured with; None where it serves every model."""
        return next((tables.model for tables in self._tables.values() if tables.model), None)

    @property
    def counts_all_queries(self) -> bool:
        """Whether notes are of all queries that ever came, and not only of those since the last choice."""
        return type(self).kept is Score.kept

    @property
    def sums_attention(self) -> bool:
        own = type(self)
        return (own.fold, own.kept, own.joined) == (Score.fold, Score.kept, Score.joined)

    def without_numbers(self) -> Score:
        """A score that is equal for layers whose measured numbers differ; where there are any, states hold them."""
        own = {name: tables.without_numbers() for name, tables in self._tables.items()}
        return dataclasses.replace(self, **own) if own else self

    def judged(self, memory: State, query: Query, tokens: KVTokens) -> Float[Array, "B K C"]:
        """The notes of tokens that come, where they are of the tokens themselves (`of_tokens`)."""
        raise NotImplementedError

    def check(self, every: int) -> None:
        """Refuse a number of tokens after which the tier makes room.

        Raises:
          ValueError: the score cannot be told from the queries of so few tokens.
        """

    def init(self, spec: KVSpec, slots: int) -> Float[Array, "B K S"]:
        return spec.scores(slots, spec.kv_heads)

    def fold(self, shares: Float[Array, "B K G C S"], query: Query) -> Float[Array, "B K S"]:
        """What C queries add to a token's note: their attention, over the query heads that share a key head."""
        return jnp.sum(shares, axis=(2, 3))

    def memory(self, spec: KVSpec) -> State:
        """What is kept of the stream's queries, before there are any: a pytree of arrays [B, K or H or 1, ...]."""
        return ()

    def watched(self, memory: State, query: Query) -> State:
        """The memory after a chunk's queries; padding is not `query.valid`."""
        return memory

    def rank(self, held: Held) -> Float[Array, "B K S"]:
        """The worth of each token: the highest stay, of equals the newest. Anything for slots that hold none.

        By default what is noted of its attention.
        """
        return held.noted

    def rank_all(self, held: Held) -> Float[Array, "B K S"]:
        """The same where all of a stream's tokens compete at once, in the order of the stream."""
        return self.rank(held)
