"""`PairedLayers`: keys and values of two layers: one direction, two lengths (MiniCache, Liu et al., 2405.14366)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

from pallas_kernels.partial import Partial, merge
from streamjax.field_checks import Fraction
from streamjax.kv.channels.lent import Lent
from streamjax.kv.query import KVSpec, Query, State, Stored
from streamjax.kv.slots.slot_state import take_slots

_PARALLEL = 1e-6  # of a sine, below which directions are interpolated in a line


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Directions:
    """What two layers share. k, v: unit vectors. apart: slots whose tokens each layer keeps itself."""

    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S V"]
    position: UInt32[Array, "B 1 S"]
    count: Int32[Array, " B"]
    apart: Int32[Array, "B K R"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lengths:
    """What a layer has itself. k, v: of the tokens that are kept apart. k_length, v_length: of all tokens."""

    k: Float[Array, "B K R D"]
    v: Float[Array, "B K R V"]
    k_length: Float[Array, "B K S"]
    v_length: Float[Array, "B K S"]


@dataclasses.dataclass(frozen=True)
class PairedLayers(Lent):
    """Tokens of two layers: of keys and of values one direction, interpolated on the sphere, and each layer's length.

    Each key head keeps the tokens apart whose directions differ most between the layers, by the larger of the angles
    between keys and between values. Both layers turn a token's key by the same angle, so it may be turned already.

    Args:
      apart: share of the tokens that each layer keeps as they are.
      toward: where directions lie between those of the lower layer (0) and of the upper one (1).
    """

    apart: Fraction = 0.05
    toward: Fraction = 0.6

    @property
    def kept(self) -> int:
        """How many tokens each head keeps apart."""
        return round(self.apart * self.size)

    def init(self, spec: KVSpec) -> Lengths:
        shape = spec.batch_size, spec.kv_heads, self.size
        return Lengths(spec.buffer(self.kept), spec.values(self.kept), *(jnp.zeros(shape, spec.dtype) for _ in "kv"))

    def shared(self, spec: KVSpec) -> Directions:
        apart = jnp.zeros((spec.batch_size, spec.kv_heads, self.kept), jnp.int32)
        position = jnp.zeros((spec.batch_size, 1, self.size), jnp.uint32)
        return Directions(spec.buffer(self.size), spec.values(self.size), position, spec.counter(), apart)

    def shared_and_own(self, held: Sequence[Stored], raw_k: Sequence[Array]) -> tuple[Directions, list[State]]:
        low, high = held
        k, *k_lengths, k_angle = between(low.k, high.k, self.toward)
        v, *v_lengths, v_angle = between(low.v, high.v, self.toward)
        angle = jnp.where(low.valid, jnp.maximum(k_angle, v_angle), -1.0)
        apart = jax.lax.top_k(angle, self.kept)[1].astype(jnp.int32)
        count = jnp.sum(low.valid[:, 0], axis=1, dtype=jnp.int32)
        own = [
            Lengths(take_slots(layer.k, apart), take_slots(layer.v, apart), k_length, v_length)
            for layer, k_length, v_length in zip(held, k_lengths, v_lengths, strict=True)
        ]
        return Directions(k, v, low.position, count, apart), list(own)

    def attend(self, state: Lengths, query: Query, reach: int | None) -> Partial:
        shared = self.lent(query)
        k, v = shared.k * state.k_length[..., None], shared.v * state.v_length[..., None]
        there = self.there(shared)
        if not self.kept:
            return query.attend(k, v, shared.position, there, filled=shared.count)
        of_head = jax.vmap(jax.vmap(lambda at: jnp.zeros((self.size,), bool).at[at].set(True)))
        merged = query.attend(k, v, shared.position, there & ~of_head(shared.apart), filled=shared.count)
        position = take_slots(jnp.broadcast_to(shared.position, (*k.shape[:2], self.size)), shared.apart)
        apart = query.attend(state.k, state.v, position, shared.apart < shared.count[:, None, None])
        return merge(merged, apart)


def between(
    low: Float[Array, "B K S D"], high: Float[Array, "B K S D"], toward: float
) -> tuple[Float[Array, "B K S D"], Float[Array, "B K S"], Float[Array, "B K S"], Float[Array, "B K S"]]:
    """The direction between those of two layers' vectors, the two lengths, and the angle, in radians."""
    wide = [x.astype(jnp.float32) for x in (low, high)]
    lengths = [jnp.linalg.norm(x, axis=-1) for x in wide]
    one, other = (
        x / jnp.maximum(length, jnp.finfo(jnp.float32).tiny)[..., None] for x, length in zip(wide, lengths, strict=True)
    )
    angle = jnp.arccos(jnp.clip(jnp.sum(one * other, axis=-1), -1.0, 1.0))
    sine = jnp.sin(angle)
    parts = [
        jnp.where(sine > _PARALLEL, jnp.sin(share * angle) / jnp.maximum(sine, _PARALLEL), share)[..., None]
        for share in (1.0 - toward, toward)
    ]
    direction = (parts[0] * one + parts[1] * other).astype(low.dtype)
    return direction, *(length.astype(low.dtype) for length in lengths), angle
