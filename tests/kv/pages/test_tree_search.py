"""The tree search against a search by plain lists, and pages that are found by it."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamjax.kv import Cascade, MinMax, Pages, Sink, Window
from streamjax.kv.pages.indexes import Middle
from streamjax.kv.pages.tree_search import tree_search
from tests.covering import rest_slow
from tests.kv.tier_streams import KEY_HEADS, SCALE, Stream, by_lists, plain_attention, run
from tests.oracles.pages import Rule
from tests.oracles.pages import Stream as Lists


def search_by_lists(scores, held, top_k):
    """2406.09827, algorithm 1: ranges (start, stop), halved; the best by the page in the middle stay."""
    pages, length = len(scores), 1
    while top_k * length < pages:
        length *= 2
    last = max((p for p in range(pages) if held[p]), default=-1)

    def value(start, length):
        page = min(start + length // 2, last)
        if start > last:
            return None
        if not held[page]:
            page = max(page - 1, start)
        return scores[page] if held[page] else None

    def best(starts, length):
        there = [s for s in starts if value(s, length) is not None]
        return sorted(there, key=lambda s: -value(s, length))[:top_k]

    starts = best([i * length for i in range(top_k) if i * length < pages], length)
    while length > 1:
        length //= 2
        starts = best([s for start in starts for s in (start, start + length) if s < pages], length)
    return starts


SIZES = [(1, 1), (1, 3), (2, 1), (5, 2), (6, 6), (13, 1), (16, 4), (17, 4), (31, 5), (40, 2)]  # pages, top_k
search = jax.jit(lambda scores, held, top_k: tree_search(partial(jnp.take, scores), held, top_k), static_argnums=2)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(SIZES), st.booleans())
def test_the_search_is_the_published_one(seed, sizes, wrapped):
    """The first pages of the buffer hold something, or all but one."""
    (pages, top_k), random = sizes, np.random.default_rng(seed)
    scores = random.permutation(pages).astype(np.float32)
    held = np.arange(pages) != random.integers(pages) if wrapped else np.arange(pages) < random.integers(pages + 1)
    found, some = search(scores, held[None, None, None], top_k)
    assert np.asarray(found)[np.asarray(some)].tolist() == search_by_lists(scores, held, top_k)


class Searching(Lists):
    """`Stream` of the oracle that finds its pages by the search, in the order of the ring's slots."""

    def best(self, q, group, head, place):
        rule = self.rule
        slots = rule.capacity // rule.size + 1
        there = {page % slots: page for page in sorted({self.page_of[e[2]] for e in self.paged})}

        def value(page):
            keys = [key[head] for key, _ in self.summarised[page]]
            # what the page holds now counts for its middle when it was last written
            return max(float(q[h] @ keys[len(keys) // 2]) for h in group)

        scores = [value(there[slot]) if slot in there else 0.0 for slot in range(slots)]
        return [there[s] for s in search_by_lists(scores, [slot in there for slot in range(slots)], rule.top_k)]


def test_a_stream_token_by_token():
    """Pages wrap around their buffer; of up to 9 pages two are found."""
    stream = Stream.drawn(2, 61)
    cascade = Cascade(Sink(2, reach=10**6), Window(5), Pages(4, 32, 2, Middle(), search="tree"))
    found, _ = run(cascade, stream, [1])
    rule = Rule(KEY_HEADS, 2, 5, 4, 32, 2, None, SCALE)
    np.testing.assert_allclose(found, by_lists(Searching, rule, stream), atol=2e-5)


@pytest.mark.parametrize("search", rest_slow(["all", "tree"], "tree"))
def test_with_every_page_found_it_is_dense_attention(search):
    """And blocks of queries, padded ones too."""
    stream = Stream.drawn(2, 52, seed=3)
    found, _ = run(Cascade(Pages(4, 52, 14, MinMax(), block=3, search=search)), stream, [7], width=8)
    np.testing.assert_allclose(found, plain_attention(stream), atol=2e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pages(4, 16, 2, search="best"), "Pages.search is 'best': it must be 'all' or 'tree'"),
        (lambda: Pages(4, 16, 2, search="tree", shared=True), 'Pages.search "tree" is for each key head'),
        (
            lambda: run(Cascade(Pages(4, 16, 2, search="tree")), Stream.drawn(1, 3), [1], slopes=(0.1,) * 4),
            'Pages.search "tree" does not know distances',
        ),
    ],
)
def test_bad_requests_are_one_line(make, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make()
    assert "\n" not in str(error.value)


def test_more_pages_make_no_longer_program():
    """Ranges are halved in a loop, which compilers see once."""
    sizes = [
        len(
            jax.make_jaxpr(lambda held: search(jnp.zeros(held.shape[-1]), held, 4))(jnp.ones((1, 1, 1, n), bool))
            .pretty_print()
            .splitlines()
        )
        for n in (64, 4096)
    ]
    assert sizes[0] == sizes[1]
