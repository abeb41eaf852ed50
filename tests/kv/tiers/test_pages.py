"""Pages of one length against plain lists, and what falls out of them; test_paging.py has what all such tiers share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamjax.attention.rotary import Rotary
from streamjax.kv import (
    BestKey,
    BlendedBounds,
    Cascade,
    Coarse,
    Full,
    KVTokens,
    Mean,
    MinMax,
    Pages,
    Representative,
    Sink,
    Window,
)
from tests.kv.tier_streams import (
    FREQUENCIES,
    HEADS,
    KEY_HEADS,
    SCALE,
    SLOPES,
    WIDTH,
    Stream,
    ask,
    by_lists,
    filled,
    plain_attention,
    run,
    spec,
)  # fmt: skip
from tests.oracles.pages import Rule, blended, bounds, means
from tests.oracles.pages import Stream as Lists

INDEXES = {
    "bounds": (MinMax(), bounds(1, 4)),
    "logical pages": (MinMax(parts=2), bounds(2, 4)),
    "means": (Mean(), means(0.0)),
    "normalised means": (Mean(power=0.5), means(0.5)),
    "best keys": (BestKey(), bounds(4, 4)),
    "blended bounds": (BlendedBounds(0.6), blended(0.6)),
}


@pytest.mark.covering
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
    stream, pages = Stream.drawn(2, 61), Pages(4, 20, 2, index, distance=distance)
    alone = name in ("means", "best keys", "blended bounds")  # what stands before pages is the same for all of them
    cascade = Cascade(pages) if alone else Cascade(Sink(2, reach=10**6), Window(5), pages)
    found, _ = run(cascade, stream, [1], slopes=slopes, frequencies=frequencies)
    sizes = (0, 0, 4, 20, 2) if alone else (2, 5, 4, 20, 2)
    rule = Rule(KEY_HEADS, *sizes, score, SCALE, slopes, frequencies, distance, forgets=index.reads_keys)
    np.testing.assert_allclose(found, by_lists(Lists, rule, stream), atol=2e-5)


@pytest.mark.usual("alibi-4")
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_pages_of_the_best_runs_compete(positions, size):
    """Of six pages in runs of two, or of four and two, the best run is chosen, and two pages in it."""
    slopes = SLOPES if positions == "alibi" else None
    frequencies = FREQUENCIES if positions == "rope" else None
    stream = Stream.drawn(2, 61, seed=3)
    mine = Pages(4, 20, 2, BlendedBounds(0.6), coarse=Coarse(1, pages=size))
    cascade = Cascade(mine)
    rule = Rule(KEY_HEADS, 0, 0, 4, 20, 2, blended(0.6), SCALE, slopes, frequencies, coarse=(size, 1))
    found, _ = run(cascade, stream, [1], slopes=slopes, frequencies=frequencies)
    np.testing.assert_allclose(found, by_lists(Lists, rule, stream), atol=2e-5)


def test_the_most_attended_keys_stand_for_a_page():
    """InfLLM's rule, sinks apart: one choice for all heads, and the page that is being filled is always read."""
    stream = Stream.drawn(2, 70, seed=6)
    pages = Pages(4, 24, 3, Representative(2), distance=6, pool="mean", shared=True, read_newest=True)
    cascade = Cascade(Sink(2, reach=10**6), Window(6), pages)
    found, _ = run(cascade, stream, [1], frequencies=FREQUENCIES)
    rule = Rule(KEY_HEADS, 2, 6, 4, 24, 3, None, SCALE, None, FREQUENCIES, 6, representatives=2, newest=True)
    np.testing.assert_allclose(found, by_lists(Lists, rule, stream), atol=2e-5)


def test_attention_is_noted_whatever_the_chunks():
    """Tokens get their scores from the queries of their own chunk and of those after it; padding gives none."""
    stream = Stream.drawn(2, 12, seed=7)
    cascade = Cascade(Window(20), Pages(4, 8, 2, Representative(1)))
    states = [run(cascade, stream, counts, width=12)[1] for counts in ([1], [5, 7], [12])]
    for state in states:
        score, first = np.asarray(state[0].score), np.asarray(states[0][0].score)
        np.testing.assert_allclose(score[:, :, :12], first[:, :, :12], atol=1e-5)
        np.testing.assert_allclose(score.sum(axis=2), 12.0, rtol=1e-5)


@pytest.mark.usual("2-3-index0")
@pytest.mark.parametrize(("size", "pages", "index"), [(2, 3, MinMax()), (5, 1, Mean())])
@settings(max_examples=4)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), start=st.sampled_from([0, 2**32 - 20]))
def test_what_pages_lose_goes_on(size, pages, index, counts, start):
    """Token by token pages are a longer window; with a tier that keeps what they lose, chunks see everything."""
    stream = Stream.drawn(2, 40, seed=1)
    tiers = Window(4), Pages(size, size * pages, pages + 1, index)
    once, _ = run(Cascade(*tiers), stream, [1], start=start)
    np.testing.assert_allclose(once, plain_attention(stream, reach=4 + size * pages), atol=1e-5)
    found, state = run(Cascade(*tiers, Full(60)), stream, counts, width=9, start=start)
    np.testing.assert_allclose(found, plain_attention(stream), atol=1e-5)
    assert state[2].filled.tolist() == [max(40 - 4 - size * pages, 0)] * 2


def test_a_block_reads_what_one_of_its_queries_wants_most():
    """Two queries, two pages: each wants another, the second more; with one page to read both get the second's."""
    keys = np.zeros((1, 8, KEY_HEADS, WIDTH))
    keys[:, :4, :, 0], keys[:, 4:, :, 1] = 1.0, 1.0
    values = np.zeros_like(keys)
    values[:, :4], values[:, 4:] = 1.0, 2.0
    tier = Pages(4, 8, 1, block=2)
    state = filled(tier, keys, values)
    q = np.zeros((1, 3, HEADS, WIDTH))
    q[:, 0, :, 0], q[:, 1, :, 1], q[:, 2, :, 0] = 1.0, 3.0, 9.0

    def read(tier, valid):
        return np.asarray(ask(tier, state, q, valid=np.array([valid])).out)[0, :, 0, 0].tolist()

    assert read(tier, [True, True, True]) == [2.0, 2.0, 1.0]
    assert read(tier, [True, False, False])[0] == 1.0  # padding has no say
    assert read(dataclasses.replace(tier, block=1), [True, True, True]) == [1.0, 2.0, 1.0]


def test_what_falls_out_stands_where_it_stood():
    """Pages at a fixed distance keep their keys turned back to position 0; the next tier gets them as they came."""
    stream = Stream.drawn(1, 30, seed=5)
    tier, rotary = Pages(4, 12, 2, distance=7), Rotary.from_frequencies(np.array(FREQUENCIES), scale=1.3)
    position = jnp.arange(30, dtype=jnp.uint32)[None]

    @jax.jit
    def insert(keys, values):
        k, v = (jnp.swapaxes(x, 1, 2) for x in (rotary(keys, position), values))
        tokens = KVTokens(k, v, jnp.zeros_like(k), position[:, None], jnp.ones((1, 1, 30), bool), rotary)
        return k, *tier.insert(tier.init(spec()), tokens)

    k, state, evicted = insert(stream.k.astype(np.float32), stream.v.astype(np.float32))
    k, position = np.asarray(k), np.asarray(position)
    assert np.asarray(evicted.valid).sum() == 30 - 12
    np.testing.assert_allclose(np.asarray(evicted.k)[:, :, :18], k[:, :, :18], atol=1e-5)
    np.testing.assert_array_equal(np.asarray(evicted.position)[:, :, :18], position[:, None, :18])
    slots = np.arange(18, 30) % 16
    np.testing.assert_allclose(np.asarray(state.tokens.k)[0, :, slots], 1.3 * stream.k[0, 18:], atol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pages(4, 18, 2), "Pages.capacity must be a multiple of the page size 4, got 18"),
        (lambda: Pages(4, 16, 6), "Pages.top_k is 6, but 16 tokens lie in at most 5 pages of 4"),
        (lambda: Pages(0, 16, 5), "Pages.size is 0: it must be a whole number of at least 1"),
        (
            lambda: Pages(4, 16, 2, BestKey(), search="tree"),
            r"Pages with BestKey\(\) reads all keys as they are: it needs search",
        ),
        (lambda: Pages(4, 16, 1, MinMax(parts=3)), "MinMax.parts must divide the page size 4, got 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
