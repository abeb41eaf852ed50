"""`QueryMoments`: a score that judges by where a stream's queries are, and by how they spread."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from streamjax.kv.query import KVSpec, Query, State
from streamjax.kv.scores.score import Held, Score


class Moments(NamedTuple):
    """Of the queries so far, for each query head: how many, their sum, and the sum of their products, if it is kept."""

    number: Float[Array, "B H 1"]
    total: Float[Array, "B H D"]
    products: Float[Array, "B H D D"] | None = None

    @property
    def mean(self) -> Float[Array, "B H D"]:
        return self.total / jnp.maximum(self.number, 1)

    @property
    def covariance(self) -> Float[Array, "B H D D"]:
        assert self.products is not None
        mean = self.mean
        return self.products / jnp.maximum(self.number, 1)[..., None] - mean[..., None] * mean[..., None, :]


@dataclasses.dataclass(frozen=True)
class QueryMoments(Score):
    """Keeps sums of the queries, D + D^2 numbers for each query head. Subclasses rank by `self.moments(held)`."""

    needs_queries: ClassVar[bool] = True

    @property
    def keeps_products(self) -> bool:
        """Whether the sum of products is kept, which the covariance is made of."""
        return True

    def counted(self, query: Query) -> tuple[Float[Array, "B C H D"], Bool[Array, "B C"]]:
        """The queries as they are summed, and which of them are; padding never is."""
        return query.q, jnp.ones(query.q.shape[:2], bool)

    def moments(self, held: Held) -> Moments:
        return Moments(*held.memory)

    def memory(self, spec: KVSpec) -> State:
        rows, heads, width = spec.batch_size, spec.kv_heads * spec.group, spec.head_dim
        shapes = (rows, heads, 1), (rows, heads, width), (rows, heads, width, width)
        return tuple(jnp.zeros(shape, jnp.float32) for shape in shapes[: 2 + self.keeps_products])

    def watched(self, memory: State, query: Query) -> State:
        count, total, *products = memory
        q, counts = self.counted(query)
        if query.valid is not None:
            counts &= query.valid
        q = q.astype(jnp.float32) * counts[..., None, None]
        return (
            count + jnp.sum(counts, axis=1, dtype=jnp.float32)[:, None, None],
            total + jnp.sum(q, axis=1),
            *(each + jnp.einsum("bchd,bche->bhde", q, q, precision="highest") for each in products),
        )
