"""Ring attention (2310.01889) in the zigzag layout: keys and values go round, and no device ever has all of them.

With P devices a causal sequence lies in 2 P blocks, of which device d has d, its low one, and 2 P - 1 - d, its high
one. After s turns it holds the keys of device j = d - s. Its high queries see all of j's low keys. Besides, for j < d
its low queries see j's low keys, for j > d its high queries see j's high ones; nothing else is visible. So each turn is
two whole blocks for every device. The next keys are on their way while these are computed.

Backwards the keys go round once more, and their gradients with them, one turn behind, until they are home.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.partial import Partial, accumulator, add_sink_logits, merge, named
from streamjax.attention.context.blocks import Given, KeyBlock, Rule, attend, constants, gradients, sink_gradient
from streamjax.attention.context.exchange import place, to_next

LOW, HIGH = 0, 1


class Own(NamedTuple):
    """What a device has, in the zigzag layout. Sinks are learned logits, see `add_sink_logits`."""

    q: Float[Array, "2 B c H D"]
    k: Float[Array, "2 B c K D"]
    v: Float[Array, "2 B c K D"]
    ids: Int32[Array, "2 B c"] | None
    slopes: Float[Array, " H"] | None
    sinks: Float[Array, " H"] | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring_attention(rule: Rule, own: Own, known: Partial | None = None) -> Float[Array, "2 B c H D"]:
    """Full causal attention of a sequence over the devices of the axis, in the dtype of sums.

    known: what `found` gave for these arguments; then nothing goes round, but backwards.
    """
    return _forward(rule, own, known)[0]


def _forward(rule: Rule, own: Own, known: Partial | None = None) -> tuple[Float[Array, "2 B c H D"], Any]:
    whole = named(found(rule, own)) if known is None else known
    return whole.out, (own, whole, known)


def found(rule: Rule, own: Own) -> Partial:
    """The output of `ring_attention`, and the log-sum-exp of the logits, sinks among them."""

    def visit(keys: KeyBlock, meeting: _Meeting, parts: Any) -> Any:
        q, given = own.q[meeting.query], _given(own, meeting)
        out, lse = merge(Partial(*(x[meeting.query] for x in parts)), attend(rule, q, keys, meeting.key, given))
        return Partial(
            *(
                jax.lax.dynamic_update_index_in_dim(x, new, meeting.query, 0)
                for x, new in zip(parts, (out, lse), strict=True)
            )
        )

    shape, dtype = own.q.shape, accumulator(own.q.dtype)
    parts: Any = Partial(jnp.zeros(shape, dtype), jnp.full(shape[:-1], -jnp.inf, dtype))
    keys = KeyBlock.of(own.k, own.v, own.ids)

    def turn(s: Any, keys: KeyBlock, parts: Any) -> Any:
        for meeting in _meetings(s, shape[2]):
            parts = visit(keys, meeting, parts)
        return parts

    def one(s: Any, carry: tuple[KeyBlock, Any]) -> tuple[KeyBlock, Any]:
        keys, parts = carry
        return jax.tree.map(to_next, keys), turn(s, keys, parts)

    keys, parts = one(0, (keys, parts))
    size = place()[1]
    keys, parts = jax.lax.fori_loop(1, size - 1, one, (keys, parts))
    parts = turn(size - 1, keys, parts)
    return add_sink_logits(parts, own.sinks)


class _Meeting(NamedTuple):
    """A block of queries and one of keys that it sees: which of the two, and how far apart they are in tokens."""

    query: Int[Array, ""] | int
    key: Int[Array, ""] | int
    offset: Int[Array, ""] | int


def _meetings(s: Any, length: int) -> list[_Meeting]:
    """What meets after s turns, of blocks of `length` tokens."""
    index, size = place()
    if isinstance(s, int) and s == 0:
        across = (2 * size - 1 - 2 * index) * length
        return [_Meeting(LOW, LOW, 0), _Meeting(HIGH, LOW, across), _Meeting(HIGH, HIGH, 0)]
    other = (index - s) % size
    which = jnp.where(other < index, LOW, HIGH)
    return [
        _Meeting(HIGH, LOW, (2 * size - 1 - index - other) * length),
        _Meeting(which, which, jnp.abs(index - other) * length),
    ]


def _given(own: Own, meeting: _Meeting) -> Given:
    return Given(None if own.ids is None else own.ids[meeting.query], own.slopes, meeting.offset)


def _backward(rule: Rule, saved: Any, d_out: Float[Array, "2 B c H D"]) -> tuple[Own, Partial | None]:
    own, whole, known = saved
    keys, size = KeyBlock.of(own.k, own.v, own.ids), place()[1]
    dtype = accumulator(own.q.dtype)

    def turn(s: Any, keys: KeyBlock, d_q: Array) -> tuple[Array, tuple[Array, Array]]:
        d_k, d_v = (jnp.zeros(x.shape, dtype) for x in keys[:2])
        for meeting in _meetings(s, own.q.shape[2]):
            at = meeting.query
            part = Partial(whole.out[at], whole.lse[at])
            more, d_k, d_v = gradients(
                rule, own.q[at], keys, meeting.key, _given(own, meeting), part, d_out[at], d_k, d_v
            )
            d_q = jax.lax.dynamic_update_index_in_dim(d_q, d_q[at] + more, at, 0)
        return d_q, (d_k, d_v)

    def one(s: Any, carry: tuple[KeyBlock, Array, Any]) -> tuple[KeyBlock, Array, Any]:
        keys, d_q, sums = carry
        sums = jax.tree.map(to_next, sums)
        d_q, found = turn(s, keys, d_q)
        return jax.tree.map(to_next, keys), d_q, jax.tree.map(jnp.add, sums, found)

    d_q, sums = turn(0, keys, jnp.zeros(own.q.shape, dtype))
    keys = jax.tree.map(to_next, keys)
    keys, d_q, sums = jax.lax.fori_loop(1, size - 1, one, (keys, d_q, sums))
    sums = jax.tree.map(to_next, sums)
    d_q, found = turn(size - 1, keys, d_q)
    d_k, d_v = (to_next(x + y) for x, y in zip(sums, found, strict=True))
    d_k, d_v = (jnp.swapaxes(x, 2, 3).astype(own.k.dtype) for x in (d_k, d_v))
    ids, slopes = constants(own.ids, own.slopes)
    d_own = Own(d_q.astype(own.q.dtype), d_k, d_v, ids, slopes, sink_gradient(whole, d_out, own.sinks))
    return d_own, jax.tree.map(jnp.zeros_like, known)


ring_attention.defvjp(_forward, _backward)
