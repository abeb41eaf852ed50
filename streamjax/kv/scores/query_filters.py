"""`QFilters`: keys that point where queries do (Godey et al., 2503.02812)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from pallas_kernels.partial import accumulator
from streamjax.kv.layer_tables import LayerTables
from streamjax.kv.query import KVSpec, Query, State
from streamjax.kv.scores.query_moments import Moments, QueryMoments
from streamjax.kv.scores.score import Held


@dataclasses.dataclass(frozen=True, repr=False)
class Filters(LayerTables):
    """The filter of each key head of a layer, [K, D]."""


SQUARINGS = 10  # the products' matrix to the power 1,024: directions with 0.99 of the first one's spread are gone


@dataclasses.dataclass(frozen=True)
class QFilters(QueryMoments):
    """The key along the direction in which the rotated queries spread most, towards where their mean points.

    A head's filter is the first right singular vector of its queries; heads that share a key head have the mean of
    theirs. The queries are all that the stream has had so far, or with `filters` those of a calibration text.
    """

    at_true_distance: ClassVar[bool] = True

    filters: Filters | None = None

    @property
    def needs_queries(self) -> bool:  # type: ignore[override]
        return self.filters is None

    def memory(self, spec: KVSpec) -> State:
        if self.filters is None:
            return super().memory(spec)
        heads, width = self.filters.shapes[0]
        if (heads, width) != (spec.kv_heads, spec.head_dim):
            raise ValueError(f"the filters are of {heads} heads, and the layer caches {spec.kv_heads}")
        return tuple(x[:, 0] for x in self.filters.in_state(spec.batch_size))  # by key head, as a mesh splits them

    def watched(self, memory: State, query: Query) -> State:
        return super().watched(memory, query) if self.needs_queries else memory

    def rank(self, held: Held) -> Float[Array, "B K S"]:
        k = held.k.astype(accumulator(held.k.dtype))
        own = filters(self.moments(held), k.shape[1]) if self.needs_queries else held.memory[0]
        return jnp.einsum("bkd,bksd->bks", own.astype(k.dtype), k, precision="highest")


def filters(moments: Moments, key_heads: int) -> Float[Array, "B K D"]:
    """The filter of each key head, from the sum of its queries and of their products."""

    def squared(_: Array | int, x: Array) -> Array:
        x = x / jnp.maximum(jnp.trace(x, axis1=2, axis2=3)[..., None, None], jnp.finfo(x.dtype).tiny)
        return jnp.einsum("bhde,bhef->bhdf", x, x, precision="highest")

    # of this power only the first direction is left, and the mean on its side of it: no decomposition is needed
    power = jax.lax.fori_loop(0, SQUARINGS, squared, moments.products)
    power = power / jnp.maximum(jnp.trace(power, axis1=2, axis2=3)[..., None, None], jnp.finfo(power.dtype).tiny)
    first = jnp.einsum("bhde,bhe->bhd", power, moments.total, precision="highest")
    length = jnp.linalg.norm(first, axis=-1, keepdims=True)
    unit = first / jnp.where(length > 0, length, 1.0)
    return jnp.mean(rearrange(unit, "b (k g) d -> b k g d", k=key_heads), axis=2)
