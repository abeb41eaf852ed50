"""What holds for every tier that reads only some of what it has: pages of one length, pages by content, clusters."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamjax.kv import Cascade, Clusters, ContentPages, EndTokens, Full, KeyChange, Pages, Window
from tests.kv.tier_streams import ENDS, Stream, ask, filled, gradients, run, wandering

ALL_READ = {
    "pages": Pages(3, 60, 21),
    "content by keys": ContentPages(3, 120, 40, KeyChange(0.3, 3, 2)),
    "content by ids": ContentPages(3, 120, 40, EndTokens(ENDS)),
    "clusters": Clusters(6, 36, 18, size=4, most=4),
}


@pytest.fixture(scope="module")
def dense():
    stream, _ = wandering(length=40, seed=1)
    return run(Cascade(Full(60)), stream, [40])[0]


@pytest.mark.parametrize("name", ALL_READ)
@settings(max_examples=6)
@given(
    counts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6).filter(
        lambda pairs: any(a for a, _ in pairs) and any(b for _, b in pairs)
    ),
    start=st.sampled_from([0, 2**32 - 20]),
)
def test_with_everything_read_nothing_is_missed(name, dense, counts, start):
    """Rows stop where they like, also across the wrap of positions."""
    stream, ids = wandering(length=40, seed=1)
    found, _ = run(Cascade(Window(4), ALL_READ[name]), stream, counts, ids=ids, width=9, start=start)
    np.testing.assert_allclose(found, dense, atol=1e-5)


@pytest.mark.parametrize(
    "tier",
    [Pages(4, 48, 2), ContentPages(4, 120, 2, KeyChange(0.3, 3, 2)), Clusters(24, 48, 2, 3, size=4, most=6)],
    ids=["pages", "content", "clusters"],
)
def test_queries_of_a_chunk_choose_each_for_themselves(tier):
    """What a query reads in a chunk is what it reads alone."""
    stream, _ = wandering(2, 48, seed=6)
    state, q = filled(tier, stream.k, stream.v), stream.q[:, :7]
    together = ask(tier, state, q)
    assert np.abs(np.asarray(together.out[:, 1:]) - np.asarray(together.out[:, :-1])).max() > 0.01
    for i in range(7):
        alone = ask(tier, state, q[:, i : i + 1])
        np.testing.assert_allclose(together.out[:, i : i + 1], alone.out, atol=1e-6)
        np.testing.assert_allclose(together.lse[:, i : i + 1], alone.lse, atol=1e-6)


@pytest.fixture(scope="module")
def dense_gradients():
    return gradients(Cascade(Full(12)), Stream.drawn(1, 12, seed=4), 6)


@pytest.mark.parametrize(
    "tier",
    [Pages(2, 12, 7), ContentPages(3, 36, 12, KeyChange(0.3, 2)), Clusters(6, 12, 8, size=3, most=2)],
    ids=["pages", "content", "clusters"],
)
def test_gradients_of_all_that_is_read_are_dense_attentions(tier, dense_gradients, monkeypatch):
    monkeypatch.setattr("streamjax.kv.tiers.content_pages.SUMMARISED", 2)
    found = gradients(Cascade(tier), Stream.drawn(1, 12, seed=4), 6)
    for mine, expected in zip(found, dense_gradients, strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5)
