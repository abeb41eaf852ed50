"""`Compensation`: one token in the place of all that were dropped (RazorAttention, 2407.15891, section 3.3).

A head that does not look far back still gives some of its attention to what is far. Dropped tokens are summed up in
their mean key and mean value; that one token counts as often as tokens were dropped: its logit is log(count) + q . key.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

from pallas_kernels.partial import Partial
from streamjax.kv.query import KVSpec, KVTokens, Query
from streamjax.kv.tier import Tier

COUNT_LIMIT = 2**30  # where the count saturates: later tokens still move the means, as little as they should


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompensationState:
    """Means over all dropped tokens, float32: of their keys as they were stored, of their values, and of how far they
    lie behind `last`, the position of the newest of them."""

    k: Float[Array, "B K 1 D"]
    v: Float[Array, "B K 1 V"]
    age: Float[Array, "B 1 1"]
    last: UInt32[Array, "B 1 1"]
    count: Int32[Array, " B"]


@dataclasses.dataclass(frozen=True)
class Compensation(Tier):
    """Keeps one token for all that reach it, in constant memory. The last tier of its cascade."""

    @property
    def slots(self) -> int:
        return 1

    def init(self, spec: KVSpec) -> CompensationState:
        mean = jnp.zeros((spec.batch_size, spec.kv_heads, 1, spec.head_dim), jnp.float32)
        age = jnp.zeros((spec.batch_size, 1, 1), jnp.float32)
        return CompensationState(mean, mean, age, spec.positions(1), spec.counter())

    def attend(self, state: CompensationState, query: Query, reach: int | None) -> Partial:
        some = state.count[:, None, None] > 0
        position = state.last - jnp.round(state.age).astype(jnp.uint32)
        part = query.attend(state.k, state.v, position, some)
        return part._replace(lse=part.lse + jnp.log(jnp.maximum(state.count, 1).astype(jnp.float32))[:, None, None])

    def insert(self, state: CompensationState, tokens: KVTokens) -> tuple[CompensationState, KVTokens]:
        start, more = tokens.run()
        valid = tokens.valid[..., None]
        n = jnp.maximum(more, 1).astype(jnp.float32)[:, None, None, None]
        end = jnp.maximum(start + more - 1, 0)[:, None, None]
        newest = jnp.take_along_axis(tokens.position, end, axis=2, mode="clip")
        last = jnp.where(more[:, None, None] > 0, newest, state.last)
        behind = jnp.where(tokens.valid, (last - tokens.position).astype(jnp.int32), 0).astype(jnp.float32)
        aged = state.age + (last - state.last).astype(jnp.int32).astype(jnp.float32)
        share = (more / jnp.maximum(state.count + more, 1)).astype(jnp.float32)[:, None, None]

        def moved(mean: Array, chunk: Array) -> Array:
            chunk_mean = jnp.sum(jnp.where(valid, chunk, 0), axis=2, keepdims=True, dtype=jnp.float32) / n
            return mean + share[..., None] * (chunk_mean - mean)

        age = aged + share * (jnp.sum(behind, axis=2, keepdims=True) / n[..., 0] - aged)
        new = CompensationState(
            k=moved(state.k, tokens.k),
            v=moved(state.v, tokens.v),
            age=jnp.where(more[:, None, None] > 0, age, state.age),
            last=last,
            count=jnp.minimum(state.count + more, COUNT_LIMIT),
        )
        return new, dataclasses.replace(tokens, valid=jnp.zeros_like(tokens.valid))
