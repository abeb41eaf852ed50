"""Attention where keys and values lie: pages in the host's memory are read by the host, and a partial comes back.

InstInfer (Pan et al., 2409.04992) and attention offload (Chen et al., 2405.01814) move a query, which is small, to
where the cache is, and not the cache to where the query is. A partial is all that is needed of it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.partial import Partial
from streamjax.kv.pages.host_memory import compute_in_host, flat_index
from streamjax.kv.pages.selection import PageTokens, take_chosen
from streamjax.kv.query import Query

UNSEEN = -1e30  # in the place of -inf, of which the host would have to take care


def attend_in_host(
    pages: PageTokens, query: Query, chosen: Int32[Array, "B K N"], some: Bool[Array, "B K N"] | None
) -> Partial:
    """Attention of one query a row to the pages that each key head names; `some` says which of them are pages at all.

    Keys and values stay in the host's memory. What goes there are queries, numbers of pages, and one number for each
    key and query head, which says what the key's place is worth; what comes back is a `Partial`.
    """
    rows, heads, total = pages.k.shape[:3]
    position, valid = (take_chosen(x, chosen) for x in pages[2:])
    if some is not None:
        valid &= jnp.repeat(some, pages.position.shape[3], axis=2)
    visible, distance = query.visible_keys(position, valid, None)
    visible = visible[:, :, None, 0]
    worth = jnp.zeros((), jnp.float32)
    if query.slopes is not None and distance is not None:
        worth = -rearrange(query.slopes, "(k g) -> k g 1", k=heads) * distance
    worth = jnp.where(visible, worth, UNSEEN)
    q = rearrange(query.q, "b 1 (k g) d -> b k g d", k=heads)
    index = flat_index(jnp.clip(chosen, 0, total - 1), rows, heads, total)[:, None]
    shape = rows, heads, -1

    def read(q: Array, k: Array, v: Array, index: Array, worth: Array) -> tuple[Array, Array]:
        keys, values = (_pages(x, index).reshape(*shape, x.shape[-1]) for x in (k, v))
        logits = jnp.einsum("bkgd,bksd->bkgs", q, keys, preferred_element_type=jnp.float32) * query.scale
        if query.softcap is not None:
            logits = query.softcap * jnp.tanh(logits / query.softcap)
        logits = logits + worth
        top = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - top)
        whole = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.einsum("bkgs,bksd->bkgd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return out / whole, top + jnp.log(whole)

    out, lse = compute_in_host(read, q, pages.k, pages.v, index, worth)
    there = lse > UNSEEN / 2
    out, lse = jnp.where(there, out, 0.0), jnp.where(there, lse, -jnp.inf)[..., 0]
    return Partial(rearrange(out, "b k g d -> b 1 (k g) d"), rearrange(lse, "b k g -> b 1 (k g)"))


def _pages(x: Float[Array, "B K P S D"], index: Int32[Array, "M 1"]) -> Float[Array, "M S D"]:
    """Some pages of all rows and heads in one line, without a constant, which would lie on the device."""
    flat = x.reshape(-1, *x.shape[3:])
    numbers = jax.lax.GatherDimensionNumbers(offset_dims=(1, 2), collapsed_slice_dims=(0,), start_index_map=(0,))
    mode = jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return jax.lax.gather(flat, index, numbers, (1, *flat.shape[1:]), mode=mode)
