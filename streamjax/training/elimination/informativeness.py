"""How much a layer's queries have to do with each block of tokens (Jenga, USENIX ATC 2025, section 4.2, the later text
of LeMo, 2501.09767).

The score of a pair of blocks is the largest mean over heads of the positive attention logits between their tokens
(equation 2). Logits count before the softmax, in which they would depend on each other. A block's informativeness is
the mean of its pairs with the blocks of queries that see it. The paper sums over all queries, those in front of a
token too; attention is causal, so here only what it computes counts, and a sum would rank old tokens first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from jaxtyping import Array, Bool, Float, Int32


def pair_scores(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    block: int,
    scale: float,
    segment_ids: Int32[Array, "B T"] | None = None,
) -> Float[Array, "B M N"]:
    """Scores of the pairs of a block of queries and one of keys, float32; 0 where no query sees a key.

    Logits exist for one block of queries at a time: B H block T of them.

    Args:
      q, k: rotated queries and keys of whole rows; T is a multiple of `block`.
      block: tokens of a block.
      scale: of the logits.
      segment_ids: tokens see only their own segment.
    """
    length = q.shape[1]
    grouped = rearrange(q, "b (m s) (k g) d -> m b s k g d", s=block, k=k.shape[2])
    segments = jnp.zeros(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids

    def of_block(piece: tuple[Array, Array, Array]) -> Float[Array, "B N"]:
        queries, index, own = piece
        logits = jnp.einsum("bskgd,btkd->bstkg", queries, k, preferred_element_type=jnp.float32) * scale
        score = reduce(jnp.maximum(logits, 0.0), "b s t k g -> b s t", "mean")
        sees = (index[:, None] >= jnp.arange(length)) & (own[:, :, None] == segments[:, None])
        return reduce(jnp.where(sees, score, 0.0), "b s (n t) -> b n", "max", t=block)

    index = rearrange(jnp.arange(length), "(m s) -> m s", s=block)
    cut = grouped, index, rearrange(segments, "b (m s) -> m b s", s=block)
    return rearrange(jax.lax.map(of_block, cut), "m b n -> b m n")


def last_seeing(rows: int, length: int, block: int, segment_ids: Int32[Array, "B T"] | None) -> Int32[Array, "B N"]:
    """The last block of queries that sees each block of keys; all from the block itself up to it do.

    A segment is a run of neighbours, so a later block sees this one as long as the segment of its last token goes on.
    """
    if segment_ids is None:
        return jnp.full((rows, length // block), length // block - 1, jnp.int32)
    ends = segment_ids[:, 1:] != segment_ids[:, :-1]
    place = jnp.where(jnp.pad(ends, ((0, 0), (0, 1)), constant_values=True), jnp.arange(length), length - 1)
    end = jax.lax.cummin(place, axis=1, reverse=True)
    return (end[:, block - 1 :: block] // block).astype(jnp.int32)


def seeing(last: Int32[Array, "B N"]) -> Bool[Array, "B M N"]:
    """Which blocks of queries see which blocks of keys, from what `last_seeing` gives."""
    blocks = jnp.arange(last.shape[1])
    return (blocks[:, None] >= blocks) & (blocks[:, None] <= last[:, None, :])


def block_scores(pairs: Float[Array, "B M N"], sees: Bool[Array, "B M N"]) -> Float[Array, "B N"]:
    """Informativeness of blocks of tokens: the mean of their pairs that there are."""
    return jnp.sum(jnp.where(sees, pairs, 0.0), axis=1) / jnp.sum(sees, axis=1)
