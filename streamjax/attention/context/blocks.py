"""Attention of a block of queries to a block of keys, and its gradient once all blocks' log-sum-exp is known.

By the platform's kernels for chunks where they take the block, otherwise by the loops of `blockwise`. Indices are
relative: key 0 of the block is the key with index 0, and the first query has index `offset`, however far it is.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels import api
from pallas_kernels.api import platforms
from pallas_kernels.padding import padded
from pallas_kernels.partial import Partial
from pallas_kernels.patterns import Pattern
from streamjax.attention import blockwise
from streamjax.attention.blockwise import Blocks, Keys, Queries, block_sizes, even_block

KERNEL_TOKENS = 256  # a kernel works in blocks of its own; smaller ones would be padding mostly


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is static in a call of attention. kernels: those of the platform are used; None: where they take it."""

    pattern: Pattern
    scale: float
    softcap: float | None = None
    kernels: bool | None = None


class Given(NamedTuple):
    """What a block of queries knows besides keys and values: segments of its tokens, slopes of its heads."""

    ids: Int32[Array, "B C"] | None
    slopes: Float[Array, " H"] | None
    offset: Int[Array, ""] | int


class KeyBlock(NamedTuple):
    """R blocks of keys and values, heads first, and the segments of their tokens."""

    k: Float[Array, "R B K S D"]
    v: Float[Array, "R B K S D"]
    ids: Int32[Array, "R B S"] | None

    @classmethod
    def of(
        cls, k: Float[Array, "R B S K D"], v: Float[Array, "R B S K D"], ids: Int32[Array, "R B S"] | None
    ) -> KeyBlock:
        k, v = (rearrange(x, "r b s k d -> r b k s d") for x in (k, v))
        return cls(k, v, ids)


def attend(rule: Rule, q: Float[Array, "B C H D"], keys: KeyBlock, row: Int[Array, ""] | int, given: Given) -> Partial:
    """Attention of the queries to one of the blocks of keys."""
    if _kernels(rule, q, keys):
        return api.chunk_attention(q, keys.k, keys.v, rule.pattern, row=row, **_known(rule, keys, row, given))
    blocks, queries, whole = _loops(rule, q, keys, row, given)
    out, lse = blockwise.forward(blocks, queries, whole)
    return Partial(_joined(out, q), _joined(lse[..., None], q)[..., 0])


def gradients(
    rule: Rule,
    q: Float[Array, "B C H D"],
    keys: KeyBlock,
    row: Int[Array, ""] | int,
    given: Given,
    part: Partial,
    d_out: Float[Array, "B C H D"],
    d_k: Float[Array, "R B K S D"],
    d_v: Float[Array, "R B K S D"],
) -> tuple[Float[Array, "B C H D"], Float[Array, "R B K S D"], Float[Array, "R B K S D"]]:
    """Gradient of the queries, and `d_k`, `d_v` with what this block of queries adds.

    part: attention to all keys and sinks. d_out: the cotangent of its output.
    """
    if _kernels(rule, q, keys):
        known = _known(rule, keys, row, given)
        return api.chunk_gradients(q, keys.k, keys.v, rule.pattern, part, d_out, d_k, d_v, row=row, **known)
    blocks, queries, whole = _loops(rule, q, keys, row, given)
    grouped = [_grouped(x, keys.k.shape[2], blocks.block_q) for x in (d_out, part.out, part.lse[..., None])]
    shift, lse = -jnp.sum(grouped[0] * grouped[1], axis=-1), grouped[2][..., 0]
    grads = (padded(x, 3, blocks.block_k) for x in (d_k, d_v))
    d_q, d_k, d_v = blockwise.backward(blocks, queries, whole, lse, grouped[0], shift, *grads)
    stop = keys.k.shape[3]
    return _joined(d_q, q), d_k[:, :, :, :stop], d_v[:, :, :, :stop]


def _kernels(rule: Rule, q: Array, keys: KeyBlock) -> bool:
    if rule.kernels is not None:
        return rule.kernels
    slots, width = keys.k.shape[3:]
    return q.shape[1] >= KERNEL_TOKENS and platforms.takes_buffer(rule.pattern, slots, width, q.dtype.name)


def _known(rule: Rule, keys: KeyBlock, row: Any, given: Given) -> dict[str, Any]:
    ids = None if given.ids is None or keys.ids is None else (given.ids, keys.ids[row])
    return {"scale": rule.scale, "softcap": rule.softcap, "slopes": given.slopes, "segment_ids": ids,
            "offset": given.offset}  # fmt: skip


def _loops(rule: Rule, q: Array, keys: KeyBlock, row: Any, given: Given) -> tuple[Blocks, Queries, Keys]:
    heads, slots = keys.k.shape[2:4]
    block_q, block_k = block_sizes()
    block_q, block_k = even_block(q.shape[1], block_q), min(block_k, slots)
    known = given.ids is not None and keys.ids is not None
    queries = Queries(
        q=_grouped(q, heads, block_q),
        segments=padded(given.ids, 1, block_q) if known else None,  # type: ignore[arg-type]
        slopes=None if given.slopes is None else rearrange(given.slopes, "(k g) -> k g", k=heads),
        offset=given.offset,
    )
    whole = Keys(
        k=padded(keys.k, 3, block_k),
        v=padded(keys.v, 3, block_k),
        segments=padded(keys.ids[row], 1, block_k) if known else None,  # type: ignore[index]
        row=row,
        base=0,
        stop=slots,
    )
    return Blocks(rule.pattern, rule.scale, rule.softcap, block_q, block_k), queries, whole


def _grouped(x: Float[Array, "B C H D"], heads: int, size: int) -> Float[Array, "B K G P D"]:
    return padded(rearrange(x, "b c (k g) d -> b k g c d", k=heads), 3, size)


def _joined(x: Float[Array, "B K G P D"], q: Float[Array, "B C H E"]) -> Float[Array, "B C H D"]:
    return rearrange(x[:, :, :, : q.shape[1]], "b k g c d -> b c (k g) d")


def sink_gradient(
    part: Partial, d_out: Float[Array, "*N B C H D"], sinks: Float[Array, " H"] | None
) -> Float[Array, " H"] | None:
    """Gradient of logits that stand for no token; `part` is attention with them in its log-sum-exp."""
    if sinks is None:
        return None
    share = jnp.exp(sinks.astype(part.lse.dtype) - part.lse)
    found = -share * jnp.sum(d_out * part.out, axis=-1)
    return jnp.sum(found, axis=tuple(range(found.ndim - 1))).astype(sinks.dtype)


def constants(*arrays: Array | None) -> list[Array | None]:
    """Cotangents of what gets no gradient."""

    def zero(x: Array | None) -> Any:
        if x is None:
            return None
        return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.zeros(x.shape, jax.dtypes.float0)

    return [zero(x) for x in arrays]
