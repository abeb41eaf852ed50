"""Streams in a pool of pages give what dense streams give, wherever their pages lie and whoever shares them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamjax as sj
from streamjax.kv.pages.page_pool import PagePool, PageTables
from tests.streaming.tiny_models import ALIBI, GQA, VOCAB, build

CAPACITY, SIZE, ROWS, PAGES = 21, 4, 3, 20
WIDTH = -(-CAPACITY // SIZE)
MODELS = {"rope": build(GQA.replace(num_layers=1)), "alibi": build(ALIBI.replace(num_layers=1))}


def tables(own: list[list[int]], shared: int = 0) -> PageTables:
    """Of rows with these pages, of which all have the first `shared` ones in common."""
    named = np.full((ROWS, WIDTH), -1, np.int32)
    for row, pages in enumerate(own):
        named[row, : len(pages)] = pages
    both, place = np.full(WIDTH, -1, np.int32), np.zeros(WIDTH, np.int32)
    both[:shared], place[:shared] = own[0][:shared], np.arange(shared)
    sharers = np.broadcast_to((np.arange(WIDTH) < shared)[:, None], (WIDTH, ROWS))
    return PageTables(*map(jnp.asarray, (named, both, place, sharers, np.full(ROWS, shared, np.int32))))


def pooled(model: sj.Decoder, found: PageTables) -> sj.StreamState:
    state = sj.init_state(model, [PagePool(CAPACITY, PAGES, SIZE)] * model.config.num_layers, ROWS)
    return dataclasses.replace(state, tables=found)


def read(model: sj.Decoder, state: sj.StreamState, ids: np.ndarray, cuts: list[int]) -> np.ndarray:
    """Logits of all tokens, read in chunks of these sizes, padded to 8."""
    found, start = [], 0
    for size in cuts:
        piece = np.zeros((ROWS, 8), np.int32)
        piece[:, :size] = ids[:, start : start + size]
        state, logits = sj.step(model, state, jnp.asarray(piece), jnp.full(ROWS, size, jnp.int32))
        found.append(np.asarray(logits)[:, :size])
        start += size
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("kind", ["rope", pytest.param("alibi", marks=pytest.mark.slow)])
@settings(max_examples=8)
@given(st.permutations(range(PAGES)), st.lists(st.integers(1, 8), min_size=4, max_size=4), st.integers(0, 2**20))
def test_tokens_are_found_wherever_they_lie(kind, order, cuts, seed):
    if sum(cuts) > CAPACITY:
        cuts = [4, 8, 3, 6]
    model = MODELS[kind]
    ids = np.random.default_rng(seed).integers(0, VOCAB, (ROWS, sum(cuts)))
    own = [order[row * WIDTH : (row + 1) * WIDTH] for row in range(ROWS)]
    expected = read(model, sj.init_state(model, sj.kv.preset("dense", capacity=CAPACITY), ROWS), ids, cuts)
    np.testing.assert_allclose(read(model, pooled(model, tables(own)), ids, cuts), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shared", [1, 2, 4])
def test_shared_pages_are_seen_by_all_who_share_them(kind, shared):
    model, draw = MODELS[kind], np.random.default_rng(shared)
    ids = draw.integers(0, VOCAB, (ROWS, 20))
    ids[:, : shared * SIZE] = ids[0, : shared * SIZE]
    cuts = [4] * shared + [3, 1]
    ids = ids[:, : sum(cuts)]
    order = draw.permutation(PAGES).tolist()
    own = [order[:shared] + order[(row + 1) * WIDTH : (row + 2) * WIDTH - shared] for row in range(ROWS)]
    own[2] = own[2] if len(own[2]) > shared else own[2] + order[-2:]
    expected = read(model, sj.init_state(model, sj.kv.preset("dense", capacity=CAPACITY), ROWS), ids, cuts)
    state = pooled(model, tables(own))
    found = []
    for index, (start, size) in enumerate(zip(np.cumsum([0, *cuts]), cuts, strict=False)):
        now = tables(own, shared if index >= shared else 0)
        state = dataclasses.replace(state, tables=now)
        piece = np.zeros((ROWS, 8), np.int32)
        piece[:, :size] = ids[:, start : start + size]
        state, logits = sj.step(model, state, jnp.asarray(piece), jnp.full(ROWS, size, jnp.int32))
        found.append(np.asarray(logits)[:, :size])
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=2e-5, atol=2e-5)


def test_a_row_without_pages_changes_nothing():
    model = MODELS["rope"]
    state = pooled(model, tables([[5, 6], [], [7]]))
    before = np.asarray(state.layers[0].k)
    state, _ = sj.step(model, state, jnp.ones((ROWS, 8), jnp.int32), jnp.asarray([6, 5, 0], jnp.int32))
    changed = np.flatnonzero((np.asarray(state.layers[0].k) != before).any(axis=(0, 2, 3)))
    assert changed.tolist() == [5, 6]


def test_a_pool_without_tables_is_refused():
    model = MODELS["rope"]
    state = dataclasses.replace(pooled(model, tables([[0]])), tables=None)
    with pytest.raises(ValueError, match="needs tables"):
        sj.step(model, state, jnp.ones((ROWS, 8), jnp.int32))
