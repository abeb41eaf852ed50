"""Windows over a sequence that lies on several devices: each gets the few keys in front of its own, and the sinks."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import api
from pallas_kernels.api import platforms
from pallas_kernels.partial import Partial, merge
from pallas_kernels.patterns import SinkWindow, SlidingWindow
from streamjax.attention.context.blocks import KERNEL_TOKENS
from streamjax.attention.context.exchange import before, of_device, place
from streamjax.attention.dense import attend
from streamjax.attention.flash import flash_attention

NOTHING = jnp.iinfo(jnp.int32).min  # the segment of places in front of the sequence


def window_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    pattern: SlidingWindow | SinkWindow,
    *,
    ids: Int32[Array, "B T"] | None,
    slopes: Float[Array, " H"] | None,
    scale: float,
    softcap: float | None,
    kernels: bool | None,
) -> Partial:
    """Attention of this device's stretch: at most the keys of all other devices stand in front of it."""
    (index, _), length, count = place(), q.shape[1], pattern.window - 1
    own = jnp.zeros(q.shape[:2], jnp.int32) if ids is None else ids
    in_front = jnp.where(index * length - count + jnp.arange(count) < 0, NOTHING, before(own, count))
    keys, values = (jnp.concatenate((before(x, count), x), axis=1) for x in (k, v))
    window = SlidingWindow(pattern.window)
    if kernels is None:
        kernels = length >= KERNEL_TOKENS and platforms.takes(window, q.dtype.name)
    blocks: Any = api.flash_attention if kernels else flash_attention
    known: dict[str, Any] = {"slopes": slopes, "scale": scale, "softcap": softcap}
    part = blocks(
        q, keys, values, window, offset=count, segment_ids=(own, jnp.concatenate((in_front, own), axis=1)), **known
    )
    if not pattern.sinks:
        return part
    keys, values = (jnp.swapaxes(of_device(0, x[:, : pattern.sinks]), 1, 2) for x in (k, v))
    query, key = index * length + jnp.arange(length)[:, None], jnp.arange(pattern.sinks)[None]
    same = own[:, :, None] == of_device(0, own[:, : pattern.sinks])[:, None]
    visible = ((key <= query - pattern.window)[None] & same)[:, None]  # those in the window are read already
    distance = (query - key).astype(jnp.float32)[None, None]
    return merge(part, attend(q, keys, values, visible, distance=distance, **known))
