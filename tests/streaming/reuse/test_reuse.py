"""Edits in the middle of a stream, and chunks that are joined: exact where they are, and what they leave as it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from tests.streaming.tiny_models import GQA, LOCAL, build, random_tokens, read_stream

ROOM = 48
OTHER_EDITS = ((10, 14, 4), (10, 16, 0), (7, 7, 3), (0, 2, 1))


@pytest.fixture(scope="module")
def one_layer():
    """Keys and values depend on a token alone: every reuse of them is exact."""
    return build(GQA.replace(num_layers=1))


@pytest.fixture(scope="module")
def model():
    return build(GQA)


def dense(model, tokens, position=0):
    state = sj.init_state(model, sj.kv.preset("dense", capacity=ROOM), len(tokens), position=position)
    return sj.read(model, state, tokens, 16)


def assert_alike(model, mine, theirs, atol=1e-5):
    """What is cached, where the streams stand, and how they go on."""
    np.testing.assert_array_equal(mine.position, theirs.position)
    np.testing.assert_array_equal(mine.seen, theirs.seen)
    assert jax.tree.map(np.shape, mine) == jax.tree.map(np.shape, theirs)
    for own, other in zip(mine.layers, theirs.layers, strict=True):
        np.testing.assert_array_equal(own[0].position, other[0].position)
        np.testing.assert_allclose(own[0].k, other[0].k, atol=atol)
        np.testing.assert_allclose(own[0].v, other[0].v, atol=atol)


@pytest.mark.parametrize(
    ("start", "stop", "count"),
    [(10, 12, 5), *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHER_EDITS)],
)
def test_an_edit_of_one_layer_is_reading_the_other_text(one_layer, start, stop, count):
    """Replaced, longer, shorter, inserted and at the beginning; two rows, across the wrap of positions."""
    tokens, new = random_tokens(2, 30), random_tokens(2, count, seed=3)
    state = dense(one_layer, tokens, 2**32 - 12)
    edited = sj.edit(one_layer, state, start, stop, new)
    whole = np.concatenate((tokens[:, :start], new, tokens[:, stop:]), axis=1)
    assert_alike(one_layer, edited, dense(one_layer, whole, 2**32 - 12))


def test_an_edit_computes_what_is_new_and_turns_what_is_behind(model):
    """New tokens are those of the other text to the last layer; values behind are those of before, keys moved."""
    tokens, new = random_tokens(1, 30), random_tokens(1, 5, seed=3)
    state = dense(model, tokens)
    edited = sj.edit(model, state, 10, 12, new)
    whole = np.concatenate((tokens[:, :10], new, tokens[:, 12:]), axis=1)
    exact = dense(model, whole)
    for mine, theirs, before in zip(edited.layers, exact.layers, state.layers, strict=True):
        np.testing.assert_allclose(mine[0].k[:, :, :15], theirs[0].k[:, :, :15], atol=1e-5)
        np.testing.assert_array_equal(mine[0].v[:, :, 15:33], before[0].v[:, :, 12:30])
    with_end = sj.edit(model, state, 20, 30, new)
    whole = np.concatenate((tokens[:, :20], new), axis=1)
    assert_alike(model, with_end, dense(model, whole))
    np.testing.assert_allclose(with_end.hidden, dense(model, whole).hidden, atol=1e-5)
    more = random_tokens(1, 6, seed=5)
    (_, mine), (_, theirs) = (read_stream(model, s, more, [3]) for s in (with_end, dense(model, whole)))
    np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_joined_chunks_of_one_layer_are_one_text(one_layer):
    prefix, parts = random_tokens(2, 3, seed=9), [random_tokens(2, 13, seed=n) for n in range(3)]
    chunks = [sj.encode_chunk(one_layer, part, prefix) for part in parts]
    joined = sj.join(one_layer, chunks, capacity=ROOM)
    assert_alike(one_layer, joined, dense(one_layer, np.concatenate((prefix, *parts), axis=1)))


def test_chunks_that_are_read_again_see_those_in_front(model):
    """All of them: the state of the whole text. Some: those whose values change most, and the others stay."""
    prefix, parts = random_tokens(1, 3, seed=9), [random_tokens(1, n, seed=n) for n in (9, 6, 9)]
    chunks = [sj.encode_chunk(model, part, prefix) for part in parts]
    exact = dense(model, np.concatenate((prefix, *parts), axis=1))
    again = sj.join(model, chunks, recompute=1.0, capacity=ROOM)
    assert_alike(model, again, exact)
    np.testing.assert_allclose(again.hidden, exact.hidden, atol=1e-5)
    apart, some = (np.asarray(sj.join(model, chunks, recompute=r).layers[1][0].v) for r in (0.0, 0.3))
    changed = (apart != some).any(axis=(0, 1, 3))
    assert changed.sum() == 2 + 3
    whole = np.asarray(exact.layers[1][0].v)[:, :, : apart.shape[2]]
    difference = np.square(whole - apart).sum(axis=(0, 1, 3))
    for first, last, count in ((12, 18, 2), (18, 27, 3)):
        assert set(np.flatnonzero(changed[first:last])) == set(np.argsort(-difference[first:last])[:count])


@pytest.mark.slow
def test_one_chunk_side_by_side_with_nothing_is_a_stream(model):
    """Its attention as it is; a second chunk, a temperature and a scale change what comes."""
    prefix, part, question = (random_tokens(1, n, seed=n) for n in (3, 9, 6))
    chunk, other = (sj.encode_chunk(model, ids, prefix) for ids in (part, random_tokens(1, 9, seed=30)))
    exact = dense(model, np.concatenate((prefix, part), axis=1))
    plain = sj.side_by_side(model, [chunk], room=20, temperature=1.0, scale=1.0)
    np.testing.assert_array_equal(plain.position, exact.position)
    assert plain.capacity == 3 + 9 + 20
    (_, mine), (_, theirs) = (read_stream(model, state, question, [6]) for state in (plain, exact))
    np.testing.assert_allclose(mine, theirs, atol=1e-4)
    _, both = read_stream(model, sj.side_by_side(model, [chunk, other], room=20), question, [6])
    _, turned = read_stream(model, sj.side_by_side(model, [other, chunk], room=20), question, [6])
    np.testing.assert_allclose(both, turned, atol=1e-4)
    assert np.abs(both - theirs).max() > 1e-2


def test_side_by_side_against_plain_numbers():
    """Two softmaxes, of what stands side by side and of the rest, merged by weighted logarithms (APE's code)."""
    draw, temperature, scale = np.random.default_rng(0), 0.8, 0.7
    k, v, q = draw.normal(size=(9, 6)), draw.normal(size=(9, 6)), draw.normal(size=(1, 6))
    tier, spec = sj.kv.Parallel(6, temperature, scale), sj.kv.KVSpec(1, 1, 6, np.dtype(np.float32))

    def tokens(part):
        some = [jnp.asarray(x[part][None, None], jnp.float32) for x in (k, v, k)]
        place = np.arange(some[0].shape[2], dtype=np.uint32)[None, None]
        return sj.kv.KVTokens(*some, jnp.asarray(place), jnp.asarray(np.ones(place.shape, bool)))

    cascade = sj.kv.Cascade(tier, sj.kv.Full(8))
    full = jax.jit(cascade.tiers[1].store)(cascade.tiers[1].init(spec), tokens(slice(6, 8)))
    raw = jnp.asarray(q[None, :, None], jnp.float32)
    one = sj.kv.Query(raw, raw, jnp.full((1, 1), 20, jnp.uint32), jnp.full((1,), 8), None, None, 0.5, None)
    own = dataclasses.replace(tokens(slice(8, 9)), position=jnp.full((1, 1, 1), 20, jnp.uint32))
    out, (after, _) = jax.jit(cascade.update)(
        (jax.jit(lambda x: tier.given(spec, x))(tokens(slice(0, 6))), full), one, own
    )
    logits, parts = 0.5 * k @ q[0], []
    for part, sharp, weight in ((slice(0, 6), temperature, temperature * scale), (slice(6, 9), 1.0, 1.0)):
        mine = np.exp(logits[part] / sharp)
        parts.append((mine @ v[part] / mine.sum(), weight * np.log(mine.sum())))
    share = np.exp([lse for _, lse in parts]) / np.exp([lse for _, lse in parts]).sum()
    np.testing.assert_allclose(out[0, 0, 0], share @ np.array([found for found, _ in parts]), atol=1e-5)
    assert int(after.filled[0]) == 6


@pytest.mark.quick
def test_what_cannot_be_reused_is_refused(model):
    state = dense(model, random_tokens(1, 8))
    chunk = sj.encode_chunk(model, [[1, 2, 3]])
    other = sj.encode_chunk(model, [[1, 2]], [[7]])
    local = build(LOCAL)
    windowed = sj.init_state(model, sj.kv.preset("window", window=4))
    for act, message in (
        (lambda: sj.edit(model, windowed, 0, 0, [[1]]), "needs every token in every layer"),
        (lambda: sj.edit(model, state, 5, 9, [[1]]), "from 5 to 9 is not within the 8 tokens"),
        (lambda: sj.edit(model, state, 2, 3, [[1], [2]]), "needs 1 rows of one length"),
        (lambda: sj.edit(model, state, 2, 3, [[1000]]), "token id 1000"),
        (lambda: sj.edit(model, state, 2, 2, [[1] * 41]), "there would be 49 tokens, and the cache ends after 48"),
        (lambda: sj.join(model, []), "must be at least one chunk"),
        (lambda: sj.join(model, [chunk, other]), "behind different prefixes"),
        (lambda: sj.side_by_side(model, [chunk, other]), "behind different prefixes"),
        (lambda: sj.side_by_side(model, [chunk], temperature=0.0), "Parallel.temperature is 0.0"),
        (lambda: sj.side_by_side(model, [chunk], room=0), "room is 0"),
        (lambda: sj.join(model, [chunk], recompute=1.5), "recompute is 1.5: it must be from 0 to 1"),
        (lambda: sj.encode_chunk(model, [[]]), "at least one token of the chunk"),
        (lambda: sj.encode_chunk(local, [[1, 2]]), "needs (every token|full attention) in every layer"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            act()
        assert "\n" not in str(error.value)
