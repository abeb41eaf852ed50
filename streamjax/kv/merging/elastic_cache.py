"""`Anchors`: into the kept token that stands nearest in the stream (Elastic Cache, Liu et al., 2407.17678)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from streamjax.kv.merging.merge import Joining, Merge, Side, in_blocks, positions_apart
from streamjax.kv.query import State


@dataclasses.dataclass(frozen=True)
class Anchors(Merge):
    """Every token that leaves joins the kept one at the nearest position, of two the older; the plain mean of all."""

    def join(self, stays: Side, leaves: Side, memory: State) -> Joining:
        def nearest(position: Array) -> Array:
            apart = positions_apart(leaves._replace(position=position), stays).astype(jnp.float32)
            far = jnp.where(stays.valid[:, :, None], jnp.abs(apart) + jnp.where(apart > 0, 0.25, 0.0), jnp.inf)
            return jnp.argmin(far, axis=3).astype(jnp.int32)

        target = in_blocks(nearest, leaves.position)
        some = jnp.broadcast_to(stays.valid.any(axis=2, keepdims=True), target.shape)
        return Joining(target, some, jnp.ones(stays.worth.shape, jnp.float32))
