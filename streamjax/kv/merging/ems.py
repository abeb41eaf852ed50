"""`ZeroClass`: evict what is like nothing, merge the rest by worth (EMS, Li et al., 2412.08521)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from streamjax.field_checks import Finite
from streamjax.kv.merging.merge import Joining, Merge, Side, most_alike
from streamjax.kv.query import State


@dataclasses.dataclass(frozen=True)
class ZeroClass(Merge):
    """A token joins the kept one with the most similar key, and each weighs what the tier's score gave it.

    One whose cosine with every kept key is below `threshold` falls into the zero class: it is dropped. So each head
    evicts and merges as many as it has that are unlike and alike. Scores below 0 weigh nothing.
    """

    threshold: Finite = 0.6

    def join(self, stays: Side, leaves: Side, memory: State) -> Joining:
        target, cosine = most_alike(leaves, stays)
        weight, own = (jnp.where(jnp.isfinite(x), jnp.maximum(x, 0.0), 0.0) for x in (leaves.worth, stays.worth))
        return Joining(target, jnp.where(cosine >= self.threshold, weight, 0.0), own)
