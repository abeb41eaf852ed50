"""Attention inside chosen pages of a sequence over the devices of `context`: pages go round, queries stay.

The output is a sum over the pages that a query chose, with weights that are known beforehand. So a device adds what its
queries read in the pages that are passing, and nothing has to be merged. After s turns device d has the pages of device
d - s; it never has those of more than two. Backwards they go round once more, and their gradients one turn behind.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.partial import accumulator
from streamjax.attention.context.blocks import constants
from streamjax.attention.context.exchange import place, to_next

Pages = tuple[Float[Array, "B K P S D"], Float[Array, "B K P S D"]]
# Attention of queries to the pages that they chose, -1 for none: (q, k, v, chosen, weights), as in landmarks.page_forms
Attend = Callable[..., Float[Array, "B C H D"]]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def read_round(
    attend: Attend,
    q: Float[Array, "B C H D"],
    pages: Pages,
    chosen: Int32[Array, "B C K n"],
    weights: Float[Array, "B C K n"],
) -> Float[Array, "B C H D"]:
    """What a device's queries read, in the dtype of sums.

    Args:
      attend: how they read the pages that are passing.
      q: the device's queries.
      pages: keys and values of its own P pages; those of all devices have numbers 0, 1, ... in the order of devices.
      chosen, weights: numbers of the pages that each query reads, -1 for none, and what each counts.
    """
    return _forward(attend, q, pages, chosen, weights)[0]


def _forward(attend: Attend, q: Array, pages: Pages, chosen: Array, weights: Array) -> tuple[Array, Any]:
    def add(s: Any, passing: Pages, out: Array) -> Array:
        return out + attend(q, *passing, _passing(chosen, s, passing), weights)

    def turn(s: Any, carry: tuple[Pages, Array]) -> tuple[Pages, Array]:
        passing, out = carry
        return jax.tree.map(to_next, passing), add(s, passing, out)

    last = place()[1] - 1
    passing, out = jax.lax.fori_loop(0, last, turn, (pages, jnp.zeros(q.shape, accumulator(q.dtype))))
    return add(last, passing, out), (q, pages, chosen, weights)


def _passing(chosen: Int32[Array, "B C K n"], s: Int[Array, ""] | int, pages: Pages) -> Int32[Array, "B C K n"]:
    """Which of the pages that are passing after s turns each query reads, -1 for none."""
    index, size = place()
    count = pages[0].shape[2]
    own = chosen - (index - s) % size * count
    return jnp.where((own >= 0) & (own < count), own, -1).astype(jnp.int32)


def _backward(attend: Attend, saved: Any, d_out: Float[Array, "B C H D"]) -> tuple[Array, Pages, Any, Array]:
    q, pages, chosen, weights = saved
    dtype = accumulator(q.dtype)

    def add(s: Any, passing: Pages, own: tuple[Array, Array]) -> tuple[tuple[Array, Array], Pages]:
        """Gradients of the queries and weights with those of a turn, and of what is passing."""
        here = _passing(chosen, s, passing)
        _, back = jax.vjp(lambda q, k, v, weights: attend(q, k, v, here, weights), q, *passing, weights)
        d_q, d_k, d_v, d_weights = (x.astype(dtype) for x in back(d_out.astype(dtype)))
        return (own[0] + d_q, own[1] + d_weights), (d_k, d_v)

    def turn(s: Any, carry: tuple[Pages, Any, Pages]) -> tuple[Pages, Any, Pages]:
        passing, own, sums = carry
        sums = jax.tree.map(to_next, sums)
        own, found = add(s, passing, own)
        return jax.tree.map(to_next, passing), own, jax.tree.map(jnp.add, sums, found)

    size = place()[1]
    own, sums = add(0, pages, (jnp.zeros(q.shape, dtype), jnp.zeros(weights.shape, dtype)))
    passing, own, sums = jax.lax.fori_loop(1, size - 1, turn, (jax.tree.map(to_next, pages), own, sums))
    sums = jax.tree.map(to_next, sums)
    (d_q, d_weights), found = add(size - 1, passing, own)
    d_k, d_v = (to_next(x + y).astype(pages[0].dtype) for x, y in zip(sums, found, strict=True))
    return d_q.astype(q.dtype), (d_k, d_v), constants(chosen)[0], d_weights.astype(weights.dtype)


read_round.defvjp(_forward, _backward)
