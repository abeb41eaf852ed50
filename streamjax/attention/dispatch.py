"""Which implementation computes attention over a sequence: one function, the best for shapes and platform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int32

from pallas_kernels.api import platforms
from pallas_kernels.partial import add_sink_logits
from pallas_kernels.patterns import Chunked, Full, Pattern
from streamjax.attention import sharded
from streamjax.attention.context.sequence import Exchange, context_attention
from streamjax.attention.dense import attend
from streamjax.attention.flash import flash_attention

Implementation = Literal["dense", "xla", "pallas"]
DENSE_LIMIT = 512 * 512  # logits per row and head from which on the dense form is not used
KERNEL_TOKENS = 256  # a kernel works in blocks; shorter sequences would be padding mostly


def sequence_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    pattern: Pattern,
    *,
    scale: float,
    segment_ids: Int32[Array, "B T"] | None = None,
    softcap: float | None = None,
    slopes: Float[Array, " H"] | None = None,
    sink_logits: Float[Array, " H"] | None = None,
    implementation: Implementation | None = None,
    exchange: Exchange = "auto",
) -> Float[Array, "B T H D"]:
    """Self-attention of a sequence under a causal pattern; float32 output.

    Args:
      q, k, v: rotated queries and keys, values; H a multiple of K.
      pattern: which keys a query sees, by index in the sequence. Chunks (`Chunked`) become rows with full attention.
      scale, softcap, slopes: as in `dense.attend`; ALiBi distances are index differences.
      segment_ids: tokens see only their own segment.
      sink_logits: a logit more a head in every softmax, without a value (`add_sink_logits` of pallas_kernels.partial).
      implementation: `"dense"` (all logits at once), `"xla"` (blockwise, memory linear in T), `"pallas"` (the kernel of
        the platform); None chooses, and logs the choice once.
      exchange: how devices that have a stretch of the sequence each come to each other's keys, where the mesh axis
        `context` splits it; see `context.sequence.context_attention`.

    Raises:
      ValueError: an unknown implementation, or no kernel for the platform or for these arguments.
    """
    if implementation != "dense" and sharded.context_shards(q.shape[1]) > 1:
        return context_attention(
            q, k, v, pattern, scale=scale, segment_ids=segment_ids, softcap=softcap, slopes=slopes,
            sink_logits=sink_logits, exchange=exchange, local=sequence_attention,
            kernels=None if implementation is None else implementation == "pallas",
        )  # fmt: skip
    if isinstance(pattern, Chunked):
        return _by_chunks(
            (q, k, v, segment_ids), pattern.size, scale=scale, softcap=softcap, slopes=slopes,
            sink_logits=sink_logits, implementation=implementation,
        )  # fmt: skip
    if implementation is None:
        implementation = choose(q.shape[1], k.shape[1], pattern, q.dtype.name)
    if implementation in ("pallas", "xla"):
        blocks = sharded.flash_attention if implementation == "pallas" else flash_attention
        part = blocks(q, k, v, pattern, segment_ids=segment_ids, scale=scale, softcap=softcap, slopes=slopes)
        return add_sink_logits(part, sink_logits).out
    if implementation != "dense":
        raise ValueError(f"unknown attention implementation {implementation!r}; use 'dense', 'xla' or 'pallas'")
    index = jnp.arange(q.shape[1], dtype=jnp.int32)
    visible = pattern.mask(index[:, None], index[None, :])[None, None]
    if segment_ids is not None:
        visible = visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    distance = (index[:, None] - index[None, :]).astype(jnp.float32)[None, None]
    heads_first = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    part = attend(q, *heads_first, visible, scale=scale, softcap=softcap, slopes=slopes, distance=distance)
    return add_sink_logits(part, sink_logits).out


def _by_chunks(arrays: tuple[Array | None, ...], size: int, **options: Any) -> Float[Array, "B T H D"]:
    """Attention within chunks of `size` tokens: each whole chunk is a row, and what is left behind them is one more."""

    def full(arrays: Sequence[Array | None]) -> Array:
        q, k, v, ids = arrays
        return sequence_attention(q, k, v, Full(), segment_ids=ids, **options)  # type: ignore[arg-type]

    rows, length = arrays[0].shape[:2]  # type: ignore[union-attr]
    if length <= size:
        return full(arrays)
    whole = length // size * size
    cut = [None if x is None else rearrange(x[:, :whole], "b (n c) ... -> (b n) c ...", c=size) for x in arrays]
    out = rearrange(full(cut), "(b n) c ... -> b (n c) ...", b=rows)
    if whole == length:
        return out
    return jnp.concatenate((out, full([None if x is None else x[:, whole:] for x in arrays])), axis=1)


def choose(queries: int, keys: int, pattern: Pattern, dtype: str) -> Implementation:
    """The best implementation on the platform that JAX runs on: a kernel where there is one for the arguments."""
    if queries >= KERNEL_TOKENS and platforms.takes(pattern, dtype):
        return logged("pallas")
    return "dense" if queries * keys < DENSE_LIMIT else logged("xla")


def logged(choice: Implementation) -> Implementation:
    """`choice`, which the log gets once."""
    platforms.log_choice("attention over long sequences", choice)
    return choice
