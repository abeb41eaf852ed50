"""Drawn streams through a cascade, chunk by chunk, and one tier that is filled and asked; all of it compiled."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from streamjax.attention.rotary import Rotary
from streamjax.kv import KVSpec, KVTokens, Query
from tests.oracles.rotation import Turning

HEADS, KEY_HEADS, WIDTH = 4, 2, 6
SCALE = 0.7
SLOPES = (0.3, 0.2, 0.1, 0.02)
FREQUENCIES = (0.7, 0.2, 0.05)
ENDS = (3, 7)  # ids that end a page; padding has the first of them


def spec(rows: int = 1, key_heads: int = KEY_HEADS, heads: int = HEADS) -> KVSpec:
    return KVSpec(rows, key_heads, WIDTH, jnp.dtype(jnp.float32), heads // key_heads)


@dataclasses.dataclass
class Stream:
    """Drawn queries, keys and values of one stream or of several."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray

    @classmethod
    def drawn(cls, rows, length, seed=0):
        random = np.random.default_rng(seed)
        shapes = (rows, length, HEADS, WIDTH), *[(rows, length, KEY_HEADS, WIDTH)] * 2
        return cls(*(random.standard_normal(shape) for shape in shapes))


def wandering(rows=2, length=61, seed=0):
    """A stream whose keys wander, so that some are like those before them and some are not, and ids in 0 .. 9."""
    stream, random = Stream.drawn(rows, length, seed), np.random.default_rng(seed + 100)
    subject = np.cumsum(random.random((rows, length)) < 0.2, axis=1)
    subjects = random.standard_normal((rows, length + 1, KEY_HEADS, WIDTH))
    mine = np.take_along_axis(subjects, subject[:, :, None, None], axis=1)
    return dataclasses.replace(stream, k=mine + 0.6 * stream.k), random.integers(0, 10, (rows, length))


def _update(
    cascade, state, q, k, v, ids, position, seen, valid, slopes=None, rotary=None, softcap=None, differentiable=False,
    sink_logits=None,
):  # fmt: skip
    turn = (lambda x: x) if rotary is None else partial(rotary, position=position)
    first = partial(jnp.swapaxes, axis1=1, axis2=2)
    own = None if ids is None else ids[:, None]
    tokens = KVTokens(first(turn(k)), first(v), first(k), position[:, None], valid[:, None], rotary, ids=own)
    slopes = None if slopes is None else jnp.array(slopes, jnp.float32)
    sinks = None if sink_logits is None else jnp.array(sink_logits, jnp.float32)
    query = Query(turn(q), q, position, seen, slopes, rotary, SCALE, softcap, valid, differentiable, sink_logits=sinks)
    return cascade.update(state, query, tokens)


update = jax.jit(_update, static_argnums=(0, 9, 10, 11, 12, 13), donate_argnums=1)
empty = jax.jit(lambda cascade, spec: cascade.init(spec), static_argnums=(0, 1))


def run(
    cascade, stream, counts, *, ids=None, width=None, start=0, slopes=None, frequencies=None, softcap=None,
    key_heads=KEY_HEADS, sink_logits=None, differentiable=False,
):  # fmt: skip
    """Outputs [B, T, H, D] and the last state; chunk i holds `counts[i]` tokens, or `counts[i][row]` of each row.

    Again from the first count when they run out, until all rows are read. Chunks are padded to `width` (where None, to
    the largest count), so that a stream is read by one program.
    """
    rows, length, heads = stream.q.shape[:3]
    rotary = None if frequencies is None else Rotary.from_frequencies(np.array(frequencies))
    state, seen, turn = empty(cascade, spec(rows, key_heads, heads)), np.zeros(rows, int), 0
    out = np.zeros(stream.q.shape)
    wide = min(max(np.max(count) for count in counts), length) if width is None else width
    while (seen < length).any():
        count = np.minimum(np.broadcast_to(counts[turn % len(counts)], rows), length - seen)
        turn += 1
        index = seen[:, None] + np.arange(wide)
        valid = np.arange(wide) < count[:, None]

        def piece(x, pad, index=index, valid=valid):
            taken = np.take_along_axis(x, np.minimum(index, length - 1).reshape(*index.shape, *[1] * (x.ndim - 2)), 1)
            return np.where(valid.reshape(*valid.shape, *[1] * (x.ndim - 2)), taken, pad)

        arrays = (np.asarray(piece(x, 30.0), np.float32) for x in (stream.q, stream.k, stream.v))
        own = None if ids is None else np.asarray(piece(ids, ENDS[0]), np.int32)
        found, state = update(
            cascade, state, *map(jnp.asarray, arrays), None if own is None else jnp.asarray(own),
            jnp.asarray(((index + start) % 2**32).astype(np.uint32)), jnp.asarray(seen.astype(np.int32)),
            jnp.asarray(valid), slopes, rotary, softcap, differentiable, sink_logits,
        )  # fmt: skip
        for row in range(rows):
            out[row, seen[row] : seen[row] + count[row]] = np.asarray(found)[row, : count[row]]
        seen = seen + count
    return out, state


def by_lists(kind, rule, stream):
    """Outputs of the lists of class `kind`, a token at a time."""
    rows = []
    for q, k, v in zip(stream.q, stream.k, stream.v, strict=True):
        lists = kind(rule)
        rows.append([lists.read(q[i], (k[i], v[i], i)) for i in range(len(q))])
    return np.array(rows)


@partial(jax.jit, static_argnums=0)
def _store(tier, k, v, ids):
    shape = k.shape[0], 1, k.shape[2]
    position = jnp.broadcast_to(jnp.arange(k.shape[2], dtype=jnp.uint32), shape)
    return tier.store(tier.init(spec(k.shape[0])), KVTokens(k, v, k, position, jnp.ones(shape, bool), ids=ids))


def filled(tier, keys, values, ids=None):
    """The tier with [B, T, K, D] tokens stored in one chunk; `ids` [B, T] where it asks for them."""
    arrays = (jnp.asarray(np.swapaxes(x, 1, 2).astype(np.float32)) for x in (keys, values))
    return _store(tier, *arrays, None if ids is None else jnp.asarray(ids, jnp.int32)[:, None])


def plain_attention(stream, *, frequencies=None, reach=None):
    """Outputs [B, T, H, D] of plain attention in float64 to a token itself and all before it, or the last `reach`."""
    turning = Turning()
    turning.frequencies = frequencies
    q, k = (np.stack([turning.turned(x[:, i].T, i).T for i in range(x.shape[1])], axis=1) for x in (stream.q, stream.k))
    k, v = (np.repeat(x, HEADS // KEY_HEADS, axis=2) for x in (k, stream.v))
    index = np.arange(q.shape[1])
    away = index[:, None] - index
    seen = (away >= 0) & (away <= (len(index) if reach is None else reach))
    logits = np.where(seen, np.einsum("bthd,bshd->bhts", q, k) * SCALE, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", weights / weights.sum(axis=-1, keepdims=True), v)


@partial(jax.jit, static_argnums=(0, 3))
def _attend(tier, state, q, softcap, valid):
    rows, width = q.shape[:2]
    seen, position = jnp.full((rows,), 500), jnp.full((rows, width), 500, jnp.uint32)
    return tier.attend(state, Query(q, q, position, seen, None, None, SCALE, softcap, valid), None)


def ask(tier, state, q, *, softcap=None, valid=None):
    """The Partial of queries [B, C, H, D] that stand far behind all that is stored."""

    return _attend(tier, state, jnp.asarray(np.asarray(q, np.float32)), softcap, valid)


def gradients(cascade, stream, width):
    """Of a sum over all outputs, by queries, keys and values; the stream is read in chunks of `width`."""
    rows, length = stream.q.shape[:2]

    def total(q, k, v):
        state, parts = cascade.init(spec(rows)), []
        for start in range(0, length, width):
            pieces = (x[:, start : start + width] for x in (q, k, v))
            position = jnp.broadcast_to(jnp.arange(start, start + width, dtype=jnp.uint32), (rows, width))
            seen, valid = jnp.full((rows,), start), jnp.ones((rows, width), bool)
            out, state = _update(cascade, state, *pieces, None, position, seen, valid, differentiable=True)
            parts.append(out)
        return jnp.sum(jnp.sin(jnp.concatenate(parts, axis=1)))

    arrays = (jnp.asarray(x.astype(np.float32)) for x in (stream.q, stream.k, stream.v))
    return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*arrays)
