"""`ExpectedAttention`: what the queries so far make one expect of those to come (Devoto et al., 2510.00636)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from pallas_kernels.partial import accumulator
from streamjax.attention.rotary import rotate
from streamjax.field_checks import LATER, NotNegative, Size
from streamjax.kv.query import Query
from streamjax.kv.scores.query_moments import QueryMoments
from streamjax.kv.scores.score import Held


@dataclasses.dataclass(frozen=True)
class ExpectedAttention(QueryMoments):
    """The attention that a query drawn like those before would give on average, times the length of the value.

    Queries before rotation are taken for normal with the mean and covariance of all so far, and stand at the mean
    rotation of the next `ahead` positions. The expected weight of key k is exp(k . mean + k' covariance k / 2), a
    softmax over the tokens that compete, and its mean over the query heads that share the key head. The covariances
    take D^2 numbers for each query head of each layer: of SmolLM2-135M as many bytes as 192 cached tokens in bfloat16.

    Args:
      ahead: positions to come.
      skip: the first queries of a stream, which are like no others, do not count.
      covariance: whether it counts; the mean alone decides where False, and D numbers are kept for each query head.
      epsilon: added to the attention before it is multiplied by the value's length.
    """

    ahead: Size = 512
    skip: Size = 4
    epsilon: NotNegative = 0.0
    covariance: bool = dataclasses.field(default=True, metadata=LATER)

    @property
    def keeps_products(self) -> bool:
        return self.covariance

    def counted(self, query: Query) -> tuple[Float[Array, "B C H D"], Bool[Array, "B C"]]:
        return query.raw_q.astype(jnp.float32) * query.scale, query.index >= self.skip

    def rank(self, held: Held) -> Float[Array, "B K S"]:
        moments, heads, dtype = self.moments(held), held.k.shape[1], accumulator(held.k.dtype)
        k = held.k.astype(dtype)
        mean = rearrange(self._turned(moments.mean, held), "b (k g) d -> b k g d", k=heads)
        logits = jnp.einsum("bkgd,bksd->bkgs", mean, k, precision="highest")
        if self.covariance:
            spread = self._turned(self._turned(moments.covariance, held).swapaxes(2, 3), held)
            spread = rearrange(spread, "b (k g) d e -> b k g d e", k=heads)
            logits += 0.5 * jnp.einsum("bksd,bkgde,bkse->bkgs", k, spread, k, precision="highest")
        shares = jax.nn.softmax(jnp.where(held.valid[:, :, None], logits, -jnp.inf), axis=-1)
        length = jnp.linalg.norm(held.values.astype(dtype), axis=-1)
        return (jnp.mean(shares, axis=2) + self.epsilon) * length

    def _turned(self, x: Float[Array, "B H ... D"], held: Held) -> Float[Array, "B H ... D"]:
        """The last axis turned by the mean rotation of the queries to come."""
        if held.rotary is None:
            return x
        if held.distance is None:
            position = held.now[:, None] + jnp.arange(self.ahead, dtype=jnp.uint32)
        else:
            position = jnp.full((held.now.shape[0], 1), held.distance, jnp.uint32)
        cos, sin = (
            jnp.mean(part, axis=1).reshape(-1, *[1] * (x.ndim - 2), part.shape[-1])
            for part in held.rotary.table(position)
        )
        return rotate(x, cos, sin)
