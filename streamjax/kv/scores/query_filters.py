"""`QFilters`: keys that point where queries do (Godey et al., 2503.02812)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from pallas_kernels.partial import accumulator
from streamjax.field_checks import check_fields
from streamjax.kv.query import KVSpec, Query, State
from streamjax.kv.scores.score import Held, Score


@dataclasses.dataclass(frozen=True)
class Filters:
    """The filter of each key head of a layer, float32 [K, D] as bytes, which hash once; and whose: a fingerprint."""

    data: bytes
    heads: int
    model: str

    def __repr__(self) -> str:
        return f"Filters({self.heads} heads of model {self.model})"

    @property
    def array(self) -> Float[np.ndarray, "K D"]:
        return np.frombuffer(self.data, np.float32).reshape(self.heads, -1)


SQUARINGS = 10  # the products' matrix to the power 1,024: directions with 0.99 of the first one's spread are gone


@dataclasses.dataclass(frozen=True)
class QFilters(Score):
    """The key along the direction in which the rotated queries spread most, towards where their mean points.

    A head's filter is the first right singular vector of its queries; heads that share a key head have the mean of
    theirs. The queries are all that the stream has had so far, or with `filters` those of a calibration text.
    """

    filters: Filters | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def needs_queries(self) -> bool:  # type: ignore[override]
        return self.filters is None

    @property
    def made_for(self) -> str | None:
        return None if self.filters is None else self.filters.model

    def memory(self, spec: KVSpec) -> State:
        """The sum of each head's queries, and the sum of their products."""
        if self.filters is not None:
            return ()
        rows, heads, width = spec.batch_size, spec.kv_heads * spec.group, spec.head_dim
        return jnp.zeros((rows, heads, width), jnp.float32), jnp.zeros((rows, heads, width, width), jnp.float32)

    def watched(self, memory: State, query: Query) -> State:
        if self.filters is not None:
            return memory
        total, products = memory
        q = query.q.astype(jnp.float32)
        if query.valid is not None:
            q = q * query.valid[..., None, None]
        return total + jnp.sum(q, axis=1), products + jnp.einsum("bchd,bche->bhde", q, q, precision="highest")

    def rank(self, held: Held) -> Float[Array, "B K S"]:
        if held.distance is not None:
            raise ValueError("QFilters() judges keys at their true places: leave Scored.distance None")
        k = held.k.astype(accumulator(held.k.dtype))
        if self.filters is not None:
            own = self.filters.array
            if own.shape != (k.shape[1], k.shape[3]):
                raise ValueError(f"the filters are of {own.shape[0]} heads, and the layer caches {k.shape[1]}")
            return jnp.einsum("kd,bksd->bks", own.astype(k.dtype), k, precision="highest")
        total, products = held.memory
        return jnp.einsum("bkd,bksd->bks", filters(total, products, k.shape[1]), k, precision="highest")


def filters(total: Float[Array, "B H D"], products: Float[Array, "B H D D"], key_heads: int) -> Float[Array, "B K D"]:
    """The filter of each key head, from the sum of its queries and of their products."""

    def squared(_: Array | int, x: Array) -> Array:
        x = x / jnp.maximum(jnp.trace(x, axis1=2, axis2=3)[..., None, None], jnp.finfo(x.dtype).tiny)
        return jnp.einsum("bhde,bhef->bhdf", x, x, precision="highest")

    # of this power only the first direction is left, and the mean on its side of it: no decomposition is needed
    power = jax.lax.fori_loop(0, SQUARINGS, squared, products)
    power = power / jnp.maximum(jnp.trace(power, axis1=2, axis2=3)[..., None, None], jnp.finfo(power.dtype).tiny)
    first = jnp.einsum("bhde,bhe->bhd", power, total, precision="highest")
    length = jnp.linalg.norm(first, axis=-1, keepdims=True)
    unit = first / jnp.where(length > 0, length, 1.0)
    return jnp.mean(rearrange(unit, "b (k g) d -> b k g d", k=key_heads), axis=2)
