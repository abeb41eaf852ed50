"""`NearestAbove`: into the most similar kept key, where it is similar enough (D2O, Wan et al., 2406.13035)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from streamjax.field_checks import Fraction
from streamjax.kv.merging.merge import Joining, Merge, Side, most_alike
from streamjax.kv.query import KVSpec, State


@dataclasses.dataclass(frozen=True)
class NearestAbove(Merge):
    """A token joins the kept one with the most similar key, if their cosine reaches a threshold; others are dropped.

    The threshold is the mean of all such cosines, averaged exponentially from choice to choice, for each key head by
    itself. A token weighs exp(cosine), the one that it joins e. `momentum`: what the newest mean weighs.
    """

    momentum: Fraction = 0.7

    def memory(self, spec: KVSpec) -> State:
        """The threshold of each head, and whether there has been any choice."""
        return jnp.zeros((spec.batch_size, spec.kv_heads, 2), jnp.float32)

    def join(self, stays: Side, leaves: Side, memory: State) -> Joining:
        target, cosine = most_alike(leaves, stays)
        some = leaves.valid & (cosine > -jnp.inf)
        count = jnp.sum(some, axis=2)
        mean = jnp.sum(jnp.where(some, cosine, 0.0), axis=2, dtype=jnp.float32) / jnp.maximum(count, 1)
        before, known = memory[..., 0], memory[..., 1] > 0
        threshold = jnp.where(known, (1 - self.momentum) * before + self.momentum * mean, mean)
        threshold = jnp.where(count > 0, threshold, before)
        alike = some & (cosine >= threshold[..., None])
        return Joining(
            target,
            jnp.where(alike, jnp.exp(cosine), 0.0),
            jnp.full(stays.worth.shape, jnp.e, jnp.float32),
            jnp.stack((threshold, (known | (count > 0)).astype(jnp.float32)), axis=-1),
        )
