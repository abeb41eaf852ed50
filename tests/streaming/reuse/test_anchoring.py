"""Chunks behind a text that they were not read behind: against plain numbers, and against reading them there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from tests.oracles.rotation import Turning
from tests.streaming.reuse.test_reuse import ROOM, assert_alike, dense
from tests.streaming.tiny_models import GQA, build, random_tokens, read_stream

FRONT, LENGTH = 7, 9
PREFIX = random_tokens(1, 2, seed=51)


class Rope(Turning):
    frequencies = tuple(GQA.rope.theta ** (-np.arange(3) / 3))


@pytest.fixture(scope="module")
def model():
    return build(GQA)


def text(seed, length=LENGTH):
    return random_tokens(1, length, seed=seed)


def numbers(state, first, count):
    """Of each layer keys, turned back, and values, [T, K, D], of some tokens of a dense stream."""
    found = []
    for (held,) in state.layers:
        k, v = (np.swapaxes(np.asarray(x, np.float64)[0, :, first : first + count], 0, 1) for x in (held.k, held.v))
        place = np.asarray(held.position)[0, 0, first : first + count].astype(int)
        turned = [[Rope().turned(key, -at) for key in keys] for keys, at in zip(k, place, strict=True)]
        found.append((np.array(turned), v))
    return found


def test_a_chunk_is_placed_by_what_the_text_did_to_anchors(model):
    """Two chunks are read, of different lengths; what the third becomes is by their tokens at each place."""
    front = text(50, FRONT)
    pool = sj.AnchorPool(model, dense(model, front), threshold=1.0, temperature=0.3)
    chunks = [sj.encode_chunk(model, text(n, length), PREFIX) for n, length in ((1, LENGTH + 2), (2, LENGTH))]
    exact = [dense(model, np.concatenate((front, chunk.tokens), axis=1)) for chunk in chunks]
    for chunk, there in zip(chunks, exact, strict=True):
        assert_alike(model, pool.place(chunk, capacity=ROOM), there)
    third = sj.encode_chunk(model, text(3), PREFIX)
    placed = pool.place(third, capacity=ROOM)
    assert (pool.placed, pool.read, len(pool.anchors)) == (3, 2, 2)
    alone = [numbers(chunk.state, 2, LENGTH) for chunk in chunks]
    added = [
        [
            tuple(x - y for x, y in zip(*pair, strict=True))
            for pair in zip(numbers(there, FRONT, LENGTH), own, strict=True)
        ]
        for there, own in zip(exact, alone, strict=True)
    ]
    mine, found = numbers(third.state, 2, LENGTH), numbers(placed, FRONT, LENGTH)
    for part in range(2):
        far = [
            np.mean([np.abs(x[part] - y[part]).mean(axis=(1, 2)) for x, y in zip(mine, own, strict=True)], axis=0)
            for own in alone
        ]
        weights = np.exp(-np.array(far) / 0.3)
        weights /= weights.sum(axis=0)
        for layer in range(len(mine)):
            more = sum(w[:, None, None] * one[layer][part] for w, one in zip(weights, added, strict=True))
            np.testing.assert_allclose(found[layer][part], mine[layer][part] + more, atol=1e-5)
            assert layer == 0 or np.abs(more).max() > 1e-2
    np.testing.assert_array_equal(placed.position, exact[1].position)
    np.testing.assert_allclose(placed.layers[1][0].k[:, :, :FRONT], exact[0].layers[1][0].k[:, :, :FRONT], atol=1e-5)


@pytest.mark.slow
def test_a_chunk_that_is_an_anchor_is_what_reading_gives(model):
    """At a temperature near 0; the stream goes on as one that has read it all."""
    front, chunk = text(50, FRONT), text(1)
    pool = sj.AnchorPool(model, dense(model, front), threshold=0.9, temperature=1e-3)
    for n in (1, 2):
        pool.place(sj.encode_chunk(model, text(n)))
    placed = pool.place(sj.encode_chunk(model, chunk), capacity=ROOM)
    assert (pool.placed, pool.read) == (3, 2)
    exact = dense(model, np.concatenate((front, chunk), axis=1))
    assert_alike(model, placed, exact, atol=1e-4)
    (_, mine), (_, theirs) = (read_stream(model, state, text(9, 6), [6]) for state in (placed, exact))
    np.testing.assert_allclose(mine, theirs, atol=1e-3)


def test_what_is_like_no_anchor_is_read_and_the_least_used_makes_room(model):
    pool = sj.AnchorPool(model, dense(model, text(50, FRONT)), most=2, threshold=0.0)
    for n in (1, 2, 3):
        pool.place(sj.encode_chunk(model, text(n), PREFIX), capacity=ROOM)
    assert (pool.placed, pool.read, len(pool.anchors)) == (3, 3, 2)
    pool.place(sj.encode_chunk(model, text(4, LENGTH + 2), PREFIX), capacity=ROOM)  # longer than all anchors
    assert pool.read == 4
    assert [anchor.alone.length for anchor in pool.anchors] == [LENGTH, LENGTH + 2]


@pytest.mark.quick
def test_what_has_no_place_is_refused(model):
    front = dense(model, text(50, FRONT))
    pool, chunk = sj.AnchorPool(model, front), sj.encode_chunk(model, text(1), PREFIX)
    several = sj.init_state(model, sj.kv.preset("dense", capacity=ROOM), 2)
    rows = jax.tree.map(lambda x: jnp.asarray(np.repeat(x, 2, axis=0)), chunk.state)
    rows = sj.streaming.reuse.EncodedChunk(*(np.repeat(ids, 2, axis=0) for ids in (chunk.tokens, chunk.prefix)), rows)
    for act, message in (
        (lambda: sj.AnchorPool(model, several), "behind one stream, and there are 2"),
        (lambda: sj.AnchorPool(model, front, threshold=1.5), "threshold is 1.5: it must be a number from 0 to 1"),
        (lambda: sj.AnchorPool(model, sj.init_state(model, sj.kv.preset("window", window=4))), "every token in every"),
        (lambda: pool.place(rows), "this one has 2 rows"),
        (lambda: pool.place(chunk, capacity=4), "and the cache ends after 4"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            act()
        assert "\n" not in str(error.value)
