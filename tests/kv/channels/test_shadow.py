"""Pages of keys of low rank, landmarks and outliers, against the rule in loops, however a stream is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from tests.covering import rest_slow
from tests.kv.tier_streams import FREQUENCIES, SCALE, Stream, plain_attention, run
from tests.oracles.channels import Shadow

LENGTH = 61
STREAM = Stream.drawn(2, LENGTH)
CACHE = sj.kv.Cascade(sj.kv.Window(5), sj.kv.Shadow(64, keys=0.5, group=8, page=4, top_k=3, outliers=2))
RULE = Shadow(5, 8, 4, 3, 2, 6, SCALE, FREQUENCIES)


def test_every_token_reads_what_the_rule_says():
    out, _ = run(CACHE, STREAM, [1], width=1, frequencies=FREQUENCIES)
    for row in range(2):
        for i in (3, 12, 13, 30, 45, LENGTH - 1):
            expected = RULE.read(i, STREAM.q[row], STREAM.k[row], STREAM.v[row])
            np.testing.assert_allclose(out[row, i], expected, atol=3e-5, err_msg=str(i))


def test_the_cut_of_a_stream_changes_nothing_that_is_stored():
    _, one = run(CACHE, STREAM, [1], width=1, frequencies=FREQUENCIES)
    out, other = run(CACHE, STREAM, [(3, 12), (12, 1)], width=12, frequencies=FREQUENCIES)
    assert np.isfinite(out).all()
    for name in ("page", "likeness", "k"):
        a, b = (getattr(state[1].outliers, name) for state in (one, other))
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(one[1].landmarks, other[1].landmarks, atol=1e-5)
    for a, b in ((one[1].slots.k, other[1].slots.k), (one[1].slots.v, other[1].slots.v)):
        np.testing.assert_allclose(a.dense(), b.dense(), atol=2e-5)


def test_a_chunk_reads_the_pages_that_its_tokens_read_alone():
    """Of a state that is the same, a chunk whose tokens came with it sees the same pages as one token does."""
    _, state = run(CACHE, STREAM, [12], width=12, frequencies=FREQUENCIES)
    tier, q = CACHE.tiers[1], np.random.default_rng(5).normal(size=(2, 3, 4, 6)).astype(np.float32)
    position = np.broadcast_to(np.arange(61, 64, dtype=np.uint32), (2, 3))

    @jax.jit
    def ask(state, q, position):
        return tier.attend(state, sj.kv.Query(q, q, position, jnp.full((2,), 61), None, None, SCALE, None), None)

    together = ask(state[1], q, position)
    for i in range(3):
        alone = ask(state[1], q[:, i : i + 1], position[:, i : i + 1])
        np.testing.assert_allclose(together.out[:, i], alone.out[:, 0], atol=1e-5)
        np.testing.assert_allclose(together.lse[:, i], alone.lse[:, 0], atol=1e-5)


def test_neighbours_read_the_pages_that_one_of_them_wants_most():
    _, state = run(CACHE, STREAM, [12], width=12, frequencies=FREQUENCIES)
    tier = sj.kv.Shadow(64, keys=0.5, group=8, page=4, top_k=3, outliers=2, block=2)
    q = np.random.default_rng(6).normal(size=(2, 3, 4, 6)).astype(np.float32)
    asks = np.array([[1, 1, 1], [1, 0, 1]], bool)
    position = jnp.broadcast_to(jnp.arange(61, 64, dtype=jnp.uint32), (2, 3))
    ask = jnp.asarray(q)
    query = sj.kv.Query(ask, ask, position, jnp.full((2,), 61), None, None, SCALE, None, valid=jnp.asarray(asks))
    found = jax.jit(lambda state: tier.attend(state, query, None))(state[1])
    stored, marks, apart = tier.stored(state[1], None), np.asarray(state[1].landmarks), state[1].outliers
    filled, coded = (np.asarray(x) for x in (state[1].slots.filled, state[1].slots.filled - state[1].slots.k.count))
    for row, head, i in np.ndindex(2, 2, 3):
        if not asks[row, i]:
            continue
        keys, values = np.array(stored.k[row, head]), np.asarray(stored.v[row, head])
        whole = set(np.asarray(apart.page[row, head]).tolist())
        for page, own in zip(apart.page[row, head], apart.k[row, head], strict=True):
            keys[page * 4 : page * 4 + 4] = own
        free = [p for p in range(coded[row] // 4) if p not in whole]
        wants = np.full(len(free), -np.inf)
        for j in (j for j in range(3) if j // 2 == i // 2 and asks[row, j]):
            for one in q[row, j, 2 * head : 2 * head + 2]:
                logits = np.exp(marks[row, head, free] @ one * SCALE)
                wants = np.maximum(wants, logits / logits.sum())
        read = whole | {free[p] for p in np.argsort(-wants)[:3]}
        mine = [t for t in range(filled[row]) if t >= coded[row] or t // 4 in read]
        for g in range(2 * head, 2 * head + 2):
            weights = np.exp(keys[mine] @ q[row, i, g] * SCALE)
            np.testing.assert_allclose(found.out[row, i, g], weights @ values[mine] / weights.sum(), atol=2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": 0.5}, "Shadow.values is 0.5: it must be 1"),
        ({"group": 20}, "Shadow.group must be several pages of 8, got 20"),
        ({"top_k": 0}, "Shadow.top_k is 0"),
        ({"block": 0}, "Shadow.block is 0"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sj.kv.Shadow(64, **options)


@pytest.mark.parametrize("width", rest_slow([12, 1], 1))
def test_with_all_directions_and_pages_it_is_dense(width):
    every = sj.kv.Cascade(sj.kv.Window(5), sj.kv.Shadow(64, keys=1, group=16, page=4, top_k=100, outliers=3))
    out, _ = run(every, STREAM, [width], width=width, frequencies=FREQUENCIES)
    np.testing.assert_allclose(out, plain_attention(STREAM, frequencies=FREQUENCIES), atol=2e-5)
