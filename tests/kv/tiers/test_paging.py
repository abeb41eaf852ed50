"""What holds for every tier that reads only some of what it has: pages of one length, pages by content, clusters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamjax as sj
from streamjax.kv import (
    BestKey,
    BlendedBounds,
    Cascade,
    Clusters,
    Coarse,
    ContentPages,
    EndTokens,
    KeyChange,
    Middle,
    Pages,
    Representative,
    Window,
)
from streamjax.kv.pages.selection import gather_pages
from tests.covering import rest_slow
from tests.kv.tier_streams import (
    ENDS,
    FREQUENCIES,
    HEADS,
    KEY_HEADS,
    SCALE,
    SLOPES,
    WIDTH,
    Stream,
    ask,
    empty,
    filled,
    gradients,
    plain_attention,
    run,
    spec,
    wandering,
)

ALL_READ = {
    "pages": Pages(3, 60, 21),
    "content by keys": ContentPages(3, 120, 40, KeyChange(0.3, 3, 2)),
    "content by ids": ContentPages(3, 120, 40, EndTokens(ENDS)),
    "clusters": Clusters(6, 36, 18, size=4, most=4),
}


@pytest.fixture(scope="module")
def dense():
    return plain_attention(wandering(length=40, seed=1)[0])


@pytest.mark.usual("pages", "content by ids", "clusters")
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
    found, _ = run(Cascade(ALL_READ[name]), stream, counts, ids=ids, width=9, start=start)
    np.testing.assert_allclose(found, dense, atol=1e-5)


@pytest.mark.parametrize(
    "tier",
    [Pages(4, 48, 2), ContentPages(4, 120, 2, KeyChange(0.3, 3, 2)), Clusters(24, 48, 2, 3, size=4, most=6)],
    ids=["pages", "content", "clusters"],
)
def test_queries_of_a_chunk_choose_each_for_themselves(tier):
    """What a query reads in a chunk is what it reads alone."""
    stream, _ = wandering(2, 48, seed=6)
    state, q = filled(tier, stream.k, stream.v), stream.q[:, :20]  # so many that products are taken from their side
    together = ask(tier, state, q)
    assert np.abs(np.asarray(together.out[:, 1:]) - np.asarray(together.out[:, :-1])).max() > 0.01
    for i in range(0, 20, 3):
        alone = ask(tier, state, q[:, i : i + 1])
        np.testing.assert_allclose(together.out[:, i : i + 1], alone.out, atol=1e-6)
        np.testing.assert_allclose(together.lse[:, i : i + 1], alone.lse, atol=1e-6)


def test_padding_does_not_choose_for_a_block():
    stream, _ = wandering(2, 48, seed=6)
    each, blocks = (Clusters(24, 48, 2, 3, size=4, most=6, block=block) for block in (1, 3))
    state, q = filled(each, stream.k, stream.v), stream.q[:, :20]
    only = np.arange(20) % 3 == 1  # the only one of its block that asks
    found = ask(blocks, state, q, valid=jnp.asarray(np.stack([only, only])))
    expected = ask(each, state, q)
    np.testing.assert_allclose(found.out[:, only], expected.out[:, only], atol=1e-6)


@pytest.fixture(scope="module")
def dense_gradients():
    def total(q, k, v):
        k, v = (jnp.repeat(x, HEADS // KEY_HEADS, axis=2) for x in (k, v))
        logits = jnp.where(np.tri(12, dtype=bool), jnp.einsum("bthd,bshd->bhts", q, k) * SCALE, -jnp.inf)
        return jnp.sum(jnp.sin(jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits), v)))

    stream = Stream.drawn(1, 12, seed=4)
    arrays = (x.astype(np.float32) for x in (stream.q, stream.k, stream.v))
    return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*arrays)


@pytest.mark.usual("pages")
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


FEW_OR_MANY = {
    "pages": Pages(4, 40, 3),
    "pages, all but one": Pages(4, 24, 6),
    "all pages": Pages(4, 24, 7),
    "blocks far away": Pages(4, 40, 3, Representative(2), 2, 9, "mean", shared=True, read_newest=True),
    "tree": Pages(4, 40, 3, Middle(), 2, search="tree"),
    "all by tree": Pages(4, 24, 7, Middle(), search="tree"),
    "content by keys": ContentPages(4, 40, 3, KeyChange(0.3, 3, 2), block=2),
    "content by ids": ContentPages(4, 40, 5, EndTokens(ENDS), distance=9),
    "clusters": Clusters(20, 40, 2, 3, size=4, most=6, block=3),
}


def in_chunks(tier, positions, width=7, **options):
    """A stream from its empty pages to where they have wrapped, rows apart; a window notes what an index asks for."""
    stream, ids = wandering(length=61, seed=3)
    options["slopes"] = SLOPES if positions == "alibi" else None
    options["frequencies"] = FREQUENCIES if positions == "rope" else None
    front = (Window(5),) if tier == FEW_OR_MANY["blocks far away"] else ()
    return run(Cascade(*front, tier), stream, [(7, 3), (4, 7), (1, 2)], ids=ids, width=width, **options)


# the clusters' way that always chooses is met below, and all pages where everything is read
@pytest.mark.usual("none-blocks far away", "rope-pages, all but one", "none-tree", "alibi-pages", "none-content by ids")
@pytest.mark.parametrize("name", FEW_OR_MANY)
@pytest.mark.parametrize("positions", ["none", "rope", "alibi"])
def test_what_is_read_at_once_is_what_would_be_chosen(name, positions):
    """Against the way that always chooses."""
    if "tree" in name and positions == "alibi":
        pytest.skip("a tree search does not know distances")
    found, state = in_chunks(FEW_OR_MANY[name], positions)
    expected, chosen = in_chunks(FEW_OR_MANY[name], positions, differentiable=True)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    for mine, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(chosen), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-6)


READ_TOGETHER = {
    "pages": Pages(3, 12, 3),
    "best keys": Pages(3, 12, 3, BestKey()),
    "one head list": Pages(3, 12, 3, pool="mean", shared=True, read_newest=True, distance=9),
    "in two levels": Pages(3, 12, 3, BlendedBounds(), coarse=Coarse(2)),
    "content by ids": ContentPages(4, 48, 3, EndTokens(ENDS)),
    "clusters": Clusters(20, 40, 3, 4, size=4, most=4),
}


@pytest.mark.usual("clusters", "in two levels")
@pytest.mark.parametrize("name", rest_slow(READ_TOGETHER, "clusters", "one head list", "best keys", "in two levels"))
def test_neighbours_that_read_together_read_what_each_would_read_alone(monkeypatch, name):
    """Unions of few queries in tiles of two pages, the last of which is moved back to fit; padding wants nothing."""
    monkeypatch.setattr("streamjax.kv.pages.union_reading.QUERIES", 3)
    monkeypatch.setattr("streamjax.kv.tiers.clusters.QUERIES", 3)
    monkeypatch.setattr("streamjax.kv.pages.union_reading.SLOTS", 8)
    monkeypatch.setattr("streamjax.kv.tiers.content_pages.UNIT", 2)
    monkeypatch.setattr("streamjax.kv.tiers.clusters.UNIT", 3)
    stream, ids = wandering(length=61, seed=4)
    cascade, counts = Cascade(READ_TOGETHER[name]), [(7, 3), (4, 7), (1, 2)]
    found, _ = run(cascade, stream, counts, ids=ids, width=7, slopes=SLOPES)
    expected, _ = run(cascade, stream, counts, ids=ids, width=7, slopes=SLOPES, differentiable=True)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_chunk_gathers_each_page_once_for_its_neighbours(monkeypatch):
    """Slots gathered for 64 queries, counted as they run: few where queries are alike, never more than there are.

    Each query for itself would gather 8 pages of 4 tokens: 64 times 32 slots.
    """
    gathered = []

    def counted(pages, page):
        jax.debug.callback(lambda: gathered.append(page.shape[2] * pages.k.shape[3]))
        return gather_pages(pages, page)

    monkeypatch.setattr("streamjax.kv.pages.union_reading.gather_pages", counted)
    monkeypatch.setattr("streamjax.kv.pages.union_reading.SLOTS", 32)
    random, tier = np.random.default_rng(0), Pages(4, 512, 8)
    keys = random.standard_normal((1, 512, KEY_HEADS, WIDTH))
    state, one = filled(tier, keys, keys), random.standard_normal((1, 1, HEADS, WIDTH))
    for spread, share in ((0.02, 0.3), (9.0, 1.0)):
        gathered.clear()
        jax.block_until_ready(ask(tier, state, one + spread * random.standard_normal((1, 64, HEADS, WIDTH))))
        jax.effects_barrier()
        assert 32 <= sum(gathered) <= share * 512 + 32


def test_what_is_gathered_of_short_pages_and_clusters_is_little_more_than_their_tokens(monkeypatch):
    """Slots gathered for 64 queries, counted as they run, whether they choose or read all that there is.

    Sentences of some 12 tokens have pages of 128 slots, and clusters of some 8 tokens may have 32: gathered whole they
    would be 10 and 4 times as many slots as tokens.
    """
    gathered, tokens = [], 1024
    gather = Clusters._gather

    def counted(pages, page):
        jax.debug.callback(lambda: gathered.append(page.shape[2] * pages.k.shape[3]))
        return gather_pages(pages, page)

    def counted_clusters(self, closed, start, count, chosen, each):
        jax.debug.callback(lambda: gathered.append(chosen.shape[2] * each))
        return gather(self, closed, start, count, chosen, each)

    monkeypatch.setattr("streamjax.kv.pages.union_reading.gather_pages", counted)
    monkeypatch.setattr(Clusters, "_gather", counted_clusters)
    random = np.random.default_rng(0)
    keys, ids = random.standard_normal((1, tokens, KEY_HEADS, WIDTH)), np.full((1, tokens), 9)
    ids[0, np.cumsum(random.integers(8, 17, 80))[:-1]] = ENDS[0]
    q = 9 * random.standard_normal((1, 64, HEADS, WIDTH))
    few, many = (ContentPages(128, 16384, top_k, EndTokens(ENDS)) for top_k in (16, 100))
    clusters = Clusters(tokens, tokens, 24, size=8, most=32)
    in_pages, in_clusters = (filled(tier, keys, keys, ids) for tier in (few, clusters))
    for tier, state in ((few, in_pages), (many, in_pages), (clusters, in_clusters)):
        gathered.clear()
        jax.block_until_ready(ask(tier, state, q))
        jax.effects_barrier()
        assert tokens // 2 < sum(gathered) <= 2 * tokens + 512


def test_a_prefill_through_clusters_does_less_by_default_than_dense_attention(monkeypatch):
    """Products of 64 queries with slots that are gathered and with clusters, counted as they run: half of those with
    2,048 tokens at most, and one ranking for all queries of a block."""
    gathered, ranked, tokens = [], [], 2048
    (*_, tier) = sj.kv.preset("retro_infer", capacity=tokens, segment=256, iterations=1).tiers
    gather, rank = Clusters._gather, Clusters._zones

    def counted_gather(self, closed, start, count, chosen, each):
        jax.debug.callback(lambda places: gathered.append(places.shape[2] * each), chosen)
        return gather(self, closed, start, count, chosen, each)

    def counted_rank(self, scores):
        jax.debug.callback(lambda asked: ranked.append(asked.shape[2]), scores)
        return rank(self, scores)

    monkeypatch.setattr(Clusters, "_gather", counted_gather)
    monkeypatch.setattr(Clusters, "_zones", counted_rank)
    random = np.random.default_rng(0)
    keys = random.standard_normal((1, tokens, KEY_HEADS, WIDTH))
    state = filled(tier, keys, keys, np.zeros((1, tokens), int))
    jax.block_until_ready(ask(tier, state, random.standard_normal((1, 64, HEADS, WIDTH))))
    jax.effects_barrier()
    products = tier.block * sum(gathered) + 64 * 2 * tier.clusters  # logits of clusters and estimates by them
    assert 0 < products < 0.5 * 64 * tokens
    assert sum(ranked) == 64 / tier.block


def poisoned(x):
    return jnp.asarray(np.full(x.shape, np.nan, x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x


# of the others the next test asks the same, by the program that it has anyway
@pytest.mark.usual("content by keys", "clusters", "blocks far away")
@pytest.mark.parametrize("name", FEW_OR_MANY)
def test_empty_pages_are_not_read(monkeypatch, name):
    """Keys and values of empty slots are NaN, which would show: 0 times NaN is NaN."""
    monkeypatch.setattr("streamjax.kv.query.SLOT_BLOCK", 4)  # what one block holds is read as a whole
    tier = FEW_OR_MANY[name]
    nothing = empty(tier, spec(2))
    state = jax.tree.map(poisoned, nothing)
    if name == "clusters":  # the segment that is being filled is read as a whole
        state = type(state)(nothing.open, state.closed)
    out, lse = ask(tier, state, np.ones((2, 6, 4, 6)))
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)


@pytest.mark.parametrize("name", ["pages", "tree", "content by ids"])
def test_only_slots_that_hold_tokens_are_read_while_they_are_few(monkeypatch, name):
    monkeypatch.setattr("streamjax.kv.query.SLOT_BLOCK", 4)
    monkeypatch.setattr("streamjax.kv.pages.union_reading.SLOTS", 4)
    tier, (stream, _) = FEW_OR_MANY[name], wandering(1, 7)
    state = filled(tier, stream.k, stream.v, np.full((1, 7), 1))
    expected = ask(tier, state, stream.q[:, :6])
    beyond = np.arange(state.tokens.k.shape[2] if hasattr(state, "tokens") else 40)[:, None] >= 8
    ring = getattr(state, "tokens", state)
    spoilt = type(ring)(
        **{**vars(ring), "k": jnp.where(beyond, jnp.nan, ring.k), "v": jnp.where(beyond, jnp.nan, ring.v)}
    )
    state = spoilt if ring is state else type(state)(spoilt, jax.tree.map(poisoned, state.summary))
    jax.tree.map(np.testing.assert_array_equal, ask(tier, state, stream.q[:, :6]), expected)
    out, lse = ask(tier, jax.tree.map(poisoned, empty(tier, spec(1))), stream.q[:, :6])
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)


@pytest.mark.usual("pages")
@pytest.mark.parametrize("name", ["pages", "blocks far away", "content by keys"])
def test_pages_that_are_scored_some_at_a_time_are_those_that_all_would_choose(monkeypatch, name):
    """With ALiBi; the way with a reverse mode scores all at once, and an odd number of pages ends in half a turn."""
    monkeypatch.setattr("streamjax.kv.pages.selection.SCORED", 2)
    found, _ = in_chunks(FEW_OR_MANY[name], "alibi", width=8)  # a program of its own
    expected, _ = in_chunks(FEW_OR_MANY[name], "alibi", differentiable=True)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_chunk_scores_no_pages_beyond_those_that_hold_tokens(monkeypatch):
    """By what the compiler counts, which is one turn of a loop: 2,016 pages more add no products with their bounds."""
    monkeypatch.setattr("streamjax.kv.pages.selection.SCORED", 16)

    def flops(pages: int) -> float:
        tier = Pages(2, 2 * pages, 2, block=8)
        state = jax.eval_shape(lambda: tier.init(spec()))
        compiled = jax.jit(lambda state: ask(tier, state, np.ones((1, 32, 4, 6)))).lower(state).compile()
        return compiled.cost_analysis()["flops"]

    products = 2 * (2 * WIDTH) * 32 * HEADS * (2048 - 32)
    assert flops(2048) - flops(32) < products / 2
