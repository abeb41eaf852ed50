"""Self-attention of a sequence whose tokens lie over the mesh axis `context`.

Outside attention the compiler places everything, and tokens stay in order: a device has a stretch of the sequence. Here
the axes are taken by hand. Full attention goes by a ring or by gathered keys, for which queries are laid out in zigzag
and back; windows, and chunks that devices share, by what stands in front of a stretch; chunks within one by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int32

from pallas_kernels.partial import Partial, accumulator, add_sink_logits
from pallas_kernels.patterns import Chunked, Full, Pattern, SinkWindow, SlidingWindow
from streamjax.attention.context.blocks import Rule
from streamjax.attention.context.exchange import from_zigzag, place, to_zigzag
from streamjax.attention.context.gathered import Own as Gathered
from streamjax.attention.context.gathered import found as found_at_once
from streamjax.attention.context.gathered import gathered_attention
from streamjax.attention.context.ring import Own as Ring
from streamjax.attention.context.ring import found as found_round
from streamjax.attention.context.ring import ring_attention
from streamjax.attention.context.windows import window_attention
from streamjax.attention.sharded import (
    a_key_head_for_each_device,
    context_shards,
    names_of_partial,
    per_device_call,
)

Exchange = Literal["auto", "ring", "gather"]
GATHERED_BYTES = 256 << 20  # of gathered keys and values on a device, up to which "auto" gathers
_QUERY, _KEY = ("batch", "length", "heads", None), ("batch", "length", "kv_heads", None)
# Of queries, keys, values, segments, slopes and sinks; of a partial.
_NAMES = (_QUERY, _KEY, _KEY, _QUERY[:2], ("heads",), ("heads",), _QUERY, _QUERY[:3])


def context_attention(
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
    exchange: Exchange = "auto",
    kernels: bool | None = None,
    known: Partial | None = None,
    local: Callable[..., Array],
) -> Float[Array, "B T H D"]:
    """`dispatch.sequence_attention` where `context_shards` is above 1.

    Args:
      q, k, v, pattern, scale, segment_ids, softcap, slopes, sink_logits: as there.
      exchange: how full attention comes to the keys of other devices. "ring": they go round, in as many turns as there
        are devices. "gather": all at once, which is faster while they are few. "auto": "gather" up to 256 MiB.
      kernels: whether the platform's kernels are used; where they take the arguments if None.
      known: what `found_attention` gave for these arguments: then it is not computed again.
      local: `dispatch.sequence_attention`, for chunks that lie on one device.
    """
    k, v = (a_key_head_for_each_device(x, q.shape[2]) for x in (k, v))

    def own(q: Array, k: Array, v: Array, ids: Any, slopes: Any, sinks: Any, known: Any) -> Array:
        if _is_local(pattern, q.shape[1]):
            return local(
                q, k, v, pattern, scale=scale, segment_ids=ids, softcap=softcap, slopes=slopes, sink_logits=sinks
            )
        rule = Rule(pattern, scale, softcap, kernels)
        return _of_a_stretch(rule, q, k, v, ids, slopes, sinks, exchange, known)

    def call(*arrays: Any) -> Array:
        given: Any = (*arrays[:6], None if known is None else Partial(*arrays[6:]))
        return own(*given)

    arrays = (q, k, v, segment_ids, slopes, sink_logits, *(known or ()))
    return per_device_call(call, _NAMES[: len(arrays)], _QUERY, arrays)


def found_attention(
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
    exchange: Exchange = "auto",
    kernels: bool | None = None,
) -> Partial | None:
    """What `context_attention` takes as `known`, by devices' stretches (`as_stretches`), each in the order in which it
    computes; arguments as there. None for attention that meets few keys of other devices: it is computed again."""
    if _is_local(pattern, q.shape[1]) or _far_pattern(pattern, q.shape[1], context_shards(q.shape[1])) is None:
        return None
    k, v = (a_key_head_for_each_device(x, q.shape[2]) for x in (k, v))

    def own(q: Array, k: Array, v: Array, ids: Any, slopes: Any, sinks: Any) -> Partial:
        rule = Rule(pattern, scale, softcap, kernels)
        _, found, rule, laid = _laid_out(rule, q, k, v, ids, slopes, sinks, exchange)
        return Partial(*(rearrange(x, "l b c ... -> b (l c) ...") for x in found(rule, laid)))

    arrays = q, k, v, segment_ids, slopes, sink_logits
    return per_device_call(own, _NAMES[:6], names_of_partial(_QUERY), arrays)


def _of_a_stretch(
    rule: Rule, q: Array, k: Array, v: Array, ids: Any, slopes: Any, sinks: Any, exchange: Exchange, known: Any
) -> Float[Array, "B T H D"]:
    """This device's part, under `jax.shard_map`."""
    (index, size), length, pattern = place(), q.shape[1], rule.pattern
    if _far_pattern(pattern, length, size) is None:
        if isinstance(pattern, Chunked):
            pattern, ids = _chunks_as_segments(pattern.size, ids, q.shape[:2], index, size)
        assert isinstance(pattern, SlidingWindow | SinkWindow)
        near: dict[str, Any] = {"scale": rule.scale, "softcap": rule.softcap, "kernels": rule.kernels}
        return add_sink_logits(window_attention(q, k, v, pattern, ids=ids, slopes=slopes, **near), sinks).out
    attention, _, rule, laid = _laid_out(rule, q, k, v, ids, slopes, sinks, exchange)
    blocks = laid.q.shape[0]
    if known is not None:
        known = Partial(*(rearrange(x, "b (l c) ... -> l b c ...", l=blocks) for x in known))
    out = attention(rule, laid, known)
    back = from_zigzag(out.astype(q.dtype)) if blocks == 2 else out[0]
    return back.astype(accumulator(q.dtype))


def _laid_out(
    rule: Rule, q: Array, k: Array, v: Array, ids: Any, slopes: Any, sinks: Any, exchange: Exchange
) -> tuple[Callable[..., Array], Callable[..., Partial], Rule, Any]:
    """How this device meets the keys of all others: attention, what it finds, and what both are given."""
    (index, size), length, pattern = place(), q.shape[1], rule.pattern
    far = _far_pattern(pattern, length, size)
    assert far is not None
    if isinstance(pattern, Chunked):
        _, ids = _chunks_as_segments(pattern.size, ids, q.shape[:2], index, size)
    rule = Rule(far, rule.scale, rule.softcap, rule.kernels)
    even = length % 2 == 0
    bytes_gathered = 2 * k.size * size * k.dtype.itemsize
    ring = exchange == "ring" or (exchange == "auto" and bytes_gathered > GATHERED_BYTES)
    lay = to_zigzag if even else lambda x: x[None]
    laid_ids = None if ids is None else lay(ids)
    if ring and even and isinstance(far, Full):
        own = Ring(lay(q), lay(k), lay(v), laid_ids, slopes, sinks)
        return ring_attention, found_round, rule, own
    return gathered_attention, found_at_once, rule, Gathered(lay(q), k, v, laid_ids, ids, slopes, sinks)


def _is_local(pattern: Pattern, length: int) -> bool:
    """Whether stretches hold whole chunks, within which tokens attend."""
    return isinstance(pattern, Chunked) and length % pattern.size == 0


def _far_pattern(pattern: Pattern, length: int, size: int) -> Pattern | None:
    """The pattern by which tokens of stretches of this length meet the keys of all of `size` devices; None: a window
    for which what stands in front of a stretch is enough. Chunks are windows, by `_chunks_as_segments`."""
    if isinstance(pattern, Chunked):
        pattern = SlidingWindow(pattern.size)
    if isinstance(pattern, SlidingWindow | SinkWindow):
        if pattern.window >= length * size:
            return Full()
        if pattern.window - 1 <= (size - 1) * length and pattern.sinks <= length:
            return None
    return pattern


def _chunks_as_segments(
    chunk: int, ids: Any, shape: tuple[int, ...], index: Any, size: int
) -> tuple[SlidingWindow, Int32[Array, "B T"]]:
    """Attention within chunks is a window of their size, with each chunk of each segment as a segment of its own."""
    number = (index * shape[1] + jnp.arange(shape[1])) // chunk
    count = -(-size * shape[1] // chunk)
    own = jnp.broadcast_to(number, shape) if ids is None else ids * count + number
    return SlidingWindow(chunk), own.astype(jnp.int32)
