"""`Noting`: what tiers write down about the attention that their tokens get, a number for each token of N heads.

A tier that chooses by attention is asked how it wants it noted, and the tiers in front of it do so: the note goes with
its token from tier to tier. Notes are float32 arrays [B, N, S], and queries come chunk by chunk. What is noted must not
depend on how they are cut, so a note is a sum over queries of something that each query says by itself.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt32

from streamjax.attention.dense import summed_over_queries
from streamjax.kv.codecs.slots import Slots
from streamjax.kv.query import KVSpec, Query


@dataclasses.dataclass(frozen=True)
class Noting:
    """The attention that a token gets, summed over all queries, for each query head."""

    of_tokens: ClassVar[bool] = (
        False  # whether a note is said of a token when it comes, by who ranks it (`Score.judged`)
    )

    def init(self, spec: KVSpec, slots: int) -> Float[Array, "B N S"]:
        """Notes of `slots` tokens about which nothing is known."""
        return spec.scores(slots)

    def fold(self, shares: Float[Array, "B K G C S"], query: Query) -> Float[Array, "B N S"]:
        """What C queries add to the notes of S tokens: `shares` of their attention; 0 where a query does not see."""
        return summed_over_queries(shares)

    def kept(self, note: Float[Array, "B N S"], query: Query) -> Float[Array, "B N S"]:
        """What is left of notes when the queries of a chunk come: all of it."""
        return note

    @property
    def sums_attention(self) -> bool:
        """Whether what queries add to notes is the attention that they give, summed, and nothing is ever forgotten."""
        own = type(self)
        return (own.fold, own.kept, own.joined) == (Noting.fold, Noting.kept, Noting.joined)

    def joined(self, note: Float[Array, "B N S"], more: Float[Array, "B N S"]) -> Float[Array, "B N S"]:
        """A note, and what the queries of a chunk say: their sum."""
        return note + more

    def noted(
        self,
        note: Float[Array, "B N S"] | None,
        query: Query,
        k: Slots,
        position: UInt32[Array, "B #K S"],
        valid: Bool[Array, "B #K S"],
        lse: Float[Array, "B C H"],
        reach: int | None = None,
        filled: Int32[Array, " B"] | None = None,
    ) -> Float[Array, "B N S"]:
        """The notes of stored tokens after a chunk's queries, whose whole attention is `lse`; of new ones where None.

        Rows without queries keep theirs bit for bit, and so do all where no query changes what was said of a token.
        """
        if self.of_tokens:
            assert note is not None, "what is said of new tokens comes with them"
            return note
        more = query.mass(k, position, valid, lse, reach, filled, fold=partial(self.fold, query=query))
        return more if note is None else self.joined(self.kept(note, query), more)


def kept_within_block(note: Float[Array, "B N S"], query: Query) -> Float[Array, "B N S"]:
    """Notes that count the queries of a block only: none of them where a chunk begins one."""
    assert query.block is not None, "a cascade says where blocks are to tiers that ask for them"
    begins = query.block.before == 0
    if query.valid is not None:
        begins &= query.valid.any(axis=1)
    return jnp.where(begins[:, None, None], 0.0, note)
