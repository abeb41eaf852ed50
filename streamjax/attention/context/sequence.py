"""Self-attention of a sequence whose tokens lie over the mesh axis `context`.

Outside attention the compiler places everything, and tokens stay in order: a device has a stretch of the sequence. Here
the axes are taken by hand. Full attention goes by a ring or by gathered keys, for which queries are laid out in zigzag
and back; windows, and chunks that devices share, by what stands in front of a stretch; chunks within one by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.partial import accumulator, add_sink_logits
from pallas_kernels.patterns import Chunked, Full, Pattern, SinkWindow, SlidingWindow
from streamjax.attention.context.blocks import Rule
from streamjax.attention.context.exchange import from_zigzag, place, to_zigzag
from streamjax.attention.context.gathered import Own as Gathered
from streamjax.attention.context.gathered import gathered_attention
from streamjax.attention.context.ring import Own as Ring
from streamjax.attention.context.ring import ring_attention
from streamjax.attention.context.windows import window_attention
from streamjax.attention.sharded import a_key_head_for_each_device, per_device_call

Exchange = Literal["auto", "ring", "gather"]
GATHERED_BYTES = 256 << 20  # of gathered keys and values on a device, up to which "auto" gathers


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
    local: Callable[..., Array],
) -> Float[Array, "B T H D"]:
    """`dispatch.sequence_attention` where `context_shards` is above 1.

    Args:
      q, k, v, pattern, scale, segment_ids, softcap, slopes, sink_logits: as there.
      exchange: how full attention comes to the keys of other devices. "ring": they go round, in as many turns as there
        are devices. "gather": all at once, which is faster while they are few. "auto": "gather" up to 256 MiB.
      kernels: whether the platform's kernels are used; where they take the arguments if None.
      local: `dispatch.sequence_attention`, for chunks that lie on one device.
    """
    k, v = (a_key_head_for_each_device(x, q.shape[2]) for x in (k, v))

    def own(q: Array, k: Array, v: Array, ids: Any, slopes: Any, sinks: Any) -> Array:
        if isinstance(pattern, Chunked) and q.shape[1] % pattern.size == 0:
            return local(
                q, k, v, pattern, scale=scale, segment_ids=ids, softcap=softcap, slopes=slopes, sink_logits=sinks
            )
        rule = Rule(pattern, scale, softcap, kernels)
        return _of_a_stretch(rule, q, k, v, ids, slopes, sinks, exchange)

    query, key = ("batch", "length", "heads", None), ("batch", "length", "kv_heads", None)
    names = (query, key, key, query[:2], ("heads",), ("heads",))
    return per_device_call(own, names, query, (q, k, v, segment_ids, slopes, sink_logits))


def _of_a_stretch(
    rule: Rule, q: Array, k: Array, v: Array, ids: Any, slopes: Any, sinks: Any, exchange: Exchange
) -> Float[Array, "B T H D"]:
    """This device's part, under `jax.shard_map`."""
    (index, size), length, pattern = place(), q.shape[1], rule.pattern
    if isinstance(pattern, Chunked):
        pattern, ids = _chunks_as_segments(pattern.size, ids, q.shape[:2], index, size)
    if isinstance(pattern, SlidingWindow | SinkWindow):
        if pattern.window >= length * size:
            pattern = Full()
        elif pattern.window - 1 <= (size - 1) * length and pattern.sinks <= length:
            known: dict[str, Any] = {"scale": rule.scale, "softcap": rule.softcap, "kernels": rule.kernels}
            return add_sink_logits(window_attention(q, k, v, pattern, ids=ids, slopes=slopes, **known), sinks).out
    rule = Rule(pattern, rule.scale, rule.softcap, rule.kernels)
    even = length % 2 == 0
    bytes_gathered = 2 * k.size * size * k.dtype.itemsize
    ring = exchange == "ring" or (exchange == "auto" and bytes_gathered > GATHERED_BYTES)
    if ring and even and isinstance(pattern, Full):
        laid_ids = None if ids is None else to_zigzag(ids)
        out = ring_attention(rule, Ring(to_zigzag(q), to_zigzag(k), to_zigzag(v), laid_ids, slopes, sinks))
    else:
        lay = to_zigzag if even else lambda x: x[None]
        query_ids = None if ids is None else lay(ids)
        out = gathered_attention(rule, Gathered(lay(q), k, v, query_ids, ids, slopes, sinks))
    back = from_zigzag(out.astype(q.dtype)) if even else out[0]
    return back.astype(accumulator(q.dtype))


def _chunks_as_segments(
    chunk: int, ids: Any, shape: tuple[int, ...], index: Any, size: int
) -> tuple[SlidingWindow, Int32[Array, "B T"]]:
    """Attention within chunks is a window of their size, with each chunk of each segment as a segment of its own."""
    number = (index * shape[1] + jnp.arange(shape[1])) // chunk
    count = -(-size * shape[1] // chunk)
    own = jnp.broadcast_to(number, shape) if ids is None else ids * count + number
    return SlidingWindow(chunk), own.astype(jnp.int32)
