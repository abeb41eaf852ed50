"""Pages whose slots lie over the mesh axis `context`, at a decode step: nobody has the keys and values of all.

Each device scores some of the pages, as many as any other, and gets the scores of all: one number a page. So all know
which pages a query reads. Each attends to what it has of these, and one maximum and one sum as large as the queries
make it the attention to all of them. Devices have equal runs of slots, so a page may begin on one and end on the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.partial import Partial, merge
from streamjax.attention.context.exchange import AXIS, place
from streamjax.attention.context.merging import merge_over_devices
from streamjax.attention.sharded import CONTEXT, names_of_partial, per_device_call
from streamjax.kv.query import Query
from streamjax.kv.slots.over_devices import QUERY, query_arrays, query_names, query_of, slot_names
from streamjax.kv.slots.ring_state import RingState


def shared_scores(
    score: Callable[[Any, Bool[Array, "B 1 P"], Query], Float[Array, "B K n P"]],
    summary: Any,
    some: Bool[Array, "B 1 P"],
    query: Query,
) -> Float[Array, "B K n P"]:
    """`score(summary, some, query)` of all pages, of which each device scores its share.

    Args:
      score: of any pages by themselves, for any rows and heads.
      summary: what an index keeps of each page, arrays [B, K, P, ...].
      some: which pages hold tokens.
      query: of one token.
    """
    leaves, tree = jax.tree.flatten(summary)
    total, devices = some.shape[2], jax.sharding.get_abstract_mesh().shape[CONTEXT]
    share = -(-total // devices)
    starts = [min(device * share, total - share) for device in range(devices)]  # the last ones are moved back to fit

    def own(*arrays: Any) -> Array:
        of_query, some, leaves = arrays[:5], arrays[5], arrays[6:]
        start = jnp.minimum(place()[0] * share, total - share)

        def mine(x: Array) -> Array:
            return x if x.shape[2] == share else jax.lax.dynamic_slice_in_dim(x, start, share, 2)

        found = score(jax.tree.unflatten(tree, list(map(mine, leaves))), mine(some), query_of(query, *of_query))
        found = jax.lax.all_gather(found, AXIS)
        pieces = [found[i][..., i * share - starts[i] :] for i in range(devices) if i * share < total]
        return jnp.concatenate(pieces, axis=-1)

    names = (*query_names(query), *[slot_names(x, "slots") for x in (some, *leaves)])
    arrays = (*query_arrays(query), some, *leaves)
    scores: Array = per_device_call(own, names, ("batch", "kv_heads", None, None), arrays)
    return scores


def read_chosen_slots(
    ring: RingState,
    query: Query,
    chosen: Int32[Array, "B K 1 N"],
    some: Bool[Array, "B K 1 N"] | None,
    size: int,
    at_zero: bool,
) -> Partial:
    """Attention of one token to its chosen pages, of which each device reads what it has.

    Args:
      ring: the slots, of which page p has `size` from `p * size` on.
      query: of one token.
      chosen: numbers of pages.
      some: which of them are pages at all; all where None.
      size: slots of a page.
      at_zero: whether all keys count as lying at position 0.
    """

    def own(*arrays: Any) -> Partial:
        *of_query, k, v, position, chosen, some, cursor, filled = arrays
        here = query_of(query, *of_query)
        (index, devices), slots, pages = place(), k.shape[2], chosen[:, :, 0]
        first = pages * size - index * slots  # of each page, counted from this device's first slot
        wanted = (first < slots) & (first + size > 0)
        wanted = wanted if some is None else wanted & some[:, :, 0]
        order = jnp.argsort(~wanted, axis=2, stable=True)  # those of this device come first
        first, wanted = (jnp.take_along_axis(x, order, axis=2) for x in (first, wanted))

        def read(first: Array, wanted: Array) -> Partial:
            at = (first[..., None] + jnp.arange(size, dtype=jnp.int32)).reshape(*first.shape[:2], -1)
            age = (cursor[:, None, None] - 1 - at - index * slots) % (slots * devices)
            valid = (at >= 0) & (at < slots) & (age < filled[:, None, None]) & jnp.repeat(wanted, size, axis=2)
            at = jnp.clip(at, 0, slots - 1)
            keys, values = (jnp.take_along_axis(x, at[..., None], axis=2, mode="clip") for x in (k, v))
            flat = at.reshape(at.shape[0], position.shape[1], -1)  # one list of positions may be that of all heads
            where = jnp.take_along_axis(position, flat, axis=2, mode="clip").reshape(at.shape)
            return here.attend(keys, values, jnp.zeros_like(where) if at_zero else where, valid)

        total = pages.shape[2]
        tile = total if query.differentiable else -(-total // devices)  # what a device has of them on average
        if tile == total:
            return merge_over_devices(read(first, wanted))

        def turn(i: Array, part: Partial) -> Partial:
            start = jnp.minimum(i * tile, total - tile)  # the last one is moved back to fit
            fresh = start + jnp.arange(tile) >= i * tile
            page, mine = (jax.lax.dynamic_slice_in_dim(x, start, tile, 2) for x in (first, wanted))
            return merge(part, read(page, mine & fresh))

        most = jnp.max(jnp.sum(wanted, axis=2, dtype=jnp.int32))
        return merge_over_devices(jax.lax.fori_loop(0, (most + tile - 1) // tile, turn, here.nothing()))

    slots = [slot_names(x, "slots") for x in (ring.k, ring.v, ring.position)]
    page = ("batch", "kv_heads", None, None)
    names = (*query_names(query), *slots, page, page, ("batch",), ("batch",))
    arrays = (*query_arrays(query), ring.k, ring.v, ring.position, chosen, some, ring.cursor, ring.filled)
    return per_device_call(own, names, names_of_partial(QUERY), arrays)
