"""Which implementation computes attention over a sequence: one function, the best for shapes and platform."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.api import platforms
from pallas_kernels.partial import add_sinks
from pallas_kernels.patterns import Full, Pattern
from streamjax.attention import sharded
from streamjax.attention.dense import attend
from streamjax.attention.flash import flash_attention

Implementation = Literal["dense", "xla", "pallas"]
DENSE_LIMIT = 1024 * 1024  # logits per row and head up to which the dense form is used
DENSE_LIMIT_LOCAL = 512 * 512  # the same where a window leaves most of them out
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
) -> Float[Array, "B T H D"]:
    """Self-attention of a sequence under a causal pattern; float32 output.

    Args:
      q, k, v: rotated queries and keys, values; H a multiple of K.
      pattern: which keys a query sees, by index in the sequence.
      scale, softcap, slopes: as in `dense.attend`; ALiBi distances are index differences.
      segment_ids: tokens see only their own segment.
      sink_logits: one more logit a head in every softmax, without a value; see `pallas_kernels.partial.add_sinks`.
      implementation: `"dense"` (all logits at once), `"xla"` (blockwise, memory linear in T), `"pallas"` (the kernel of
        the platform); None chooses, and logs the choice once.

    Raises:
      ValueError: an unknown implementation, or no kernel for the platform or for these arguments.
    """
    if implementation is None:
        implementation = choose(q.shape[1], k.shape[1], pattern, q.dtype.name)
    if implementation in ("pallas", "xla"):
        blocks = sharded.flash_attention if implementation == "pallas" else flash_attention
        part = blocks(q, k, v, pattern, segment_ids=segment_ids, scale=scale, softcap=softcap, slopes=slopes)
        return add_sinks(part, sink_logits).out
    if implementation != "dense":
        raise ValueError(f"unknown attention implementation {implementation!r}; use 'dense', 'xla' or 'pallas'")
    index = jnp.arange(q.shape[1], dtype=jnp.int32)
    visible = pattern.visible(index[:, None], index[None, :])[None, None]
    if segment_ids is not None:
        visible = visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    distance = (index[:, None] - index[None, :]).astype(jnp.float32)[None, None]
    heads_first = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    part = attend(q, *heads_first, visible, scale=scale, softcap=softcap, slopes=slopes, distance=distance)
    return add_sinks(part, sink_logits).out


def choose(queries: int, keys: int, pattern: Pattern, dtype: str) -> Implementation:
    """The best implementation on the platform that JAX runs on: a kernel where there is one for the arguments."""
    if queries >= KERNEL_TOKENS and platforms.takes(pattern, dtype):
        return logged("pallas")
    local = not isinstance(pattern, Full) and 4 * pattern.window <= keys
    return "dense" if queries * keys <= (DENSE_LIMIT_LOCAL if local else DENSE_LIMIT) else logged("xla")


def logged(choice: Implementation) -> Implementation:
    """`choice`, which the log gets once."""
    platforms.log_choice("attention over long sequences", choice)
    return choice
