"""Decoding by the platform's kernels: when one reads a tier's slots in the place of XLA, and how it is called.

A kernel sees a ring by age and knows no positions. That is the same thing for one new token: everything that a tier of
successive tokens holds lies before it and within its reach. Chunks of several tokens, and models with ALiBi, are XLA's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32, UInt32

from pallas_kernels import api
from pallas_kernels.api import platforms
from pallas_kernels.argument_checks import DTYPES
from pallas_kernels.coded import Coded
from pallas_kernels.partial import Partial, merge
from pallas_kernels.unpacking.protocol import Unpackable
from streamjax.attention.dense import attend
from streamjax.attention.rotary import Rotary
from streamjax.attention.sharded import Names, names_of_partial, per_device_call, splits
from streamjax.kv.codecs.slots import CodedSlots, Slots
from streamjax.kv.query import Query

KERNEL_SLOTS = 1024  # below, a kernel would be called for little
POOL_QUERIES = 128  # of a key head, that a kernel takes at once; more are a prompt's, whose products fill the hardware
_QUERY: Names = ("batch", None, "heads", None)
_OUT = names_of_partial(_QUERY)


def kernel_decodes(
    query: Query,
    k: Slots,
    top_k: int | None = None,
    page: int | None = None,
    position: UInt32[Array, "B #K S"] | None = None,
) -> bool:
    """Whether a kernel reads the slots [S] of these keys for a query, or `top_k` of the pages that they lie in, [P, S].

    Codes are [S] in any case; `page` is how many of them are a page. `position`: of the slots, by which a kernel turns
    keys whose codes are of unrotated ones.

    The query's `implementation` says so; where it is None, the platform has to have a kernel that takes the cache as it
    lies, there must be one device and slots enough, and the choice is logged once.

    Raises:
      ValueError: implementation "pallas" for what the kernels do not take.
    """
    if query.implementation == "xla" or query.differentiable or query.q.shape[1] > 1:
        return False
    if top_k is not None and not isinstance(k, CodedSlots):
        page = k.shape[3]
    coded = k.for_kernels(position, query.rotary) if isinstance(k, CodedSlots) else None
    refused = _refused(query, k, page, coded)
    if query.implementation == "pallas":
        if refused is not None:
            raise ValueError(f"the kernels for decoding do not take {refused}: use implementation None or 'xla'")
        return True
    read = k.shape[2] if top_k is None or page is None else top_k * page
    if refused is not None or read < KERNEL_SLOTS:
        return False
    if isinstance(k, CodedSlots):
        taken = platforms.takes_codes(coded if page is None or coded is None else coded.in_pages(page), page)
    else:
        taken = platforms.takes_cache(k.shape[-1], math.prod(k.shape[2:-1]), k.dtype.name)
    platforms.log_choice(f"decoding over long {'paged' if page else 'contiguous'} caches", "pallas" if taken else "xla")
    return taken


def decode(
    query: Query,
    k: Slots,
    v: Slots,
    count: Int32[Array, " B"],
    first: Int32[Array, " B"] | None = None,
    position: UInt32[Array, "B #K S"] | None = None,
) -> Partial:
    """Attention of one token to all `count` tokens of a ring, the oldest of which is in slot `first`."""
    v = v if v.shape[-1] else k
    waits, count = _waiting(query, k, v, count)
    slots, lying = jax.tree.flatten(tuple(_read(x, None, position, query.rotary) for x in (k, v)))

    def own(q: Array, count: Array, first: Array | None, *slots: Array) -> Partial:
        k, v = jax.tree.unflatten(lying, slots)
        return api.decode_attention(q, k, v, count, first=first, scale=query.scale, softcap=query.softcap)

    names = (_QUERY, ("batch",), ("batch",), *map(_names, slots))
    part = per_device_call(own, names, _OUT, (query.q, count, first, *slots))
    return part if waits is None else merge(part, waits)


def decode_pages(
    query: Query,
    k: Slots,
    v: Slots,
    chosen: Int32[Array, "B K 1 N"],
    some: Bool[Array, "B K 1 N"] | None,
    count: Int32[Array, " B"],
    first: Int32[Array, " B"],
    size: int,
) -> Partial:
    """Attention of one token to the chosen pages of a ring; `some` says which of them are pages at all.

    k, v: [B, K, P, S, D], or codes, of which `size` slots are a page.
    """
    if some is not None:
        chosen = -jnp.sort(-jnp.where(some, chosen, -1), axis=3)  # the kernel wants those that are none behind
    waits, count = _waiting(query, k, v, count, lambda slot: (slot[:, None] // size)[..., None] == chosen)
    slots, lying = jax.tree.flatten((_read(k, size), _read(v, size)))

    def own(q: Array, pages: Array, count: Array, first: Array, *slots: Array) -> Partial:
        k, v = jax.tree.unflatten(lying, slots)
        return api.paged_attention(
            q, k, v, pages, count, page_size=size, first=first, scale=query.scale, softcap=query.softcap
        )

    names = (_QUERY, ("batch", "kv_heads", None), ("batch",), ("batch",), *map(_names, slots))
    part = per_device_call(own, names, _OUT, (query.q, chosen[:, :, 0], count, first, *slots))
    return part if waits is None else merge(part, waits)


def kernel_reads_pool(query: Query, k: Float[Array, "K P S D"], shared: bool = False) -> bool:
    """Whether a kernel reads the pages that `query.tables` names of a pool; a few queries of a row may ask at once.

    As `kernel_decodes`: all tokens in pages lie before the queries, and none is out of reach. `shared`: pages that rows
    have in common, for all rows together.

    Raises:
      ValueError: implementation "pallas" for what the kernel does not take.
    """
    rows, heads, size = query.q.shape[1], query.q.shape[2] // k.shape[0], k.shape[2]
    if shared:
        rows *= query.q.shape[0]
        if query.q.shape[0] > api.MOST_READERS:
            return False
    if query.implementation == "xla" or query.differentiable or rows * heads > POOL_QUERIES:
        return False
    refused = _refused(query, k, size)
    if query.implementation == "pallas":
        if refused is not None:
            raise ValueError(f"the kernel for pools does not take {refused}: use implementation None or 'xla'")
        return True
    if refused is not None or query.tables.own.shape[1] * size < KERNEL_SLOTS:
        return False
    taken = platforms.takes_cache(k.shape[-1], size, k.dtype.name)
    platforms.log_choice("decoding over pools of pages", "pallas" if taken else "xla")
    return taken


def decode_pool(
    query: Query,
    k: Float[Array, "K P S D"],
    v: Float[Array, "K P S D"],
    pages: Int32[Array, "B N"],
    count: Int32[Array, " B"],
) -> Partial:
    """Attention to the first `count` tokens of each row, which lie in its `pages` in their order."""

    def own(q: Array, pages: Array, count: Array, k: Array, v: Array) -> Partial:
        return api.pool_attention(q, k, v, pages, count, scale=query.scale, softcap=query.softcap)

    pool: Names = ("kv_heads", None, None, None)
    names = (_QUERY, ("batch", None), ("batch",), pool, pool)
    return per_device_call(own, names, _OUT, (query.q, pages, count, k, v if v.shape[-1] else k))


def decode_shared(
    query: Query,
    k: Float[Array, "K P S D"],
    v: Float[Array, "K P S D"],
    pages: Int32[Array, " M"],
    readers: Bool[Array, "M B"],
) -> Partial:
    """Attention of all rows together to full pages that some of them have in common."""

    def own(q: Array, pages: Array, readers: Array, k: Array, v: Array) -> Partial:
        return api.shared_pool_attention(q, k, v, pages, readers, scale=query.scale, softcap=query.softcap)

    pool: Names = ("kv_heads", None, None, None)
    names = (_QUERY, (None,), (None, "batch"), pool, pool)
    return per_device_call(own, names, _OUT, (query.q, pages, readers, k, v if v.shape[-1] else k))


def _names(x: Array) -> Names:
    """Of keys, values, codes or what belongs to these, which all rows or all heads may have together."""
    return "batch" if x.shape[0] > 1 else None, "kv_heads" if x.shape[1] > 1 else None, None, None


def _read(
    x: Slots,
    page: int | None = None,
    position: UInt32[Array, "B #K S"] | None = None,
    rotary: Rotary | None = None,
) -> Array | Coded | Unpackable:
    """Keys or values as a kernel reads them, [B, K, S, D], or in pages of so many slots."""
    if isinstance(x, CodedSlots):
        coded = x.for_kernels(position, rotary)
        assert coded is not None  # `_refused`
        return coded if page is None else coded.in_pages(page)
    return x if x.ndim == 4 else rearrange(x, "b k p s d -> b k (p s) d")


def _waiting(
    query: Query,
    k: Slots,
    v: Slots,
    count: Int32[Array, " B"],
    chosen: Callable[[Int32[Array, "B T"]], Bool[Array, "B K T N"]] | None = None,
) -> tuple[Partial | None, Int32[Array, " B"]]:
    """Attention to the newest tokens, which are not coded yet, and the number of the others.

    Args:
      chosen: which of the pages that a head reads hold these slots; all do where None.
    """
    waits = k.waiting() if isinstance(k, CodedSlots) else None
    if waits is None:
        return None, count
    (keys, slots, there), (values, *_) = waits, v.waiting()
    seen = there[:, None, None]
    if chosen is not None:
        seen = seen & chosen(slots).any(axis=3)[:, :, None]
    part = attend(query.q, keys, values, seen, scale=query.scale, softcap=query.softcap)
    return part, count - jnp.sum(there, axis=1, dtype=jnp.int32)


def _refused(query: Query, k: Slots, page: int | None, coded: Coded | Unpackable | None = None) -> str | None:
    """What the kernels do not take; None where they take it."""
    if query.slopes is not None:
        return "ALiBi"
    if splits("slots"):
        return "slots on several devices"
    if k.dtype != query.q.dtype or k.dtype.name not in DTYPES:
        return f"queries in {query.q.dtype} and keys in {k.dtype}"
    if isinstance(k, CodedSlots):
        return None if coded is not None else f"codes of {k.codec!r}"
    if page is not None and page % (32 // k.dtype.itemsize):
        return f"pages of {page} tokens in {k.dtype}"
    return None
