"""Decoding by the platform's kernels: when one reads a tier's slots in the place of XLA, and how it is called.

A kernel sees a ring by age and knows no positions. That is the same thing for one new token: everything that a tier of
successive tokens holds lies before it and within its reach. Chunks of several tokens, and models with ALiBi, are XLA's.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels import api
from pallas_kernels.api import platforms
from pallas_kernels.argument_checks import DTYPES
from pallas_kernels.partial import Partial
from streamjax.attention.sharded import names_of_partial, per_device_call, splits
from streamjax.kv.codecs.slots import CodedSlots, Slots
from streamjax.kv.tier import Query

KERNEL_SLOTS = 1024  # below, a kernel would be called for little
_NAMES = (("batch", None, "heads", None), *(("batch", "kv_heads", None, None),) * 2)  # of queries, keys and values
_OUT = names_of_partial(_NAMES[0])


def kernel_decodes(query: Query, k: Slots, top_k: int | None = None) -> bool:
    """Whether a kernel reads the slots [S] of these keys for a query, or `top_k` of the pages that they lie in, [P, S].

    The query's `implementation` says so; where it is None, the platform has to have a kernel that takes the cache as it
    lies, there must be one device and slots enough, and the choice is logged once.

    Raises:
      ValueError: implementation "pallas" for what the kernels do not take.
    """
    if query.implementation == "xla" or query.differentiable or query.q.shape[1] > 1:
        return False
    if isinstance(k, CodedSlots):
        if query.implementation == "pallas":
            raise ValueError("the kernels for decoding do not take codes: use implementation None or 'xla'")
        return False
    page = None if top_k is None else k.shape[3]
    refused = _refused(query, k, page)
    if query.implementation == "pallas":
        if refused is not None:
            raise ValueError(f"the kernels for decoding do not take {refused}: use implementation None or 'xla'")
        return True
    read = k.shape[2] if top_k is None or page is None else top_k * page
    if refused is not None or read < KERNEL_SLOTS:
        return False
    taken = platforms.takes_cache(k.shape[-1], math.prod(k.shape[2:-1]), k.dtype.name)
    platforms.log_choice(f"decoding over long {'paged' if page else 'contiguous'} caches", "pallas" if taken else "xla")
    return taken


def decode(
    query: Query,
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S V"],
    count: Int32[Array, " B"],
    first: Int32[Array, " B"] | None = None,
) -> Partial:
    """Attention of one token to all `count` tokens of a ring, the oldest of which is in slot `first`."""
    v = v if v.shape[-1] else k

    def own(q: Array, k: Array, v: Array, count: Array, first: Array | None) -> Partial:
        return api.decode_attention(q, k, v, count, first=first, scale=query.scale, softcap=query.softcap)

    return per_device_call(own, (*_NAMES, ("batch",), ("batch",)), _OUT, (query.q, k, v, count, first))


def decode_pages(
    query: Query,
    k: Float[Array, "B K P S D"],
    v: Float[Array, "B K P S V"],
    chosen: Int32[Array, "B K 1 N"],
    some: Bool[Array, "B K 1 N"] | None,
    count: Int32[Array, " B"],
    first: Int32[Array, " B"],
) -> Partial:
    """Attention of one token to the chosen pages of a ring; `some` says which of them are pages at all."""
    if some is not None:
        chosen = -jnp.sort(-jnp.where(some, chosen, -1), axis=3)  # the kernel wants those that are none behind
    slots = "b k p s d -> b k (p s) d"
    arrays = query.q, rearrange(k, slots), rearrange(v, slots), chosen[:, :, 0], count, first

    def own(q: Array, k: Array, v: Array, pages: Array, count: Array, first: Array) -> Partial:
        return api.paged_attention(
            q, k, v, pages, count, page_size=size, first=first, scale=query.scale, softcap=query.softcap
        )

    size = k.shape[3]
    return per_device_call(own, (*_NAMES, ("batch", "kv_heads", None), ("batch",), ("batch",)), _OUT, arrays)


def _refused(query: Query, k: Array, page: int | None) -> str | None:
    """What the kernels do not take; None where they take it."""
    if query.slopes is not None:
        return "ALiBi"
    if splits("slots"):
        return "slots on several devices"
    if k.dtype != query.q.dtype or k.dtype.name not in DTYPES:
        return f"queries in {query.q.dtype} and keys in {k.dtype}"
    if page is not None and page % (32 // k.dtype.itemsize):
        return f"pages of {page} tokens in {k.dtype}"
    return None
