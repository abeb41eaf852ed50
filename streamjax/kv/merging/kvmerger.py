"""`Gaussian`: into a neighbouring kept token, by how near the keys lie (KVMerger, Wang et al., 2407.08454)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.partial import accumulator
from streamjax.field_checks import Finite
from streamjax.kv.merging.merge import Joining, Merge, Side, in_blocks, positions_apart, summed, unit
from streamjax.kv.query import State
from streamjax.kv.slots.slot_state import take_slots


@dataclasses.dataclass(frozen=True)
class Gaussian(Merge):
    """Kept tokens are the pivots; a token joins the one next to it in the stream, before or behind, that is more alike.

    It weighs exp(-d^2 / (2 s^2)), d being how far its key lies from the pivot's and s the mean of all d that join this
    pivot, over the root of 2; the pivot weighs 1. Where the cosine is below `threshold` it is dropped: the paper keeps
    such tokens as sets of their own, for which a tier of a fixed size has no place.
    """

    threshold: Finite = 0.75

    def join(self, stays: Side, leaves: Side, memory: State) -> Joining:
        there = unit(stays.k)

        def neighbour(mine: Array, position: Array) -> tuple[Array, Array]:
            apart = positions_apart(leaves._replace(position=position), stays)
            far, none = jnp.iinfo(jnp.int32).max, ~stays.valid[:, :, None]
            before = jnp.argmin(jnp.where(none | (apart > 0), far, -apart), axis=3)
            behind = jnp.argmin(jnp.where(none | (apart < 0), far, apart), axis=3)
            alike = []
            for at, ok in ((before, apart <= 0), (behind, apart >= 0)):
                cosine = jnp.einsum("bkfd,bkfd->bkf", mine, take_slots(there, at), precision="highest")
                alike.append(jnp.where((ok & ~none).any(axis=3), cosine, -jnp.inf))
            return jnp.where(alike[1] > alike[0], behind, before).astype(jnp.int32), jnp.maximum(*alike)

        target, cosine = in_blocks(neighbour, unit(leaves.k), leaves.position)
        joins = leaves.valid & (cosine >= self.threshold)
        dtype = accumulator(stays.k.dtype)
        apart = leaves.k.astype(dtype) - take_slots(stays.k, target).astype(dtype)
        distance = jnp.where(joins, jnp.linalg.norm(apart, axis=-1), 0.0)
        count, total = (
            summed(stays.worth[..., None], x[..., None], target)[..., 0] for x in (joins.astype(dtype), distance)
        )
        mean = take_slots(total / jnp.maximum(count, 1), target)
        weight = jnp.exp(-jnp.square(distance / jnp.where(mean > 0, mean, 1.0)))
        return Joining(target, jnp.where(joins, weight, 0.0), jnp.ones(stays.worth.shape, jnp.float32))
