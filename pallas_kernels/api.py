"""The kernels' public functions: one each, whatever the platform.

`implementation` names a kernel's backend: "tpu" (Mosaic) or "triton" (NVIDIA GPUs, Ampere and later). None takes the
one of the platform that JAX runs on. "mosaic_gpu" (Hopper) is a backend of `flash_attention` that is taken by its name
alone. The XLA twins, which run anywhere, are in `streamjax.attention`; so is the dispatch between them and these.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Int8, Int32, UInt8

from pallas_kernels import checks
from pallas_kernels.checks import DTYPES
from pallas_kernels.gpu import chunk as gpu_chunk
from pallas_kernels.gpu import decode as gpu_decode
from pallas_kernels.gpu import flash as gpu_flash
from pallas_kernels.gpu import hopper
from pallas_kernels.gpu import hsa as gpu_hsa
from pallas_kernels.gpu import paged as gpu_paged
from pallas_kernels.gpu import scores as gpu_scores
from pallas_kernels.gpu.online import MAX_WIDTH
from pallas_kernels.partial import Partial, merge
from pallas_kernels.patterns import Pattern
from pallas_kernels.tpu import chunk as tpu_chunk
from pallas_kernels.tpu import decode as tpu_decode
from pallas_kernels.tpu import flash as tpu_flash
from pallas_kernels.tpu import hsa as tpu_hsa
from pallas_kernels.tpu import paged as tpu_paged
from pallas_kernels.tpu import scores as tpu_scores
from pallas_kernels.tpu.flash import MAX_SINKS
from pallas_kernels.tpu.tiles import LANES

Implementation = Literal["tpu", "triton", "mosaic_gpu"]


def platform_implementation() -> Implementation | None:
    """The kernels for the platform that JAX runs on; None where there are none."""
    return {"tpu": "tpu", "gpu": "triton"}.get(jax.default_backend())  # type: ignore[return-value]


def takes(pattern: Pattern, dtype: str) -> bool:
    """Whether `flash_attention` takes a pattern and a dtype on the platform that JAX runs on."""
    chosen = platform_implementation()
    return chosen is not None and dtype in DTYPES and (chosen != "tpu" or pattern.sinks <= MAX_SINKS)


def takes_cache(width: int, slots: int, dtype: str) -> bool:
    """Whether `decode_attention` and `paged_attention` take a cache on the platform that JAX runs on, and as it lies.

    Where slots do not fill a TPU's tiles, or heads not its lanes, its compiler lays the cache out with other dimensions
    inside: all of it would be copied at every step.
    """
    chosen = platform_implementation()
    if chosen is None or dtype not in DTYPES:
        return False
    if chosen == "triton":
        return width <= MAX_WIDTH
    return width % LANES == 0 and slots % (32 // jnp.dtype(dtype).itemsize) == 0


def takes_buffer(pattern: Pattern, slots: int, width: int, dtype: str) -> bool:
    """Whether `chunk_attention` takes a buffer on the platform that JAX runs on."""
    if platform_implementation() == "triton":
        return takes(pattern, dtype) and width <= MAX_WIDTH and slots % gpu_flash.BLOCK_K == 0
    return takes(pattern, dtype) and slots % LANES == 0


def flash_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    pattern: Pattern,
    *,
    scale: float | None = None,
    segment_ids: Int32[Array, "B T"] | tuple[Int32[Array, "B T"], Int32[Array, "B S"]] | None = None,
    offset: Int[Array, ""] | int = 0,
    softcap: float | None = None,
    slopes: Float[Array, " H"] | None = None,
    sink_logits: Float[Array, " H"] | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Partial:
    """Attention of T queries, the first of which has index `offset`, over S keys with indices 0 to S - 1.

    Differentiable in q, k, v and `sink_logits`, through both `out` and `lse` of the result. Blocks that the pattern
    rules out are neither loaded nor computed, forwards and backwards (FlashAttention-2, 2307.08691).

    Args:
      q, k, v: rotated queries and keys, values, bfloat16 or float32; H a multiple of K; products are summed in float32.
      pattern: which keys a query sees, by index.
      scale: factor on the logits, above 0; 1 / sqrt(D) where None.
      segment_ids: tokens see only their own segment; a pair gives queries' and keys' ids apart.
      offset: index of the first query, for a chunk deep in a sequence; may be traced.
      softcap: logits become `softcap * tanh(logits / softcap)`.
      slopes: ALiBi, `-slope * distance` added to the scaled logits; constants, their gradient is zero.
      sink_logits: a learned logit for each head that takes part in the softmax without a value (gpt-oss); `lse` has it.
      block_q, block_k: tokens of a block; by default those with the best schedules (docs/kernels.md).
      implementation: see the module.
      interpret: run the kernel in an interpreter, on any machine: `pltpu.InterpretParams()` or True.

    Raises:
      ValueError: shapes that do not fit together, a dtype that no kernel takes, or no kernel for the platform.
    """
    checks.flash(q, k, v, segment_ids)
    scale = checks.scale(scale, q)
    chosen = implementation or platform_implementation()
    if chosen is None:
        raise ValueError(f"no attention kernel for {jax.default_backend()}; use streamjax's implementation='xla'")
    if chosen not in _KERNELS:
        raise ValueError(f"unknown kernel implementation {chosen!r}; use {' or '.join(map(repr, _KERNELS))}")
    if segment_ids is not None and not isinstance(segment_ids, tuple):
        segment_ids = (segment_ids, segment_ids)
    found = _KERNELS[chosen](  # type: ignore[operator]
        q, k, v, pattern, scale=scale, segment_ids=segment_ids, offset=offset, softcap=softcap, slopes=slopes,
        block_q=block_q, block_k=block_k, interpret=interpret,
    )  # fmt: skip
    if sink_logits is None:
        return found
    return merge(found, Partial(jnp.zeros_like(found.out), jnp.broadcast_to(sink_logits, found.lse.shape)))


def chunk_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "R B K S D"],
    v: Float[Array, "R B K S D"],
    pattern: Pattern,
    *,
    offset: Int[Array, ""] | int,
    row: Int[Array, ""] | int = 0,
    scale: float | None = None,
    segment_ids: tuple[Int32[Array, "B C"], Int32[Array, "B S"]] | None = None,
    softcap: float | None = None,
    slopes: Float[Array, " H"] | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Partial:
    """`flash_attention` of one chunk of a sequence over the keys in a row of a buffer; not differentiable.

    With `chunk_gradients` it is what chunked backprop (StreamBP, 2506.03077) does with a chunk.

    Args:
      q: rotated queries, the first of which has index `offset`.
      k, v: buffers, of R layers, say, whose slots hold the keys with indices 0 to S - 1, the chunk's own among them.
        Slots behind the chunk's last token may hold anything finite.
      row: which of the R is meant.
      pattern, scale, segment_ids, softcap, slopes, implementation, interpret: as in `flash_attention`.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or no kernel for the platform.
    """
    checks.chunk(q, k, v)
    kernel = _find(_CHUNK, "kernel for chunks", implementation, "XLA loops")
    return kernel(
        q, k, v, pattern, offset=jnp.asarray(offset, jnp.int32), row=row, segment_ids=segment_ids, softcap=softcap,
        slopes=slopes, interpret=interpret, scale=checks.scale(scale, q),
    )  # fmt: skip


def chunk_gradients(
    q: Float[Array, "B C H D"],
    k: Float[Array, "R B K S D"],
    v: Float[Array, "R B K S D"],
    pattern: Pattern,
    part: Partial,
    d_out: Float[Array, "B C H D"],
    d_k: Float[Array, "R B K S D"],
    d_v: Float[Array, "R B K S D"],
    *,
    offset: Int[Array, ""] | int,
    row: Int[Array, ""] | int = 0,
    scale: float | None = None,
    segment_ids: tuple[Int32[Array, "B C"], Int32[Array, "B S"]] | None = None,
    softcap: float | None = None,
    slopes: Float[Array, " H"] | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B C H D"], Float[Array, "R B K S D"], Float[Array, "R B K S D"]]:
    """The backward pass of `chunk_attention`: float32 gradient of q, and `d_k`, `d_v` with this chunk's part added.

    Args:
      q, k, v, pattern, offset, row, scale, segment_ids, softcap, slopes, implementation, interpret: as there.
      part: what `chunk_attention` returned.
      d_out: cotangent of its output.
      d_k, d_v: gradients of the keys and values so far, of any float dtype; only blocks that the chunk sees change.

    Raises:
      ValueError: as there.
    """
    checks.chunk(q, k, v)
    kernel = _find(_CHUNK_GRADIENTS, "kernel for chunks", implementation, "XLA loops")
    if d_k.shape != k.shape or d_v.shape != k.shape:
        raise ValueError(f"shapes d_k {d_k.shape}, d_v {d_v.shape}: use those of k and v, {k.shape}")
    return kernel(
        q, k, v, pattern, part, d_out, d_k, d_v, offset=jnp.asarray(offset, jnp.int32), row=row,
        segment_ids=segment_ids, softcap=softcap, slopes=slopes, interpret=interpret, scale=checks.scale(scale, q),
    )  # fmt: skip


def decode_attention(
    q: Float[Array, "B C H D"],
    k: Array,
    v: Array,
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
        (`pack_int4`), as which they come with scales.
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
    checks.decode(q, k, v, k_scale, v_scale)
    kernel = _find(_DECODING, "decoding kernel", implementation)
    scale = checks.scale(scale, q)
    return kernel(
        q, k, v, count, scale=scale, first=first, window=window, softcap=softcap, k_scale=k_scale, v_scale=v_scale,
        splits=splits, block=block, interpret=interpret,
    )  # fmt: skip


def paged_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
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
      k, v: the cache, of q's dtype.
      pages: numbers of pages, none twice; -1 for none, behind those that are named.
      count: tokens in the cache; slots of a page that hold none are not seen.
      page_size: tokens a page, a multiple of 8 (16 for bfloat16).
      first, scale, softcap: as in `decode_attention`.
      block: slots that are worked on at once.
      implementation, interpret: as in `flash_attention`.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or no kernel for the platform.
    """
    checks.paged(q, k, v, pages, page_size)
    kernel = _find(_PAGED, "paged kernel", implementation)
    scale = checks.scale(scale, q)
    return kernel(
        q, k, v, pages, count, page_size=page_size, scale=scale, first=first, softcap=softcap, block=block,
        interpret=interpret,
    )  # fmt: skip


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
    checks.scores(q, summary, some, bounds, parts)
    kernel = _find(_SCORES, "kernel for scores", implementation)
    by_head = rearrange(q, "b c (k g) d -> b k (g c) d", k=summary.shape[1])
    if bounds:  # max(q * high, q * low) is q * high for a positive q, and q * low for a negative one
        by_head = jnp.concatenate((jnp.maximum(by_head, 0), jnp.minimum(by_head, 0)), axis=-1)
    found = kernel(by_head, summary, some, block=block, interpret=interpret)
    return rearrange(found, "b k (g c) p -> b (k g) c p", c=q.shape[1])


def hsa_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "B K P S D"],
    v: Float[Array, "B K P S D"],
    chosen: Int32[Array, "B K C N"],
    weights: Float[Array, "B K C N"],
    *,
    scale: float | None = None,
    block: int | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Float[Array, "B C H D"]:
    """Attention inside each of the chunks that a query chose, by a softmax of its own, summed with given weights.

    The attention of hierarchical sparse attention (2504.16795, section 3). Differentiable in q, k, v and `weights`.
    Queries are grouped by the chunk that they chose, so work is products of dense matrices and grows with the choices,
    not with the chunks; chunks that nobody chose are not read, and their gradient is 0. The result is float32.

    Args:
      q, k, v: queries, and the keys and values of P chunks of S tokens, all of which are seen; bfloat16 or float32; S a
        multiple of 8 (16 for bfloat16).
      chosen: chunks that a query reads, for each key head; none twice; -1 for none.
      weights: what each chunk's output is multiplied with; where `chosen` is -1 they count for nothing.
      scale: factor on the logits, above 0; 1 / sqrt(D) where None.
      block: rows of a tile, each a query head of a query that reads the tile's chunk; by the shapes where None.
      implementation, interpret: as in `flash_attention`.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or no kernel for the platform.
    """
    checks.hsa(q, k, v, chosen, weights, block)
    scale = checks.scale(scale, q)
    kernel = _find(_HSA, "hsa kernel", implementation)
    return kernel(q, k, v, chosen, weights, scale=scale, block=block, interpret=interpret)


def pack_int4(x: Int8[Array, "*N D"]) -> UInt8[Array, "*N half"]:
    """Numbers from -8 to 7, two in a byte: channel i below channel i + D / 2."""
    low, high = jnp.split(x.astype(jnp.uint8), 2, axis=-1)
    return (low & 15) | (high << 4)


_KERNELS = {
    "tpu": tpu_flash.flash_attention,
    "triton": gpu_flash.flash_attention,
    "mosaic_gpu": hopper.flash_attention,
}
_CHUNK = {"tpu": tpu_chunk.chunk_attention, "triton": gpu_chunk.chunk_attention}
_CHUNK_GRADIENTS = {"tpu": tpu_chunk.chunk_gradients, "triton": gpu_chunk.chunk_gradients}
_DECODING = {"tpu": tpu_decode.decode_attention, "triton": gpu_decode.decode_attention}
_HSA = {"tpu": tpu_hsa.hsa_attention, "triton": gpu_hsa.hsa_attention}
_SCORES = {"tpu": tpu_scores.page_scores, "triton": gpu_scores.page_scores}
_PAGED = {"tpu": tpu_paged.paged_attention, "triton": gpu_paged.paged_attention}


def _find(kernels: dict[str, Any], what: str, implementation: str | None, otherwise: str = "XLA path") -> Any:
    """The kernel of an implementation, or of the platform.

    Raises:
      ValueError: there is none.
    """
    chosen = implementation or platform_implementation()
    if chosen not in kernels:
        raise ValueError(f"no {what} for {chosen or jax.default_backend()}; use streamjax's {otherwise}")
    return kernels[chosen]
