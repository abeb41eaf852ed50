"""Attention of a chunk that also says how much of it each key got, from one computation of its logits.

How much of a query's attention a key gets is known when the query has seen everything. For the queries of a whole chunk
nobody keeps all logits until then, so `Noting.noted` computes them again, which is half of what attention costs. For
`QUERIES` of them at a time they are few enough to be kept.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int32

from pallas_kernels.partial import Partial, merge
from streamjax.attention.block_cutting import cut_blocks, join_blocks
from streamjax.attention.dense import summed_over_queries
from streamjax.kv.query import KVTokens, Query, Stored

QUERIES = 64  # queries of a chunk whose logits to all keys exist at a time


def attend_and_note(
    query: Query, stored: Stored, own: KVTokens, others: Partial, reach: int | None, filled: Int32[Array, " B"]
) -> tuple[Partial, Float[Array, "B H S"], Float[Array, "B H C"]]:
    """Attention to what is stored and to the chunk's own tokens, and the sum of shares that each of these keys got.

    Args:
      query, own: the chunk.
      stored: keys and values of a tier, of which the first `filled` slots may hold tokens.
      others: attention of the same queries to all else that they see; it is part of what comes back.
      reach: how far back a query sees.
      filled: slots of each row.
    """
    slots, width = stored.k.shape[2], query.q.shape[1]
    asks = jnp.ones(query.q.shape[:2], bool) if query.valid is None else query.valid
    own_pieces = {"q": query.q, "raw_q": query.raw_q, "position": query.position, "valid": asks}
    pieces: dict[str, Any] = {name: cut_blocks(x, QUERIES) for name, x in own_pieces.items()}
    pieces["back"] = None if query.back is None else _cut_back(query.back)
    chunk = Stored(own.k, own.v, own.position, own.valid)

    def read(used: int) -> tuple[Partial, Array, Array]:
        first = Stored(*(x[:, :, :used] for x in stored[:4]))

        def some(masses: tuple[Array, ...], piece: tuple[dict[str, Any], Partial]) -> tuple[tuple[Array, ...], Partial]:
            asked = dataclasses.replace(query, **piece[0])
            found = [
                asked.attend_weighted(*part[:4], reach, before) for part, before in ((first, True), (chunk, False))
            ]
            whole = merge(piece[1], *(part for part, _, _ in found))
            lse = rearrange(whole.lse, "b c (k g) -> b k g c 1", g=found[0][1].shape[2])
            counts = rearrange(piece[0]["valid"], "b c -> b 1 1 c 1") & ~jnp.isneginf(lse)
            more = (
                summed_over_queries(weights, jnp.where(counts, jnp.exp(top - lse), 0.0)[..., 0])
                for _, weights, top in found
            )
            return tuple(map(jnp.add, masses, more)), whole

        heads = query.q.shape[2]
        nothing = tuple(jnp.zeros((len(asks), heads, n), jnp.float32) for n in (used, width))
        (mass, mine), parts = jax.lax.scan(some, nothing, (pieces, Partial(*(cut_blocks(x, QUERIES) for x in others))))
        whole = Partial(*(join_blocks(x, width) for x in parts))
        return whole, jnp.pad(mass, ((0, 0), (0, 0), (0, slots - used))), mine

    sizes = sorted({-(-slots // 4), -(-slots // 2), slots})
    enough = sum((jnp.max(filled) > size).astype(jnp.int32) for size in sizes[:-1])
    found: tuple[Partial, Array, Array] = jax.lax.switch(enough, [partial(read, size) for size in sizes])
    return found


def _cut_back(back: Int32[Array, "B *K C"]) -> Int32[Array, "N B *K C"]:
    return jnp.moveaxis(cut_blocks(jnp.moveaxis(back, -1, 1), QUERIES), 2, -1)
