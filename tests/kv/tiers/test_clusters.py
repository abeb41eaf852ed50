"""Clusters against plain lists, what an estimate is worth, and what does not depend on how a stream is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.kv import Cascade, Clusters, Compensation, Full, Sink, Window
from streamjax.kv.pages.spherical_kmeans import nearest_centroids, runs_of
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
    run,
)  # fmt: skip
from tests.oracles.clusters import Rule, k_means
from tests.oracles.clusters import Stream as Lists


def gathered(rows, length, *, around=6, spread=0.3, seed=0):
    """Keys and values of each head that lie around a few centres, in mixed order."""
    random = np.random.default_rng(seed)
    stream = Stream.drawn(rows, length, seed)
    centres = random.standard_normal((2, around, KEY_HEADS, WIDTH)) * [[[[2.0]]], [[[1.0]]]]
    mine = random.integers(0, around, (rows, length))
    return Stream(stream.q, centres[0][mine] + spread * stream.k, centres[1][mine] + spread * stream.v)


@pytest.mark.parametrize("count", [1, 4, 7])
def test_k_means_is_the_plain_one(count):
    keys = np.random.default_rng(1).standard_normal((2, 2, 24, 5)) + 3.0  # far from the origin: centred first
    found = jax.jit(nearest_centroids, static_argnums=(1, 2))(jnp.asarray(keys, jnp.float32), count, 4)
    for row in range(2):
        for head in range(2):
            assert found[row, head].tolist() == k_means(list(keys[row, head]), count, 4)


def test_tokens_in_blocks_make_the_same_clusters(monkeypatch):
    """A segment that whole blocks do not fill, and identical keys, which have no direction from their mean."""
    keys = jnp.asarray(np.random.default_rng(2).standard_normal((1, 2, 23, 5)), jnp.float32)

    def nearest(keys):
        return jax.jit(lambda keys: nearest_centroids(keys, 4, 3))(keys)  # traced anew

    expected = nearest(keys)
    monkeypatch.setattr("streamjax.kv.pages.spherical_kmeans.TOKEN_BLOCK", 5)
    np.testing.assert_array_equal(nearest(keys), expected)
    np.testing.assert_array_equal(nearest(np.ones((1, 2, 23, 5), np.float32)), 0)


def test_no_run_is_too_long_and_none_is_lost():
    assigned = jnp.array([[[3, 0, 3, 3, 1, 3, 0, 3, 3, 3]]])
    order, start, count = runs_of(assigned, 3, 6)
    runs = [order[0, 0, s : s + n].tolist() for s, n in zip(start[0, 0], count[0, 0], strict=True)]
    assert runs == [[1, 6], [4], [0, 2, 3], [5, 7, 8], [9], []]


@pytest.mark.parametrize(
    ("positions", "estimate", "softcap"),
    [
        pytest.param("none", 0, None, marks=pytest.mark.slow),
        ("rope", 4, None),
        pytest.param("alibi", 4, None, marks=pytest.mark.slow),
        ("alibi", 3, 2.0),
    ],
)
def test_a_stream_token_by_token(positions, estimate, softcap):
    """Five segments fill in a ring of three; clusters are cut; of about 15 clusters a few are read, some estimated."""
    slopes = SLOPES if positions == "alibi" else None
    frequencies = FREQUENCIES if positions == "rope" else None
    stream = gathered(2, 66)
    cascade = Cascade(Sink(2, reach=10**6), Window(3), Clusters(12, 36, 3, estimate, size=4, most=5, iterations=2))
    found, state = run(cascade, stream, [1], slopes=slopes, frequencies=frequencies, softcap=softcap)
    rule = Rule(KEY_HEADS, 2, 3, 12, 36, 3, estimate, 4, 5, 2, SCALE, slopes, frequencies, softcap)
    np.testing.assert_allclose(found, by_lists(Lists, rule, stream), atol=2e-5)
    assert state[2].closed.cursor.tolist() == [2, 2]
    assert state[2].open.filled.tolist() == [1, 1]


def test_what_is_stored_does_not_depend_on_the_chunks():
    """Nor on the rows beside: bit for bit, except for what empty slots hold. One chunk fills more than the ring has."""
    stream = gathered(2, 47)
    cascade = Cascade(Clusters(4, 12, 2, 3, size=2, most=3))
    _, (expected,) = run(cascade, stream, [1], width=20)
    assert expected.closed.cursor.tolist() == [2, 2]  # eleven segments in a ring of three
    assert expected.open.filled.tolist() == [3, 3]
    for counts in [3, 8, 0, 5], [20]:
        _, (found,) = run(cascade, stream, counts, width=20)
        jax.tree.map(np.testing.assert_array_equal, found.closed, expected.closed)
        np.testing.assert_array_equal(found.open.k[:, :, :3], expected.open.k[:, :, :3])
        np.testing.assert_array_equal(found.open.filled, expected.open.filled)


def test_estimates_of_identical_tokens_are_exact():
    """Where all tokens of a cluster are the same the estimate is what they give, with the weight of as many."""
    random = np.random.default_rng(3)
    distinct = random.standard_normal((4, 1, 1, KEY_HEADS, WIDTH))
    counts = [3, 5, 1, 7]  # of each token: a wrong count cannot cancel
    order = random.permutation(np.repeat(np.arange(4), counts))
    keys = np.concatenate([distinct[i] for i in order], axis=1)
    values = np.concatenate([np.sin(3 * distinct[i]) for i in order], axis=1)
    # as many centroids as tokens, so that every distinct one is the first centroid of some cluster
    tier = Clusters(16, 16, 1, 3, size=1, most=8)
    state, q = filled(tier, keys, values), random.standard_normal((1, 2, HEADS, WIDTH))
    assert sorted(state.closed.count[0, 0].tolist())[-5:] == [0, 1, 3, 5, 7]
    found = ask(tier, state, q)
    for head in range(HEADS):
        own = head * KEY_HEADS // HEADS
        weights = np.exp(SCALE * q[0, :, head] @ keys[0, :, own].T)
        whole = weights.sum(axis=1)
        np.testing.assert_allclose(found.out[0, :, head], weights @ values[0, :, own] / whole[:, None], atol=1e-5)
        np.testing.assert_allclose(found.lse[0, :, head], np.log(whole), atol=1e-5)


@pytest.mark.slow
def test_estimates_come_from_below_and_help():
    """On clustered data, against leaving out the clusters that are not read: for every query, and by a wide margin."""
    stream, exact = gathered(1, 96, spread=0.5, seed=4), Full(96)
    q = 0.7 * np.random.default_rng(5).standard_normal((1, 40, HEADS, WIDTH))
    dense = ask(exact, filled(exact, stream.k, stream.v), q)

    def error(retrieve, estimate):
        tier = Clusters(48, 96, retrieve, estimate, size=8, most=12)
        part = ask(tier, filled(tier, stream.k, stream.v), q)
        assert (np.asarray(part.lse) <= np.asarray(dense.lse) + 1e-5).all()
        return np.linalg.norm(np.asarray(part.out - dense.out), axis=-1), np.asarray(dense.lse - part.lse)

    most = Clusters(48, 96, 1, size=8, most=12).clusters
    ignored, missing = error(2, 0)
    some, less = error(2, 4)
    all_, least = error(2, most - 2)
    assert (less < missing).all()
    assert (least <= less + 1e-6).all()
    assert (all_ < ignored).mean() > 0.9
    assert all_.mean() < 0.25 * ignored.mean()
    assert some.mean() < 0.7 * ignored.mean()
    assert error(most, 0)[0].max() < 1e-5


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clusters(8, 20, 1), "Clusters.capacity must be a multiple of the segment size 8, got 20"),
        (lambda: Clusters(8, 0, 1), "Clusters.capacity is 0: it must be a whole number of at least 1"),
        (lambda: Clusters(0, 8, 1), "Clusters.segment is 0: it must be a whole number of at least 1"),
        (lambda: Clusters(8, 8, 0), "Clusters.retrieve is 0: it must be a whole number of at least 1"),
        (lambda: Clusters(8, 8, 1, -1), "Clusters.estimate is -1: it must be a whole number of at least 0"),
        (lambda: Clusters(8, 8, 1, most=0), "Clusters.most is 0: it must be a whole number of at least 1"),
        (
            lambda: Clusters(8, 16, 5, 2, size=4, most=4),
            "Clusters reads 5 and estimates 2 clusters, but 16 tokens make at most 6 clusters",
        ),
        (lambda: Cascade(Clusters(8, 8, 1), Window(2)), "Clusters must be the last tier of a Cascade"),
        (lambda: Cascade(Window(2), Clusters(8, 8, 1), Compensation()), "Clusters must be the last tier of a Cascade"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
