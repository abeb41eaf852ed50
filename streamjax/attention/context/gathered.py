"""Attention of each device's queries to the keys of all, which are gathered, used and forgotten (Llama 3, 2407.21783).

Backwards they are gathered again, and the gradients that devices have of each other's keys are summed where these lie.
Queries may be in the zigzag layout, so that all devices have the same work, or a stretch.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.partial import Partial, accumulator, add_sink_logits, named
from streamjax.attention.context.blocks import Given, KeyBlock, Rule, attend, constants, gradients, sink_gradient
from streamjax.attention.context.exchange import AXIS, place


class Own(NamedTuple):
    """What a device has: N blocks of queries, two in the zigzag layout or one stretch, and a stretch of keys."""

    q: Float[Array, "N B c H D"]
    k: Float[Array, "B T K D"]
    v: Float[Array, "B T K D"]
    query_ids: Int32[Array, "N B c"] | None
    key_ids: Int32[Array, "B T"] | None
    slopes: Float[Array, " H"] | None
    sinks: Float[Array, " H"] | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def gathered_attention(rule: Rule, own: Own, known: Partial | None = None) -> Float[Array, "N B c H D"]:
    """Attention of a sequence over the devices of the axis, in the dtype of sums.

    known: what `found` gave for these arguments; then nothing is gathered, but backwards.
    """
    return _forward(rule, own, known)[0]


def _forward(rule: Rule, own: Own, known: Partial | None = None) -> tuple[Float[Array, "N B c H D"], Any]:
    whole = named(found(rule, own)) if known is None else known
    return whole.out, (own, whole, known)


def found(rule: Rule, own: Own) -> Partial:
    """The output of `gathered_attention`, and the log-sum-exp of the logits, sinks among them."""
    keys = _all_keys(own)
    parts = [attend(rule, own.q[i], keys, 0, _given(own, i)) for i in range(own.q.shape[0])]
    return add_sink_logits(jax.tree.map(lambda *xs: jnp.stack(xs), *parts), own.sinks)


def _all_keys(own: Own) -> KeyBlock:
    keys = KeyBlock.of(own.k[None], own.v[None], None if own.key_ids is None else own.key_ids[None])
    k, v = (jax.lax.all_gather(x, AXIS, axis=3, tiled=True) for x in keys[:2])
    return KeyBlock(k, v, None if keys.ids is None else jax.lax.all_gather(keys.ids, AXIS, axis=2, tiled=True))


def _given(own: Own, i: int) -> Given:
    index, size = place()
    block: Int[Array, ""] = index if i == 0 else 2 * size - 1 - index
    return Given(None if own.query_ids is None else own.query_ids[i], own.slopes, block * own.q.shape[2])


def _backward(rule: Rule, saved: Any, d_out: Float[Array, "N B c H D"]) -> tuple[Own, Partial | None]:
    own, whole, known = saved
    keys, d_q = _all_keys(own), []
    d_k, d_v = (jnp.zeros(x.shape, accumulator(own.q.dtype)) for x in keys[:2])
    for i in range(own.q.shape[0]):
        part = Partial(whole.out[i], whole.lse[i])
        more, d_k, d_v = gradients(rule, own.q[i], keys, 0, _given(own, i), part, d_out[i], d_k, d_v)
        d_q.append(more)
    d_k, d_v = (jax.lax.psum_scatter(x, AXIS, scatter_dimension=3, tiled=True) for x in (d_k, d_v))
    d_k, d_v = (jnp.swapaxes(x[0], 1, 2).astype(own.k.dtype) for x in (d_k, d_v))
    query_ids, key_ids, slopes = constants(own.query_ids, own.key_ids, own.slopes)
    d_sinks = sink_gradient(whole, d_out, own.sinks)
    d_own = Own(jnp.stack(d_q).astype(own.q.dtype), d_k, d_v, query_ids, key_ids, slopes, d_sinks)
    return d_own, jax.tree.map(jnp.zeros_like, known)


gathered_attention.defvjp(_forward, _backward)
