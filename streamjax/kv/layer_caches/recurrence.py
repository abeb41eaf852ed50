"""What a recurrent mixer keeps of a stream: arrays of a fixed size, however far the stream is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.partial import accumulator
from streamjax.field_checks import Count, Size, check_fields
from streamjax.kv.cache import Cache
from streamjax.kv.layer_caches.no_slots import NoSlots
from streamjax.kv.query import KVSpec, State


class RecurrentState(NamedTuple):
    """A layer's state; what the layer does not have is None.

    memory: a matrix of each head, in the dtype of sums. conv: the newest inputs of a short convolution, oldest first,
    in G groups of D channels. Chunked backprop keeps several states of several layers in one.
    """

    memory: Float[Array, "*S B H K V"] | None = None
    conv: Float[Array, "*S B W G D"] | None = None

    def map_axes(self, fn: Callable[[Any, Sequence[str | None]], Any]) -> RecurrentState:
        """A copy with `fn(array, logical names of its dimensions)` in the place of every array."""
        memory = None if self.memory is None else fn(self.memory, ("batch", "heads", None, None))
        return RecurrentState(memory, None if self.conv is None else fn(self.conv, ("batch", None, "kv_heads", None)))


@dataclasses.dataclass(frozen=True)
class Recurrence(NoSlots):
    """The state of a recurrent layer, which has no other cache: it stays whatever preset a stream is given.

    memory: heads, channels of a key, channels of a value. conv: tokens behind the newest one that a short convolution
    reads, groups of channels, channels of a group. Empty: the layer has none.
    """

    memory: tuple[Size, ...] = ()
    conv: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)

    def init(self, spec: KVSpec) -> RecurrentState:
        return self.empty(spec.batch_size, spec.dtype)

    def empty(self, batch_size: int, dtype: Any) -> RecurrentState:
        """The state of streams that have seen nothing, of a model whose activations are of `dtype`."""
        memory = jnp.zeros((batch_size, *self.memory), accumulator(dtype)) if self.memory else None
        return RecurrentState(memory, jnp.zeros((batch_size, *self.conv), dtype) if self.conv else None)

    def sizes(self, state: RecurrentState) -> Sequence[tuple[int, int]]:
        """One place, which the first token fills; none where the layer keeps nothing."""
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        return [(1, total)] if total else []


@dataclasses.dataclass(frozen=True)
class BesideRecurrence(Cache):
    """What a layer keeps that has a recurrent mixer beside its attention: attention's cache, and the mixer's state.

    Its state is the pair of theirs.
    """

    attention: Cache
    recurrence: Cache

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def slots(self) -> int:
        return self.attention.slots

    @property
    def span(self) -> int:
        return self.attention.span

    @property
    def capacity(self) -> int | None:
        return self.attention.capacity

    @property
    def reach(self) -> int | None:
        return self.attention.reach

    @property
    def needs_ids(self) -> bool:
        return self.attention.needs_ids

    @property
    def made_for(self) -> str | None:
        return self.attention.made_for

    @property
    def needs_outputs(self) -> bool:
        return self.attention.needs_outputs

    @property
    def shares_values(self) -> bool:
        return self.attention.shares_values

    def init(self, spec: KVSpec) -> tuple[State, RecurrentState]:
        return self.attention.init(spec), self.recurrence.init(spec)

    @property
    def alters_every(self) -> int | None:
        return self.attention.alters_every

    @property
    def notes_attention(self) -> bool:
        return self.attention.notes_attention

    def unaltered(self, state: tuple[State, RecurrentState]) -> Int32[Array, " B"] | int:
        return self.attention.unaltered(state[0])

    def levels(self, state: tuple[State, RecurrentState]) -> Int32[Array, " B"] | int | None:
        return self.attention.levels(state[0])

    def deferred(self, one_by_one: bool = False) -> BesideRecurrence:
        return BesideRecurrence(self.attention.deferred(one_by_one), self.recurrence.deferred(one_by_one))

    def renumbered(self) -> tuple[Cache, tuple[int, ...] | None]:
        attention, heads = self.attention.renumbered()
        return BesideRecurrence(attention, self.recurrence), heads

    def sizes(self, state: tuple[State, RecurrentState]) -> Sequence[tuple[int, int]]:
        return [*self.attention.sizes(state[0]), *self.recurrence.sizes(state[1])]
