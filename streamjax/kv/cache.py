"""What a layer caches, whatever it is made of: the interface that a stream sees."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from streamjax.kv.eviction_blocks import by_token, read_in_pieces
from streamjax.kv.query import KVSpec, KVTokens, Query, State


class Cache:
    """A rule for what one layer keeps of a stream. Subclasses are frozen dataclasses; `init` makes the state."""

    @property
    def slots(self) -> int:
        """Tokens that are held, in the heads that hold most."""
        raise NotImplementedError

    @property
    def span(self) -> int:
        """Positions in use at once: of the stored keys and of the query."""
        raise NotImplementedError

    @property
    def capacity(self) -> int | None:
        """Tokens after which the cache is full, where it has an end."""
        raise NotImplementedError

    @property
    def reach(self) -> int | None:
        """How far back a query sees, sinks apart. None: no fixed number of positions."""
        raise NotImplementedError

    @property
    def needs_ids(self) -> bool:
        """Whether tokens have to come with their ids."""
        return False

    @property
    def made_for(self) -> str | None:
        """A fingerprint of the model that it was measured with; None where it serves every model."""
        return None

    @property
    def needs_outputs(self) -> bool:
        """Whether tokens have to come with what takes values to the layer's output (`KVTokens.outputs`)."""
        return False

    @property
    def shares_values(self) -> bool:
        """Whether values without channels are understood: each token's key is its value (latent attention)."""
        return False

    def init(self, spec: KVSpec) -> State:
        """An empty state.

        Raises:
          ValueError: a layer that this cache is not made for.
        """
        raise NotImplementedError

    def update(self, state: State, query: Query, tokens: KVTokens) -> tuple[Float[Array, "B C H D"], State]:
        """Attend a chunk's queries to the cache and to the chunk itself, causally, and store the chunk.

        Returns the attention output in float32 and the new state. Output beyond the capacity means nothing.
        """
        raise NotImplementedError

    def deferred(self, one_by_one: bool = False) -> Cache:
        """This cache as a chunk sees it that is not stored yet; see `Deferred`."""
        return Deferred(self, one_by_one)

    @property
    def alters_every(self) -> int | None:
        """How many tokens lie at least between two moments at which what queries read of old tokens may change.

        A chunk's tokens see each other as they came. What has been stored meanwhile may be read otherwise: it has been
        coded, moved, or lies in pages that are not chosen. None: a stream gives the same however it is cut.
        """
        return 1

    @property
    def notes_attention(self) -> bool:
        """Whether what is stored depends on the attention that tokens got."""
        return True

    def unaltered(self, state: State) -> Int32[Array, " B"] | int:
        """How many tokens see the cache, one after another, as they would in one chunk: at least 1."""
        return 1

    def levels(self, state: State) -> Int32[Array, " B"] | int | None:
        """How many levels of a token tree each stream may be asked at once; None: as many as one likes.

        So many tokens, one after another, would see the cache as it is now.
        """
        return None if self.alters_every is None else self.unaltered(state)

    def renumbered(self) -> tuple[Cache, tuple[int, ...] | None]:
        """A cache that is equal for layers with equal states, and which key heads its heads 0, 1, ... are.

        None: they are the layer's own, and the cache is this one.
        """
        return self, None

    def sizes(self, state: State) -> Sequence[tuple[int, int]]:
        """Slots and bytes of each part of the state that fills at a pace of its own."""
        return [(self.slots, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))]


def least(numbers: Iterable[Int32[Array, " B"] | int | None]) -> Int32[Array, " B"] | int | None:
    """The least of those that are numbers, for each stream; None where none is."""
    some = [number for number in numbers if number is not None]
    return functools.reduce(jnp.minimum, some) if some else None


class Waiting(NamedTuple):
    """A chunk that has attended and is not stored: what its cache is given when it is known how much of it counts."""

    query: Query
    tokens: KVTokens


@dataclasses.dataclass(frozen=True)
class Deferred(Cache):
    """`cache` as a chunk sees it that is not stored yet; what `update` gives for a state is the chunk itself.

    Tokens that were guessed have to be seen by the model before anyone knows how many of them are right, and what a
    ring has overwritten or a recurrent state has taken in cannot be taken back. So the chunk attends, and the caches
    stay as they are. What they would have been given is kept: a chunk's queries, keys and values are few.

        out, waiting = Deferred(cache).update(state, query, tokens)  # `state` is as before
        state = take_in(cache, state, waiting, valid)  # as if only the valid tokens had come

    With `one_by_one` each token sees what it would see if those before it had come and been stored one by one. Where
    the cache changes under a chunk (`Cache.alters_every`) a copy of the state takes the tokens in, piece by piece.
    """

    cache: Cache
    one_by_one: bool = False

    @property
    def slots(self) -> int:
        return self.cache.slots

    @property
    def span(self) -> int:
        return self.cache.span

    @property
    def capacity(self) -> int | None:
        return self.cache.capacity

    @property
    def reach(self) -> int | None:
        return self.cache.reach

    @property
    def needs_ids(self) -> bool:
        return self.cache.needs_ids

    @property
    def made_for(self) -> str | None:
        return self.cache.made_for

    @property
    def needs_outputs(self) -> bool:
        return self.cache.needs_outputs

    @property
    def shares_values(self) -> bool:
        return self.cache.shares_values

    def init(self, spec: KVSpec) -> State:
        return self.cache.init(spec)

    def deferred(self, one_by_one: bool = False) -> Deferred:
        return self

    def update(self, state: State, query: Query, tokens: KVTokens) -> tuple[Float[Array, "B C H D"], Waiting]:
        cache, waiting = self.cache, Waiting(query, tokens)
        every, width = cache.alters_every, query.q.shape[1]
        if not self.one_by_one or every is None or query.tree is not None or width == 1:
            return cache.update(state, query, tokens)[0], waiting

        def whole(state: State) -> Array:
            return cache.update(state, query, tokens)[0]

        def in_pieces(state: State) -> Array:
            return _in_pieces(cache, state, query, tokens)[0]

        fits = (cache.unaltered(state) >= tokens.run()[1]).all()
        return jax.lax.cond(fits, whole, in_pieces, state), waiting


def _in_pieces(cache: Cache, state: State, query: Query, tokens: KVTokens) -> tuple[Float[Array, "B C H D"], State]:
    """`cache.update` of a chunk, cut where the cache changes under it."""
    assert cache.alters_every is not None
    _, count = tokens.run()

    def left(state: State) -> Int32[Array, " B"]:
        return jnp.broadcast_to(jnp.asarray(cache.unaltered(state), jnp.int32), count.shape)

    return read_in_pieces(cache.update, left, min(cache.alters_every, query.q.shape[1]), state, query, tokens)


def along(waiting: Waiting, path: Int32[Array, "B D"]) -> Waiting:
    """Of a tree that has attended, the nodes of one path of each row, as a chunk that has."""
    own, stored = by_token(waiting.query, waiting.tokens)

    def along_path(x: Array, axis: int) -> Array:
        index = jnp.expand_dims(path, [i for i in range(x.ndim) if i not in (0, axis)])
        return jnp.take_along_axis(x, index, axis, mode="clip")

    mine: dict[str, Any] = {name: along_path(x, 1) for name, x in own.items()}
    theirs: dict[str, Any] = {name: along_path(x, 2) for name, x in {**stored, "valid": waiting.tokens.valid}.items()}
    query = dataclasses.replace(waiting.query, **mine, valid=None, tree=None)
    return Waiting(query, dataclasses.replace(waiting.tokens, **theirs))


def take_in(cache: Cache, state: State, waiting: Waiting, valid: Bool[Array, "B C"], one_by_one: bool = False) -> State:
    """The state of a cache that takes in a chunk which waited, of which the `valid` tokens count, a prefix of each row.

    Equal to `cache.update` of a chunk that had no other tokens: what a token was computed from lies before it. With
    `one_by_one` equal to that of these tokens one by one, which is another state where attention is noted.
    """
    query = dataclasses.replace(waiting.query, valid=valid, answered=True, tree=None)
    tokens = dataclasses.replace(waiting.tokens, valid=valid[:, None])
    if one_by_one and cache.alters_every is not None and cache.notes_attention and valid.shape[1] > 1:
        return _in_pieces(cache, state, query, tokens)[1]
    return cache.update(state, query, tokens)[1]
