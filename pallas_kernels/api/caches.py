"""Attention to caches, and scores of their pages: see `pallas_kernels.api`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int8, Int32, UInt8

from pallas_kernels import argument_checks
from pallas_kernels.api.platforms import Implementation, find
from pallas_kernels.coded import Coded
from pallas_kernels.gpu import decode_attention as gpu_decode
from pallas_kernels.gpu import page_scores as gpu_scores
from pallas_kernels.gpu import paged_attention as gpu_paged
from pallas_kernels.partial import Partial
from pallas_kernels.tpu import decode_attention as tpu_decode
from pallas_kernels.tpu import page_scores as tpu_scores
from pallas_kernels.tpu import paged_attention as tpu_paged
from pallas_kernels.unpacking.protocol import Unpackable

MOST_READERS = 32  # rows that may have a shared page: bits of a number
_DECODING = {"tpu": tpu_decode.decode_attention, "triton": gpu_decode.decode_attention}
_PAGED = {"tpu": tpu_paged.paged_attention, "triton": gpu_paged.paged_attention}
_POOLED = {"tpu": tpu_paged.pool_attention, "triton": gpu_paged.pool_attention}
_SHARED = {"tpu": tpu_paged.shared_pool_attention, "triton": gpu_paged.shared_pool_attention}
_SCORES = {"tpu": tpu_scores.page_scores, "triton": gpu_scores.page_scores}


def decode_attention(
    q: Float[Array, "B C H D"],
    k: Array | Coded | Unpackable,
    v: Array | Coded | Unpackable,
    count: Int32[Array, " B"],
    *,
    scale: float | None = None,
    first: Int32[Array, " B"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    k_scale: Float[Array, "B K S"] | None = None,
    v_scale: Float[Array, "B K S"] | None = None,
    splits: int | None = None,
    block: int | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Partial:
    """Attention of a few queries over the tokens that a cache holds; queries do not see each other here.

    Each row's tokens lie in a ring of S slots: its oldest one in slot `first`, `count` in all. Slots that hold nothing
    are not read where whole blocks of them do. Shares of the slots are merged as partials (Lean Attention, 2405.10480).

    Args:
      q: queries of the tokens that follow the cached ones.
      k, v: [B, K, S, D] of q's dtype or int8, or uint8 [B, K, S, D / 2] with two numbers of four bits in a byte
        (`pack_int4`), as which they come with scales; or both `Coded`, in 8 to 1 bits with what belongs to them, and
        what they stand for is made in registers, or both `Unpackable`, in codes that a codec unpacks itself. TPUs take
        channels in an order where there are 128 of them.
      count: tokens in the cache, at most S.
      first: slot of the oldest token; 0 where None.
      scale, softcap: of the logits, as in `flash_attention`.
      window: how many tokens before itself a query sees; all where None.
      k_scale, v_scale: what the numbers of each slot are multiplied with.
      splits: into how many shares the slots are cut, for cores or programs that have nothing else to do: by default 1
        on a TPU, and what fills a GPU there.
      block: slots that are read at once.
      implementation, interpret: as in `flash_attention`.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or no kernel for the platform.
    """
    argument_checks.decode(q, k, v, k_scale, v_scale)
    kernel = find(_DECODING, "decoding kernel", implementation)
    scale = argument_checks.scale(scale, q)
    return kernel(
        q, k, v, count, scale=scale, first=first, window=window, softcap=softcap, k_scale=k_scale, v_scale=v_scale,
        splits=splits, block=block, interpret=interpret,
    )  # fmt: skip


def paged_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "B K S D"] | Coded | Unpackable,
    v: Float[Array, "B K S D"] | Coded | Unpackable,
    pages: Int32[Array, "B K N"],
    count: Int32[Array, " B"],
    *,
    page_size: int,
    scale: float | None = None,
    first: Int32[Array, " B"] | None = None,
    softcap: float | None = None,
    block: int | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Partial:
    """Attention of a few queries over the pages of a cache that each key head names; nothing else is read.

    A ring of slots as in `decode_attention`, of which page p is slots `p * page_size` and on. All queries of a row and
    all query heads of a key head read the same pages: queries that choose each for themselves are rows.

    Args:
      q: queries of the tokens that follow the cached ones.
      k, v: the cache, of q's dtype, or both in codes, as in `decode_attention`; TPUs take no `Unpackable` ones here.
      pages: numbers of pages, none twice; -1 for none, behind those that are named.
      count: tokens in the cache; slots of a page that hold none are not seen.
      page_size: tokens a page, a multiple of 8 (16 for bfloat16), or of the groups of codes.
      first, scale, softcap: as in `decode_attention`.
      block: slots that are worked on at once.
      implementation, interpret: as in `flash_attention`.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or no kernel for the platform.
    """
    argument_checks.paged(q, k, v, pages, page_size)
    kernel = find(_PAGED, "paged kernel", implementation)
    scale = argument_checks.scale(scale, q)
    return kernel(
        q, k, v, pages, count, page_size=page_size, scale=scale, first=first, softcap=softcap, block=block,
        interpret=interpret,
    )  # fmt: skip


def pool_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "K P S D"],
    v: Float[Array, "K P S D"],
    pages: Int32[Array, "B N"],
    count: Int32[Array, " B"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    block: int | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Partial:
    """Attention of a few queries over the tokens of their streams, which lie in pages of one pool (2309.06180).

    Token i of a row lies in slot `i % S` of page `pages[row, i // S]`. Nothing else is read, and nothing is gathered.

    Args:
      q: queries of the tokens that follow the cached ones.
      k, v: P pages of S slots, of q's dtype; S is a multiple of 8 (16 for bfloat16).
      pages: numbers of each row's pages, in the order of its tokens; several rows may have the same. Behind those that
        its tokens fill, anything.
      count: tokens of each row, at most N S.
      scale, softcap, block, implementation, interpret: as in `paged_attention`.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or no kernel for the platform.
    """
    argument_checks.pooled(q, k, v, pages, count)
    kernel = find(_POOLED, "kernel for pools", implementation)
    scale = argument_checks.scale(scale, q)
    return kernel(q, k, v, pages, count, scale=scale, softcap=softcap, block=block, interpret=interpret)


def shared_pool_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "K P S D"],
    v: Float[Array, "K P S D"],
    pages: Int32[Array, " M"],
    readers: Bool[Array, "M B"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    block: int | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Partial:
    """Attention of a few queries of each row to full pages that rows have in common (Hydragen, 2402.05099).

    Each page is read once, for the queries of all rows together.

    Args:
      q, k, v: as in `pool_attention`, of at most 32 rows.
      pages: numbers of pages, none twice; -1 for none, behind those that are named.
      readers: which rows have each page.
      scale, softcap, block, implementation, interpret: as in `paged_attention`.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or no kernel for the platform.
    """
    argument_checks.pooled(q, k, v, jnp.broadcast_to(pages, (len(q), *pages.shape)), jnp.zeros(len(q)))
    if readers.shape != (len(pages), len(q)) or len(q) > MOST_READERS:
        raise ValueError(f"q {q.shape}, pages {pages.shape}, readers {readers.shape}: use [M, B], of at most 32 rows")
    kernel = find(_SHARED, "kernel for pools", implementation)
    bit = jnp.left_shift(jnp.uint32(1), jnp.arange(len(q), dtype=jnp.uint32))
    bits = jnp.sum(jnp.where(readers, bit, 0), axis=1, dtype=jnp.uint32).view(jnp.int32)
    count = jnp.sum(pages >= 0, dtype=jnp.int32)
    scale = argument_checks.scale(scale, q)
    return kernel(q, k, v, pages, bits, count, scale=scale, softcap=softcap, block=block, interpret=interpret)


def page_scores(
    q: Float[Array, "B C H D"],
    summary: Float[Array, "B K P W"],
    some: Bool[Array, "B K P parts"] | None = None,
    *,
    bounds: bool = False,
    parts: int = 1,
    block: int | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Float[Array, "B H C P"]:
    """How well each page of a cache suits each query, in the units of `q . k`; float32. Not differentiable.

    Args:
      q: queries.
      summary: of each page `parts` vectors of D channels, whose products with a query are scores; or, with `bounds`,
        `parts` times the largest value of each of D channels and behind them the smallest: no key within these bounds
        has a larger product (Quest, 2406.10774, equation 2). Of a page's parts the best counts (LServe, 2502.14866).
      some: which parts hold anything; a page without any gets -inf.
      bounds, parts: see `summary`.
      block: pages that are worked on at once.
      implementation, interpret: as in `flash_attention`.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or no kernel for the platform.
    """
    argument_checks.scores(q, summary, some, bounds, parts)
    kernel = find(_SCORES, "kernel for scores", implementation)
    by_head = rearrange(q, "b c (k g) d -> b k (g c) d", k=summary.shape[1])
    if bounds:  # max(q * high, q * low) is q * high for a positive q, and q * low for a negative one
        by_head = jnp.concatenate((jnp.maximum(by_head, 0), jnp.minimum(by_head, 0)), axis=-1)
    found = kernel(by_head, summary, some, block=block, interpret=interpret)
    return rearrange(found, "b k (g c) p -> b (k g) c p", c=q.shape[1])


def pack_int4(x: Int8[Array, "*N D"]) -> UInt8[Array, "*N half"]:
    """Numbers from -8 to 7, two in a byte: channel i below channel i + D / 2."""
    low, high = jnp.split(x.astype(jnp.uint8), 2, axis=-1)
    return (low & 15) | (high << 4)
