"""What a layer caches, whatever it is made of: the interface that a stream sees."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jaxtyping import Array, Float

from streamjax.kv.tier import KVSpec, KVTokens, Query, State


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

    def renumbered(self) -> tuple[Cache, tuple[int, ...] | None]:
        """A cache that is equal for layers with equal states, and which key heads its heads 0, 1, ... are.

        None: they are the layer's own, and the cache is this one.
        """
        return self, None

    def sizes(self, state: State) -> Sequence[tuple[int, int]]:
        """Slots and bytes of each part of the state that fills at a pace of its own."""
        return [(self.slots, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))]
