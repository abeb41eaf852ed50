"""Pages that end where the content does, against plain lists, and what does not depend on how a stream is cut."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamjax.kv import (
    Cascade,
    Compensation,
    ContentPages,
    EndTokens,
    KeyChange,
    KVSpec,
    KVTokens,
    Mean,
    MinMax,
    Pages,
    Representative,
    Sink,
    Window,
)
from tests.kv.tier_streams import ENDS, FREQUENCIES, KEY_HEADS, SCALE, SLOPES, WIDTH, run, wandering
from tests.oracles.content_pages import Rule, end_tokens, key_change
from tests.oracles.content_pages import Stream as Lists
from tests.oracles.pages import bounds, means


def by_lists(stream, ids, rule, ends):
    """Outputs of the lists, and the lists themselves; `ends` is made for each row from its ids."""
    outs, lists = [], []
    for q, k, v, own in zip(stream.q, stream.k, stream.v, ids, strict=True):
        row = Lists(dataclasses.replace(rule, ends=ends(own)))
        outs.append([row.read(q[i], (k[i], v[i], i)) for i in range(len(q))])
        lists.append(row)
    return np.array(outs), lists


def held(tier, state):
    """For each row its pages, oldest first: the positions of their tokens."""
    rows = []
    for row in range(state.count.shape[0]):
        order = (int(state.cursor[row]) + np.arange(tier.pages)) % tier.pages
        position = np.asarray(state.position)[row, 0].reshape(tier.pages, tier.size)
        pages = [position[page][: int(state.count[row, 0, page])].tolist() for page in order]
        rows.append([page for page in pages if page])
    return rows


BOUNDARIES = {
    "keys": (KeyChange(0.3, 3, 2), 2, lambda ids: key_change(0.3, 3)),
    "last key": (KeyChange(0.1, 1, 1), 1, lambda ids: key_change(0.1, 1)),
    "ids": (EndTokens(ENDS), 1, lambda ids: end_tokens(ids, ENDS)),
    "ids, three at least": (EndTokens(ENDS, 3), 3, lambda ids: end_tokens(ids, ENDS)),
}


@pytest.mark.parametrize(
    ("boundary", "index", "score", "positions", "distance"),
    [
        ("keys", Mean(power=0.5), means(0.5), "rope", None),
        ("keys", Mean(power=0.5), means(0.5), "rope", 9),
        ("last key", MinMax(), bounds(1, 5), "none", None),
        ("ids", Mean(), means(0.0), "alibi", None),
    ],
)
def test_a_stream_token_by_token(boundary, index, score, positions, distance):
    """Pages wrap around their ring, pages that were used before are shorter the next time; of six two are read."""
    slopes = SLOPES if positions == "alibi" else None
    frequencies = FREQUENCIES if positions == "rope" else None
    stream, ids = wandering()
    rule, least, ends = BOUNDARIES[boundary]
    tier = ContentPages(5, 30, 2, rule, index, distance=distance)
    cascade = Cascade(Sink(2, reach=10**6), Window(4), tier)
    found, state = run(cascade, stream, [1], ids=ids, slopes=slopes, frequencies=frequencies)
    expected, lists = by_lists(
        stream, ids, Rule(KEY_HEADS, 2, 4, 5, 30, 2, score, SCALE, slopes, frequencies, distance, least=least), ends
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert held(tier, state[2]) == [[[entry[2] for entry in page] for page in row.pages] for row in lists]
    for row in lists:
        assert row.started > 8  # the ring has wrapped
        assert len(set(row.lengths())) > 1  # and lengths differ


@functools.cache
def token_by_token(boundary, start):
    """A stream and its ids, a tier, its state when it has read one token at a time, and the lists' positions."""
    stream, ids = wandering(seed=3)
    rule, least, ends = BOUNDARIES[boundary]
    tier = ContentPages(4, 24, 6, rule)
    _, (state,) = run(Cascade(tier), stream, [1], ids=ids, width=9, start=start)
    _, lists = by_lists(stream, ids, Rule(KEY_HEADS, 0, 0, 4, 24, 6, means(0.5), SCALE, least=least), ends)
    places = [[[(entry[2] + start) % 2**32 for entry in page] for page in row.pages] for row in lists]
    return stream, ids, tier, state, places


@pytest.mark.usual("keys")
@pytest.mark.parametrize("boundary", ["keys", "ids, three at least"])
@settings(max_examples=5)
@given(
    counts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6).filter(
        lambda pairs: any(a for a, _ in pairs) and any(b for _, b in pairs)
    ),
    start=st.sampled_from([0, 2**32 - 20]),
)
def test_what_is_stored_does_not_depend_on_the_chunks(boundary, counts, start):
    """Rows stop where they like; a slot of a page that was used before never comes back."""
    stream, ids, tier, expected, places = token_by_token(boundary, start)
    _, (state,) = run(Cascade(tier), stream, counts, ids=ids, width=9, start=start)
    assert held(tier, state) == held(tier, expected) == places
    np.testing.assert_array_equal(state.count, expected.count)
    np.testing.assert_array_equal(state.cursor, expected.cursor)
    some = np.arange(tier.size) < np.asarray(state.count)[..., None]
    for name in ("k", "v"):
        here, there = (np.asarray(getattr(x, name)).reshape(2, KEY_HEADS, 6, 4, WIDTH) for x in (state, expected))
        np.testing.assert_array_equal(np.where(some[..., None], here, 0), np.where(some[..., None], there, 0))
    np.testing.assert_allclose(state.summary, expected.summary, atol=1e-6)
    np.testing.assert_array_equal(state.marks, expected.marks)


def test_a_chunk_that_opens_more_pages_than_there_are(monkeypatch):
    """The newest stay, as in the lists; their summaries are made a few pages at a time."""
    stream, ids = wandering(length=50, seed=4)
    ids[1] = ENDS[0]  # every token of this row is a page
    tier = ContentPages(4, 44, 2, EndTokens(ENDS), Mean())
    monkeypatch.setattr("streamjax.kv.tiers.content_pages.SUMMARISED", 4)
    _, (state,) = run(Cascade(tier), stream, [50], ids=ids)
    _, lists = by_lists(
        stream, ids, Rule(KEY_HEADS, 0, 0, 4, 44, 2, means(0.0), SCALE), lambda own: end_tokens(own, ENDS)
    )
    pages = held(tier, state)
    assert pages == [[[entry[2] for entry in page] for page in row.pages] for row in lists]
    assert pages[1] == [[i] for i in range(39, 50)]
    for row, own in enumerate(pages):
        order = (int(state.cursor[row]) + np.arange(tier.pages)) % tier.pages
        order = [page for page in order if state.count[row, 0, page]]
        for page, positions in zip(order, own, strict=True):
            mean = stream.k[row, positions].mean(axis=0)
            np.testing.assert_allclose(state.summary[row, :, page], mean, atol=1e-5)


def store(tier, k, ids=None):
    """The tier with keys [T, D] of one row and one head stored in one chunk."""
    length, spec = len(k), KVSpec(1, 1, len(k[0]), jnp.dtype(jnp.float32))

    @jax.jit
    def stored(keys, own):
        position = jnp.arange(length, dtype=jnp.uint32)[None, None]
        tokens = KVTokens(keys, keys, keys, position, jnp.ones((1, 1, length), bool), ids=own)
        return tier.store(tier.init(spec), tokens)

    return stored(np.array(k, np.float32)[None, None], None if ids is None else np.array(ids, np.int32)[None, None])


def test_a_page_ends_behind_its_last_token_and_not_one_later():
    tier = ContentPages(4, 32, 1, EndTokens(ENDS))
    keys = np.ones((12, 2))
    assert held(tier, store(tier, keys, [1, 3, 3, 1, 1, 1, 7, 1, 1, 1, 1, 1])) == [
        [[0, 1], [2], [3, 4, 5, 6], [7, 8, 9, 10], [11]]  # an end at a full page ends one page, not two
    ]
    tier = ContentPages(4, 32, 1, EndTokens(ENDS, 2))
    assert held(tier, store(tier, keys, [3, 3, 3, 1, 7, 7, 7, 1, 1, 1, 1, 3])) == [
        [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9, 10], [11]]  # an end that comes too early does not end the page later
    ]


def test_a_page_ends_before_the_key_that_differs():
    east, north = [1.0, 0.0], [0.0, 1.0]
    tier = ContentPages(4, 32, 1, KeyChange(0.5, 2))
    keys = [east, east, north, north, [0.6, 0.8], east, north, east]
    assert held(tier, store(tier, keys)) == [[[0, 1], [2, 3, 4], [5], [6], [7]]]  # cosines 0, 0.8, 0.32, 0, 0
    # the mean is of the open page alone: with the page before, north would be like (east + north) / 2
    keys = [east, north, east, north]
    assert held(tier, store(tier, keys)) == [[[0], [1], [2], [3]]]
    assert held(tier, store(dataclasses.replace(tier, boundary=KeyChange(0.8, 2, 2)), keys)) == [[[0, 1], [2, 3]]]
    # of the last `context` keys only: a cosine of 0.16 with the mean of all four, of 0.6 with the last one
    keys = [east, east, east, [0.8, 0.6], north]
    far, near = (ContentPages(8, 32, 1, KeyChange(0.5, context)) for context in (4, 1))
    assert held(far, store(far, keys)) == [[[0, 1, 2, 3], [4]]]
    assert held(near, store(near, keys)) == [[[0, 1, 2, 3, 4]]]


@pytest.mark.slow
def test_with_pages_of_one_length_it_is_pages():
    """Where no token ends a page: the choice and the sum are those of `Pages`, blocks and shared choices included."""
    stream, ids = wandering(seed=5)
    options = {"block": 4, "shared": True, "pool": "mean", "distance": 7}
    content = Cascade(Window(5), ContentPages(4, 64, 3, EndTokens((99,)), MinMax(), **options))
    plain = Cascade(Window(5), Pages(4, 64, 3, MinMax(), **options))
    found, _ = run(content, stream, [8], ids=ids, frequencies=FREQUENCIES)
    expected, _ = run(plain, stream, [8], ids=ids, frequencies=FREQUENCIES)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_attention_may_stand_for_a_page():
    """An index that wants the attention of tokens gets it: with as many keys as a page has it is their mean."""
    stream, ids = wandering(seed=6)
    tier = ContentPages(3, 60, 3, EndTokens(ENDS), Representative(3))
    found, _ = run(Cascade(Window(5), tier), stream, [1], ids=ids)
    rule = Rule(KEY_HEADS, 0, 5, 3, 60, 3, means(0.0), SCALE)
    np.testing.assert_allclose(found, by_lists(stream, ids, rule, lambda own: end_tokens(own, ENDS))[0], atol=2e-5)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContentPages(4, 18, 2, KeyChange()), "ContentPages.capacity must be a multiple of the page size 4"),
        (lambda: ContentPages(4, 16, 5, KeyChange()), "ContentPages.top_k is 5, but 16 tokens lie in at most 4 pages"),
        (
            lambda: ContentPages(0, 16, 5, KeyChange()),
            "ContentPages.size is 0: it must be a whole number",
        ),
        (lambda: ContentPages(4, 16, 1, KeyChange(least=5)), "KeyChange.least must be in 1 .. 4, the page size, got 5"),
        (
            lambda: ContentPages(4, 16, 1, EndTokens((1,), 0)),
            "EndTokens.least is 0: it must be a whole number of at least 1",
        ),
        (lambda: ContentPages(4, 16, 1, KeyChange(), MinMax(3)), "MinMax.parts must divide the page size 4, got 3"),
        (
            lambda: ContentPages(4, 16, 1, KeyChange(), pool="sum"),
            "ContentPages.pool is 'sum': it must be 'max' or 'mean'",
        ),
        (lambda: ContentPages(4, 16, 1, "."), "ContentPages.boundary is '.': it must be Boundary"),
        (lambda: KeyChange(1.5), r"KeyChange.threshold is 1.5: it must be a number from -1 to 1"),
        (lambda: KeyChange(context=0), "KeyChange.context is 0: it must be a whole number of at least 1"),
        (lambda: EndTokens(()), r"EndTokens.ids must be a tuple of token ids, such as \(46, 33, 63\), got \(\)"),
        (lambda: EndTokens((".",)), r"EndTokens.ids is \('.',\): it must be a tuple of a whole number of at least 0"),
        (
            lambda: Cascade(ContentPages(4, 16, 1, KeyChange()), Window(2)),
            "ContentPages must be the last tier of a Cascade",
        ),
        (
            lambda: Cascade(Window(2), ContentPages(4, 16, 1, KeyChange()), Compensation()),
            "ContentPages must be the last tier of a Cascade",
        ),
        (lambda: store(ContentPages(4, 16, 1, EndTokens(ENDS)), np.ones((3, 2))), "EndTokens needs the ids of tokens"),
    ],
)
def test_what_does_not_fit_is_refused(make, message, monkeypatch):
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", True
    )  # a wrong type reaches the library, as a user's does
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
