"""Pages against plain lists, and what holds whatever is chosen: everything read is dense attention."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamjax.attention.rotary import Rotary
from streamjax.kv import Cascade, Full, KVSpec, KVTokens, Mean, MinMax, Pages, Query, Representative, Sink, Window
from tests.oracles.pages import Rule, bounds, means
from tests.oracles.pages import Stream as Lists

HEADS, KEY_HEADS, WIDTH = 4, 2, 6
SCALE = 0.7


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


def _update(cascade, state, q, k, v, position, seen, valid, slopes, rotary=None, differentiable=False):
    turn = (lambda x: x) if rotary is None else partial(rotary, position=position)
    first = partial(jnp.swapaxes, axis1=1, axis2=2)
    tokens = KVTokens(first(turn(k)), first(v), first(k), position[:, None], valid[:, None], rotary)
    slopes = None if slopes is None else jnp.array(slopes, jnp.float32)
    query = Query(turn(q), q, position, seen, slopes, rotary, SCALE, None, valid, differentiable)
    return cascade.update(state, query, tokens)


update = jax.jit(_update, static_argnums=(0, 8, 9, 10))


def run(cascade, stream, counts, *, width=None, start=0, slopes=None, frequencies=None, key_heads=KEY_HEADS):
    """Outputs [B, T, H, D] of the streams, cut into `counts` tokens padded to `width`, and the last state."""
    rows, length = stream.q.shape[:2]
    rotary = None if frequencies is None else Rotary.from_frequencies(np.array(frequencies))
    state = cascade.init(KVSpec(rows, key_heads, WIDTH, jnp.dtype(jnp.float32), stream.q.shape[2] // key_heads))
    out, seen, turn = [], 0, 0
    while seen < length:
        count = min(counts[turn % len(counts)], length - seen)
        turn += 1
        wide = count if width is None else width
        index = seen + np.arange(wide)

        def piece(x, index=index, count=count, wide=wide):
            taken = x[:, np.minimum(index, length - 1)]
            return jnp.asarray(np.where((np.arange(wide) < count)[None, :, None, None], taken, 30.0), jnp.float32)

        position = jnp.broadcast_to(jnp.asarray((index + start) % 2**32, jnp.uint32), (rows, wide))
        valid = jnp.broadcast_to(jnp.asarray(np.arange(wide) < count), (rows, wide))
        found, state = update(
            cascade, state, piece(stream.q), piece(stream.k), piece(stream.v), position,
            jnp.full((rows,), seen, jnp.int32), valid, slopes, rotary,
        )  # fmt: skip
        out.append(np.asarray(found)[:, :count])
        seen += count
    return np.concatenate(out, axis=1), state


def by_lists(stream, rule):
    rows = []
    for q, k, v in zip(stream.q, stream.k, stream.v, strict=True):
        lists = Lists(rule)
        rows.append([lists.read(q[i], (k[i], v[i], i)) for i in range(len(q))])
    return np.array(rows)


INDEXES = {
    "bounds": (MinMax(), bounds(1, 4)),
    "logical pages": (MinMax(parts=2), bounds(2, 4)),
    "means": (Mean(), means(0.0)),
    "normalised means": (Mean(power=0.5), means(0.5)),
}
SLOPES = (0.3, 0.2, 0.1, 0.02)
FREQUENCIES = (0.7, 0.2, 0.05)


@pytest.mark.parametrize(
    ("name", "positions", "distance"),
    [
        *((name, "none", None) for name in INDEXES),
        ("bounds", "alibi", None),
        ("bounds", "rope", None),
        ("bounds", "rope", 9),
        ("logical pages", "alibi", 9),
        ("normalised means", "rope", 9),
    ],
)
def test_a_stream_token_by_token(name, positions, distance):
    """Pages wrap around their buffer twice; of six pages two are read."""
    index, score = INDEXES[name]
    slopes = SLOPES if positions == "alibi" else None
    frequencies = FREQUENCIES if positions == "rope" else None
    stream = Stream.drawn(2, 61)
    cascade = Cascade(Sink(2, reach=10**6), Window(5), Pages(4, 20, 2, index, distance=distance))
    found, _ = run(cascade, stream, [1], slopes=slopes, frequencies=frequencies)
    rule = Rule(KEY_HEADS, 2, 5, 4, 20, 2, score, SCALE, slopes, frequencies, distance)
    np.testing.assert_allclose(found, by_lists(stream, rule), atol=2e-5)


def test_the_most_attended_keys_stand_for_a_page():
    """InfLLM's rule, sinks apart: one choice for all heads, and the page that is being filled is always read."""
    stream = Stream.drawn(2, 70, seed=6)
    pages = Pages(4, 24, 3, Representative(2), distance=6, pool="mean", shared=True, read_newest=True)
    cascade = Cascade(Sink(2, reach=10**6), Window(6), pages)
    found, _ = run(cascade, stream, [1], frequencies=FREQUENCIES)
    rule = Rule(KEY_HEADS, 2, 6, 4, 24, 3, None, SCALE, None, FREQUENCIES, 6, representatives=2, newest=True)
    np.testing.assert_allclose(found, by_lists(stream, rule), atol=2e-5)


def test_attention_is_noted_whatever_the_chunks():
    """Tokens get their scores from the queries of their own chunk and of those after it; padding gives none."""
    stream = Stream.drawn(2, 12, seed=7)
    cascade = Cascade(Window(20), Pages(4, 8, 2, Representative(1)))
    cuts = ([1], None), ([5, 7], 8), ([12], None)
    states = [run(cascade, stream, counts, width=width)[1] for counts, width in cuts]
    for state in states:
        np.testing.assert_allclose(state[0].score[:, :, :12], states[0][0].score[:, :, :12], atol=1e-5)
        np.testing.assert_allclose(state[0].score.sum(axis=2), 12.0, rtol=1e-5)


@settings(max_examples=4)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    size=st.sampled_from([1, 2, 3, 5]),
    pages=st.integers(1, 6),
    index=st.sampled_from([MinMax(), Mean()]),
    start=st.sampled_from([0, 2**32 - 20]),
)
def test_with_every_page_read_nothing_is_missed(counts, size, pages, index, start):
    """Token by token pages are a longer window; with a tier that keeps what they lose, chunks see everything."""
    stream = Stream.drawn(2, 40, seed=1)
    tiers = Window(4), Pages(size, size * pages, pages + 1, index)
    once, _ = run(Cascade(*tiers), stream, [1], start=start)
    expected, _ = run(Cascade(Window(4 + size * pages)), stream, [1], start=start)
    np.testing.assert_allclose(once, expected, atol=1e-5)
    found, state = run(Cascade(*tiers, Full(60)), stream, counts, width=9, start=start)
    dense, _ = run(Cascade(Full(60)), stream, counts, width=9, start=start)
    np.testing.assert_allclose(found, dense, atol=1e-5)
    assert state[2].filled.tolist() == [max(40 - 4 - size * pages, 0)] * 2


@pytest.mark.parametrize("width", [None, 8])
def test_queries_of_a_chunk_choose_each_for_themselves(width):
    """While nothing falls out of the pages, what a query reads in a chunk is what it reads alone."""
    stream = Stream.drawn(3, 40, seed=2)
    cascade = Cascade(Pages(4, 40, 2))
    first = Stream(stream.q[:, :32], stream.k[:, :32], stream.v[:, :32])
    _, state = run(cascade, first, [8])
    rows = stream.q.shape[0]
    out = []
    for query in range(8):
        # a chunk of which only this query asks: the others' answers do not depend on it
        q = jnp.asarray(stream.q[:, 32 + query : 33 + query], jnp.float32)
        part = cascade.tiers[0].attend(
            state[0],
            Query(q, q, jnp.full((rows, 1), 40, jnp.uint32), jnp.full((rows,), 32), None, None, SCALE, None),
            None,
        )
        out.append(np.asarray(part.out))
    q = jnp.asarray(stream.q[:, 32:], jnp.float32)
    together = cascade.tiers[0].attend(
        state[0], Query(q, q, jnp.full((rows, 8), 40, jnp.uint32), jnp.full((rows,), 32), None, None, SCALE, None), None
    )
    np.testing.assert_allclose(together.out, np.concatenate(out, axis=1), atol=1e-6)


def test_a_block_reads_what_one_of_its_queries_wants_most():
    """Two queries, two pages: each wants another, the second more; with one page to read both get the second's."""
    keys = np.zeros((1, KEY_HEADS, 8, WIDTH), np.float32)
    keys[:, :, :4, 0], keys[:, :, 4:, 1] = 1.0, 1.0
    values = np.zeros_like(keys)
    values[:, :, :4], values[:, :, 4:] = 1.0, 2.0
    tier = Pages(4, 8, 1, block=2)
    state = tier.init(KVSpec(1, KEY_HEADS, WIDTH, jnp.dtype(jnp.float32)))
    valid, position = jnp.ones((1, 1, 8), bool), jnp.arange(8, dtype=jnp.uint32)[None, None]
    state, _ = tier.insert(state, KVTokens(jnp.asarray(keys), jnp.asarray(values), jnp.asarray(keys), position, valid))
    q = np.zeros((1, 3, HEADS, WIDTH), np.float32)
    q[:, 0, :, 0], q[:, 1, :, 1], q[:, 2, :, 0] = 1.0, 3.0, 9.0

    def read(tier, valid):
        query = Query(
            jnp.asarray(q), jnp.asarray(q), jnp.full((1, 3), 20, jnp.uint32), jnp.array([8]), None, None, 1.0, None,
            jnp.asarray([valid]),
        )  # fmt: skip
        return np.asarray(tier.attend(state, query, None).out)[0, :, 0, 0].tolist()

    assert read(tier, [True, True, True]) == [2.0, 2.0, 1.0]
    assert read(tier, [True, False, False])[0] == 1.0  # padding has no say
    assert read(dataclasses.replace(tier, block=1), [True, True, True]) == [1.0, 2.0, 1.0]


def test_what_falls_out_stands_where_it_stood():
    """Pages at a fixed distance keep their keys turned back to position 0; the next tier gets them as they came."""
    stream = Stream.drawn(1, 30, seed=5)
    tier, rotary = Pages(4, 12, 2, distance=7), Rotary.from_frequencies(np.array(FREQUENCIES), scale=1.3)
    position, keys = jnp.arange(30, dtype=jnp.uint32)[None], jnp.asarray(stream.k, jnp.float32)
    k, v = jnp.swapaxes(rotary(keys, position), 1, 2), jnp.asarray(np.swapaxes(stream.v, 1, 2), jnp.float32)
    state = tier.init(KVSpec(1, KEY_HEADS, WIDTH, jnp.dtype(jnp.float32)))
    tokens = KVTokens(k, v, jnp.zeros_like(k), position[:, None], jnp.ones((1, 1, 30), bool), rotary)
    state, evicted = tier.insert(state, tokens)
    assert int(evicted.valid.sum()) == 30 - 12
    np.testing.assert_allclose(evicted.k[:, :, :18], k[:, :, :18], atol=1e-5)
    np.testing.assert_array_equal(evicted.position[:, :, :18], position[:, None, :18])
    slots = np.arange(18, 30) % 16
    np.testing.assert_allclose(np.asarray(state.tokens.k)[0, :, slots], 1.3 * stream.k[0, 18:], atol=1e-5)


def test_the_gradient_of_what_is_read_is_dense_attentions():
    stream = Stream.drawn(1, 12, seed=4)
    arrays = tuple(jnp.asarray(x, jnp.float32) for x in (stream.q, stream.k, stream.v))

    def loss(cascade):
        def total(q, k, v):
            state = cascade.init(KVSpec(1, KEY_HEADS, WIDTH, jnp.dtype(jnp.float32)))
            parts = []
            for start in range(0, 12, 4):
                q_, k_, v_ = (x[:, start : start + 4] for x in (q, k, v))
                position = jnp.arange(start, start + 4, dtype=jnp.uint32)[None]
                valid = jnp.ones((1, 4), bool)
                out, state = _update(
                    cascade, state, q_, k_, v_, position, jnp.array([start]), valid, None, differentiable=True
                )
                parts.append(out)
            return jnp.sum(jnp.sin(jnp.concatenate(parts, axis=1)))

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*arrays)

    for found, expected in zip(loss(Cascade(Pages(2, 12, 7))), loss(Cascade(Full(12))), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pages(4, 18, 2), "Pages.capacity must be a multiple of the page size 4, got 18"),
        (lambda: Pages(4, 16, 6), "Pages.top_k is 6, but 16 tokens lie in at most 5 pages of 4"),
        (lambda: Pages(0, 16, 5), "Pages.size is 0: it must be a whole number of at least 1"),
        (lambda: Pages(4, 16, 1, MinMax(parts=3)), "MinMax.parts must divide the page size 4, got 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
